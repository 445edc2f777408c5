"""What every worker process of ours does first."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Keeps this process from outliving a parent that was killed and could not end it; does nothing in a parent."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent) -> None:
    parent.join()
    os._exit(1)
