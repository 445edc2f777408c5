"""What all commands share: flags and ``--config.NAME=VALUE``, errors in one line, exit codes, logging, joining a pod.

Exit codes: 0 done, 1 failed, 2 a mistake in the command, 3 interrupted (training saves its state first). A command's
module imports slow packages inside its functions. Ctrl-C can then end it at any moment without a traceback, and worker
processes, which import the command's module again, start without these packages.
"""

import argparse
import difflib
import errno
import functools
import io
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from clip_jax.errors import FailedError, first_line, printable, reason

if TYPE_CHECKING:
    import ml_collections

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 3  # exit codes
CLOSED_PIPE = 141  # 128 + the number of SIGPIPE: the code that a shell reports for a program that SIGPIPE ends
POD_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
OVERRIDE = "--config."
STARTUP_TIMEOUT = 60.0  # seconds
# Errors of the operating system that another command line can avoid. Others, such as a full disk, are failures.
MISTAKEN_NAMES = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL),
}

Main = Callable[..., int]


def command(program: str) -> Callable[[Callable[[list[str], str], int]], Main]:
    """Makes the ``main`` of a command from a function of its arguments and its name.

    Args:
      program: what the user types to start it, for help and errors; ``main`` may be given another.

    Returns:
      A decorator. ``main(argv=None, program=program)`` uses ``sys.argv`` if ``argv`` is None, prints mistakes, failures
      and Ctrl-C as one line, and returns the exit code. Other exceptions are bugs of the program, and are raised.
    """

    def decorate(body: Callable[[list[str], str], int]) -> Main:
        @functools.wraps(body)
        def main(argv: list[str] | None = None, program: str = program) -> int:
            try:
                return body(sys.argv[1:] if argv is None else argv, program)
            except KeyboardInterrupt as interrupt:
                return report_interrupt(str(interrupt))
            except Exception as error:
                code = report_error(error)
                if code is None:
                    raise
                return code

        return main

    return decorate


def report(kind: str, text: str) -> None:
    """Prints ``kind: text`` on standard error, with ``kind`` before each line of the text."""
    for line in text.split("\n"):
        print(f"{kind}: {printable(line)}", file=sys.stderr, flush=True)


def report_error(error: Exception) -> int | None:
    """Prints ``error: ...`` for a mistake and ``failed: ...`` for a failure.

    Returns:
      The exit code, or None if the error is neither: then nothing is printed.
    """
    if isinstance(error, FailedError | FloatingPointError) or (isinstance(error, OSError) and not is_mistake(error)):
        report("failed", reason(error))
        return FAILED
    if isinstance(error, ValueError | OSError):
        report("error", reason(error))
        return MISTAKE
    return None


def is_mistake(error: OSError) -> bool:
    """Returns whether another command line can avoid this error, such as a missing file or a lack of permission."""
    if error.strerror is None:  # raised with a message only, such as FileNotFoundError("no config file")
        return not isinstance(error, ConnectionError | TimeoutError)
    return error.errno in MISTAKEN_NAMES


def report_interrupt(hint: str = "") -> int:
    """Prints that the command was interrupted, with a hint at what to do next, and returns the exit code."""
    start = "\n" if sys.stderr.isatty() else ""  # after the ^C or the progress line on the terminal
    print(f"{start}interrupted{hint and '; '}{hint}", file=sys.stderr, flush=True)
    return INTERRUPTED


