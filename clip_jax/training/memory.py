"""The memory that a training uses on its devices and on this host, for the metrics."""

import multiprocessing
import os
import pathlib

import jax


def memory_bytes() -> dict[str, float]:
    """Returns bytes by name, without asking a device to compute.

    ``memory/device`` and ``memory/device_peak`` are the largest of this host's devices, where the backend reports them.
    ``memory/host`` is the resident memory of this process and its workers, on Linux; shared pages count several times.
    """
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"memory/device": "bytes_in_use", "memory/device_peak": "peak_bytes_in_use"}
    found = {
        name: float(max(of_device[key] for of_device in stats))
        for name, key in names.items()
        if stats and all(key in of_device for of_device in stats)
    }
    processes = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    resident = [size for process in processes if (size := _resident(process))]
    return found | ({"memory/host": float(sum(resident))} if resident else {})


def _resident(process: int) -> int:
    try:
        pages = pathlib.Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):  # no Linux, or a worker that has just ended
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
