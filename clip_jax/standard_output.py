"""How a command ends whose output is a pipe that nobody reads any more, or a disk that is full."""

import io
import os
import sys
from collections.abc import Callable

CLOSED_PIPE = 141  # 128 and the number of SIGPIPE: the code with which a shell reports programs that this signal ends


def run(main: Callable[[], int]) -> None:
    """Runs a command and exits with its code.

    Where the reader of its output goes away (``| head``) the command ends without a word, as other Unix tools do. The
    signal itself, which Python ignores, would also end it for a worker process that has died.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor:
            setattr(sys, name, _wrapped(stream, descriptor))
    try:
        code = main()
    except SystemExit as end:  # of argparse
        code = end.code
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()  # here, where it can still decide about the exit code
    except OSError as error:
        _to_nowhere(1)
        print(f"failed: standard output: {error.strerror}", file=sys.stderr)
        code = 1
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

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            _to_nowhere(self.fileno())
            raise SystemExit(CLOSED_PIPE) from None


def _to_nowhere(descriptor: int) -> None:
    """Lets what is written from now on vanish, such as what Python writes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
