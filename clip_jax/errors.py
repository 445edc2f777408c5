"""Error messages in one line, and the base class of errors that are not the user's mistake."""

import os


class FailedError(Exception):
    """The command is right, but it cannot go on: a file is lost or damaged, a process has died. One line.

    Commands print it and exit with code 1. A ValueError is a mistake in what was asked for and exits with code 2.
    """


def one_line(error: BaseException, longest: int | None = None) -> str:
    """Returns an error's message without line breaks, cut after ``longest`` characters; its type if it has none."""
    return (" ".join(str(error).split()) or type(error).__name__)[:longest]


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, where the others are details of the library that raised it."""
    return str(error).strip().partition("\n")[0]


def reason(error: BaseException) -> str:
    """Returns what to print about an error: ``file: why`` for one of the operating system, else its message."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        return error.strerror if name is None else f"{printable(os.fsdecode(name))}: {error.strerror}"
    return str(error).strip() or type(error).__name__


def printable(text: str) -> str:
    """Returns the text with line breaks and other characters that cannot be printed escaped, as ``\\n``."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
