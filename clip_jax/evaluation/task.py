"""The description of an evaluation task: its fields, their checks, and how a JSON file of tasks is read."""

import dataclasses
import difflib
import json
import pathlib
import re

KINDS = ("zero_shot", "retrieval")
METRICS = {
    "zero_shot": ("top_1", "top_5", "mean_per_class", "mean_top_1_top_5", "average_precision_11", "roc_auc"),
    "retrieval": ("image_to_text_recall@1", "text_to_image_recall@1"),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One evaluation task: a row of the registry, or an object in a task file.

    Attributes:
      name: the name that ``--tasks`` takes.
      kind: one of ``KINDS``.
      source: the source of the images, as in :mod:`clip_jax.data.sources`. ``{data}`` is replaced by ``--data``.
      title: the name shown in reports.
      metric: the main metric, one of ``METRICS[kind]``. The default is the first. Tasks of the paper use the paper's.
      prompts: the name of a file in ``prompts/``, without ``.json``. It holds class names and templates.
      class_names: replaces those of ``prompts``.
      labels: the source's names for the classes, in the order of ``class_names``. Leave it empty if the source uses
        class names or class indices (see :mod:`clip_jax.evaluation.labels`).
      templates: replaces those of ``prompts``.
      train, validation: sources for the linear probe. Without ``validation`` a fifth of ``train`` is used. Images of
        classes that the task lacks are left out and counted; the same holds for ``pixel_baseline``.
      other_classes: whether images in ``source`` of other classes are left out and counted, instead of refused.
      first_caption: for retrieval, whether an image's text is its first caption only, which several images may share.
        Otherwise every caption is a text that belongs to one image.
      pixel_baseline: a labeled source for the nearest mean image baseline. Empty: no baseline.
      note: a sentence that is added to the notes of the result.
      groups: names of groups that the task belongs to; ``--tasks`` takes them.
      published: the row of ``published.json`` with other models' numbers on the same task.
      how_to_get: how to get the data; printed when it is missing.
    """

    name: str
    kind: str
    source: str
    title: str = ""
    metric: str = ""
    prompts: str = ""
    class_names: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    train: str = ""
    validation: str = ""
    other_classes: bool = False
    first_caption: bool = False
    pixel_baseline: str = ""
    note: str = ""
    groups: tuple[str, ...] = ()
    published: str = ""
    how_to_get: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError if a value is invalid or a field has no effect."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", self.name, re.ASCII):
            raise ValueError(f"a task's name may have letters, digits, _, - and . only, not {self.name[:40]!r}")
        if self.kind not in KINDS:
            raise ValueError(f"task {self.name}: kind={self.kind!r} must be one of {', '.join(KINDS)}")
        if not self.metric:
            object.__setattr__(self, "metric", METRICS[self.kind][0])
        if self.metric not in METRICS[self.kind]:
            raise ValueError(f"task {self.name}: metric={self.metric!r} must be one of {', '.join(METRICS[self.kind])}")
        if self.labels and self.class_names and len(self.labels) != len(self.class_names):
            raise ValueError(f"task {self.name}: {len(self.class_names)} class_names for {len(self.labels)} labels")
        unused = [key for key in self._unused_keys() if getattr(self, key)]
        if unused:
            without = "" if self.train or unused[0] != "validation" else " without train"
            raise ValueError(
                f"task {self.name}: {unused[0]} has no effect with kind={self.kind!r} and metric={self.metric!r}"
                f"{without}; leave it out"
            )

    def _unused_keys(self) -> tuple[str, ...]:
        """Returns the names of the fields that have no effect. Setting one is an error."""
        if self.kind == "retrieval":
            names = ("prompts", "class_names", "labels", "templates", "other_classes", "note")
            return (*names, "train", "validation", "pixel_baseline")
        unused = ("first_caption",) + (() if self.train else ("validation",))
        return unused + (("pixel_baseline",) if self.metric == "average_precision_11" else ())


def read_task_file(name: str) -> list[Task]:
    """Returns the tasks of a JSON file: one object with the attributes of :class:`Task`, or a list of them.

    Raises:
      ValueError: the file is not valid JSON, or a task in it is not valid; one line that names the file.
      FileNotFoundError: the file does not exist.
    """
    try:
        content = json.loads(pathlib.Path(name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if content == []:
        raise ValueError(f"{name} has no tasks; write one object or a list of objects")
    try:
        return [_from_json(entry) for entry in (content if isinstance(content, list) else [content])]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _from_json(entry: object) -> Task:
    if not isinstance(entry, dict):
        raise ValueError(f"a task must be a JSON object, not {type(entry).__name__}")
    defaults = {field.name: field.default for field in dataclasses.fields(Task)}
    for key, value in entry.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.0)[0]
            raise ValueError(f"a task has no key {key!r}; did you mean {near!r}?")
        if isinstance(defaults[key], tuple):
            valid, kind = isinstance(value, list) and all(isinstance(item, str) for item in value), "a list of strings"
        elif isinstance(defaults[key], bool):
            valid, kind = isinstance(value, bool), "true or false"
        else:
            valid, kind = isinstance(value, str), "a string"
        if not valid:
            raise ValueError(f"{key} must be {kind}, not {json.dumps(value, ensure_ascii=False)[:80]}")
    missing = [key for key in ("name", "kind", "source") if not entry.get(key)]
    if missing:
        raise ValueError(f"a task needs {', '.join(missing)}")
    return Task(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
