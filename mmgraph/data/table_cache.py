"""Tables converted once, to files that are memory-mapped from then on.

Beside a table (see :func:`mmgraph.utils.files.cache_folder`) lie ``tables/nodes-<hash>.arrow``, its nodes, and
``tables/edges-<hash>.npy``, its edges as rows, with relations in ``.relations.npy`` where it has a ``rel_id``, and what
is to be told of them in ``.json``. A hash is that of the files' bytes and of the conversion: a changed table is
converted anew. What is found there is complete and was checked.
"""

import atexit
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmgraph.data.edge_table import EdgeTable, EdgeWriter
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import ARROW, fingerprint, is_text, read_chunks
from mmgraph.data.tables import EDGE_COLUMNS, NODE_COLUMNS, check_dropped, check_unique, find_ids
from mmgraph.errors import RunError, UserError
from mmgraph.utils.files import cache_folder, make_once, save_array, write_durably
from mmgraph.utils.log import log

Opened = TypeVar("Opened")

FORMAT = 2  # raised where the same table would be converted otherwise
RELATION = "rel_id"
ATTEMPTS = 3  # to open what was made
ROW_CHUNK = 1 << 16  # of a table, in memory and in a record batch
EDGE_CHUNK = 1 << 20  # looked up in one go


class Edges(NamedTuple):
    """An edge table's edges whose two ends are nodes, in its order."""

    rows: EdgeTable  # E edges
    relations: EdgeTable | None  # (E,) the place of each edge's relation among the names
    names: list[str]  # of relations, as ``rel_id`` has them; empty where the table has none


_temporary_folders: dict[Path, Path] = {}  # temporary folders, of cache folders that cannot be written


def open_nodes(path: str | Path, digest: str) -> NodeTable:
    """A node table, converted where it is not an Arrow file to be used as it is.

    Args:
        digest: the file's fingerprint.

    Raises:
        UserError: as :func:`mmgraph.data.tables.read_nodes`.
    """
    name = f"nodes-{_hash(digest)}"
    if Path(path).suffix in ARROW and (table := _in_place(path)) is not None:
        convert_once(path, f"{name}.checked", lambda file, _: _check_nodes(path, table))  # else at each start
        return table
    return _open(path, f"{name}.arrow", lambda file, _: _write_nodes(file, path, digest), NodeTable)


def open_edges(path: str | Path, digest: str, nodes: NodeTable, nodes_digest: str) -> Edges:
    """The edges whose two ends are nodes, in the order of the edge table; others are counted in the log.

    Args:
        digest, nodes_digest: the fingerprints of the two files.

    Raises:
        UserError: as :func:`mmgraph.data.tables.read_edges` and :func:`mmgraph.data.tables.known_edges`.
    """
    name = f"edges-{_hash(digest, nodes_digest)}.npy"

    def opened(path_made: Path) -> tuple[Edges, list[Any]]:
        told = json.loads(path_made.with_suffix(".json").read_text())
        relations = EdgeTable(path_made.with_suffix(".relations.npy")) if told["relations"] else None
        return Edges(EdgeTable(path_made), relations, told["relations"]), told["dropped"]

    edges, dropped = _open(path, name, lambda file, target: _write_edges(file, target, path, digest, nodes), opened)
    if dropped[0]:
        check_dropped(path, *dropped)
    return edges


