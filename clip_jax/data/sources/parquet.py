"""Pairs from Parquet files as Hugging Face writes them: a column of pictures as bytes, or as ``{bytes, path}``.

Parquet has no random access below a row group, so a picture costs the reading of its group; the last few are kept. With
groups of more than some tens of pictures, write ArrayRecord files from it once (``python -m clip_jax.prepare``).
"""

import functools
import os

import numpy as np

from clip_jax.data.sources.base import MissingPackageError, Pair, PairError, ShardError
from clip_jax.data.sources.digest import digest
from clip_jax.data.sources.fields import Fields, nested, parse_fields, split_options
from clip_jax.data.sources.files import Stamp, check_unchanged, ends_digest, expand, is_remote, stamp

DEFAULT_FIELDS = Fields(image=("image",), captions=(("caption", 1.0),))
ROW_GROUPS_KEPT = 4  # in each process


class ParquetSource:
    """Pairs from Parquet files, in the order of the files.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is no Parquet file, or has no column of this name.
    """

    def __init__(self, paths: list[str], fields: Fields):
        parquet = _import_parquet()
        self._paths, self._fields = paths, fields
        self._stamps = [stamp(path) for path in paths]
        needed = [*fields.image, *(name.partition(".")[0] for name, _ in fields.captions)]
        self._columns = list(dict.fromkeys([*needed, *filter(None, [fields.label.partition(".")[0]])]))
        groups = []  # file, row group, rows
        for number, path in enumerate(paths):
            try:
                with _open(path) as file, parquet.ParquetFile(file) as table:
                    missing = [name for name in self._columns if name not in table.schema_arrow.names]
                    found = ", ".join(table.schema_arrow.names)
                    rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            except OSError:
                raise
            except Exception as error:  # pyarrow raises kinds of its own
                raise ValueError(f"{path} is no Parquet file: {' '.join(str(error).split())}") from None
            if missing:
                raise ValueError(
                    f"{path} has no column {missing[0]!r}, only {found}; name it with ?image= or ?caption="
                )
            groups += [(number, group, count) for group, count in enumerate(rows)]
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        if not len(self):
            raise ValueError(f"{', '.join(paths)}: no rows")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Pair:
        place = int(np.searchsorted(self._ends, index, side="right"))
        number, group, rows = self._groups[place].tolist()
        path, row = self._paths[number], index - (int(self._ends[place]) - rows)
        name = f"{path}, row group {group}, row {row}"
        try:
            columns = _read_row_group(path, self._stamps[number], group, tuple(self._columns))
            record = {column: columns[column][row].as_py() for column in self._columns}
        except ShardError:
            raise
        except Exception as error:  # damaged pages raise kinds of pyarrow's own
            raise PairError(f"{name}: {' '.join(str(error).split())}") from None
        image = next((record[field] for field in self._fields.image if record[field] is not None), None)
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes):
            raise PairError(f"{name} has no picture's bytes in {', '.join(self._fields.image)}", "no_picture")
        get = nested(record.get, name)
        captions, weights = self._fields.captions_of(get, name)
        return Pair(image, captions, name, self._fields.label_of(get), weights)

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


def _open(path: str):
    if not is_remote(path):
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()


@functools.lru_cache(ROW_GROUPS_KEPT)
def _read_row_group(path: str, at_start: Stamp, group: int, columns: tuple[str, ...]) -> dict:
    parquet = _import_parquet()
    if not is_remote(path):
        try:
            check_unchanged(path, path, at_start)
        except FileNotFoundError:
            raise ShardError(f"{path} is gone") from None
    with _open(path) as file, parquet.ParquetFile(file) as table:
        rows = table.read_row_group(group, columns=list(columns), use_threads=False)
    return {name: rows.column(name) for name in columns}


def open_parquet(where: str) -> ParquetSource:
    place, options = split_options(where)
    fields, _ = parse_fields(options, DEFAULT_FIELDS, f"parquet:{where}")
    return ParquetSource(expand(place), fields)
