"""Node and edge tables: read from CSV or Parquet, checked, and their image paths looked up."""

import csv
import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmgraph.errors import UserError
from mmgraph.text_log import log

NODE_COLUMNS = ("node_id", "short_name", "summary", "image_path")
EDGE_COLUMNS = ("src_id", "dst_id")


def read_nodes(path: str | Path) -> pd.DataFrame:
    """Read a node table. Ids are text, compared exactly (``007`` is not ``7``, ``NA`` is a name).

    Raises:
        UserError: no such file, not a table, a column or an id missing, an id twice; with file and line.
    """
    nodes = _read(path, NODE_COLUMNS, NODE_COLUMNS[:1])
    repeated = nodes["node_id"].duplicated()
    if repeated.any():
        second = int(repeated.to_numpy().argmax())
        name = nodes["node_id"].iloc[second]
        first = int((nodes["node_id"] == name).to_numpy().argmax())
        raise UserError(
            f"{_place(path, second)}: node_id '{name}' is already used in {_place(path, first, short=True)}; "
            "every node needs an id of its own"
        )
    return nodes


def read_edges(path: str | Path) -> pd.DataFrame:
    """Read an edge table (``src_id``, ``dst_id`` and any other columns); errors as :func:`read_nodes`."""
    return _read(path, EDGE_COLUMNS, EDGE_COLUMNS)


def _read(path: str | Path, columns: Sequence[str], id_columns: Sequence[str]) -> pd.DataFrame:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a table' if path.is_dir() else 'no such file'}")
    table = _read_parquet(path, columns, id_columns) if path.suffix in (".parquet", ".pq") else _read_csv(path)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise UserError(f"{path}: no column '{missing[0]}'; it has {', '.join(map(str, table.columns))}")
    for name in id_columns:
        empty = table[name].isna() | (table[name] == "")
        if empty.any():
            raise UserError(f"{_place(path, int(empty.to_numpy().argmax()))}: {name} is empty")
    if table.empty:
        raise UserError(f"{path}: has a header but no rows")
    return table


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header, else cut silently
            return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    except pd.errors.EmptyDataError:
        raise UserError(f"{path}: is empty") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable CSV table in UTF-8: {str(error).strip()}") from None


def _read_parquet(path: Path, columns: Sequence[str], id_columns: Sequence[str]) -> pd.DataFrame:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet table: {str(error).strip()}") from None
    for name in set(columns) & set(table.column_names):
        kind = table.schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind  # a pandas categorical
        if name in id_columns and not (
            pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
        ):
            raise UserError(f"{path}: column '{name}' holds {kind}; ids must be integers or text")
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind).cast(pa.string()))
    return table.to_pandas()


def _place(path: str | Path, row: int, short: bool = False) -> str:
    """Where row ``row`` (from 0) stands: the file's line in a CSV, whose quoted fields may span lines."""
    if Path(path).suffix in (".parquet", ".pq"):
        return f"row {row}" if short else f"{path}, row {row}"
    csv.field_size_limit(1 << 30)  # of 128 KiB
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        filled = -1
        line = 0
        for fields in reader:
            filled += bool(fields)  # pandas skips blank lines
            if filled == row + 1:
                break
            line = reader.line_num
    return f"line {line + 1}" if short else f"{path}, line {line + 1}"


def known_edges(nodes: pd.DataFrame, edges: pd.DataFrame, path: str | Path = "edges") -> np.ndarray:
    """Edges as node rows, without those that have an end outside the node table (counted in the log).

    Returns:
        (E, 2) int64: rows of ``nodes`` for source and destination.

    Raises:
        UserError: no edge has both ends in the node table, or two nodes have one id.
    """
    index = pd.Index(nodes["node_id"])
    if not index.is_unique:
        raise UserError(f"node_id '{index[index.duplicated()][0]}' is used twice; every node needs an id of its own")
    ends = np.stack([index.get_indexer(edges[name]) for name in EDGE_COLUMNS], axis=1).astype(np.int64)
    known = np.all(ends >= 0, axis=1)
    if not known.all():
        first = int(np.argmin(known))
        unknown = edges[EDGE_COLUMNS[0 if ends[first, 0] < 0 else 1]].iloc[first]
        count = len(known) - int(known.sum())
        if count == len(known):
            raise UserError(f"{path}: no edge has both ends in the node table; the first unknown id is '{unknown}'")
        log(f"{path}: {count:,} of {len(known):,} edges dropped: an end is not in the node table (first: '{unknown}')")
    return ends[known]


class ImagePaths:
    """Turns the ``image_path`` of a row into the path to open.

    ``\\`` is read as ``/``. A relative path is looked up below ``root``, or, without one, below the folder of the node
    table and then the working directory (the original's rule).
    """

    def __init__(self, nodes_path: str | Path, root: str | Path | None = None):
        if root is not None and not Path(root).is_dir():
            raise UserError(f"--image_root {root}: no such folder")
        self.roots = (Path(root),) if root is not None else (Path(nodes_path).parent, Path())

    def resolve(self, image_path: object) -> str | None:
        """The path to open, or None where the row has no image."""
        if not isinstance(image_path, str) or not image_path.strip():
            return None
        candidates = [root / image_path.replace("\\", "/") for root in self.roots]
        for candidate in candidates[:-1]:
            if os.path.exists(candidate):  # noqa: PTH110 - False, not an error, where a name is too long
                return str(candidate)
        if len(candidates) > 1 and not os.path.exists(candidates[-1]):  # noqa: PTH110
            return str(candidates[0])
        return str(candidates[-1])

    def check(self, image_paths: Sequence[object], seed: int, sample: int = 1000) -> None:
        """Look up to ``sample`` of the paths up, drawn by ``seed``, so that a wrong root is seen before training.

        Raises:
            UserError: none of the files exists. More than 10 % missing is one line in the log.
        """
        filled = [path for path in image_paths if self.is_filled(path)]
        if not filled:
            log("no node has an image path: every image is black")
            return
        drawn = np.random.default_rng(seed).permutation(len(filled))[:sample]
        resolved = [self.resolve(filled[i]) for i in drawn]
        missing = [path for path in resolved if not os.path.isfile(str(path))]  # noqa: PTH113
        if len(missing) == len(resolved):
            raise UserError(
                f"none of {len(resolved):,} image files looked up exists; the first tried is {resolved[0]}. "
                "Set --image_root to the folder that image_path starts from"
            )
        if len(missing) > 0.1 * len(resolved):
            share = len(missing) / len(resolved)
            log(f"warning: {share:.0%} of {len(resolved):,} image files looked up do not exist, such as {missing[0]}")

    @staticmethod
    def is_filled(image_path: object) -> bool:
        return isinstance(image_path, str) and bool(image_path.strip())


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
