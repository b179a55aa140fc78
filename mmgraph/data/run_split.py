"""The split that a run keeps in the folder ``split`` of its output folder.

- ``held_out_edges.parquet``: the edges that the run held out: ``src_id``, ``dst_id``, ``rel_id`` (if the edges have
  relations), and ``part``: ``validation`` if the run chooses a checkpoint by these edges, else ``test``.
- ``training_rows.npy``: one bit for each row of the edge table (see :mod:`mmgraph.data.bits`), 1 for the rows that the
  run trains on. So a table of 10^9 edges takes 125 MB.
- ``split.json``: what the other two files belong to.

Verbs read the split from here. They do not draw it again, because another edge table would give another split.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmgraph.config import Config
from mmgraph.data.bits import BitWriter, unpacked
from mmgraph.data.edge_conversion import RELATION, Edges
from mmgraph.data.edge_table import RemainingEdges
from mmgraph.data.graph import Graph
from mmgraph.data.node_table import NodeTable
from mmgraph.data.split import HeldOut
from mmgraph.data.tables import EDGE_COLUMNS, check_dropped, find_ids
from mmgraph.errors import UserError
from mmgraph.utils.error_text import one_line
from mmgraph.utils.files import save_array, write_durably

FOLDER, HELD_OUT, TRAINED, RECORD = "split", "held_out_edges.parquet", "training_rows.npy", "split.json"
FORMAT = 1
EDGE_CHUNK = 1 << 16  # held-out edges written at a time


class RunSplit(NamedTuple):
    """The split in a run's folder."""

    folder: Path  # the folder ``split``
    nodes_fingerprint: str
    edges_fingerprint: str
    eval_fraction: float
    seed: int
    held_out_fingerprint: str  # identifies the set of held-out edges; empty if there are none
    edge_rows: int  # rows of the edge table
    training_edges: int
    held_out_edges: int
    relation_ids: list[str]  # of the held-out edges; empty if they have no relations
    relation_names: list[str]
    part: str
    format: int = FORMAT

    def held_out(self, nodes: NodeTable) -> HeldOut | None:
        """Return the held-out edges as rows of a node table; None if the run held out no edges.

        Raises:
            UserError: the file is missing or damaged, or no edge has both ends in the node table. If only some edges
                have not, they are dropped, and their number is logged.
        """
        if not self.held_out_edges:
            return None
        path = self.folder / HELD_OUT
        try:
            table = pq.read_table(path)
            table.validate(full=True)  # a damaged file may have ids that are not UTF-8
            ends = pa.chunked_array([chunk for name in EDGE_COLUMNS for chunk in table[name].chunks])
            relations = None
            if self.relation_ids:
                relations = find_ids(
                    pa.chunked_array([pa.array(self.relation_ids, pa.large_string())]), table[RELATION]
                )
            if len(table) != self.held_out_edges or (relations is not None and (relations < 0).any()):
                raise ValueError(f"it does not fit {RECORD}")
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)}); restore the run's folder") from None
        with nodes.column("node_id") as ids:
            rows = find_ids(ids.cast(pa.large_string()), ends).reshape(2, -1).T  # (M, 2)
        known = np.all(rows >= 0, axis=1)
        if not known.all():
            first = int(np.argmin(known))
            unknown = table[EDGE_COLUMNS[0 if rows[first, 0] < 0 else 1]][first].as_py()
            check_dropped(path, int((~known).sum()), len(known), unknown)
            relations = None if relations is None else relations[known]
        return HeldOut(rows[known], relations, self.relation_names, self.held_out_fingerprint, self.relation_ids)

    def training_edges_of(self, table: Edges) -> RemainingEdges:
        """Return the edges of the run's edge table that the run trained on.

        Args:
            table: all edges of the edge table. It must have the fingerprint ``edges_fingerprint``.
        """
        excluded, count = [np.empty(0, np.int64)], 0
        for trained, known in zip(self.trained_rows(), _known_rows(table), strict=True):
            excluded.append(count + np.flatnonzero(~trained[known]))
            count += int(known.sum())
        return RemainingEdges(table.rows, np.concatenate(excluded))

    def trained_rows(self) -> Iterator[np.ndarray]:
        """Yield (n,) bool arrays that together tell, for each row of the edge table, whether the run trained on it.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.folder / TRAINED
        try:
            bits = np.load(path)
            fits = bits.dtype == np.uint8 and bits.shape == ((self.edge_rows + 7) // 8,)
            if not fits or sum(int(rows.sum()) for rows in unpacked(bits, self.edge_rows)) != self.training_edges:
                raise ValueError(f"it does not fit {RECORD}")
        except (OSError, ValueError, EOFError, TokenError) as error:  # TokenError: NumPy cannot parse the header
            raise UserError(f"{path}: cannot be read ({error}); restore the run's folder") from None
        return unpacked(bits, self.edge_rows)


def read_split(output: Path) -> RunSplit | None:
    """Read the split in a run's output folder; None if the run has none, because an older version trained it.

    Raises:
        UserError: the split is damaged, or a newer version wrote it.
    """
    path = output / FOLDER / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore the run's folder") from None
    if not isinstance(record, dict) or not _is_valid(record):
        raise UserError(f"{path}: damaged, or written by another version of mmgraph; restore the run's folder")
    return RunSplit(folder=path.parent, **record)


def _is_valid(record: dict[str, Any]) -> bool:
    kinds = get_type_hints(RunSplit)
    types = {name: get_origin(kinds[name]) or kinds[name] for name in RunSplit._fields[1:]}  # without the folder
    return (
        record.keys() == types.keys()
        and all(isinstance(record[name], int | float if kind is float else kind) for name, kind in types.items())
        and record["format"] == FORMAT
    )


def write_split(output: Path, config: Config, graph: Graph) -> None:
    """Write the split of a run into its output folder, unless it is already there.

    Args:
        output: the run's output folder.
        config: the run's settings.
        graph: the run's graph.

    Raises:
        OSError: a file cannot be written.
    """
    folder, held_out = output / FOLDER, graph.held_out
    split = RunSplit(
        folder=folder,
        nodes_fingerprint=graph.nodes_fingerprint,
        edges_fingerprint=graph.edges_fingerprint,
        eval_fraction=config.eval_fraction,
        seed=config.seed,
        held_out_fingerprint="" if held_out is None else held_out.fingerprint,
        edge_rows=graph.edge_table.table_rows,
        training_edges=len(graph.rows),
        held_out_edges=0 if held_out is None else len(held_out.rows),
        relation_ids=[] if held_out is None or held_out.relations is None else list(held_out.relation_ids),
        relation_names=[] if held_out is None or held_out.relations is None else list(held_out.names),
        part="validation" if config.keep_best or config.early_stopping_patience else "test",
    )
    record = json.dumps({name: value for name, value in split._asdict().items() if name != "folder"}, indent=1)
    path = folder / RECORD
    complete = all((folder / name).is_file() for name in (RECORD, HELD_OUT, TRAINED))
    if complete and path.read_bytes() == record.encode():
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # first, so that no record ever stands beside files of another split
    save_array(folder / TRAINED, _training_bits(graph))
    write_durably(folder / HELD_OUT, lambda temporary: _write_held_out(temporary, graph, split))
    write_durably(path, lambda temporary: temporary.write_text(record, encoding="utf-8"))


def _known_rows(table: Edges) -> Iterator[np.ndarray]:
    return unpacked(None if table.known is None else np.load(table.known), table.table_rows)


def _training_bits(graph: Graph) -> np.ndarray:
    """Return one bit for each row of the edge table: 1 if the run trains on it."""
    numbers = np.empty(0, np.int64)
    if graph.held_out is not None and graph.held_out.numbers is not None:
        numbers = graph.held_out.numbers
    bits, count = BitWriter(), 0
    for known in _known_rows(graph.edge_table):
        rows = np.flatnonzero(known)
        first, last = np.searchsorted(numbers, (count, count + len(rows)))
        known[rows[numbers[first:last] - count]] = False
        bits.add(known)
        count += len(rows)
    return bits.finish()


def _write_held_out(path: Path, graph: Graph, split: RunSplit) -> None:
    text = pa.large_string()
    names = [*EDGE_COLUMNS, *([RELATION] if split.relation_ids else []), "part"]
    schema = pa.schema([(name, text) for name in names])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, split.held_out_edges, EDGE_CHUNK):
            assert graph.held_out is not None
            rows = graph.held_out.rows[start : start + EDGE_CHUNK]  # (n, 2)
            columns: list[Any] = [[str(node_id) for node_id in graph.nodes.ids(ends)] for ends in rows.T]
            if split.relation_ids:
                assert graph.held_out.relations is not None
                relations = graph.held_out.relations[start : start + EDGE_CHUNK]
                columns.append([split.relation_ids[number] for number in relations.tolist()])
            columns.append([split.part] * len(rows))
            writer.write_table(pa.table([pa.array(column, text) for column in columns], schema=schema))
