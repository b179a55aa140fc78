"""The rules by which columns become texts and pixels: texts, cache keys, the checks of columns, and messages."""

import dataclasses
import hashlib
import json
import re
import tempfile
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import graph_files, line_with, lines_with, settings

from mmgraph.arguments import parse_config
from mmgraph.cli import train_main
from mmgraph.config import Config
from mmgraph.data.batches import open_image_cache
from mmgraph.data.content_hashes import read_content_hashes
from mmgraph.data.graph import load_graph
from mmgraph.data.image_cache import file_name
from mmgraph.data.images import IMAGE_STATUS, image_remarks
from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.node_table import NodeTable
from mmgraph.data.preprocessing import Preprocessing
from mmgraph.data.text_check import check_texts
from mmgraph.distributed.launch import build_accelerator
from mmgraph.errors import UserError
from mmgraph.inference.feature_shards import SHARD_NODES, FeatureShards
from mmgraph.towers.clip import load_tokenizer_and_processor
from mmgraph.towers.store_plan import recipe

# Each rule with another value than its default.
IMAGE_RULES = {"truncated_images": "black", "background": "white", "sixteen_bit_images": "scale"}
ALL_RULES = {**IMAGE_RULES, "text_columns": "short_name,summary"}


@pytest.mark.parametrize(
    ("columns", "node", "text"),
    [
        ("short_name,summary", {"short_name": "a name", "summary": "two words"}, "a name two words"),
        ("summary,short_name", {"short_name": "a name", "summary": "two words"}, "two words a name"),
        (" short_name , summary ", {"short_name": "a", "summary": "b"}, "a b"),
        ("short_name,summary", {"short_name": " a\n", "summary": "  "}, "a"),
        ("short_name,summary", {"short_name": None, "summary": "b"}, "b"),
        ("short_name,summary", {"short_name": float("nan"), "summary": pd.NA}, " "),
        ("short_name,summary", {}, " "),
        ("title,year,price,new", {"title": "a", "year": 1984, "price": 2.5, "new": True}, "a 1984 2.5 True"),
        ("year", {"year": np.int32(7), "title": "not used"}, "7"),
        ("price,new", {"price": Decimal("2.50"), "new": np.bool_(False)}, "2.50 False"),
        ("price", {"price": Decimal("NaN")}, " "),
        ("year", {"year": np.float32("nan")}, " "),
        (
            "summary",
            {"summary": "日本語の文章には空白がありません", "short_name": "x"},
            "日本語の文章には空白がありません",
        ),
    ],
)
def test_text_columns_are_joined(columns: str, node: dict[str, Any], text: str) -> None:
    assert InputRules(text_columns=columns).text(node) == text


def test_another_type_of_text_is_an_error() -> None:
    for value in (["a"], {"a": 1}, b"a", 1j):
        with pytest.raises(UserError, match=rf"^tags is a {type(value).__name__}\b[^\n]*$"):
            InputRules(text_columns="title,tags").text({"title": "a", "tags": value})


@pytest.mark.parametrize("columns", ["", ",", "a,", "a,,b", "a,b,a", "a, a"])
def test_empty_and_repeated_columns_are_refused(columns: str) -> None:
    for make in (lambda: InputRules(text_columns=columns), lambda: Config(text_columns=columns)):
        with pytest.raises(UserError, match=rf"^--text_columns {re.escape(columns)}: [^\n]*$"):
            make()


@pytest.mark.parametrize(
    "background", ["red", "", "1,2", "1,2,3,4", "256,0,0", "-1,0,0", "1.5,0,0", "#ffffff", "WHITE", "0,0,x", "²,0,0"]
)
def test_wrong_backgrounds_are_refused(background: str) -> None:
    for make in (lambda: InputRules(background=background), lambda: Config(background=background)):
        with pytest.raises(UserError, match=rf"^--background {re.escape(background)}: [^\n]*\bwhite\b[^\n]*R,G,B\b"):
            make()


def test_other_values_of_rules_are_refused() -> None:
    for name, values in (("truncated_images", "partial or black"), ("sixteen_bit_images", "clip or scale")):
        with pytest.raises(UserError, match=rf"^{name} 'yes': must be {values}$"):
            InputRules(**{name: "yes"})


