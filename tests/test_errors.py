"""What is printed about an error is one line."""

import pytest

from clip_jax.errors import first_line, one_line, printable, reason


def test_a_message_of_several_lines_becomes_one():
    error = ValueError("first\n  second\tthird")
    assert one_line(error) == "first second third"
    assert one_line(error, longest=8) == "first se"
    assert first_line(error) == "first"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "a\nb"), "a\\nb: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("the bucket is gone"), "the bucket is gone"),
        (ValueError("two\nmistakes"), "two\nmistakes"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_the_reason_names_the_file(error, text):
    assert reason(error) == text


def test_characters_that_cannot_be_printed_are_escaped():
    assert printable("a\x1b[2J\n\udcff é") == "a\\x1b[2J\\n\\udcff é"
