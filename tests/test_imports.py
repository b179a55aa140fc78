"""Imports go one way: a module imports only from its own package and from earlier packages in ORDER."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mmgraph"
ORDER = (
    ("errors",), ("utils",), ("flags",), ("config",), ("arguments",), ("distributed",), ("data",), ("loader", "towers"),
    ("models", "losses"), ("checkpoints",), ("inference",), ("evaluation",), ("report",), ("training",), ("demo",),
    ("bench",), ("cli",),
)  # fmt: skip
LEVEL = {package: level for level, packages in enumerate(ORDER) for package in packages}
UNCHECKED = {"__init__", "__main__"}  # these may import from every package


def imported_packages(path: Path) -> Iterator[str]:
    """Yield the packages of mmgraph that a file imports from, at module level or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "mmgraph":
            names = [f"mmgraph.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name.split(".")[1] for name in names if name.startswith("mmgraph."))


def test_a_module_imports_only_from_earlier_rooms() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        package = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if package in UNCHECKED:
            continue
        others = [other for other in imported_packages(path) if other != package and LEVEL[other] >= LEVEL[package]]
        wrong += [f"{path.relative_to(PACKAGE)} imports from {other}" for other in others]
    assert not wrong, "\n".join(wrong)


def test_every_room_is_in_the_order() -> None:
    packages = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert packages == {*LEVEL, *UNCHECKED}
