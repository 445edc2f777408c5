"""A pod's process that notices within half a minute that another host is gone, says so in one line, and leaves.

Without it, who waits in a collective for a host that is gone would wait until JAX notices, for 100 seconds, and then
end in a dump of its stack. Host 0 runs JAX's coordination service, so it is the one that judges:

- Every host counts up in the service's key-value store. Host 0 sees whose count stands still and writes there who is
  gone, for the others to read. That they get an answer at all is host 0's own sign of life.
- When host 0's process ends, JAX's client sees its connection break and calls ``abort()`` at once, which nothing can
  come before. It prints its dump; the line and the exit code are by a handler of SIGABRT.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time

import jax
from jax._src.distributed import global_state  # JAX has no public way to its key-value store

SILENCE = 25  # seconds after which a silent host is gone; what holds up all threads of a busy one is far shorter
PAUSE = 2  # seconds between two signs of life
ALIVE, GONE = "clip_jax/alive/", "clip_jax/gone/"


class Watch:
    """Watches the other hosts until :meth:`leave`; made once :func:`jax.distributed.initialize` has returned."""

    def __init__(self, workdir: str):
        self._workdir = workdir
        self._index, self._count = global_state.process_id, global_state.num_processes
        self._names = {0: global_state.coordinator_address}
        self._silent = dict.fromkeys(range(1, self._count) if self._index == 0 else [0], 0)
        self._left = threading.Event()
        self._ending = threading.Lock()
        if self._index > 0:
            # Not Python's signal module, whose handlers run in the main thread: abort() does not wait for that.
            self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborting)
            ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._judge)]
        for thread in self._threads:
            thread.start()

    def await_verdict(self, error: BaseException | None) -> None:
        """Waits if ``error`` may come of a collective with a host that is gone; if one is, this process ends.

        What a device or the compiler refuses has nothing to do with other hosts.
        """
        while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
            error = error.__cause__ or error.__context__
        if error is not None and not str(error).startswith(("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")):
            time.sleep(SILENCE + 5 * PAUSE)

    def leave(self, code: int, together: bool) -> int:
        """Returns the exit code ``code`` once all hosts are here, so that none takes another's end for its loss.

        ``together`` says that all will come, however long the first one writes its report. If not, the others may
        have failed in the same way, or wait for this host in a collective: then it ends at once after 20 seconds,
        without JAX's own shutdown, which would wait for them, and they find it gone.
        """
        barrier, seconds = ("clip_jax/done", 7 * 24 * 3600) if together else ("clip_jax/failed", 20)
        try:
            global_state.client.wait_at_barrier(barrier, 1000 * seconds)
        except jax.errors.JaxRuntimeError as error:
            if together:  # host 0 is gone, and SIGABRT about to come
                self.await_verdict(error)
            _exit(code or 1)
        self._left.set()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        for thread in self._threads:  # one that is inside of JAX when Python ends would crash
            thread.join()
        return code

    def _exchange(self) -> None:
        """Gives signs of life and takes in those of others."""
        client, before, beat = global_state.client, {}, 0
        while not self._left.is_set():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # no answer, which is host 0's silence
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
                    if self._index in gone:  # this process was stopped for a while, and is awake again
                        gone[self._index] = "this one, silent for too long"
                    self._silent[0] = 0
                    if gone:
                        self._end(gone)
            beat += 1
            self._left.wait(PAUSE)

    def _judge(self) -> None:
        """Counts seconds of silence by turns of this loop, as there are none while this process itself is stopped."""
        while not self._left.wait(1):
            for host in self._silent:
                self._silent[host] += 1
            gone = {host: self._names.get(host, "?") for host, silent in self._silent.items() if silent > SILENCE}
            if gone and self._index == 0:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # the line must come out all the same
                    for host, name in gone.items():
                        global_state.client.key_value_set(f"{GONE}{host}", name, allow_overwrite=True)
                time.sleep(2 * PAUSE)  # in which the others read it; host 0's end would be a reason of its own
            if gone:
                self._end(gone)

    def _aborting(self, number: int) -> None:
        """SIGABRT's handler. It returns, and ``abort()`` goes on, where host 0 is there and cannot be the reason."""
        host, _, port = self._names[0].rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            self._end({0: self._names[0]})

    def _end(self, gone: dict[int, str]) -> None:
        """Prints the line and ends this process, whatever its main thread waits for."""
        with self._ending:
            hosts = " and ".join(f"host {host} of {self._count} ({name})" for host, name in gone.items())
            hosts += " is gone" if len(gone) == 1 else " are gone"
            found = []
            looking = threading.Thread(target=lambda: found.append(self._newest_checkpoint()), daemon=True)
            looking.start()
            looking.join(timeout=5)  # a shared disk may be gone with the host, and never answer
            way_on = f"the run goes on from {found[0] if found else 'its last checkpoint'}"
            print(f"failed: {hosts}; start all hosts again with the same command, and {way_on}", file=sys.stderr)
            _exit(1)

    def _newest_checkpoint(self) -> str:
        with contextlib.suppress(OSError, ValueError):  # no folder, or no step in it
            step = max(int(name) for name in os.listdir(f"{self._workdir}/checkpoints") if name.isdigit())
            return f"its last checkpoint (step {step})"
        return "its start, as it has no checkpoint yet"


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
