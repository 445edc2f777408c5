"""Notes a request to stop, so that a training can save and end between two steps."""

import os
import signal

import jax


class Interruption:
    """Notes SIGINT and SIGTERM, so that the loop can save and leave between two steps; a second one ends at once."""

    def __init__(self):
        self.requested = False
        self._previous = {}

    def __enter__(self) -> "Interruption":
        if jax.process_count() == 1:
            handlers = {signal.SIGINT: self._note, signal.SIGTERM: self._note}
        else:
            # All hosts must stop at the same step. SIGTERM is left to JAX, which tells the others; Ctrl-C joins it.
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)