def _open(
    table: str | Path, name: str, write: Callable[[BinaryIO, Path], object], opened: Callable[[Path], Opened]
) -> Opened:
    """What :func:`convert_once` makes, opened; made anew where it is damaged: cut short, or another's."""
    for _ in range(ATTEMPTS):
        path = convert_once(table, name, write)
        found = _identity(path)
        try:
            return opened(path)
        except (FileNotFoundError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            reason = f"{path}: damaged ({type(error).__name__}: {error})"
        if _identity(path) == found:  # else another process was here before
            log(f"{reason}, made anew")
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _temporary_folder(path.parent, error)
    raise RunError(reason)


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _hash(*digests: str) -> str:
    return hashlib.sha256(" ".join([str(FORMAT), *digests]).encode()).hexdigest()[:16]


def convert_once(table: str | Path, name: str, write: Callable[[BinaryIO, Path], object]) -> Path:
    """The file ``name`` of a table's cache, which ``write`` (given the file, open, and its path) fills where it is new.

    Where the cache cannot be written, it is made in a temporary folder that is removed at the exit.
    """
    folder = cache_folder(table) / "tables"
    try:
        return _make(_temporary_folders.get(folder, folder) / name, write)
    except OSError as error:
        if folder in _temporary_folders:
            raise
        _temporary_folder(folder, error)
    return _make(_temporary_folders[folder] / name, write)


def _temporary_folder(folder: Path, error: OSError) -> None:
    log(f"{folder} cannot be written ({error.strerror or error}): converted tables are kept for this run only")
    _temporary_folders[folder] = Path(tempfile.mkdtemp(prefix="mmgraph_tables_"))


def _make(path: Path, write: Callable[[BinaryIO, Path], object]) -> Path:
    make_once(path, lambda file: write(file, path))
    _give_back_memory()
    return path


def _give_back_memory() -> None:
    """What a conversion worked in, which allocators keep otherwise: more than a run needs of its tables."""
    pa.default_memory_pool().release_unused()
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def remove_temporary_folders() -> None:
    """Remove the temporary folders of this process; called at its exit."""
    while _temporary_folders:
        shutil.rmtree(_temporary_folders.popitem()[1], ignore_errors=True)


atexit.register(remove_temporary_folders)
os.register_at_fork(after_in_child=_temporary_folders.clear)  # they are the parent's


def _in_place(path: str | Path) -> NodeTable | None:
    """An Arrow file of the user's as it is; None where it has to be converted, or an error told."""
    try:
        table = NodeTable(path)
        kinds = {field.name: field.type for field in table.schema}
    except (OSError, ValueError, pa.ArrowException):
        return None
    as_needed = (
        len(table) > 0
        and all(name in kinds for name in NODE_COLUMNS)
        and (is_text(kinds["node_id"]) or pa.types.is_integer(kinds["node_id"]))
        and all(is_text(kinds[name]) for name in NODE_COLUMNS[1:])
    )
    return table if as_needed else None


def _check_nodes(path: str | Path, table: NodeTable) -> None:
    for _ in read_chunks(path, NODE_COLUMNS, NODE_COLUMNS[:1], ROW_CHUNK):
        pass
    with table.column("node_id") as ids:
        check_unique(path, ids.cast(pa.large_string()))


def _write_nodes(file: BinaryIO, path: str | Path, digest: str) -> None:
    start = time.monotonic()
    writer: pa.RecordBatchWriter | None = None
    ids: list[pa.Array] = []
    try:
        for table in read_chunks(path, NODE_COLUMNS, NODE_COLUMNS[:1], ROW_CHUNK):
            table = _plain(path, table)
            writer = writer or pa.ipc.new_file(file, table.schema)
            writer.write_table(table)
            ids += table["node_id"].chunks
    finally:
        if writer is not None:
            writer.close()
    check_unique(path, pa.chunked_array(ids))
    _end(path, digest, start)


def _plain(path: str | Path, table: pa.Table) -> pa.Table:
    """Without pandas' index, with one type for texts, and no dictionaries, which may differ between chunks."""
    fields = []
    for field in table.schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        kind = pa.large_string() if is_text(kind) or pa.types.is_null(kind) else kind
        if not field.name.startswith("__index_level_"):
            fields.append(pa.field(field.name, kind))
    schema = pa.schema(fields)
    try:
        return table.select(schema.names).cast(schema).combine_chunks()
    except pa.ArrowException as error:
        raise UserError(f"{path}: cannot be converted to Arrow: {str(error).strip()}") from None


def _write_edges(file: BinaryIO, target: Path, path: str | Path, digest: str, nodes: NodeTable) -> None:
    start = time.monotonic()
    writer, relations = EdgeWriter(file, len(nodes)), _Relations()
    total, unknown = 0, None
    # Each look-up indexes the ids anew: fewer edges than this at once, and that would be most of the work.
    for part in _gathered(read_chunks(path, EDGE_COLUMNS, EDGE_COLUMNS, ROW_CHUNK), max(EDGE_CHUNK, len(nodes) // 4)):
        both = pa.chunked_array([chunk for name in EDGE_COLUMNS for chunk in part[name].chunks])
        with nodes.column("node_id") as ids:
            ends = find_ids(ids.cast(pa.large_string()), both).reshape(2, -1).T
        known = np.all(ends >= 0, axis=1)
        if unknown is None and not known.all():
            first = int(np.argmin(known))
            unknown = part[EDGE_COLUMNS[0 if ends[first, 0] < 0 else 1]][first].as_py()
        writer.write(ends[known])
        if RELATION in part.column_names:
            relations.add(path, part[RELATION], known)
        total += len(part)
    writer.finish()
    dropped = total - writer.count, total, unknown
    if not writer.count:
        check_dropped(path, *dropped)  # an error, of which nothing is kept
    _end(path, digest, start)
    names = list(relations.names) if relations.usable else []
    if names:
        save_array(target.with_suffix(".relations.npy"), np.concatenate(relations.codes))
    told = json.dumps({"dropped": dropped, "relations": names})
    write_durably(target.with_suffix(".json"), lambda temporary: temporary.write_text(told), shared=True)


class _Relations:
    """The relations of edges that come in parts, as numbers; a missing one is the empty name."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.codes: list[np.ndarray] = []  # int32
        self.usable = True

    def add(self, path: str | Path, column: pa.ChunkedArray, known: np.ndarray) -> None:
        try:
            text = pc.fill_null(column.cast(pa.large_string()), "").combine_chunks()
        except pa.ArrowException:
            if not self.codes:
                log(f"{path}: column '{RELATION}' holds {column.type}, which is not text: the edges have no relations")
            text = pa.array([""] * len(column), pa.large_string())
            self.usable = False
        encoded = text.filter(pa.array(known)).dictionary_encode()
        numbers = [self.names.setdefault(name, len(self.names)) for name in encoded.dictionary.to_pylist()]
        self.codes.append(np.array(numbers, np.int32)[encoded.indices.to_numpy()])


def _gathered(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The edge columns of tables, put together to ``rows`` rows or more."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table.select([*EDGE_COLUMNS, *[RELATION] * (table.column_names.count(RELATION) == 1)]))
        if sum(map(len, waiting)) >= rows:
            yield pa.concat_tables(waiting, promote_options="permissive")
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting, promote_options="permissive")


def _end(path: str | Path, digest: str, start: float) -> None:
    if fingerprint(path) != digest:
        raise UserError(f"{path} was changed while it was read; start again")
    log(f"{path}: converted in {time.monotonic() - start:.1f} s, which later starts are spared")
