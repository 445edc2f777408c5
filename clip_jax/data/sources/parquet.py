"""Reads images with captions from Parquet files as Hugging Face writes them. Images are bytes or ``{bytes, path}``.

Parquet has no random access below a row group, so every image costs the reading of its group; the last few are cached.
If groups hold more than some tens of images, convert them once to ArrayRecord (``python -m clip_jax.prepare``).
"""

import functools
import os
from collections import Counter

import numpy as np

from clip_jax.data.sources.base import MissingPackageError, Pair, PairError, ShardError
from clip_jax.data.sources.buckets import is_remote
from clip_jax.data.sources.class_names import features_of, names_of, with_names
from clip_jax.data.sources.digest import digest
from clip_jax.data.sources.fields import (
    Fields,
    column_notes,
    column_of,
    count_files,
    nested,
    parse_fields,
    split_options,
)
from clip_jax.data.sources.files import Stamp, check_unchanged, ends_digest, expand, open_file, stamp
from clip_jax.data.sources.skipping import read_skipped
from clip_jax.errors import one_line

DEFAULT_FIELDS = Fields(image=("image",), captions=(("caption", 1.0),))
CACHED_ROW_GROUPS = 4  # in each process


class ParquetSource:
    """Pairs from Parquet files, in the order of the files.

    Args:
      paths: the files.
      fields: which columns are read.
      skip: a list of files to skip, see :mod:`clip_jax.data.sources.skipping`.

    Raises:
      FileNotFoundError: a file is missing.
      MissingPackageError: pyarrow is not installed.
      ValueError: a file is not a Parquet file, or lacks a column.
    """

    def __init__(self, paths: list[str], fields: Fields, skip: str = ""):
        self._paths, self._fields, self._skipped = paths, fields, read_skipped(skip, paths)
        self._stamps = [stamp(path) for path in paths]
        self._names: dict[str, list[str]] = {}  # names of classes, by field
        self._notes, groups = Counter(), []  # groups: file, row group, rows
        for number, path in enumerate(paths):
            schema, rows = _read_footer(path)
            for field in fields.names():
                _check_column(path, schema.names, field)
            features = features_of(schema.metadata)
            names = {field: names_of(features, field) for field in fields.names()}
            if number and names != self._names:
                field = next(field for field in names if names[field] != self._names[field])
                raise ValueError(f"{path} and {paths[0]} name the classes of {field} differently; use two sources")
            self._names = names
            self._notes.update(column_notes(schema.names, fields))
            groups += [(number, group, count) for group, count in enumerate(rows)]
        self._columns = list(dict.fromkeys(column_of(schema.names, field) for field in fields.names()))
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        if not len(self):
            raise ValueError(f"{', '.join(paths)}: no rows")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Pair:
        position = int(np.searchsorted(self._ends, index, side="right"))
        number, group, rows = self._groups[position].tolist()
        path, row = self._paths[number], index - (int(self._ends[position]) - rows)
        self._skipped.check(number, path)
        name = f"{path}, row group {group}, row {row}"
        try:
            columns = _read_row_group(path, self._stamps[number], group, tuple(self._columns))
            record = {column: columns[column][row].as_py() for column in self._columns}
        except ShardError:
            raise
        except Exception as error:  # pyarrow raises its own kinds for damaged pages
            raise PairError(f"{name}: {one_line(error)}") from None
        get = with_names(nested(record, name), self._names, name)
        image = next((value for field in self._fields.image if (value := get(field)) is not None), None)
        elsewhere = ""
        if isinstance(image, dict):
            elsewhere = f", only the path {image['path']}" if image.get("path") else ""
            image = image.get("bytes")
        if not isinstance(image, bytes):
            wanted = ", ".join(self._fields.image)
            raise PairError(f"{name} has no image bytes in {wanted}{elsewhere}", "no_image")
        captions, proportions = self._fields.captions_of(get, name)
        return Pair(image, captions, name, self._fields.label_of(get), proportions)

    def notes(self) -> list[str]:
        counts = np.bincount(self._groups[:, 0], self._groups[:, 2], minlength=len(self._paths))
        return count_files(self._notes, len(self._paths)) + self._skipped.notes(counts)

    def fingerprint(self) -> str:
        files = [
            (os.path.basename(path), size, time if is_remote(path) else ends_digest(path))
            for path, (size, time) in zip(self._paths, self._stamps, strict=True)
        ]
        return digest(files, repr(self._fields))


def _import_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError("Parquet files need pyarrow: pip install 'clip-jax-tpu[parquet]'") from None
    return pyarrow.parquet


def _read_footer(path: str) -> tuple:
    """Returns the schema of a file and the number of rows of each row group.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not a Parquet file.
    """
    parquet = _import_parquet()
    try:
        with open_file(path) as file, parquet.ParquetFile(file) as table:
            groups = range(table.num_row_groups)
            return table.schema_arrow, [table.metadata.row_group(group).num_rows for group in groups]
    except OSError as error:
        if error.filename or error.errno or is_remote(path):
            raise
        raise ValueError(f"{path} is not a Parquet file: {one_line(error)}") from None
    except Exception as error:  # pyarrow raises its own kinds
        raise ValueError(f"{path} is not a Parquet file: {one_line(error)}") from None


def _check_column(path: str, columns: list[str], field: str) -> None:
    column = column_of(columns, field)
    if column is None:
        raise ValueError(
            f"{path} has no column {field!r}, only {', '.join(columns)}; name it with ?image=, ?caption= or ?label="
        )
    if columns.count(column) > 1:
        raise ValueError(f"{path} has {columns.count(column)} columns {column!r}; rename all but one")


@functools.lru_cache(CACHED_ROW_GROUPS)
def _read_row_group(path: str, at_start: Stamp, group: int, columns: tuple[str, ...]) -> dict:
    parquet = _import_parquet()
    if not is_remote(path):
        try:
            check_unchanged(path, path, at_start)
        except FileNotFoundError:
            raise ShardError(f"{path} no longer exists") from None
    with open_file(path, at_start) as file, parquet.ParquetFile(file) as table:
        rows = table.read_row_group(group, columns=list(columns), use_threads=False)
    return {name: rows.column(name) for name in columns}


def open_parquet(where: str) -> ParquetSource:
    """Opens ``parquet:where``. Raises as :class:`ParquetSource`, or ValueError for a wrong option."""
    path, options = split_options(where)
    fields, others = parse_fields(options, DEFAULT_FIELDS, f"parquet:{where}", also=("skip",))
    return ParquetSource(expand(path), fields, others.get("skip", ""))
