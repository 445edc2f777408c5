"""Writes TensorBoard's event files, in the calling thread.

tensorboardX's own SummaryWriter hands events to a thread through a bounded queue. If the disk is full, the thread ends,
and the training would wait for it forever.
"""

import contextlib
import os
import time

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import image, scalar

FLUSH_EVERY = 10  # seconds; a flush waits for the disk


class TensorBoard:
    """An event file in a folder, for the steps from ``first_step`` on. All methods may raise OSError."""

    def __init__(self, folder: str | os.PathLike, first_step: int):
        """TensorBoard drops what earlier files of the folder have of ``first_step`` and later steps."""
        os.makedirs(folder, exist_ok=True)
        self._events = EventsWriter(os.path.join(folder, "events"))
        self._flushed = time.monotonic()
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the metrics of a step."""
        for name, value in scalars.items():
            self._write_summary(step, scalar(name, value))

    def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes an image, uint8 ``[H, W, 3]``."""
        self._write_summary(step, image(name, pixels, dataformats="HWC"))

    def close(self) -> None:
        """Writes what is left and closes the file. On a full disk, what is left is lost."""
        with contextlib.suppress(OSError):
            self._events.close()

    def _write_summary(self, step: int, summary: Summary) -> None:
        self._write(Event(step=step, summary=summary))
        if time.monotonic() - self._flushed > FLUSH_EVERY:
            self._events.flush()
            self._flushed = time.monotonic()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