class Parser(argparse.ArgumentParser):
    """The flags of a command or subcommand. A mistake raises ValueError with one line that says what is wrong."""

    def __init__(self, *positional: object, **options: object):
        self._flags: list[str] = []
        self._subcommands: argparse._SubParsersAction | None = None
        self._takes_overrides = False
        super().__init__(*positional, **{"allow_abbrev": False} | options)

    def add_argument(self, *names: str, **options: object) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self._flags.extend(action.option_strings)
        return action

    def add_subparsers(self, **options: object) -> argparse._SubParsersAction:
        self._subcommands = super().add_subparsers(**options)
        return self._subcommands

    def add_config(self, example: str) -> None:
        """Adds ``--config`` and ``--config.NAME=VALUE``; :func:`read_config` reads both."""
        self._takes_overrides = True
        self.add_argument(
            "--config",
            required=True,
            metavar="FILE",
            help=f"a config file, such as {example}; {OVERRIDE}NAME=VALUE sets one of its values",
        )

    def add_distributed(self) -> None:
        """Adds ``--distributed``, which :func:`start_distributed` takes."""
        self.add_argument(
            "--distributed", action="store_true", help="join the other hosts of a pod; needed on Cloud TPU VMs only"
        )
        self.add_argument(
            "--startup-timeout",
            type=float,
            default=STARTUP_TIMEOUT,
            metavar="SECONDS",
            help="how long a host of a pod waits for the others to start (default: %(default).0f)",
        )

    def read(self, argv: list[str]) -> argparse.Namespace:
        """Returns the flags, and as ``overrides`` the names and values of ``--config.NAME=VALUE``.

        Raises:
          ValueError: a flag is missing or unknown, or its value is wrong; one line.
        """
        words, overrides = self._split(argv)
        reader = self
        if self._subcommands:
            start = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
            self._refuse_unknown(words[:start], [])
            reader = self._subcommands.choices.get("".join(words[start : start + 1]))
            if reader:
                reader._refuse_unknown(words[start + 1 :], overrides)
        else:
            self._refuse_unknown(words, overrides)
        arguments, rest = self.parse_known_args(words)
        if rest:
            reader.error(f"unknown argument {rest[0]}")
        arguments.overrides = overrides
        return arguments

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}{' See' if message.endswith('?') else '; see'} {self.prog} --help")

    def _split(self, argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
        """Takes ``--config.NAME=VALUE`` and ``--config.NAME VALUE`` out of the arguments."""
        words, overrides = [], []
        rest = iter(argv)
        for word in rest:
            if word == "--":  # only names of files follow
                words += [word, *rest]
                break
            if not word.startswith(OVERRIDE):
                words.append(word)
                continue
            name, equals, value = word.partition("=")
            if not equals:
                value = next(rest, "--")
                if value.startswith("--"):
                    self.error(f"{name} has no value; write {name}=VALUE")
            overrides.append((name.removeprefix(OVERRIDE), value))
        return words, overrides

    def _refuse_unknown(self, words: list[str], overrides: list[tuple[str, str]]) -> None:
        # Called before argparse, which would report a misspelled required flag as missing.
        unknown = [f"{OVERRIDE}{name}" for name, _ in overrides] if not self._takes_overrides else []
        for word in words:
            if word == "--":
                break
            name = word.partition("=")[0]
            if re.match(r"-[^\d. ][^ ]*$", name) and name not in self._flags:
                unknown.append(word)
        if unknown:
            known = [*self._flags, *_override_flags()] if self._takes_overrides else self._flags
            name = unknown[0].partition("=")[0]
            same = [flag for flag in known if flag.rpartition(".")[2] == name.lstrip("-")]  # --steps of --config.steps
            near = sorted(same, key=len) or difflib.get_close_matches(name, known, n=1)
            self.error(f"unknown argument {unknown[0]}{f'; did you mean {near[0]}?' if near else ''}")


def _override_flags() -> list[str]:
    from clip_jax.config import default_config, flatten

    return [f"{OVERRIDE}{name}" for name in flatten(default_config("ViT-B/32"))]


def read_config(arguments: argparse.Namespace) -> "ml_collections.ConfigDict":
    """Returns the config of ``--config`` with the values of ``--config.NAME=VALUE``, not yet validated.

    Raises:
      ValueError, FileNotFoundError: there is no such file, key or value; one line.
    """
    from clip_jax.config import load_config_file, override

    config = load_config_file(arguments.config)
    for name, value in arguments.overrides:
        override(config, name, value)
    return config


def start_distributed(asked_for: bool, timeout: float = STARTUP_TIMEOUT) -> bool:
    """Joins the pod if asked to, or if the environment describes one; must be called before anything uses a device.

    If the other hosts have not started after ``timeout`` seconds, it prints one line and ends this process with exit
    code 1: JAX waits in C++ and would then print a stack trace.

    Returns:
      Whether it joined.

    Raises:
      ValueError: the environment describes a pod only in part, or with words instead of numbers.
      FailedError: JAX cannot join the pod.
    """
    import jax

    given = [name for name in POD_VARIABLES if name in os.environ]
    if given:
        if len(given) < len(POD_VARIABLES):
            missing = ", ".join(name for name in POD_VARIABLES if name not in given)
            raise ValueError(f"{', '.join(given)} is set, but not {missing}; a pod needs all three")
        address, processes, index = (os.environ[name] for name in POD_VARIABLES)
        if not (processes.isdigit() and index.isdigit()):
            raise ValueError(f"{POD_VARIABLES[1]}={processes} and {POD_VARIABLES[2]}={index} must be numbers")
        _join_pod(timeout, f"host {index} of {processes} (coordinator {address})", address, int(processes), int(index))
    elif asked_for or _several_processes():
        _join_pod(timeout, "this host")  # JAX detects the cluster
    return jax.distributed.is_initialized()


def _join_pod(timeout: float, name: str, *cluster: str | int) -> None:
    import jax

    def end() -> None:
        report(
            "failed",
            f"{name} has waited {timeout:.0f} s for the other hosts of the pod; start all of them, or give "
            "them more time with --startup-timeout",
        )
        os._exit(FAILED)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(*cluster, initialization_timeout=int(timeout) + 60)
    except RuntimeError as error:
        raise FailedError(f"{name} cannot join the pod: {first_line(error)}") from None
    finally:
        timer.cancel()


def _several_processes() -> bool:
    """Returns whether GKE's, Slurm's or Open MPI's variables show more than one process."""
    counts = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    tpu_hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    several_hosts = "," in tpu_hosts and " " not in tpu_hosts  # libtpu may store a sentence there
    return several_hosts or any(count.isdigit() and int(count) > 1 for count in counts)


def set_up_logging(stream: str = "stderr", level: int = logging.WARNING) -> None:
    """Prints the log lines of ``clip_jax`` from this level up, unformatted, on ``sys.stderr`` or ``sys.stdout``.

    Hides the log of absl, which orbax and others use: orbax warns of every option that follows from another, and prints
    the tracebacks of exceptions that it also raises. Hides what tensorstore prints for each array after the first that
    it could not write, as to a full disk.
    """
    import absl.logging

    handler = _Console(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("clip_jax")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    absl.logging.set_verbosity(absl.logging.FATAL)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


class _Unraisable:
    """Discards the errors of tensorstore's callbacks in an event loop that has ended; passes on all others."""

    def __init__(self, previous: Callable[["sys.UnraisableHookArgs"], object]):
        self._previous = previous

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._previous(unraisable)


class _Console(logging.StreamHandler):
    """Writes to the current ``sys.stdout`` or ``sys.stderr``."""

    def __init__(self, name: str):
        logging.Handler.__init__(self)
        self._stream_name = name

    @property
    def stream(self) -> io.TextIOBase:
        return getattr(sys, self._stream_name)


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a command and exits with its code.

    If the reader of its output closes the pipe (``| head``), the command ends without a message, as other Unix tools
    do. SIGPIPE, which Python ignores, would also end the command when a worker process has died.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor:
            setattr(sys, name, _wrapped(stream, descriptor))
    try:
        code = main()
    except SystemExit as end:  # from argparse's --help, or a closed pipe
        code = end.code
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()  # here, where an error can still change the exit code
    except OSError as error:
        _discard(1)
        report("failed", f"standard output: {error.strerror}")
        code = FAILED
    # Once a KeyboardInterrupt has passed through exec() of a text, as in the definition of a dataclass, Python ends by
    # SIGINT in place of any exit code, until the next such exec().
    exec("")
    sys.exit(code)


def _wrapped(stream: io.TextIOWrapper, descriptor: int) -> io.TextIOWrapper:
    raw = _Pipe(descriptor, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Pipe(io.FileIO):
    """A file descriptor that ends the program when nothing reads from it any more."""

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            _discard(self.fileno())
            raise SystemExit(CLOSED_PIPE) from None


def _discard(descriptor: int) -> None:
    """Discards what is written from now on, such as what Python writes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
