"""Waits with the libraries imported, and forks for each process that a test starts by ``warm_python``.

    python tests/helpers/warm_python_server.py SOCKET PROGRAM

It ends when its standard input is closed. It neither starts threads nor touches a device, so that a fork is whole.
"""

import importlib
import os
import pathlib
import runpy
import select
import signal
import socket
import sys
from collections.abc import Mapping

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
# JAX reads its other variables when it is imported; a process with other values of these needs an import of its own.
READ_LATER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def read_at_import(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: variables[name] for name in variables if name.startswith("JAX_") and name not in READ_LATER}


class Request:
    """What a process of its own would have found: its folder, its words, its variables and its three files."""

    def __init__(self, connection: socket.socket):
        length, self.files, _, _ = socket.recv_fds(connection, 8, 3)
        message = b""
        while len(message) < int.from_bytes(length, "big"):
            message += connection.recv(2**20)
        folder, words, variables = message.decode("utf-8", "surrogateescape").split("\1")
        self.folder = folder
        self.words = words.split("\0")[1:]
        self.variables = dict(variable.split("=", 1) for variable in variables.split("\0"))

    def can_be_forked(self) -> bool:
        runs_python = bool(self.words) and (self.words[0] == "-m" or self.words[0].endswith(".py"))
        return runs_python and read_at_import(self.variables) == read_at_import(os.environ)

    def close(self) -> None:
        for file in self.files:
            os.close(file)


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
        request = Request(connection)
        if not request.can_be_forked():
            connection.sendall(b"0")
            os._exit(0)
        if not (process := os.fork()):
            os.setsid()
            connection.close()
            return request
        request.close()
        watch(process, connection)


def reap() -> None:
    """Clears away the watchers that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def watch(process: int, connection: socket.socket) -> None:
    """Tells the client how the process ended; kills the process and what it started if the client is gone first."""
    connection.sendall(b"%d" % process)
    ended = os.pidfd_open(process)
    ready, _, _ = select.select([connection, ended], [], [])
    if ended not in ready:
        os.killpg(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if ended in ready:
        connection.sendall(b"%d" % status)
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
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
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


def main() -> None:
    address, program = sys.argv[1:]
    for name in LIBRARIES:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    request = serve(listener)
    become(request, program)
    run(request.words)


if __name__ == "__main__":
    main()
