"""Reads images with captions from TensorFlow Datasets that are prepared as ArrayRecord files, without TensorFlow.

Nested fields are named with slashes: ``tfds:coco_captions/train?image=image&text=captions/text``.
"""

from collections.abc import Callable

from clip_jax.data.sources.base import MissingPackageError, Pair, PairError
from clip_jax.data.sources.class_names import with_names
from clip_jax.data.sources.digest import digest
from clip_jax.data.sources.fields import Fields, name_some, parse_fields, split_options
from clip_jax.errors import first_line

DEFAULT_FIELDS = Fields(image=("image",), captions=(("captions/text", 1.0),))


class TFDSSource:
    """Pairs of one split, in its order.

    Args:
      name: of the data set.
      split: of the data set, such as ``train[:10%]``.
      fields: which features are read.
      data_dir: folder of the prepared data sets; by default that of tensorflow-datasets.

    Raises:
      FileNotFoundError: the data set or the split does not exist.
      MissingPackageError: tensorflow-datasets is not installed.
      ValueError: it is not prepared as ArrayRecord, or has no such field.
    """

    def __init__(self, name: str, split: str, fields: Fields, data_dir: str | None = None):
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise MissingPackageError(
                f"tfds:{name} needs tensorflow-datasets: pip install 'clip-jax-tpu[tfds]'"
            ) from None
        self._name, self._split, self._fields, self._data_dir = name, split, fields, data_dir
        try:
            builder = tfds.builder(name, data_dir=data_dir)
            known = builder.info.splits
        except Exception as error:  # tfds raises its own kinds; the first line has the reason
            raise FileNotFoundError(f"tfds:{name}: {first_line(error)}") from None
        if not known:
            raise FileNotFoundError(
                f"tfds:{name} is not prepared in {builder.data_dir}; run tfds build {name} --file_format=array_record"
            )
        if split.partition("[")[0] not in known:
            raise FileNotFoundError(f"tfds:{name} has no split {split!r}, only {', '.join(known)}")
        features = builder.info.features
        for field in fields.names():
            _check_field(features, field, f"tfds:{name}")
        split_info = known[split.partition("[")[0]]
        self._content = [str(builder.info.full_name), split_info.num_bytes, list(split_info.shard_lengths or [])]
        self._unused = [name for name in features if name not in {field.partition("/")[0] for field in fields.names()}]
        self._class_names = {field: _names_of(features, field) for field in fields.names()}
        try:
            decoders = {field: tfds.decode.SkipDecoding() for field in fields.image}
            self._records = builder.as_data_source(split, decoders=decoders)
        except Exception as error:
            raise ValueError(f"tfds:{name}: {first_line(error)}") from None

    def __reduce__(self) -> tuple:
        return TFDSSource, (self._name, self._split, self._fields, self._data_dir)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Pair:
        name = f"{self._name}/{self._split}, record {index}"
        try:
            record = self._records[index]
        except Exception as error:
            raise PairError(f"{name} is damaged: {type(error).__name__}: {first_line(error)}") from None
        image = next((value for field in self._fields.image if isinstance(value := _find(record, field), bytes)), None)
        if image is None:
            raise PairError(f"{name} has no image bytes in {', '.join(self._fields.image)}", "no_image")
        get = with_names(_texts_of(record), self._class_names, name)
        captions, proportions = self._fields.captions_of(get, name)
        return Pair(image, captions, name, self._fields.label_of(get), proportions)

    def notes(self) -> list[str]:
        return [f"not used: features {name_some(self._unused)}"] if self._unused else []

    def fingerprint(self) -> str:
        return digest(self._content, self._split, len(self), repr(self._fields))


def _check_field(features, field: str, name: str) -> None:
    found = features
    for part in field.split("/"):
        found = getattr(found, "feature", found)  # the element of a sequence
        if part not in (getattr(found, "keys", list)() or ()):
            raise ValueError(f"{name} has no field {field!r}, only {', '.join(features.keys())}")
        found = found[part]


def _names_of(features, field: str) -> list[str]:
    for part in field.split("/"):
        features = getattr(features, "feature", features)[part]
    return list(getattr(getattr(features, "feature", features), "names", None) or [])


def _find(record: object, field: str) -> object:
    for part in field.split("/"):
        record = [item[part] for item in record] if isinstance(record, list) else record[part]
    return record


def _texts_of(record: dict) -> Callable[[str], object]:
    def text(value: object) -> object:
        if isinstance(value, list | tuple) or hasattr(value, "tolist"):
            values = value.tolist() if hasattr(value, "tolist") else value
            return [text(item) for item in values] if isinstance(values, list | tuple) else text(values)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    return lambda field: text(_find(record, field))


def open_tfds(where: str) -> TFDSSource:
    """Opens ``tfds:where``. Raises as :class:`TFDSSource`, or ValueError for a wrong option."""
    path, options = split_options(where)
    fields, others = parse_fields(options, DEFAULT_FIELDS, f"tfds:{where}", also=("data_dir",))
    name, slash, split = path.rpartition("/")
    if not slash or not split:
        raise ValueError(f"tfds:{where}: write tfds:NAME/SPLIT")
    return TFDSSource(name, split, fields, others.get("data_dir"))
