"""Starts worker processes that ignore Ctrl-C, and ends those whose parent process was killed."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

LEAK_WARNING = "ignore:resource_tracker:UserWarning"


@contextlib.contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """A context in which this thread starts processes that ignore SIGINT from their first moment.

    A terminal sends SIGINT to them as well, and they would print a traceback before they can ignore it. They inherit
    which signals are blocked. This process still receives SIGINT, in another thread.

    It also silences the process that frees shared memory after this one was killed: it warns of each such case.
    """
    if LEAK_WARNING not in sys.warnoptions:
        sys.warnoptions.append(LEAK_WARNING)  # started processes inherit these
    resource_tracker.ensure_running()  # its start would unblock the signal
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


def end_with_parent() -> None:
    """Makes a worker process exit as soon as its parent is gone. In any other process it does nothing."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent) -> None:
    parent.join()
    os._exit(1)
