"""Reads CSV, Parquet and Arrow tables, completely or in chunks. Error messages contain the file and the line."""

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
ROW_FORMATS = PARQUET + ARROW  # formats without lines; a file with any other suffix is read as CSV


def read_chunks(
    path: str | Path, columns: Sequence[str], id_columns: Sequence[str], rows: int | None = None
) -> Iterator[pa.Table]:
    """Read a table of any format in chunks, and check it.

    Args:
        path: a Parquet file (``.parquet``, ``.pq``), an Arrow file (``.arrow``, ``.feather``) or a CSV file (any other
            suffix).
        columns: required columns. They are cast to text (large_string).
        id_columns: those of ``columns`` that contain ids. In them, no value may be missing or empty.
        rows: maximum number of rows in a chunk; None: one chunk with all rows.

    Yields:
        The chunks. Each is checked before it is yielded.

    Raises:
        UserError: the file does not exist or is not a table, it has no rows, a column or an id is missing, or a CSV row
            has more or fewer fields than the header. The message contains the file. For an invalid row, it also
            contains the line or the row number.
    """
    path = Path(path)
    _check_file(path)
    if path.suffix not in ROW_FORMATS:
        _check_rows(path, columns)
    count = 0
    for table in (_arrow_tables if path.suffix in ROW_FORMATS else _csv_tables)(path, rows):
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise UserError(f"{path}: column '{missing[0]}' is missing; the table has {', '.join(table.column_names)}")
        _check_not_repeated(path, columns, table.column_names)
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


def _check_not_repeated(path: Path, columns: Sequence[str], header: list[str]) -> None:
    repeated = [name for name in columns if header.count(name) > 1]
    if repeated:
        raise UserError(f"{path}: column '{repeated[0]}' exists more than once; rename or remove all but one")


def _check_rows(path: Path, columns: Sequence[str]) -> None:
    """Check a CSV for errors that pandas does not report.

    pandas fills up rows that are too short. If two columns have the same name, it uses the first one. Without this
    check, an extra quote or line end inside a text would turn the rest of the text into a node.
    """
    header: list[str] | None = None
    try:
        for line, fields in _records(path):
            if header is None:
                header = fields
                _check_not_repeated(path, columns, header)
            elif len(fields) != len(header):
                raise UserError(
                    f"{path}, line {line}: {len(fields)} fields where the header has {len(header)}; look for a "
                    "comma or a line end in a text without quotes, or for a quote that is not closed"
                )
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a CSV table in UTF-8: {str(error).strip()}") from None


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a CSV, header included, each with the number of its first line. Skip blank lines."""
    csv.field_size_limit(1 << 30)  # the default is 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_lines(path, file))
        line = 1
        for fields in reader:
            if fields:  # a blank line gives no fields; a line of two quotes gives one empty field
                yield line, fields
            line = reader.line_num + 1


def _lines(path: Path, lines: Iterator[str]) -> Iterator[str]:
    """Yield the lines of a CSV. A line of spaces and tabs is yielded as an empty line, because pandas skips it."""
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise UserError(
                f"{path}, line {number}: contains a NUL byte; the file is damaged, or not a CSV table in UTF-8"
            )
        yield line if line.strip(" \t\r\n") else "\n"


def _csv_tables(path: Path, rows: int | None) -> Iterator[pa.Table]:
    frame: pd.DataFrame | None = None
    try:
        with pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, iterator=True
        ) as reader:
            while frame is None or rows is not None:
                with warnings.catch_warnings():
                    # Without this, pandas cuts a row with too many fields.
                    warnings.simplefilter("error", pd.errors.ParserWarning)
                    try:
                        frame = reader.read(rows)
                    except StopIteration:
                        return
                yield pa.Table.from_pandas(frame, preserve_index=False)
    except pd.errors.EmptyDataError:
        raise UserError(f"{path}: the file is empty") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a CSV table in UTF-8: {str(error).strip()}") from None


def _arrow_tables(path: Path, rows: int | None) -> Iterator[pa.Table]:
    """Yield the chunks of a Parquet or Arrow file, with at most ``rows`` rows each."""
    file_format = "Parquet" if path.suffix in PARQUET else "Arrow"
    try:
        if file_format == "Parquet" and rows is None:
            yield _validated(pq.read_table(path))
        elif file_format == "Parquet":
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(rows):
                    yield _validated(pa.Table.from_batches([batch]))
        else:
            with pa.memory_map(str(path)) as file:
                tables = (_validated(pa.Table.from_batches([batch])) for batch in arrow_batches(file))
                if rows is None:
                    yield from [pa.concat_tables(batches) for batches in [list(tables)] if batches]
                else:
                    yield from (table.slice(start, rows) for table in tables for start in range(0, len(table), rows))
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as {file_format}: {str(error).strip()}") from None


def _validated(table: pa.Table) -> pa.Table:
    """Return the table after two checks: its offsets are within its data, and its texts are UTF-8.

    Without these checks, reading a damaged table could crash the process.

    Raises:
        pa.ArrowException: the table is damaged.
    """
    table.validate(full=True)
    return table


def arrow_batches(source: pa.NativeFile | pa.Buffer) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of an Arrow file or stream. Uncompressed batches of a memory map are not copied."""
    try:
        file = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        if isinstance(source, pa.NativeFile):
            source.seek(0)
        yield from pa.ipc.open_stream(source)
    else:
        yield from (file.get_batch(number) for number in range(file.num_record_batches))


def _with_text(path: Path, table: pa.Table, columns: Sequence[str], id_columns: Sequence[str]) -> pa.Table:
    """Return the table with ``columns`` cast to large_string."""
    for name in columns:
        number = table.column_names.index(name)
        data_type = table.schema.field(number).type
        data_type = data_type.value_type if pa.types.is_dictionary(data_type) else data_type  # a pandas categorical
        if name in id_columns and not (pa.types.is_integer(data_type) or is_text(data_type)):
            raise UserError(f"{path}: column '{name}' has type {data_type}; ids must be integers or text")
        try:
            table = table.set_column(number, name, table[number].cast(data_type).cast(pa.large_string()))
        except pa.ArrowException:
            raise UserError(
                f"{path}: column '{name}' has type {data_type}, which cannot be converted to text"
            ) from None
    return table


def is_text(data_type: pa.DataType) -> bool:
    """Return whether an Arrow type is one of the string types."""
    return pa.types.is_string(data_type) or pa.types.is_large_string(data_type) or pa.types.is_string_view(data_type)


def location(path: str | Path, row: int, short: bool = False) -> str:
    """Return the location of a row for a message: the row number. For a CSV: the number of the row's first line.

    A CSV is read again up to the row to count the lines, because quoted fields may span lines.

    Args:
        path: the table.
        row: index of the row, from 0.
        short: omit the path.
    """
    if Path(path).suffix in ROW_FORMATS:
        return f"row {row}" if short else f"{path}, row {row}"
    line = 1
    for first_line, _ in islice(_records(Path(path)), row + 2):  # the header is a record too
        line = first_line
    return f"line {line}" if short else f"{path}, line {line}"


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        UserError: the file does not exist or cannot be read.
    """
    _check_file(Path(path))
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
