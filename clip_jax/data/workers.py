"""Ends worker processes whose parent process was killed."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Makes a worker process exit as soon as its parent is gone. In any other process it does nothing."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent) -> None:
    parent.join()
    os._exit(1)
