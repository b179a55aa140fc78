"""Table files: CSV, Parquet and Arrow, read whole or in chunks, with errors that name file and line."""

import csv
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmgraph.errors import UserError

PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather")
ROW_FORMATS = PARQUET + ARROW  # the others are CSV


def read_chunks(
    path: str | Path, columns: Sequence[str], id_columns: Sequence[str], rows: int | None = None
) -> Iterator[pa.Table]:
    """Read a table of any format, ``rows`` rows at a time (all at once without); ``columns`` of it are made text.

    Raises:
        UserError: no such file, not a table, a column or an id missing, a CSV row of more or fewer fields than the
            header; with file and line. A chunk is checked when it is read.
    """
    path = Path(path)
    _check_file(path)
    if path.suffix not in ROW_FORMATS:
        _check_rows(path, columns)
    count = 0
    for table in (_arrow_tables if path.suffix in ROW_FORMATS else _csv_tables)(path, rows):
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise UserError(f"{path}: no column '{missing[0]}'; it has {', '.join(table.column_names)}")
        _check_once(path, columns, table.column_names)
        table = _with_text(path, table, columns, id_columns)
        for name in id_columns:
            empty = pc.equal(pc.fill_null(table[name], ""), "").to_numpy()
            if empty.any():
                raise UserError(f"{location(path, count + int(empty.argmax()))}: {name} is empty")
        count += len(table)
        yield table
    if not count:
        raise UserError(f"{path}: has a header but no rows")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a table' if path.is_dir() else 'no such file'}")


def _check_once(path: Path, columns: Sequence[str], header: list[str]) -> None:
    repeated = [name for name in columns if header.count(name) > 1]
    if repeated:
        raise UserError(f"{path}: has the column '{repeated[0]}' more than once; which one is meant?")


def _check_rows(path: Path, columns: Sequence[str]) -> None:
    """What pandas passes over: rows too short are filled up, and of two columns of one name the first is taken.

    So a quote or a line end too much would make a node of the rest of a text.
    """
    header: list[str] | None = None
    try:
        for line, fields in _records(path):
            if header is None:
                header = fields
                _check_once(path, columns, header)
            elif len(fields) != len(header):
                raise UserError(
                    f"{path}, line {line}: {len(fields)} fields where the header has {len(header)}; look for a "
                    "comma or a line end in a text without quotes, or a quote that does not end"
                )
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable CSV table in UTF-8: {str(error).strip()}") from None


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV, header included, each with the line that it begins in; blank lines are none."""
    csv.field_size_limit(1 << 30)  # of 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_lines(path, file))
        line = 1
        for fields in reader:
            if fields:  # quotes make a field even of nothing
                yield line, fields
            line = reader.line_num + 1


def _lines(path: Path, lines: Iterator[str]) -> Iterator[str]:
    """The lines of a CSV; those of spaces and tabs alone are made empty, because pandas skips them too."""
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise UserError(f"{path}, line {number}: holds a NUL byte: damaged, or not a CSV table in UTF-8")
        yield line if line.strip(" \t\r\n") else "\n"


def _csv_tables(path: Path, rows: int | None) -> Iterator[pa.Table]:
    frame: pd.DataFrame | None = None
    try:
        with pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, iterator=True
        ) as reader:
            while frame is None or rows is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", pd.errors.ParserWarning)  # rows too long, else cut silently
                    try:
                        frame = reader.read(rows)
                    except StopIteration:
                        return
                yield pa.Table.from_pandas(frame, preserve_index=False)
    except pd.errors.EmptyDataError:
        raise UserError(f"{path}: is empty") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable CSV table in UTF-8: {str(error).strip()}") from None


def _arrow_tables(path: Path, rows: int | None) -> Iterator[pa.Table]:
    """Tables of a Parquet or Arrow file."""
    kind = "Parquet" if path.suffix in PARQUET else "Arrow"
    try:
        if kind == "Parquet" and rows is None:
            yield _validated(pq.read_table(path))
        elif kind == "Parquet":
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(rows):
                    yield _validated(pa.Table.from_batches([batch]))
        else:
            with pa.memory_map(str(path)) as file:
                tables = (_validated(pa.Table.from_batches([batch])) for batch in arrow_batches(file))
                if rows is None:
                    yield from [pa.concat_tables(whole) for whole in [list(tables)] if whole]
                else:
                    yield from (table.slice(start, rows) for table in tables for start in range(0, len(table), rows))
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable {kind} table: {str(error).strip()}") from None


def _validated(table: pa.Table) -> pa.Table:
    """A table whose offsets lie in its data and whose texts are UTF-8: what reads damaged ones would die of it."""
    table.validate(full=True)
    return table


def arrow_batches(source: pa.NativeFile | pa.Buffer) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file or stream; of a memory map, without a copy where it is not compressed."""
    try:
        file = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        if isinstance(source, pa.NativeFile):
            source.seek(0)
        yield from pa.ipc.open_stream(source)
    else:
        yield from (file.get_batch(number) for number in range(file.num_record_batches))


def _with_text(path: Path, table: pa.Table, columns: Sequence[str], id_columns: Sequence[str]) -> pa.Table:
    for name in columns:
        number = table.column_names.index(name)
        kind = table.schema.field(number).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind  # a pandas categorical
        if name in id_columns and not (pa.types.is_integer(kind) or is_text(kind)):
            raise UserError(f"{path}: column '{name}' holds {kind}; ids must be integers or text")
        try:
            table = table.set_column(number, name, table[number].cast(kind).cast(pa.large_string()))
        except pa.ArrowException:
            raise UserError(f"{path}: column '{name}' holds {kind}, which is not text") from None
    return table


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def location(path: str | Path, row: int, short: bool = False) -> str:
    """Where row ``row`` (from 0) stands: the file's line in a CSV, whose quoted fields may span lines."""
    if Path(path).suffix in ROW_FORMATS:
        return f"row {row}" if short else f"{path}, row {row}"
    line = 1
    for begins, _ in islice(_records(Path(path)), row + 2):  # the header is a record too
        line = begins
    return f"line {line}" if short else f"{path}, line {line}"


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        UserError: no such file, or it cannot be read.
    """
    _check_file(Path(path))
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: not readable: {error.strerror}") from None
