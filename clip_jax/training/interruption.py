"""Lets SIGINT and SIGTERM stop a training between two steps, after a save."""

import os
import signal

import jax


class Interruption:
    """Catches SIGINT and SIGTERM, so that the loop can save and stop between two steps. A second one ends at once."""

    def __init__(self):
        self.requested = False
        self._previous = {}

    def __enter__(self) -> "Interruption":
        if jax.process_count() == 1:
            handlers = {signal.SIGINT: self._record, signal.SIGTERM: self._record}
        else:
            # All hosts must stop at the same step. JAX handles SIGTERM and notifies the others; Ctrl-C sends SIGTERM.
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number, frame) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)
