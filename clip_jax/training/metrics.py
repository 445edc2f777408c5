"""Writes a run's metrics to the log, ``metrics.jsonl``, TensorBoard and W&B, from the first process only."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from typing import IO

import jax
import numpy as np
from etils import epath

from clip_jax.json_lines import open_to_append, read_objects
from clip_jax.training.tensorboard import TensorBoard
from clip_jax.training.wandb_log import WandbLog

PARTS = ("input", "save", "evaluation")  # of the loop's time, in addition to the steps

logger = logging.getLogger("clip_jax")


def format_duration(seconds: float) -> str:
    """Returns seconds as ``1h02m``, ``3m05s`` or ``42s``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class MetricWriter:
    """Writes scalars; on hosts other than the first it does nothing."""

    def __init__(self, workdir: epath.Path, step: int, wandb: WandbLog | None = None):
        """``step`` is that of the checkpoint: TensorBoard drops what an earlier process wrote of later steps."""
        self._file: IO | None = None
        self._wandb = wandb
        if jax.process_index() == 0:
            self._folder = workdir
            self._file = open_to_append(workdir / "metrics.jsonl")
            self._tensorboard = TensorBoard(workdir / "tensorboard", step + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self._file is None:
            return
        with self._named():
            self._file.write(json.dumps({"step": step, **scalars}) + "\n")
            self._file.flush()
            self._tensorboard.write_scalars(step, scalars)
        if self._wandb:
            self._wandb.write(step, scalars)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image, uint8 ``[H, W, 3]``, to TensorBoard and W&B."""
        if self._file is None:
            return
        with self._named():
            self._tensorboard.write_image(step, name, image)
        if self._wandb:
            self._wandb.write_image(step, name, image)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, which write() has reported
                self._file.close()
            self._tensorboard.close()
            if self._wandb:
                self._wandb.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Adds the folder to an error of the disk, since writing to an open file names none."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder / "metrics.jsonl")) from None


class StepLog:
    """Logs each step after the next one has started, so that the host never waits for the newest step.

    Reading the metrics of the previous step also limits the host: at most two steps are in progress.
    """

    def __init__(
        self, every: int, images_per_step: int, last_step: int, writer: MetricWriter, seconds_before: float = 0
    ):
        """``seconds_before`` is the run's training time in earlier processes."""
        self._every, self._images_per_step, self._last_step, self._writer = every, images_per_step, last_step, writer
        self._started = time.perf_counter() - seconds_before
        self._has_data = False
        self._parts, self._parts_since = dict.fromkeys(PARTS, 0.0), time.perf_counter()
        self._pending: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None
        self._restart_clock()

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """A context that measures the time of the loop in one of ``PARTS``."""
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self._parts[part] += elapsed
        if part != "input":
            return
        self._waited += elapsed
        if not self._has_data:
            logger.info("first batch after %.1f s", elapsed)
            self._has_data = True

    def is_due(self, step: int) -> bool:
        """Returns whether this step is logged."""
        return step % self._every == 0 or step == self._last_step

    def add(self, step: int, metrics: dict[str, jax.Array], scalars: dict[str, float]) -> None:
        """Stores the metrics of the step just started, and logs those of the previous one.

        ``scalars`` are logged with ``metrics``.

        Raises:
          FloatingPointError: the loss or the gradient of the previous step is not finite.
        """
        self._log_pending()
        self._pending = (step, metrics, scalars)

    def flush(self) -> None:
        """Logs the last step. The time until the next step is not counted as training time."""
        self._log_pending()
        self._restart_clock()

    @staticmethod
    def check_finite(step: int, metrics: dict[str, jax.Array]) -> None:
        """Raises FloatingPointError if the step's loss or gradient is not finite: its state must not be saved."""
        for name in ("loss", "gradient_norm"):
            value = float(metrics[name])
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {step}")

    def _restart_clock(self) -> None:
        self._since: tuple[float, int] | None = None  # time and step at which the rate's measurement began
        self._waited = 0.0

    def _log_pending(self) -> None:
        if self._pending is None:
            return
        step, metrics, others = self._pending
        self._pending = None
        self.check_finite(step, metrics)
        now = time.perf_counter()
        if self._since is None:
            self._since = (now, step)  # the first step's time is mostly compilation
            self._waited = 0.0
        if not self.is_due(step):
            return
        values = {name: float(value) for name, value in metrics.items()} | others
        # The loss of a source without a pair in the batch is NaN.
        scalars = {name: value for name, value in values.items() if math.isfinite(value)}
        scalars["seconds"] = now - self._started
        scalars |= self._seconds_by_part(now)
        elapsed, steps = now - self._since[0], step - self._since[1]
        if steps:
            scalars["images_per_second"] = self._images_per_step * steps / elapsed
            scalars["images_per_second_per_host"] = scalars["images_per_second"] / jax.process_count()
            scalars["data_wait_share"] = self._waited / elapsed
            scalars["seconds_left"] = elapsed / steps * (self._last_step - step)
            self._since, self._waited = (now, step), 0.0
        self._writer.write(step, scalars)
        logger.info("%s", progress_line(step, self._last_step, scalars))

    def _seconds_by_part(self, now: float) -> dict[str, float]:
        """Returns the seconds since the last record by part; what is in none of ``PARTS`` is the steps' time."""
        seconds = {f"seconds/{part}": spent for part, spent in self._parts.items()}
        seconds["seconds/step"] = now - self._parts_since - sum(self._parts.values())
        self._parts, self._parts_since = dict.fromkeys(PARTS, 0.0), now
        return seconds


def progress_line(step: int, last_step: int, scalars: dict[str, float]) -> str:
    """Returns a line of the log, explained in ``docs/training.md``."""
    accuracy = (scalars["image_to_text_accuracy"] + scalars["text_to_image_accuracy"]) / 2
    parts = [
        f"step {step:>{len(str(last_step))}}/{last_step}",
        f"loss {scalars['loss']:.4f}",
        f"accuracy {accuracy:.1%}",
    ]
    if "images_per_second" in scalars:
        rate = scalars["images_per_second"]
        parts.append(f"{rate:,.0f} images/s")
        if jax.device_count() > 1:
            parts.append(f"{rate / jax.device_count():,.1f} images/s/chip")
        if jax.process_count() > 1:
            parts.append(f"{scalars['images_per_second_per_host']:,.0f} images/s/host")
        parts.append(f"input wait {scalars['data_wait_share']:.0%}")
        parts.append(f"{format_duration(scalars['seconds_left'])} left")
    return "  ".join(parts)


def training_seconds(history: list[dict[str, float]], step: int) -> float:
    """Returns the seconds that a run trained until ``step``, over all its processes; ``history``: see read_metrics."""
    return max((record.get("seconds", 0) for record in history if record["step"] <= step), default=0)


def read_metrics(workdir: epath.Path) -> list[dict[str, float]]:
    """Returns the records of ``metrics.jsonl``, training and evaluation, sorted by step.

    A killed run repeats the steps since its last checkpoint: the last record of a step replaces earlier ones. Lines
    that are damaged, or cut short by a kill, are left out and counted in the log.
    """
    lines: dict[tuple, dict] = {}
    found = read_objects((workdir / "metrics.jsonl").read_bytes())
    whole = [record for record in found if record is not None and _is_whole(record)]
    for record in whole:
        lines[record["step"], "loss" not in record] = record
    if len(whole) < len(found):
        logger.warning("metrics.jsonl: %d of %d lines are damaged and left out", len(found) - len(whole), len(found))
    return [lines[key] for key in sorted(lines)]


def _is_whole(record: dict) -> bool:
    return isinstance(record.get("step"), int) and all(isinstance(value, int | float) for value in record.values())
