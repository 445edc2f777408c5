"""The history of a run: which batches its steps have drawn, from which data and with which settings.

A run is a list of segments. Each change of the data or of the settings begins one. From the segments follows the data
position of each step, which a checkpoint must have. The file is ``history.jsonl`` in the run's folder.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from clip_jax.errors import FailedError
from clip_jax.files import write_atomically
from clip_jax.json_lines import read_objects

NAME = "history.jsonl"


class Segment(NamedTuple):
    """The steps of a run between two changes.

    Attributes:
      step: the last step before it.
      batch: batches drawn before it, trained on or skipped.
      position: examples drawn before it, on all hosts.
      global_batch_size: pairs in a step.
      skip_batches: ``config.data.skip_batches``.
      steps: the number of steps of the whole run.
      data_fingerprint: of the data.
      data_start: the position at which the order of this data began.
      data_changes: how often the data has changed before.
      changed: the keys that changed, with the old and the new value.
      from_step: the step to which ``--from-step`` went back, or None.
      time: when it began, UTC.
    """

    step: int
    batch: int
    position: int
    global_batch_size: int
    skip_batches: str
    steps: int
    data_fingerprint: str
    data_start: int = 0
    data_changes: int = 0
    changed: dict[str, list] = {}  # noqa: RUF012 (never changed in place)
    from_step: int | None = None
    time: str = ""


def parse_ranges(text: str) -> list[tuple[int, int]]:
    """Returns ``(start, stop)`` of each range of ``START:STOP,...``, sorted; ranges that touch are joined.

    Raises:
      ValueError: the text is not of this form, or a range is empty; one line.
    """
    found = []
    for part in filter(None, text.replace(" ", "").split(",")):
        start, colon, stop = part.partition(":")
        if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
            raise ValueError(f"{part} must be START:STOP with whole numbers, the first below the second")
        found.append((int(start), int(stop)))
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(found):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


def active(segments: Sequence[Segment]) -> list[Segment]:
    """Returns the segments that led to the newest state: without those that ``--from-step`` has left."""
    found: list[Segment] = []
    for segment in segments:
        found = [before for before in found if before.step < segment.step] + [segment]
    return found


def segment_at(segments: Sequence[Segment], step: int) -> Segment:
    """Returns the segment of the active ones that trains the step after ``step`` steps."""
    return next(segment for segment in reversed(segments) if segment.step <= step)


def next_batch(segments: Sequence[Segment], step: int) -> tuple[int, int]:
    """Returns the number of the batch that is drawn after ``step`` steps, counted from 0, and its data position.

    Batches of ``skip_batches`` are passed over.
    """
    segment = segment_at(segments, step)
    number = segment.batch + step - segment.step
    for start, stop in parse_ranges(segment.skip_batches):
        skipped_from = max(start, segment.batch)
        if number >= skipped_from and stop > skipped_from:
            number += stop - skipped_from
    return number, segment.position + (number - segment.batch) * segment.global_batch_size


def position_after(segments: Sequence[Segment], step: int) -> int:
    """Returns the examples that all hosts have drawn after ``step`` steps: the position that a checkpoint must have."""
    if step == 0:
        return 0
    return next_batch(segments, step - 1)[1] + segment_at(segments, step - 1).global_batch_size


def begin(segments: Sequence[Segment], step: int, segment: Segment) -> Segment:
    """Returns ``segment`` as the one that begins after ``step`` steps of the active segments."""
    batch = next_batch(segments, step - 1)[0] + 1 if step else 0
    return segment._replace(step=step, batch=batch, position=position_after(segments, step))


def first_segment(global_batch_size: int) -> Segment:
    """Returns the only segment of a run without a history, such as one of an earlier version."""
    return Segment(0, 0, 0, global_batch_size, "", 0, "")


def continued(segments: Sequence[Segment], now: Segment, step: int) -> list[Segment]:
    """Returns all segments of a run that goes on after ``step`` steps with the settings and the data of ``now``.

    A segment is added if something has changed, or if the run goes on from a step before the last change. New data has
    an order of its own, which begins at its first example.
    """
    before = active(segments)
    if not before:
        return [now]
    settings = ("global_batch_size", "skip_batches", "steps", "data_fingerprint")
    is_same = all(getattr(now, name) == getattr(before[-1], name) for name in settings)
    if is_same and not now.changed and now.from_step is None and step >= before[-1].step:
        return list(segments)
    segment, data = begin(before, step, now), segment_at(before, step)
    if now.data_fingerprint == data.data_fingerprint or not data.data_fingerprint:
        segment = segment._replace(data_start=data.data_start, data_changes=data.data_changes)
    else:
        changes = 1 + max(earlier.data_changes for earlier in segments)
        segment = segment._replace(data_start=segment.position, data_changes=changes)
    return [*segments, segment]


def read_history(workdir: epath.Path) -> list[Segment]:
    """Returns all segments in the order in which they were written; none if there is no file.

    Raises:
      FailedError: a line is damaged.
    """
    path = workdir / NAME
    if not path.exists():
        return []
    segments = []
    for number, found in enumerate(read_objects(path.read_bytes()), start=1):
        if found is None or not _is_segment(found):
            raise FailedError(f"{path}: line {number} is damaged; restore the file, or this line of it")
        segments.append(Segment(**found))
    return segments


def _is_segment(found: dict) -> bool:
    types = Segment.__annotations__
    return found.keys() == types.keys() and all(
        isinstance(found[name], dict if name == "changed" else types[name]) for name in types
    )


def write_history(workdir: epath.Path, segments: Sequence[Segment]) -> None:
    """Writes the file, whole or not at all."""
    write_atomically(workdir / NAME, "".join(json.dumps(segment._asdict()) + "\n" for segment in segments))
