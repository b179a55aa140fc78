"""Converts tables once to files that can be memory-mapped.

The folder ``tables`` in a table's cache folder (see :func:`mmgraph.utils.files.cache_folder`) contains:

- ``nodes-<hash>.arrow``: the nodes. If an Arrow file needs no conversion: an empty ``nodes-<hash>.checked`` instead.
- ``edges-<hash>.npy``: the edges, as pairs of row numbers in the node table.
- ``edges-<hash>.relations.npy``: the relations of the edges, if the table has a column ``rel_id``.
- ``edges-<hash>.json``: the names of the relations, and the number of dropped edges for the log.

The hash covers the bytes of the tables and the version of the conversion, so a changed table is converted again. All
of these files are complete, and their tables have been checked.
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
from mmgraph.utils.files import cache_folder, create_once, save_array, write_durably
from mmgraph.utils.log import log

Opened = TypeVar("Opened")

FORMAT = 2  # version of the conversion; increase it when the result of the conversion changes
RELATION = "rel_id"
ATTEMPTS = 3  # maximum number of attempts to open a converted table
ROW_CHUNK = 1 << 16  # rows in memory at a time, and in a record batch
EDGE_CHUNK = 1 << 20  # minimum number of edges whose node ids are looked up at a time


class Edges(NamedTuple):
    """The edges that have both ends in the node table, in the order of the edge table."""

    rows: EdgeTable  # (E, 2) node rows of source and destination
    relations: EdgeTable | None  # (E,) indices into names; None: the table has no relations
    names: list[str]  # names of the relations, from ``rel_id``; empty if the table has none


_temporary_folders: dict[Path, Path] = {}  # cache folder that cannot be written -> temporary folder


def open_nodes(path: str | Path, digest: str) -> NodeTable:
    """Open a node table. Convert it first, unless this was done before or it is an Arrow file that needs no conversion.

    Args:
        digest: the file's fingerprint.

    Raises:
        UserError: as :func:`mmgraph.data.tables.read_nodes`.
    """
    name = f"nodes-{_hash(digest)}"
    if Path(path).suffix in ARROW and (table := _in_place(path)) is not None:
        # The empty file marks the table as checked, so that later starts skip the check.
        convert_once(path, f"{name}.checked", lambda file, _: _check_nodes(path, table))
        return table
    return _open(path, f"{name}.arrow", lambda file, _: _write_nodes(file, path, digest), NodeTable)


def open_edges(path: str | Path, digest: str, nodes: NodeTable, nodes_digest: str) -> Edges:
    """Open an edge table. Convert it first, unless this was done before.

    Edges with an end that is not in the node table are dropped, and their number is logged at every start.

    Args:
        digest, nodes_digest: fingerprints of the edge table and of the node table.

    Raises:
        UserError: as :func:`mmgraph.data.tables.read_edges` and :func:`mmgraph.data.tables.known_edges`.
    """
    name = f"edges-{_hash(digest, nodes_digest)}.npy"

    def load(converted: Path) -> tuple[Edges, list[Any]]:
        summary = json.loads(converted.with_suffix(".json").read_text())
        relations = EdgeTable(converted.with_suffix(".relations.npy")) if summary["relations"] else None
        return Edges(EdgeTable(converted), relations, summary["relations"]), summary["dropped"]

    edges, dropped = _open(path, name, lambda file, target: _write_edges(file, target, path, digest, nodes), load)
    if dropped[0]:
        check_dropped(path, *dropped)
    return edges


def _open(
    table: str | Path, name: str, write: Callable[[BinaryIO, Path], object], load: Callable[[Path], Opened]
) -> Opened:
    """Convert a table if needed, and open the result with ``load``. Convert it again if the result is damaged."""
    for _ in range(ATTEMPTS):
        path = convert_once(table, name, write)
        identity = _identity(path)
        try:
            return load(path)
        except (FileNotFoundError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            reason = f"{path}: damaged ({type(error).__name__}: {error})"
        if _identity(path) == identity:  # else another process has already converted the table again
            log(f"{reason}; converting it again")
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _use_temporary_folder(path.parent, error)
    raise RunError(reason)


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _hash(*digests: str) -> str:
    return hashlib.sha256(" ".join([str(FORMAT), *digests]).encode()).hexdigest()[:16]


def convert_once(table: str | Path, name: str, write: Callable[[BinaryIO, Path], object]) -> Path:
    """Return the path of the file ``name`` in a table's cache. ``write(open file, path)`` fills a new file.

    If the cache folder cannot be written, the file is created in a temporary folder, which is removed at exit.
    """
    folder = cache_folder(table) / "tables"
    try:
        return _make(_temporary_folders.get(folder, folder) / name, write)
    except OSError as error:
        if folder in _temporary_folders:
            raise
        _use_temporary_folder(folder, error)
    return _make(_temporary_folders[folder] / name, write)


def _use_temporary_folder(folder: Path, error: OSError) -> None:
    log(f"{folder} cannot be written ({error.strerror or error}): converted tables are kept for this run only")
    _temporary_folders[folder] = Path(tempfile.mkdtemp(prefix="mmgraph_tables_"))


def _make(path: Path, write: Callable[[BinaryIO, Path], object]) -> Path:
    create_once(path, lambda file: write(file, path))
    _release_memory()
    return path


def _release_memory() -> None:
    """Return unused memory of a conversion to the system. Otherwise the process would keep it."""
    pa.default_memory_pool().release_unused()
    with suppress(AttributeError):  # malloc_trim exists only in glibc
        ctypes.CDLL(None).malloc_trim(0)


def remove_temporary_folders() -> None:
    """Remove the temporary folders of this process. Called at exit."""
    while _temporary_folders:
        shutil.rmtree(_temporary_folders.popitem()[1], ignore_errors=True)


atexit.register(remove_temporary_folders)
os.register_at_fork(after_in_child=_temporary_folders.clear)  # only the parent may remove the folders


def _in_place(path: str | Path) -> NodeTable | None:
    """Open a user's Arrow file. Return None if it must be converted or is damaged. The conversion reports damage."""
    try:
        table = NodeTable(path)
        types = {field.name: field.type for field in table.schema}
    except (OSError, ValueError, pa.ArrowException):
        return None
    usable = (
        len(table) > 0
        and all(name in types for name in NODE_COLUMNS)
        and (is_text(types["node_id"]) or pa.types.is_integer(types["node_id"]))
        and all(is_text(types[name]) for name in NODE_COLUMNS[1:])
    )
    return table if usable else None


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
    _finish(path, digest, start)


