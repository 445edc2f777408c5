"""Ends a training that makes no progress, with one line that states what it waits for."""

import logging
import os
import sys
import threading
from collections.abc import Callable

logger = logging.getLogger("clip_jax")

REPORT_AFTER = 45  # seconds without progress


class StallWatch:
    """A thread that counts the seconds since the training's last progress, and ends the process after a limit.

    Progress is a batch, a step, a save, or a batch of an evaluation. A save in the background has the same limit.
    """

    def __init__(self, minutes: float, saving: Callable[[], bool], folder: str):
        """``minutes`` is the limit, 0 for none. ``saving`` returns whether a save to ``folder`` is not finished."""
        self._limit, self._saving, self._folder = 60 * minutes, saving, folder
        self._waits_for, self._seconds, self._seconds_of_save = "its first batch", 0, 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)
        if minutes:
            self._thread.start()

    def waits_for(self, what: str) -> None:
        """Records progress, and what the main thread waits for next."""
        self._waits_for, self._seconds = what, 0

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _count(self) -> None:
        # By turns of this thread and not by a clock: a process that was suspended has not stalled.
        while not self._closed.wait(1):
            self._seconds += 1
            self._seconds_of_save = self._seconds_of_save + 1 if self._saving() else 0
            for seconds, what in (
                (self._seconds, self._waits_for),
                (self._seconds_of_save, f"the end of a save to {self._folder}"),
            ):
                if seconds == min(REPORT_AFTER, self._limit // 2):
                    logger.warning(
                        "no progress for %d s while the training waits for %s; it ends after config.stall_minutes=%g",
                        *(seconds, what, self._limit / 60),
                    )
                if seconds >= self._limit:
                    self._end(what)

    def _end(self, what: str) -> None:
        print(
            f"failed: no progress for {self._limit / 60:g} minutes while the training waits for {what}; the same "
            "command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(1)
