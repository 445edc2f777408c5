"""Runs clip_jax.main as several processes on this machine, like the hosts of a pod, each with its own CPU devices.

    python launch/local_pod.py --processes=2 --devices=1 -- \
        --config=configs/quickstart.py --config.steps=10 --config.evaluation.tasks= --workdir=runs/pod

It tests a training of several hosts on one machine. The output of the first process is printed unchanged, the lines of
the others start with their number. If a process fails, the others get time to notice and exit. Ctrl-C and SIGTERM are
passed to all.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

SAVED = 3  # clip_jax.main's exit code for a run that was interrupted and saved; the others are then saving, too


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(index: int, processes: int, devices: int, port: int, arguments: list[str]) -> subprocess.Popen:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "XLA_FLAGS": flags.strip(),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "clip_jax.main", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # In a new session, the terminal's Ctrl-C reaches only this launcher, which passes it on once.
        start_new_session=True,
    )


def show(index: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        print(line if index == 0 else f"[{index}] {line}", end="", flush=True)


def wait(pod: list[subprocess.Popen], grace: float) -> int:
    """Waits for all processes and returns the exit code of the first failure, else 3 if one saved, else 0.

    Processes that still run ``grace`` seconds after the first failure are killed.
    """
    code, deadline = 0, None
    while True:
        codes = [process.poll() for process in pod]
        failed = [index for index, ended in enumerate(codes) if ended not in (None, 0, SAVED)]
        if failed and deadline is None:
            first = min(failed, key=lambda index: codes[index])  # if several failed at once, one that a signal ended
            code, deadline = codes[first], time.monotonic() + grace
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            print(f"local_pod: process {first} has ended {how}", file=sys.stderr, flush=True)
        if None not in codes:
            return code or max(codes)
        if deadline and time.monotonic() > deadline:
            for process in pod:
                process.kill()
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="CPU devices of each process")
    parser.add_argument("--grace", type=float, default=60, help="seconds that the others have after one has failed")
    parser.add_argument("arguments", nargs="*", help="arguments of clip_jax.main, after --")
    arguments = parser.parse_args()
    port = free_port()
    pod: list[subprocess.Popen] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: [process.send_signal(number) for process in pod])
    for index in range(arguments.processes):
        pod.append(start(index, arguments.processes, arguments.devices, port, arguments.arguments))
    readers = [threading.Thread(target=show, args=(index, process)) for index, process in enumerate(pod)]
    for reader in readers:
        reader.start()
    code = wait(pod, arguments.grace)
    for reader in readers:
        reader.join(timeout=10)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