def test_rules_of_a_run_are_its_flags() -> None:
    rules = InputRules.of(parse_config([f"--{name}={value}" for name, value in ALL_RULES.items()]))
    assert dataclasses.asdict(rules) == ALL_RULES
    assert dataclasses.asdict(InputRules.of(Config())) == dataclasses.asdict(InputRules()) == {
        "truncated_images": "partial", "background": "keep", "sixteen_bit_images": "clip", "text_columns": None,
    }  # fmt: skip


def test_the_default_keys_have_no_later_rule() -> None:
    """Caches that older versions wrote have exactly this key."""
    assert InputRules().image_key() == InputRules().key() == {"truncated_images": "partial"}
    changed = {name: InputRules(**{name: value}) for name, value in ALL_RULES.items()}
    for name, value in {**IMAGE_RULES, "background": "255,255,255"}.items():
        expected = {"truncated_images": "partial", name: value}
        assert changed[name].image_key() == changed[name].key() == expected
    assert changed["text_columns"].image_key() == {"truncated_images": "partial"}
    assert changed["text_columns"].key() == {"truncated_images": "partial", "text_columns": "short_name,summary"}
    # The spelling of a color or of a list of columns changes nothing.
    assert InputRules(background="255, 255,255").image_key() == changed["background"].image_key()
    assert InputRules(text_columns=" short_name, summary").key() == changed["text_columns"].key()


class Caches:
    """The names of all caches of a graph under some rules."""

    def __init__(self, graph: Path):
        self.graph = graph
        self.config = parse_config(settings(graph, graph / "run"))
        self.data = load_graph(self.config)
        self.tokenizer, self.processor = load_tokenizer_and_processor(self.config.model_name)

    def names(self, **changed: Any) -> dict[str, str]:
        config = dataclasses.replace(self.config, **changed)
        rules, data, folder = InputRules.of(config), self.data, Path(tempfile.mkdtemp(dir=self.graph))
        inputs = NodeInputs(self.tokenizer, self.processor, 0, rules)
        read_content_hashes(
            data.nodes, data.images, config.nodes, data.nodes_fingerprint, rules, folder, build_accelerator()
        )
        [texts] = folder.glob("texts-*.npy")
        cache = open_image_cache(config, data, Preprocessing(self.processor), folder)
        assert cache is not None
        inference = SimpleNamespace(
            nodes_fingerprint=data.nodes_fingerprint, checkpoint_fingerprint="c", outputs=SimpleNamespace(inputs=inputs)
        )
        return {
            "store": recipe(config, "no", inputs, "towers").folder.name,
            "images": cache.path.name,
            "features": FeatureShards(inference, folder, ("fused",)).folder.name,  # type: ignore[arg-type]
            "texts": texts.name,
        }