def _plain(path: str | Path, table: pa.Table) -> pa.Table:
    """Return a chunk without pandas' index and without dictionary encoding, with texts as large_string."""
    fields = []
    for field in table.schema:
        data_type = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        data_type = pa.large_string() if is_text(data_type) or pa.types.is_null(data_type) else data_type
        if not field.name.startswith("__index_level_"):
            fields.append(pa.field(field.name, data_type))
    schema = pa.schema(fields)
    try:
        return table.select(schema.names).cast(schema).combine_chunks()
    except pa.ArrowException as error:
        raise UserError(f"{path}: cannot be converted to Arrow: {str(error).strip()}") from None


def _write_edges(file: BinaryIO, target: Path, path: str | Path, digest: str, nodes: NodeTable) -> None:
    start = time.monotonic()
    writer, relations = EdgeWriter(file, len(nodes)), _Relations()
    total, unknown = 0, None
    # Each look-up builds the index of the node ids again. With few edges per look-up, this would be most of the work.
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
        check_dropped(path, *dropped)  # raises, so that the file is discarded
    _finish(path, digest, start)
    names = list(relations.names) if relations.usable else []
    if names:
        save_array(target.with_suffix(".relations.npy"), np.concatenate(relations.codes))
    summary = json.dumps({"dropped": dropped, "relations": names})
    write_durably(target.with_suffix(".json"), lambda temporary: temporary.write_text(summary), shared=True)


class _Relations:
    """Collects the relations of edges chunk by chunk, as numbers. A missing relation gets an empty name."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.codes: list[np.ndarray] = []  # int32
        self.usable = True

    def add(self, path: str | Path, column: pa.ChunkedArray, known: np.ndarray) -> None:
        try:
            text = pc.fill_null(column.cast(pa.large_string()), "").combine_chunks()
        except pa.ArrowException:
            if not self.codes:
                log(
                    f"{path}: column '{RELATION}' has type {column.type}, which cannot be converted to text; relations "
                    "are ignored"
                )
            text = pa.array([""] * len(column), pa.large_string())
            self.usable = False
        encoded = text.filter(pa.array(known)).dictionary_encode()
        numbers = [self.names.setdefault(name, len(self.names)) for name in encoded.dictionary.to_pylist()]
        self.codes.append(np.array(numbers, np.int32)[encoded.indices.to_numpy()])


def _gathered(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Join the edge columns of the tables into chunks of at least ``rows`` rows. The last chunk may have fewer rows."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table.select([*EDGE_COLUMNS, *[RELATION] * (table.column_names.count(RELATION) == 1)]))
        if sum(map(len, pending)) >= rows:
            yield pa.concat_tables(pending, promote_options="permissive")
            pending = []
    if pending:
        yield pa.concat_tables(pending, promote_options="permissive")


def _finish(path: str | Path, digest: str, start: float) -> None:
    """Check that the table has not changed since ``digest`` was computed, and log the time of the conversion."""
    if fingerprint(path) != digest:
        raise UserError(f"{path}: changed while it was read; start again")
    log(f"{path}: converted in {time.monotonic() - start:.1f} s; later starts use the converted file")
