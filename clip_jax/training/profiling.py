"""Writes a trace of some steps of a training, for XProf, TensorBoard and Perfetto."""

import contextlib
import logging
from collections.abc import Iterator

import jax
from etils import epath

logger = logging.getLogger("clip_jax")


def parse_profile(text: str) -> tuple[int, int] | None:
    """Returns ``(start, stop)`` of ``--profile=START:STOP``, or None for an empty text.

    Raises:
      ValueError: it is not of this form, or the range is empty; one line.
    """
    if not text:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise ValueError(f"--profile={text}: must be START:STOP, two steps, the first below the second")
    return int(start), int(stop)


def check_profile(steps: tuple[int, int] | None, last_step: int) -> None:
    """Raises ValueError if the run has fewer steps than the profile needs."""
    if steps and steps[1] > last_step:
        raise ValueError(f"--profile={steps[0]}:{steps[1]}: the run has only {last_step} steps")


class Profiler:
    """Traces the steps after ``start`` up to ``stop``, on this host.

    The devices are waited for at both ends, so that the trace has all of these steps and no other.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: epath.Path, step: int):
        """``folder`` is where the trace is written; ``step`` steps have been trained."""
        self._start, self._stop = steps or (-1, -1)
        self._folder, self._is_tracing = folder, False
        if steps and step > self._start:
            logger.warning("--profile=%d:%d: nothing is traced, since the run is at step %d already", *steps, step)

    @contextlib.contextmanager
    def step(self, done: int, state: object) -> Iterator[None]:
        """A context for the step after ``done`` steps, which begins with ``state``."""
        if done == self._start:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._is_tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
            yield

    def finish_step(self, done: int, state: object) -> None:
        """Ends the trace if this is its last step; ``state`` is the result of the step."""
        if self._is_tracing and done == self._stop:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes the trace, if one has begun; of fewer steps if the training was interrupted."""
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
            logger.info("wrote a trace of the steps after %d to %s", self._start, self._folder)
