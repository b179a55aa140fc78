"""Node and edge tables: read and checked, edges found in the node table, and image paths looked up."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mmgraph.data.images import OUTSIDE
from mmgraph.data.readers import place, read_chunks
from mmgraph.errors import UserError
from mmgraph.utils.log import log

NODE_COLUMNS = ("node_id", "short_name", "summary", "image_path")
EDGE_COLUMNS = ("src_id", "dst_id")
IDS_AT_ONCE = 10_000_000


def read_nodes(path: str | Path) -> pd.DataFrame:
    """Read a node table. Ids are text, compared exactly (``007`` is not ``7``, ``NA`` is a name).

    Raises:
        UserError: no such file, not a table, a column or an id missing, an id twice; with file and line.
    """
    nodes = _read(path, NODE_COLUMNS, NODE_COLUMNS[:1])
    check_unique(path, pa.chunked_array([pa.array(nodes["node_id"], pa.large_string())]))
    return nodes


def read_edges(path: str | Path) -> pd.DataFrame:
    """Read an edge table (``src_id``, ``dst_id`` and any other columns); errors as :func:`read_nodes`."""
    return _read(path, EDGE_COLUMNS, EDGE_COLUMNS)


def _read(path: str | Path, columns: Sequence[str], id_columns: Sequence[str]) -> pd.DataFrame:
    [table] = read_chunks(path, columns, id_columns)
    return table.to_pandas()


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
        check_dropped(path, len(known) - int(known.sum()), len(known), unknown)
    return ends[known]


def check_dropped(path: str | Path, count: int, total: int, unknown: object) -> None:
    """Log that ``count`` of ``total`` edges have an end that is no node, first ``unknown``; an error if it is all."""
    if count == total:
        raise UserError(f"{path}: no edge has both ends in the node table; the first unknown id is '{unknown}'")
    log(f"{path}: {count:,} of {total:,} edges dropped: an end is not in the node table (first: '{unknown}')")


def check_unique(path: str | Path, ids: pa.ChunkedArray) -> None:
    """Raise :class:`UserError` with the file's two lines where a node has the id of one before it."""
    first = find_ids(ids, ids)
    repeated = first != np.arange(len(ids))
    if repeated.any():
        second = int(repeated.argmax())
        raise UserError(
            f"{place(path, second)}: node_id '{ids[second]}' is already used in "
            f"{place(path, int(first[second]), short=True)}; every node needs an id of its own"
        )


def find_ids(ids: pa.ChunkedArray, wanted: pa.ChunkedArray) -> np.ndarray:
    """The first of ``ids`` that equals each of ``wanted``, (len(wanted),) int64; -1 where none does.

    Both are of one type. The index of 10^7 ids or fewer is in memory while it works, whatever the number of ids.
    """
    rows = np.full(len(wanted), -1, dtype=np.int64)
    for start in range(0, len(ids), IDS_AT_ONCE):
        found = pc.index_in(wanted, value_set=ids.slice(start, IDS_AT_ONCE)).fill_null(-1).to_numpy()
        rows = np.where((rows < 0) & (found >= 0), found + np.int64(start), rows)
    return rows


class ImagePaths:
    """Turns the ``image_path`` of a row into the path to open.

    ``\\`` is read as ``/``. A relative path is looked up below ``root``, or, without one, below the folder of the node
    table and then the working directory (the original's rule).

    Args:
        confine: a path that leaves the root (by ``..``, an absolute path, a symbolic link) is not to be opened; without
            ``root``, the root is the folder of the node table alone.

    Raises:
        UserError: there is no such root.
    """

    def __init__(self, nodes_path: str | Path, root: str | Path | None = None, confine: bool = False):
        if root is not None and not Path(root).is_dir():
            raise UserError(f"--image_root {root}: no such folder")
        roots = (Path(root),) if root is not None else (Path(nodes_path).parent, Path())
        self.roots = ["" if str(folder) == "." else str(folder) for folder in roots[: 1 if confine else None]]
        self.confined_to = os.path.join(os.path.realpath(roots[0]), "") if confine else None  # noqa: PTH118

    def resolve(self, image_path: object) -> str | None:
        """The path to open, or None where the row has no image. A path that leaves the root is ``images.OUTSIDE``."""
        if not isinstance(image_path, str) or not image_path.strip():
            return None
        # Not Path's: it interns the parts of every path, and the table of interned strings grows by megabytes.
        candidates = [os.path.join(root, image_path.replace("\\", "/")) for root in self.roots]  # noqa: PTH118
        for candidate in candidates[:-1]:
            if os.path.exists(candidate):  # noqa: PTH110 - False, not an error, where a name is too long
                return candidate
        if self.confined_to is not None and not self._is_inside(candidates[0]):
            return OUTSIDE
        if len(candidates) > 1 and not os.path.exists(candidates[-1]):  # noqa: PTH110
            return candidates[0]
        return candidates[-1]

    def _is_inside(self, path: str) -> bool:
        try:
            return os.path.realpath(path).startswith(str(self.confined_to))
        except (OSError, ValueError):  # the latter of a NUL byte
            return False

    def check(self, image_paths: pa.ChunkedArray | Sequence[str | None], seed: int, sample: int = 1000) -> None:
        """Look up to ``sample`` of the paths up, drawn by ``seed``, so that a wrong root is seen before training.

        Raises:
            UserError: none of the files exists. More than 10 % missing is one line in the log.
        """
        if not isinstance(image_paths, pa.ChunkedArray):
            image_paths = pa.chunked_array([pa.array(image_paths, pa.large_string(), from_pandas=True)])
        drawn = [path for path in self._draw(image_paths, seed, sample) if self.is_filled(path)]
        if not drawn:
            log("no node has an image path: every image is black")
            return
        resolved = [self.resolve(path) for path in drawn]
        missing = [path for path in resolved if not os.path.isfile(str(path))]  # noqa: PTH113
        if len(missing) == len(resolved):
            tried = resolved[0] if resolved[0] != OUTSIDE else f"{drawn[0]}, which --confine_images refuses"
            raise UserError(
                f"none of {len(resolved):,} image files looked up exists; the first tried is {tried}. "
                "Set --image_root to the folder that image_path starts from"
            )
        if len(missing) > 0.1 * len(resolved):
            share = len(missing) / len(resolved)
            log(f"warning: {share:.0%} of {len(resolved):,} image files looked up do not exist, such as {missing[0]}")

    @staticmethod
    def _draw(image_paths: pa.ChunkedArray, seed: int, sample: int) -> list[str | None]:
        """Up to ``sample`` of the filled paths. Each gets a random number, and those of the least are drawn."""
        generator = np.random.default_rng(seed)
        numbers, rows = np.empty(0), np.empty(0, dtype=np.int64)
        for start in range(0, len(image_paths), 1 << 16):
            part = image_paths.slice(start, 1 << 16)
            filled = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(part), ""), False).to_numpy()
            numbers = np.append(numbers, generator.random(len(part))[filled])
            rows = np.append(rows, start + np.flatnonzero(filled))
            least = np.argsort(numbers)[:sample]
            numbers, rows = numbers[least], rows[least]
        return [image_paths[int(row)].as_py() for row in rows]

    @staticmethod
    def is_filled(image_path: object) -> bool:
        return isinstance(image_path, str) and bool(image_path.strip())
