"""Waits with the libraries imported, and forks for each process that a test starts by ``warm_python``.

    python tests/helpers/warm_python_server.py SOCKET PROGRAM

It ends when its standard input is closed. It uses no device, and its only other threads are those of OpenBLAS and
jemalloc, which handle forks. All forks have the server's hash seed: where each host must have its own, start Python.
"""

import contextlib
import gc
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import sys
from collections.abc import Mapping
from typing import NamedTuple

LIBRARIES = (
    "flax.linen",
    "grain",
    "jax",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "ml_collections",
    "optax",
    "orbax.checkpoint",
    "PIL.Image",
    "pyarrow.parquet",
    "tensorboardX",
)
# Variables that Python or a library has read by the time of the fork.
READ_BEFORE = ("JAX_", "PYTHON", "LC_", "LANG", "LD_", "TF_", "OMP_", "OPENBLAS_", "GLIBC_", "MPL")
READ_LATER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "PYTHONPATH", "PYTHONUNBUFFERED")


def read_before(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: variables[name] for name in variables if name.startswith(READ_BEFORE) and name not in READ_LATER}


class Request(NamedTuple):
    """What a process of its own would have found: its folder, its words, its variables and its three files."""

    folder: str
    words: list[str]
    variables: dict[str, str]
    files: list[int]

    def can_be_forked(self) -> bool:
        runs_python = bool(self.words) and (self.words[0] == "-m" or self.words[0].endswith(".py"))
        return runs_python and read_before(self.variables) == read_before(os.environ)


def receive(connection: socket.socket) -> Request:
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    text = connection.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
    return Request(*json.loads(text), files)


def send(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the client is gone, which the watcher notices
        connection.sendall(number.to_bytes(8, "big"))


def serve(listener: socket.socket) -> Request:
    """Returns in each fork, with what it was asked for."""
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            reap()
            continue
        listener.close()
        request = receive(connection)
        if not request.can_be_forked():
            send(connection, 0)
            os._exit(0)
        if not (process := os.fork()):
            os.setsid()
            send(connection, os.getpid())
            connection.close()
            return request
        for file in request.files:
            os.close(file)
        watch(process, connection)


def reap() -> None:
    """Clears away the watchers that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def watch(process: int, connection: socket.socket) -> None:
    """Tells the client 1 + the status with which the process ended; kills the process if the client is gone."""
    ended = os.pidfd_open(process)
    ready, _, _ = select.select([connection, ended], [], [])
    if ended not in ready:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    send(connection, 1 + status)
    os._exit(0)


def become(request: Request, program: str) -> None:
    """Makes this process what the request's own would be before its first line."""
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.variables)
    for number, file in enumerate(request.files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.executable = program
    path = request.variables.get("PYTHONPATH", "")
    sys.path[:0] = [os.path.abspath(folder) for folder in path.split(os.pathsep) if folder]


def run(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(pathlib.Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def collect_garbage_rarely() -> None:
    """Objects that exist by now are never looked at again, and new ones less often: a tenth of the time of tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def main() -> None:
    address, program = sys.argv[1:]
    for name in LIBRARIES:
        importlib.import_module(name)
    collect_garbage_rarely()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    request = serve(listener)
    become(request, program)
    run(request.words)


if __name__ == "__main__":
    main()
