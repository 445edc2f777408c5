"""Lets SIGINT and SIGTERM end a training at any moment: at once if there is nothing to save, else after a save.

It imports nothing slow, so that the command can catch signals before it imports anything else.
"""

import _thread
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 3  # exit code
PATIENCE = 5  # seconds in which the main thread must end after a signal if there is nothing to save


class Interruption:
    """A request to stop, by SIGINT or SIGTERM.

    Until :meth:`defer`, a signal raises KeyboardInterrupt in the main thread. After it, a signal is only recorded: the
    training saves and stops between two steps. A second signal of the same kind ends the process without a save.

    The main thread may be unable to react: a compilation runs in C++ for minutes, and some libraries discard a
    KeyboardInterrupt. A thread therefore receives the signals, too. It ends the process if the main thread does not.

    Attributes:
      requested: whether a signal has arrived.
      announced: whether the main thread has printed that the process was interrupted.
      importing: whether the main thread only imports, which may turn a KeyboardInterrupt into another error.
      before_exit: what the thread calls before it ends the process.
    """

    def __init__(self):
        self.requested = False
        self.announced = False
        self.importing = False
        self.before_exit: Callable[[], None] = lambda: None
        self._deferred = self._raised = False
        self._raised_again = 0  # how often this process has sent itself a SIGINT
        self._timer: threading.Timer | None = None
        self._notify_pod: Callable[[int], None] = lambda number: None
        self._previous: dict[int, object] = {}
        self._pipe = (-1, -1)

    def install(self) -> None:
        """Catches the signals from now on. Outside of the main thread, where Python cannot, it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._raise_again
        self._previous_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def restore(self) -> None:
        """Gives the signals back to the handlers that were there before."""
        if not self._previous:
            return
        signal.set_wakeup_fd(self._previous_fd)
        sys.unraisablehook = self._previous_hook
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        if self._timer:
            self._timer.cancel()
        for end in self._pipe:
            os.close(end)

    def ignore(self) -> None:
        """Ignores the signals from now on: the exit code is decided, and Python only has to end."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    @property
    def ends_now(self) -> bool:
        """Whether a signal has arrived while there was nothing to save."""
        return self.requested and not self._deferred

    def defer(self) -> None:
        """From now on there is something to save: a signal is recorded and no longer raises KeyboardInterrupt."""
        self._deferred = True

    def explains_lost_workers(self) -> bool:
        """Returns whether a signal has arrived that may have ended the worker processes before this one."""
        deadline = time.monotonic() + 0.5
        while not self.requested and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.requested

    def join_pod(self) -> None:
        """Call it after :func:`jax.distributed.initialize`, which lets JAX's own handler replace that of SIGTERM.

        All hosts of a pod must stop at the same step. JAX's handler starts the agreement about it, so it is called
        when a signal is deferred.
        """
        if not self._previous:
            return
        replace = ctypes.CDLL(None).signal  # Python's module does not return handlers that it has not set
        replace.restype = ctypes.c_void_p
        of_jax = replace(int(signal.SIGTERM), None)
        signal.signal(signal.SIGTERM, self._handle)
        of_python = replace(int(signal.SIGTERM), None)
        signal.signal(signal.SIGTERM, self._handle)
        if of_jax not in (None, of_python):
            self._notify_pod = ctypes.CFUNCTYPE(None, ctypes.c_int)(of_jax)

    def _handle(self, number: int, frame: object) -> None:
        self.requested = True
        if self.importing:
            self._exit(INTERRUPTED, "interrupted")
        elif self._deferred:
            self._notify_pod(int(signal.SIGTERM))
        elif not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _raise_again(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Raises a KeyboardInterrupt again that Python has discarded, since it came in a callback such as JAX's."""
        if not (self.requested and issubclass(unraisable.exc_type, KeyboardInterrupt)):
            self._previous_hook(unraisable)
        elif not self._deferred:
            self._raised = False
            self._raised_again += 1
            # Later, and in a thread: from here it would be raised in this callback, and discarded again.
            threading.Timer(0.01, _thread.interrupt_main, (signal.SIGINT,)).start()

    def _listen(self) -> None:
        received = set()
        while number := os.read(self._pipe[0], 1)[0]:
            if number == signal.SIGINT and self._raised_again:
                self._raised_again -= 1
                continue
            if number in received:
                self._exit(128 + number, "interrupted twice: nothing was saved; the last checkpoint is safe")
            if number in SIGNALS:
                received.add(number)
                self.requested = True
            if self._timer is None:
                self._timer = threading.Timer(PATIENCE, self._exit_unless_deferred)
                self._timer.daemon = True
                self._timer.start()

    def _exit_unless_deferred(self) -> None:
        if not self._deferred:
            self._exit(INTERRUPTED, "interrupted; what the last checkpoint holds is safe")

    def _exit(self, code: int, line: str) -> None:
        self.before_exit()
        if not self.announced:
            print(line, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


_of_this_process: list[Interruption] = []


def catch_signals() -> None:
    """Catches SIGINT and SIGTERM until the process ends, for a process that does nothing but train.

    Until :func:`signals_caught`, the process imports modules and a signal ends it at once.
    """
    interruption = Interruption()
    interruption.importing = True
    interruption.install()
    _of_this_process.append(interruption)


@contextlib.contextmanager
def signals_caught() -> Iterator[Interruption]:
    """Yields the :class:`Interruption` of :func:`catch_signals`, or one that ends with this context."""
    if _of_this_process:
        interruption = _of_this_process[0]
        interruption.importing = False
        try:
            yield interruption
        finally:
            interruption.ignore()
        return
    interruption = Interruption()
    interruption.install()
    try:
        yield interruption
    finally:
        interruption.restore()
