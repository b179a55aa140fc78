"""Imports run one way: a module imports only from its own room, and from those before it."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mmgraph"
ORDER = (
    ("errors",), ("utils",), ("config",), ("arguments",), ("distributed",), ("data",), ("loader", "towers"),
    ("models", "losses"), ("checkpoints",), ("inference",), ("evaluation",), ("report",), ("training",), ("demo",),
    ("bench",), ("cli",),
)  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
FREE = {"__init__", "__main__"}  # the package's own names and its command line


def imported(path: Path) -> Iterator[str]:
    """Rooms of mmgraph that a file imports from, at its top or inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "mmgraph":
            names = [f"mmgraph.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name.split(".")[1] for name in names if name.startswith("mmgraph."))


def test_a_module_imports_only_from_rooms_before_it() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room in FREE:
            continue
        others = [other for other in imported(path) if other != room and FLOOR[other] >= FLOOR[room]]
        wrong += [f"{path.relative_to(PACKAGE)} imports from {other}" for other in others]
    assert not wrong, "\n".join(wrong)


def test_a_room_is_known() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found == {*FLOOR, *FREE}