@pytest.fixture(scope="module")
def caches(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Caches:
    folder = graph_files(tmp_path_factory.mktemp("rules") / "graph", nodes=12, edges=30)
    (folder / "towers").symlink_to(graph / "towers")
    return Caches(folder)


@pytest.mark.parametrize(
    ("changed", "renamed"),
    [
        *(({name: value}, ["features", "images", "store"]) for name, value in IMAGE_RULES.items()),
        ({"background": "1,2,3"}, ["features", "images", "store"]),
        ({"text_columns": "short_name,summary"}, ["features", "texts"]),
        ({"text_columns": "short_name"}, ["features", "texts"]),
    ],
    ids=str,
)
def test_a_changed_rule_changes_the_names_of_its_caches(
    changed: dict[str, str], renamed: list[str], caches: Caches
) -> None:
    default, names = caches.names(), caches.names(**changed)
    assert sorted(name for name in names if names[name] != default[name]) == renamed


def test_different_rules_have_different_caches(caches: Caches) -> None:
    columns = ("short_name", "summary", "short_name,summary", "summary,short_name")
    by_texts = [caches.names(text_columns=names) for names in columns]
    by_images = [caches.names(background=color) for color in ("white", "1,2,3", "3,2,1")]
    assert len({names["texts"] for names in by_texts}) == 4
    assert len({names["features"] for names in by_texts + by_images}) == 7
    assert len({names["store"] for names in by_images}) == len({names["images"] for names in by_images}) == 3


def test_default_names_are_those_of_older_versions(caches: Caches) -> None:
    """The keys are written down here as the version before these rules computed them."""
    names, data = caches.names(), caches.data
    assert names["texts"] == f"texts-{data.nodes_fingerprint[:16]}.npy"
    key = json.dumps([data.nodes_fingerprint, "c", "partial", ["fused"], SHARD_NODES]).encode()
    assert names["features"] == f".blocks-{hashlib.sha256(key).hexdigest()[:16]}"
    sizes = Preprocessing(caches.processor)
    assert names["images"] == file_name(
        nodes=data.nodes_fingerprint,
        slots=["rows"],
        preprocessing=[sizes.short_side, sizes.crop],
        truncated_images="partial",
    )
    inputs = NodeInputs(caches.tokenizer, caches.processor, 0)
    assert list(recipe(caches.config, "no", inputs, "towers").description) == [
        "format", "towers", "text", "vision", "tokenizer", "text_length", "preprocessing", "truncated_images", "dtype",
    ]  # fmt: skip


def test_content_hashes_are_those_of_the_joined_texts(caches: Caches) -> None:
    data = caches.data
    table = pd.read_csv(caches.graph / "nodes.csv", dtype=str, keep_default_na=False)
    for columns, texts in (
        (None, [s if len(s.split()) > 3 else n for n, s in zip(table["short_name"], table["summary"], strict=True)]),
        ("summary,short_name", [*(table["summary"] + " " + table["short_name"])]),
    ):
        for _ in range(2):  # the second time, the hashes come from the file
            hashes = read_content_hashes(
                data.nodes, data.images, caches.config.nodes, data.nodes_fingerprint, InputRules(text_columns=columns),
                caches.graph / "hashes", build_accelerator(),
            )  # fmt: skip
            expected = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
            assert hashes.texts.view(np.uint8).tobytes() == b"".join(expected)


@pytest.fixture
def own_graph(graph: Path, tmp_path: Path) -> Path:
    """A small graph that a test may change."""
    folder = graph_files(tmp_path / "graph", nodes=12, edges=30)
    (folder / "towers").symlink_to(graph / "towers")
    return folder


def test_a_run_trains_on_the_joined_texts(own_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With live towers and with a store, the tokenizer gets the joined texts."""
    table = pd.read_csv(own_graph / "nodes.csv", dtype=str, keep_default_na=False)
    expected = set(table["short_name"] + " " + table["summary"])
    seen: set[str] = set()
    tokenize = NodeInputs.tokenize
    monkeypatch.setattr(
        NodeInputs, "tokenize", lambda self, texts, *more: seen.update(texts) or tokenize(self, texts, *more)
    )
    for name, tower_cache in (("live", "off"), ("stored", str(tmp_path / "stores"))):
        seen.clear()
        more = ("--text_columns=short_name,summary", f"--tower_cache={tower_cache}", "--max_steps=4")
        assert train_main(settings(own_graph, tmp_path / name, *more)) == 0
        assert seen == expected, name


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error, which must be the only line on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("mmgraph: error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("flag", "facts"),
    [
        ("--text_columns=short_name,sumary", ["--text_columns", "'sumary'", "short_name", "summary"]),
        ("--text_columns=tags", ["--text_columns", "'tags'", "list<"]),
        ("--text_columns=a,a", ["--text_columns a,a"]),
        ("--background=red", ["--background red", "white"]),
        ("--background=1,2", ["--background 1,2", "white"]),
        ("--background=256,0,0", ["--background 256,0,0", "255"]),
        ("--sixteen_bit_images=drop", ["--sixteen_bit_images", "'drop'", "'clip'", "'scale'"]),
    ],
)
def test_wrong_rules_are_one_line_and_exit_code_2(
    flag: str, facts: list[str], own_graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pa.Table.from_pandas(pd.read_csv(own_graph / "nodes.csv", dtype=str), preserve_index=False)
    table = table.append_column("tags", pa.array([["a", "b"]] * len(table)))
    table = table.append_column("year", pa.array(range(1980, 1980 + len(table))))
    pq.write_table(table, own_graph / "nodes.parquet")
    flags = [*settings(own_graph, tmp_path / "run", "--check"), f"--nodes={own_graph / 'nodes.parquet'}"]
    assert train_main([*flags, flag]) == 2
    error = one_error(capsys)
    positions = [error.find(fact) for fact in facts]
    assert -1 not in positions and positions == sorted(positions), error
    assert not (tmp_path / "run").exists()
    assert train_main([*flags, "--text_columns=short_name,year"]) == 0  # a column of numbers is accepted


def node_table(folder: Path, summaries: list[str | None]) -> NodeTable:
    columns = {name: pa.array([f"{name} {i}" for i in range(len(summaries))]) for name in ("node_id", "short_name")}
    table = pa.table({**columns, "summary": pa.array(summaries, pa.string())})
    with pa.OSFile(str(folder / "nodes.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return NodeTable(folder / "nodes.arrow")


JAPANESE = "この商品は日本で作られた木製の椅子です。軽くて丈夫です。"
ENGLISH = "A light and robust chair of wood, made in Japan."
LATE = 10_050  # the check reads a sample of 10,000 nodes


@pytest.mark.parametrize(
    ("summaries", "warned"),
    [
        pytest.param([JAPANESE] * 30, (30, 30), id="Japanese"),
        pytest.param([JAPANESE] * 5 + [ENGLISH] * 400 + [None, ""], (5, 407), id="some Japanese"),
        pytest.param([JAPANESE] * 3 + [ENGLISH] * 397, None, id="less than 1 %"),
        pytest.param([ENGLISH] * 30, None, id="English"),
        pytest.param(["A chair", "日本", "", None, "three short words"], None, id="short"),
        pytest.param(["Pneumonoultramicroscopic silicovolcanoconiosis"], (1, 1), id="two long words"),
        pytest.param([JAPANESE] * LATE, (10_000, 10_000), id="more than the sample"),
    ],
)
def test_warning_of_long_summaries_that_are_not_used(
    summaries: list[str | None], warned: tuple[int, int] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = node_table(tmp_path, summaries)
    check_texts(nodes, InputRules(), "nodes.csv")
    out = capsys.readouterr().out
    if warned is None:
        assert out == ""
    else:
        unused, checked = (f"{count:,}" for count in warned)
        line = line_with(out, "warning:", "nodes.csv", unused, "of", checked, "--text_columns", "short_name,summary")
        assert out == line + "\n" and next(s for s in summaries if s)[:20] in line
    check_texts(nodes, InputRules(text_columns="short_name,summary"), "nodes.csv")
    assert capsys.readouterr().out == ""


def test_a_run_warns_of_unused_summaries(own_graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.read_csv(own_graph / "nodes.csv", dtype=str, keep_default_na=False)
    table["summary"] = [JAPANESE] * 4 + [ENGLISH] * 8
    table.to_csv(own_graph / "nodes.csv", index=False)
    flags = settings(own_graph, tmp_path / "run", "--check")
    assert train_main(flags) == 0
    assert line_with(capsys.readouterr().out, "warning:", own_graph / "nodes.csv", 4, "of", 12, "--text_columns")
    assert train_main([*flags, "--text_columns=short_name,summary"]) == 0
    assert not lines_with(capsys.readouterr().out, "warning:")


@pytest.mark.parametrize(
    ("counts", "rules", "expected"),  # expected: facts of each line
    [
        ({}, {}, []),
        ({"file not found": 3, "truncated": 2}, {}, []),
        ({"transparent": 2000, "transparent, one color": 1}, {}, [("warning:", "2,001", "1", "--background", "white")]),
        ({"transparent": 4}, {}, [("4", "--background", "white")]),
        ({"transparent": 4}, {"background": "white"}, []),
        (
            {"transparent": 4, "transparent, one color": 3}, {"background": "white"},
            [("warning:", "3", "7", "--background", "white")],
        ),
        ({"16-bit grey": 5}, {}, [("warning:", "5", "8", "255", "--sixteen_bit_images", "scale")]),
        ({"16-bit grey": 5}, {"sixteen_bit_images": "scale"}, [("warning:", "5", "32")]),
        (
            {"transparent": 1, "16-bit grey": 2}, {},
            [("1", "--background", "white"), ("warning:", "2", "8", "255", "--sixteen_bit_images", "scale")],
        ),
    ],
)  # fmt: skip
def test_lines_about_spoiled_images(
    counts: dict[str, int], rules: dict[str, Any], expected: list[tuple[str, ...]]
) -> None:
    lines = image_remarks([counts.get(status, 0) for status in IMAGE_STATUS], InputRules(**rules))
    assert len(lines) == len(expected)
    for line, facts in zip(lines, expected, strict=True):
        assert lines_with(line, *facts) and line.startswith("warning: ") == ("warning:" in facts)
