"""Detects within half a minute that another host of a pod is gone, prints one line, and ends this process.

A host blocked in a collective would otherwise wait 100 s before JAX notices that another host is gone, and then end
with a stack trace. Host 0 decides which hosts are gone, because it runs JAX's coordination service:

- Every host increments a counter in the service's key-value store. Host 0 checks the counters and writes to the store
  which hosts are gone, for the others to read. Any reply shows that host 0 is alive.
- When host 0's process ends, JAX's client loses its connection and calls ``abort()`` at once, which cannot be
  prevented, and prints a stack trace. A handler of SIGABRT prints the line and sets the exit code.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

import jax
from jax._src.distributed import global_state  # JAX has no public API for its key-value store

from clip_jax.training import interruption

SILENCE = 25  # seconds without a sign of life after which a host is gone; a busy host pauses for far less
PAUSE = 2  # seconds between signs of life
ALIVE, GONE, INTERRUPTED = "clip_jax/alive/", "clip_jax/gone/", "clip_jax/interrupted/"


class Watch:
    """Watches the other hosts until :meth:`leave`. Create it after :func:`jax.distributed.initialize`."""

    def __init__(self, workdir: str):
        self._workdir = workdir
        self._index, self._count = global_state.process_id, global_state.num_processes
        self._names = {0: global_state.coordinator_address}
        self._silent = dict.fromkeys(range(1, self._count) if self._index == 0 else [0], 0)
        self._is_interrupted = False
        self._left = threading.Event()
        self._ending = threading.Lock()
        if self._index > 0:
            # Not Python's signal module: its handlers run in the main thread, and abort() does not wait for that.
            self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._handle_abort)
            ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._find_gone)]
        for thread in self._threads:
            thread.start()

    def exit_if_host_gone(self, error: BaseException | None) -> None:
        """Waits until host loss is ruled out as the cause of ``error``; ends this process if a host is gone.

        It returns at once if the error cannot come from a collective, as those of a device or the compiler.
        """
        while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
            error = error.__cause__ or error.__context__
        if error is not None and not str(error).startswith(("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")):
            time.sleep(SILENCE + 5 * PAUSE)

    def leave(self, code: int, together: bool) -> int:
        """Waits until all hosts are here, so that no host takes another's end for a failure, and returns ``code``.

        With ``together`` all hosts are expected, however long host 0 writes its report. Otherwise the others may have
        failed in the same way, or may wait for this host in a collective. After 20 seconds this process then ends
        without JAX's own shutdown, which would wait for them, and they detect that it is gone.
        """
        barrier, seconds = ("clip_jax/done", 7 * 24 * 3600) if together else ("clip_jax/failed", 20)
        try:
            global_state.client.wait_at_barrier(barrier, 1000 * seconds)
        except jax.errors.JaxRuntimeError as error:
            if together:  # host 0 is gone, and SIGABRT follows
                self.exit_if_host_gone(error)
            _exit(code or 1)
        self._left.set()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        for thread in self._threads:  # a thread inside JAX when Python ends would crash
            thread.join()
        return code

    def announce_interruption(self) -> None:
        """Lets the other hosts end, too, because this one was interrupted when there was nothing to save."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            global_state.client.key_value_set(f"{INTERRUPTED}{self._index}", socket.gethostname(), allow_overwrite=True)
        self._is_interrupted = True
        if self._index == 0:
            time.sleep(2 * PAUSE)  # for the others to read it, before they lose host 0

    def leave_interrupted(self) -> NoReturn:
        """Announces the interruption and ends this process, without JAX's own shutdown, which waits for the others."""
        self.announce_interruption()
        _exit(interruption.INTERRUPTED)

    def _exchange(self) -> None:
        """Writes this host's signs of life and reads those of the others."""
        client, before, beat = global_state.client, {}, 0
        while not self._left.is_set():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # no reply: host 0 is silent
                client.key_value_set(f"{ALIVE}{self._index}", f"{socket.gethostname()} {beat}", allow_overwrite=True)
                if self._index == 0:
                    now = {int(key.removeprefix(ALIVE)): value for key, value in client.key_value_dir_get(ALIVE)}
                    for host in self._silent:
                        if now.get(host) != before.get(host):
                            self._silent[host] = 0
                            self._names[host] = now[host].split()[0]
                    before = now
                else:
                    gone = {int(key.removeprefix(GONE)): value for key, value in client.key_value_dir_get(GONE)}
                    if self._index in gone:  # this process was suspended for a while
                        gone[self._index] = "this one, silent for too long"
                    self._silent[0] = 0
                    if gone:
                        self._end(gone)
                interrupted = dict(client.key_value_dir_get(INTERRUPTED))
                if interrupted and f"{INTERRUPTED}{self._index}" not in interrupted:
                    self._end_interrupted(interrupted)
            beat += 1
            self._left.wait(PAUSE)

    def _find_gone(self) -> None:
        """Counts seconds of silence as iterations of this loop, which stops while this process is suspended."""
        while not self._left.wait(1):
            for host in self._silent:
                self._silent[host] += 1
            gone = {host: self._names.get(host, "?") for host, silent in self._silent.items() if silent > SILENCE}
            if gone and self._index == 0:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # _end must print its line in any case
                    for host, name in gone.items():
                        global_state.client.key_value_set(f"{GONE}{host}", name, allow_overwrite=True)
                time.sleep(2 * PAUSE)  # for the others to read it, before they lose host 0
            if gone:
                self._end(gone)

    def _handle_abort(self, number: int) -> None:
        """Handles SIGABRT. If host 0 is alive, it is not the cause: the handler returns and ``abort()`` continues."""
        if self._is_interrupted:
            _exit(interruption.INTERRUPTED)
        host, _, port = self._names[0].rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            self._end({0: self._names[0]})

    def _end(self, gone: dict[int, str]) -> None:
        """Prints one line and ends this process, even if its main thread is blocked."""
        with self._ending:
            hosts = " and ".join(f"host {host} of {self._count} ({name})" for host, name in gone.items())
            hosts += " is gone" if len(gone) == 1 else " are gone"
            found = []
            looking = threading.Thread(target=lambda: found.append(self._newest_checkpoint()), daemon=True)
            looking.start()
            looking.join(timeout=5)  # a shared disk may be gone with the host, and block forever
            resumption = f"the run goes on from {found[0] if found else 'its last checkpoint'}"
            print(f"failed: {hosts}; start all hosts again with the same command, and {resumption}", file=sys.stderr)
            _exit(1)

    def _end_interrupted(self, interrupted: dict[str, str]) -> None:
        """Prints one line and ends this process with the exit code of the hosts that were interrupted."""
        with self._ending:
            hosts = " and ".join(f"{key.removeprefix(INTERRUPTED)} ({name})" for key, name in interrupted.items())
            print(f"interrupted: a signal has ended host {hosts} of {self._count} before a new step", file=sys.stderr)
            if self._index == 0:
                time.sleep(2 * PAUSE)  # for the others to read it, too
            _exit(interruption.INTERRUPTED)

    def _newest_checkpoint(self) -> str:
        with contextlib.suppress(OSError, ValueError):  # no folder, or no step in it
            step = max(int(name) for name in os.listdir(f"{self._workdir}/checkpoints") if name.isdigit())
            return f"its last checkpoint (step {step})"
        return "its start, as it has no checkpoint yet"


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
