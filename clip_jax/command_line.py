"""What all commands share: flags and ``--config.NAME=VALUE``, errors in one line, exit codes, logging, joining a pod.

Exit codes: 0 done, 1 failed, 2 a mistake in what was asked for, 3 interrupted (a training has saved what it had).
Modules of commands import what is slow to import in their functions: Ctrl-C then ends them without a traceback at any
moment, and worker processes, which import the module of the command again, start without it.
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
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from clip_jax.errors import FailedError, printable, reason

if TYPE_CHECKING:
    import ml_collections

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 3  # exit codes
CLOSED_PIPE = 141  # 128 and the number of SIGPIPE: the code with which a shell reports programs that this signal ends
POD_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
OVERRIDE = "--config."
# Errors of the operating system that another command line avoids. The others, such as a full disk, are failures.
MISTAKEN_NAMES = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL),
}

Main = Callable[..., int]


def command(program: str) -> Callable[[Callable[[list[str], str], int]], Main]:
    """Makes the ``main`` of a command from a function of its arguments and of its name.

    Args:
      program: what a person types to start it, for help and errors, unless ``main`` is given another.

    Returns:
      A decorator. ``main(argv=None, program=program)`` takes ``sys.argv`` if no arguments are given, prints mistakes,
      failures and Ctrl-C as a line, and returns the exit code. Other errors are faults of the program, and are raised.
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
    """Returns whether the user can avoid this error by another command line: a file is missing or not allowed."""
    if error.strerror is None:  # one of a message alone, such as FileNotFoundError("no config file")
        return not isinstance(error, ConnectionError | TimeoutError)
    return error.errno in MISTAKEN_NAMES


def report_interrupt(hint: str = "") -> int:
    """Prints that the command was interrupted, with a hint at what to do next, and returns the exit code."""
    start = "\n" if sys.stderr.isatty() else ""  # behind the ^C or the line of progress that the terminal shows
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
        # Before argparse, which would first ask for what is missing, perhaps since it is misspelled.
        unknown = [f"{OVERRIDE}{name}" for name, _ in overrides] if not self._takes_overrides else []
        for word in words:
            if word == "--":
                break
            name = word.partition("=")[0]
            if re.match(r"-[^\d. ][^ ]*$", name) and name not in self._flags:
                unknown.append(word)
        if unknown:
            known = [*self._flags, *_override_flags()] if self._takes_overrides else self._flags
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
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


def start_distributed(asked_for: bool) -> bool:
    """Joins the pod if asked to, or if the environment shows one; must come before anything touches a device.

    Returns:
      Whether it did.

    Raises:
      ValueError: the environment names a pod only in part.
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
        jax.distributed.initialize(address, int(processes), int(index))
    elif asked_for or _several_processes():
        jax.distributed.initialize()  # JAX finds the others by what started them
    return jax.distributed.is_initialized()


def _several_processes() -> bool:
    """Returns whether GKE's, Slurm's or Open MPI's variables show more than one process."""
    counts = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    tpu_hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    several_hosts = "," in tpu_hosts and " " not in tpu_hosts  # libtpu may leave a sentence there
    return several_hosts or any(count.isdigit() and int(count) > 1 for count in counts)


def set_up_logging(stream: str = "stderr", level: int = logging.WARNING) -> None:
    """Prints what ``clip_jax`` logs from this level on as plain lines on ``sys.stderr`` or ``sys.stdout``.

    What orbax and others log through absl is not shown: orbax warns of every option that follows from another, and
    prints the traceback of whatever it also raises.
    """
    import absl.logging

    handler = _Console(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("clip_jax")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    absl.logging.set_verbosity(absl.logging.FATAL)


class _Console(logging.StreamHandler):
    """Writes to the ``sys.stdout`` or ``sys.stderr`` of the moment."""

    def __init__(self, name: str):
        logging.Handler.__init__(self)
        self._stream_name = name

    @property
    def stream(self) -> io.TextIOBase:
        return getattr(sys, self._stream_name)


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a command and exits with its code.

    If the reader of its output goes away (``| head``), the command ends without a message, as other Unix tools do. The
    signal itself, which Python ignores, would also end it for a worker process that has died.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor:
            setattr(sys, name, _wrapped(stream, descriptor))
    try:
        code = main()
    except SystemExit as end:  # of argparse's --help, or of a closed pipe
        code = end.code
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()  # here, where it can still decide about the exit code
    except OSError as error:
        _discard(1)
        report("failed", f"standard output: {error.strerror}")
        code = FAILED
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
    """A descriptor that ends the program when nobody reads from it any more."""

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            _discard(self.fileno())
            raise SystemExit(CLOSED_PIPE) from None


def _discard(descriptor: int) -> None:
    """Discards what is written from now on, such as what Python writes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
