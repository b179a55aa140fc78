"""Feature files: one float32 vector per node, in node order, written in constant memory."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from mmgraph.checkpoints.files import check_data, load_safely, save
from mmgraph.errors import UserError
from mmgraph.utils.error_text import one_line
from mmgraph.utils.files import sync

FORMATS = ("pt", "safetensors", "parquet", "npy")
ID, VECTOR = "node_id", "vector"  # column names in Parquet


def write_features(
    path: Path, shape: tuple[int, int], blocks: Iterable[np.ndarray], ids: Iterable[pa.ChunkedArray]
) -> Iterator[int]:
    """Write (N, d) vectors, passed in blocks, to a file in the format that its suffix names.

    The contents by format:

    - ``.pt``: a tensor, written by ``torch.save``. Writing needs twice the file's size on the disk.
    - ``.safetensors``: one tensor. Its name is the file's name without ``features_`` and without the suffix.
    - ``.npy``: an array.
    - ``.parquet``: columns ``node_id`` (text) and ``vector`` (a list of d float32).

    The file appears under its name only when it is complete.

    Args:
        shape: N and d.
        blocks: (n, d) float32 arrays, N rows in total.
        ids: the ``node_id`` column of each block; used for Parquet only.

    Yields:
        The number of rows of each block, after the block is written.

    Raises:
        ValueError: the blocks do not have N rows (not checked for Parquet).
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if path.suffix == ".parquet":
            yield from _write_parquet(temporary, shape[1], blocks, ids)
        elif path.suffix == ".pt":
            yield from _write_pt(temporary, shape, blocks)
        else:
            with temporary.open("wb") as file:
                _HEADERS[path.suffix](file, path.stem, shape)
                yield from _write_rows(file, shape[0], blocks)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _write_parquet(
    path: Path, width: int, blocks: Iterable[np.ndarray], ids: Iterable[pa.ChunkedArray]
) -> Iterator[int]:
    vector = pa.list_(pa.field("element", pa.float32(), nullable=False), width)
    schema = pa.schema([(ID, pa.large_string()), (VECTOR, vector)])
    with pq.ParquetWriter(path, schema) as writer:
        for block, block_ids in zip(blocks, ids, strict=False):
            values = pa.array(np.ascontiguousarray(block, np.float32).reshape(-1))
            columns = [
                block_ids.cast(pa.large_string()).combine_chunks(),
                pa.FixedSizeListArray.from_arrays(values, type=vector),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            yield len(block)


def _write_pt(path: Path, shape: tuple[int, int], blocks: Iterable[np.ndarray]) -> Iterator[int]:
    """Write the vectors to a raw file, map this file into memory, and save the map.

    ``torch.save`` needs one complete tensor. The map is such a tensor, but does not need memory for all vectors.
    """
    raw = path.with_suffix(".raw")
    try:
        with raw.open("wb") as file:
            yield from _write_rows(file, shape[0], blocks)
        # The map is shared, because the kernel counts the pages of a private, writable map as memory of this process.
        vectors = torch.from_file(str(raw), shared=True, size=shape[0] * shape[1], dtype=torch.float32)
        save(vectors.view(shape), path)
    finally:
        raw.unlink(missing_ok=True)


def _write_rows(file: BinaryIO, count: int, blocks: Iterable[np.ndarray]) -> Iterator[int]:
    left = count
    for block in blocks:
        file.write(np.ascontiguousarray(block, "<f4").data)
        left -= len(block)
        yield len(block)
    if left:
        raise ValueError(f"expected {count} vectors, got {count - left}")


def _write_npy_header(file: BinaryIO, _: str, shape: tuple[int, int]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def _write_safetensors_header(file: BinaryIO, name: str, shape: tuple[int, int]) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
    header = json.dumps({name.removeprefix("features_"): entry, "__metadata__": {"format": "pt"}}).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)


_HEADERS = {".npy": _write_npy_header, ".safetensors": _write_safetensors_header}


def read_features(path: Path) -> tuple[torch.Tensor, list[str] | None]:
    """Read a feature file in any of :data:`FORMATS`.

    Returns:
        The vectors, (N, d) float32, and the N node ids. The ids are None unless the file is Parquet.

    Raises:
        UserError: the file does not exist, or is not a feature file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        vectors, ids = _READERS[path.suffix](path)
    except KeyError:
        raise UserError(f"{path}: not a feature file; the formats are .{', .'.join(FORMATS)}") from None
    except Exception as error:  # torch, pyarrow, NumPy and safetensors raise many types for a broken file
        reason = one_line(error)[:200]
        raise UserError(f"{path}: not a readable feature file ({type(error).__name__}: {reason})") from None
    if not isinstance(vectors, torch.Tensor) or vectors.ndim != 2 or not vectors.is_floating_point():
        raise UserError(f"{path}: not a feature file: expected one (nodes, width) tensor of floating-point numbers")
    check_data(path, {"its tensor": vectors})
    return vectors.float(), ids


def _read_safetensors(path: Path) -> tuple[Any, None]:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        if len(names) != 1:
            raise SafetensorError(f"expected one tensor, got {len(names)}")
        return file.get_tensor(names[0]), None


def _read_parquet(path: Path) -> tuple[Any, list[str]]:
    table = pq.read_table(path, columns=[ID, VECTOR])
    values = np.stack(table[VECTOR].to_numpy())
    return torch.from_numpy(values), table[ID].cast(pa.large_string()).to_pylist()


_READERS: dict[str, Any] = {
    ".pt": lambda path: (load_safely(path), None),
    ".npy": lambda path: (torch.from_numpy(np.load(path)), None),
    ".safetensors": _read_safetensors,
    ".parquet": _read_parquet,
}
