"""Converts tables once to files that can be memory-mapped.

The folder ``tables`` in a table's cache folder (see :func:`mmgraph.utils.files.cache_folder`) contains:

- ``nodes-<hash>.arrow``: the nodes. If an Arrow file needs no conversion: an empty ``nodes-<hash>.checked`` instead.
- ``edges-<hash>.npy``: the edges, as pairs of row numbers in the node table.
- ``edges-<hash>.relations.npy``: the relations of the edges, if the table has a column ``rel_id``.
- ``edges-<hash>.known.npy``: which rows of the edge table have both ends in the node table, one bit each, if not all.
- ``edges-<hash>.json``: the names of the relations, and the number of dropped edges for the log.

The hash covers the bytes of the tables and the version of the conversion, so a changed table is converted again. All
of these files are complete, and their tables have been checked.
"""

import atexit
import ctypes
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO, TypeVar

import pyarrow as pa

from mmgraph.data.edge_conversion import Edges, load_converted_edges, write_edges
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import ARROW, fingerprint, is_text, read_chunks
from mmgraph.data.tables import EDGE_COLUMNS, NODE_COLUMNS, check_dropped, check_unique
from mmgraph.errors import RunError, UserError
from mmgraph.utils.files import cache_folder, create_once
from mmgraph.utils.log import log

Opened = TypeVar("Opened")

FORMAT = 2  # version of the conversion; increase it when the result of the conversion changes
ATTEMPTS = 3  # maximum number of attempts to open a converted table
ROW_CHUNK = 1 << 16  # rows in memory at a time, and in a record batch


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
    return open_converted(path, f"{name}.arrow", lambda file, _: _write_nodes(file, path, digest), NodeTable)


def open_edges(path: str | Path, digest: str, nodes: NodeTable, nodes_digest: str) -> Edges:
    """Open an edge table. Convert it first, unless this was done before.

    Edges with an end that is not in the node table are dropped, and their number is logged at every start.

    Args:
        digest, nodes_digest: fingerprints of the edge table and of the node table.

    Raises:
        UserError: as :func:`mmgraph.data.tables.read_edges` and :func:`mmgraph.data.tables.known_edges`.
    """
    name = f"edges-{_hash(digest, nodes_digest)}.npy"

    edges, dropped = open_converted(
        path, name, lambda file, target: _write_edges(file, target, path, digest, nodes), load_converted_edges
    )
    if dropped[0]:
        check_dropped(path, *dropped)
    return edges


def open_converted(
    table: str | Path, name: str, write: Callable[[BinaryIO, Path], object], load: Callable[[Path], Opened]
) -> Opened:
    """Convert a table if needed, and open the result with ``load``. Convert it again if the result is damaged.

    Args:
        table: path of the table.
        name: name of the converted file in the table's cache.
        write: fills the converted file, an open file with this final path.
        load: opens the converted file with this path.

    Raises:
        RunError: the result is still damaged after :data:`ATTEMPTS` attempts.
    """
    for _ in range(ATTEMPTS):
        path = convert_once(table, name, write)
        identity = _identity(path)
        try:
            return load(path)
        except (FileNotFoundError, EOFError, ValueError, KeyError, TypeError, TokenError, pa.ArrowException) as error:
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
    write_edges(file, target, path, read_chunks(path, EDGE_COLUMNS, EDGE_COLUMNS, ROW_CHUNK), nodes)
    _finish(path, digest, start)


def _finish(path: str | Path, digest: str, start: float) -> None:
    """Check that the table has not changed since ``digest`` was computed, and log the time of the conversion."""
    if fingerprint(path) != digest:
        raise UserError(f"{path}: changed while it was read; start again")
    log(f"{path}: converted in {time.monotonic() - start:.1f} s; later starts use the converted file")
