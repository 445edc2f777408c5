"""The data position of each step follows from the segments of a run."""

import json

import pytest
from etils import epath

from clip_jax.errors import FailedError
from clip_jax.history import (
    Segment,
    active,
    continued,
    next_batch,
    parse_ranges,
    position_after,
    read_history,
    segment_at,
    write_history,
)

FIRST = Segment(0, 0, 0, 8, "", 100, "data")


def drawn(segments: list[Segment], steps: int) -> list[tuple[int, int]]:
    """The number and the position of the batch of each step, by drawing one batch after the other."""
    found, number, position = [], 0, 0
    for step in range(steps):
        segment = segment_at(segments, step)
        while any(start <= number < stop for start, stop in parse_ranges(segment.skip_batches)):
            number, position = number + 1, position + segment.global_batch_size
        found.append((number, position))
        number, position = number + 1, position + segment.global_batch_size
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("3:5", [(3, 5)]),
        ("7:9, 3:5", [(3, 5), (7, 9)]),
        ("3:5,5:6", [(3, 6)]),
        ("3:9,4:6", [(3, 9)]),
        ("0:1,", [(0, 1)]),
    ],
)
def test_ranges_are_sorted_and_joined(text, expected):
    assert parse_ranges(text) == expected


@pytest.mark.parametrize("text", ["3", "3:3", "5:3", "-1:3", "a:b", "1:2:3", ":", "1.5:3", "²:3"])
def test_a_text_that_is_no_range_is_an_error(text):
    with pytest.raises(ValueError, match="must be START:STOP with whole numbers"):
        parse_ranges(text)


@pytest.mark.parametrize("skip", ["", "0:1", "0:3,5:7", "2:3", "10:20,20:21", "1:2,3:4,5:6"])
def test_positions_are_those_of_drawing_batch_by_batch(skip):
    segments = [FIRST._replace(skip_batches=skip)]
    expected = drawn(segments, 30)
    assert [next_batch(segments, step) for step in range(30)] == expected
    assert [position_after(segments, step) for step in range(1, 31)] == [position + 8 for _, position in expected]
    assert position_after(segments, 0) == 0


def test_changes_begin_where_the_run_is():
    history = continued([], FIRST, 0)
    history = continued(history, FIRST._replace(global_batch_size=16, changed={"global_batch_size": [8, 16]}), 5)
    history = continued(history, FIRST._replace(global_batch_size=16, skip_batches="2:4,7:9"), 7)
    assert [next_batch(history, step) for step in range(9)] == [
        *((number, 8 * number) for number in range(5)),
        (5, 40),
        (6, 56),
        (9, 104),  # batches 7 and 8 are passed over; 2 and 3 were drawn before the change
        (10, 120),
    ]


def test_nothing_is_added_while_nothing_changes():
    history = continued([], FIRST, 0)
    assert continued(history, FIRST._replace(time="later"), 50) == history


def test_a_run_that_falls_back_before_a_change_makes_it_there():
    history = continued([], FIRST, 0)
    history = continued(history, FIRST._replace(global_batch_size=16), 10)
    history = continued(history, FIRST._replace(global_batch_size=16), 4)  # the checkpoints of later steps are damaged
    assert [segment.step for segment in active(history)] == [0, 4]
    assert position_after(active(history), 6) == 4 * 8 + 2 * 16


def test_going_back_leaves_later_changes():
    history = continued([], FIRST, 0)
    history = continued(history, FIRST._replace(skip_batches="20:30"), 20)
    history = continued(history, FIRST._replace(from_step=10), 10)
    assert [segment.step for segment in active(history)] == [0, 10]
    assert len(history) == 3


def test_new_data_has_an_order_of_its_own():
    history = continued([], FIRST, 0)
    history = continued(history, FIRST._replace(data_fingerprint="more"), 10)
    history = continued(history, FIRST._replace(data_fingerprint="more", steps=200), 20)
    history = continued(history, FIRST._replace(data_fingerprint="even more", steps=200), 30)
    assert [(segment.data_start, segment.data_changes) for segment in history] == [(0, 0), (80, 1), (80, 1), (240, 2)]


def test_it_is_read_as_it_was_written(tmp_path):
    history = continued([FIRST], FIRST._replace(from_step=3, changed={"optimizer.epsilon": [1, 2]}), 3)
    write_history(epath.Path(tmp_path), history)
    assert read_history(epath.Path(tmp_path)) == history
    assert read_history(epath.Path(tmp_path / "new")) == []


@pytest.mark.parametrize("line", ["{", "null", "{}", json.dumps(FIRST._asdict() | {"step": "1"})])
def test_a_damaged_line_is_an_error_of_one_line(tmp_path, line):
    write_history(epath.Path(tmp_path), [FIRST])
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FailedError, match=r"history\.jsonl: line 2 is damaged"):
        read_history(epath.Path(tmp_path))
