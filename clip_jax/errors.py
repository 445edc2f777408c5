"""One-line error messages, and the base class of errors that are not the user's mistake."""

import os


class FailedError(Exception):
    """The command is correct but cannot continue: a file is lost or damaged, or a process has died.

    Commands print the one-line message and exit with code 1. A ValueError is a mistake of the user: exit code 2.
    """


def one_line(error: BaseException, longest: int | None = None) -> str:
    """Returns an error's message without line breaks, cut to ``longest`` characters; its type if it has none."""
    return (" ".join(str(error).split()) or type(error).__name__)[:longest]


def first_line(error: BaseException) -> str:
    """Returns the first line of a message whose other lines are details of the library that raised the error."""
    return str(error).strip().partition("\n")[0]


def reason(error: BaseException) -> str:
    """Returns ``file: why`` for an error of the operating system, and the message of any other error."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        return error.strerror if name is None else f"{printable(os.fsdecode(name))}: {error.strerror}"
    return str(error).strip() or type(error).__name__


def printable(text: str) -> str:
    """Returns the text with unprintable characters escaped: a line break becomes ``\\n``."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
