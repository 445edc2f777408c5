"""Options of a source choose fields and their proportions, fill templates and clean captions."""

import time

import pytest

from clip_jax.data.sources import PairError
from clip_jax.data.sources.fields import Fields, clean_caption, nested, parse_fields, split_options

DEFAULTS = Fields(("image",), (("caption", 1.0),))


def captions(options: str, record: dict) -> tuple[list[str], list[float]]:
    fields, _ = parse_fields(options, DEFAULTS, "csv:x")
    return fields.captions_of(nested(record, "x"), "x")


def test_the_captions_of_a_field_share_its_proportion_and_missing_fields_are_skipped():
    record = {"title": "a", "tags": ["b", " ", "c"]}
    assert captions("caption=title:3,tags:1", record) == (["a", "b", "c"], [3.0, 0.5, 0.5])
    assert captions("text=title:3,tags:1", {"tags": "b"}) == (["b"], [1.0])


def test_a_single_field_has_no_proportions():
    assert captions("", {"caption": ["a", "b"]}) == (["a", "b"], [])


def test_each_template_takes_each_caption():
    found, _ = captions("template=a photo of {}&template=art of a {}.", {"caption": ["cat", "dog"]})
    assert found == ["a photo of cat", "art of a cat.", "a photo of dog", "art of a dog."]


def test_an_entry_of_json_is_a_field():
    assert captions("caption=meta.alt", {"meta": '{"alt": "x"}'}) == (["x"], [])
    assert captions("caption=meta.alt,caption", {"meta": "[1]", "caption": "y"}) == (["y"], [1.0])


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("<p>A &amp;amp; B</p>", "A & B"),
        ("see https://example.org/x?y=1 now", "see now"),
        ("IMG_1234.JPG on the beach", "on the beach"),
        ("write to me@example.org", "write to"),
        ("(www.example.org), a shop", "a shop"),
        ("a cat @home", "a cat @home"),
        ("two\n\n lines\t here", "two lines here"),
        ("3.5 miles", "3.5 miles"),
    ],
)
def test_cleaning_removes_html_addresses_and_file_names(dirty, clean):
    assert clean_caption(dirty) == clean
    assert "https" not in captions("clean=1", {"caption": [dirty, "x"]})[0][0]


@pytest.mark.parametrize("piece", ["a@", "a-", "<a", "&amp;", "a.jpg", "://"])
def test_cleaning_takes_linear_time(piece):
    started = time.perf_counter()
    captions("clean=1", {"caption": [piece * 1_000_000, "x"]})
    assert time.perf_counter() - started < 20  # a quadratic pattern would take hours


def test_a_caption_that_is_empty_after_cleaning_is_dropped():
    with pytest.raises(PairError, match="has no caption") as caught:
        captions("clean=1", {"caption": "https://example.org"})
    assert caught.value.reason == "empty_caption"


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("/a/b.csv", ("/a/b.csv", "")),
        ("/a/b.csv?image=x&caption=y", ("/a/b.csv", "image=x&caption=y")),
        ("/a/b-?.tar", ("/a/b-?.tar", "")),
        ("/a/b-?.tar?caption=y", ("/a/b-?.tar", "caption=y")),
    ],
)
def test_a_question_mark_starts_options_only_before_an_equals_sign(where, expected):
    assert split_options(where) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("caption=a&text=b", "the same option"),
        ("image=a&image=b", "given 2 times"),
        ("caption=a:-1", "above 0"),
        ("caption=", "caption= without a value needs classes"),
    ],
)
def test_invalid_options_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        parse_fields(options, DEFAULTS, "csv:x")
