"""Tests how labels match class names, and that each mismatch is counted or reported in one line."""

import numpy as np
import pytest

from clip_jax.evaluation.images import Annotation
from clip_jax.evaluation.labels import check_names, choose_rows, match_classes, no_match_message, plain


@pytest.mark.parametrize(
    ("found", "names", "labels", "expected"),
    [
        (["dog", "cat"], ["cat", "dog", "bird"], [], {"cat": 0, "dog": 1}),
        (["2", "0"], ["cat", "dog", "bird"], [], {"2": 2, "0": 0}),
        (["00002", "00001"], ["zero", "one", "two"], [], {"00002": 2, "00001": 1}),
        (["1", "0"], ["cat", "cat"], [], {"1": 1, "0": 0}),
        (["3", "10"], ["10", "3", "4"], [], {"3": 1, "10": 0}),  # by name, although they are numbers
        (["n02", "n01"], ["cat", "dog"], ["n02", "n01"], {"n02": 0, "n01": 1}),
        (["2", "1"], ["cat", "dog"], ["1", "2"], {"2": 1, "1": 0}),
        (["Great_White-Shark", "newt"], ["newt", "great white shark"], [], {"Great_White-Shark": 1, "newt": 0}),
        (["RED", "blue "], ["red", "blue"], [], {"RED": 0, "blue ": 1}),
        (["FACES_EASY"], ["centered face"], ["faces_easy"], {"FACES_EASY": 0}),
        (["gru\u0308n"], ["gr\u00fcn"], [], {"gru\u0308n": 0}),  # as macOS writes it
        (["C", "C++"], ["C", "C++", "C#"], [], {"C": 0, "C++": 1}),  # equal strings come first
        (["a", "A"], ["a", "A"], [], {"a": 0, "A": 1}),
    ],
)
def test_classes_are_found_by_label_name_or_number(found, names, labels, expected):
    matching = match_classes(found, names, labels)
    assert matching.index_of == expected and not matching.unknown
    keys = labels or names
    assert set(matching.loosely) == {label for label in found if not label.isdecimal() and label not in keys}


@pytest.mark.parametrize(
    ("found", "names", "labels", "unknown"),
    [
        (["robin", "Wrenn"], ["robin", "wren"], [], ["Wrenn"]),
        (["n02", "n01"], ["cat", "dog"], [], ["n02", "n01"]),  # never in alphabetical order
        (["a", "b", "c"], ["cat", "dog"], [], ["a", "b", "c"]),
        (["0", "1", "2"], ["0", "1"], [], ["2"]),  # some are names, so the other is no index
        (["0", "1", "2"], ["1", "2", "3"], [], ["0"]),
        (["0", "5"], ["1", "2"], [], ["0", "5"]),  # names are numbers, so these are no indices
        (["0", "cat"], ["cat", "dog"], [], ["0"]),
        (["-1", "0"], ["cat", "dog"], [], ["-1", "0"]),
        (["1.0", "0.0"], ["cat", "dog"], [], ["1.0", "0.0"]),
        (["cat"], ["cat"], ["n01"], ["cat"]),  # with labels, class names are ignored
        (["0"], ["cat"], ["n01"], ["0"]),
        (["c"], ["+", "-"], [], ["c"]),
        (["?"], ["!"], [], ["?"]),  # two texts of punctuation only do not match
    ],
)
def test_labels_that_match_nothing_are_unknown(found, names, labels, unknown):
    assert match_classes(found, names, labels).unknown == unknown


@pytest.mark.parametrize(
    ("found", "names", "labels", "message"),
    [
        (
            ["0", "7"],
            ["cat", "dog"],
            [],
            "labels go up to 7, which needs 8 class names, but there are 2; indices start",
        ),
        (["1", "2"], ["cat", "dog"], [], "labels go up to 2, which needs 3 class names"),
        (["1", "01"], ["cat", "dog"], [], "'1' and '01' would both be 'dog'"),
        (["cat", "Cat"], ["cat", "dog"], [], "'cat' and 'Cat' would both be 'cat'"),
        (["cat"], ["cat", "cat"], [], "'cat' could be 2 of the classes .'cat' and 'cat'.; give labels, too"),
        (["c"], ["C", "C++"], [], "'c' could be 2 of the classes .'C' and 'C[+][+]'."),
    ],
)
def test_an_ambiguous_match_is_an_error_of_one_line(found, names, labels, message):
    with pytest.raises(ValueError, match=message):
        match_classes(found, names, labels)


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (["cat", ""], [], "class_names has an empty entry at index 1"),
        (["cat", " "], [], "class_names has an empty entry at index 1"),
        (["cat", "dog"], ["a", ""], "labels has an empty entry at index 1"),
        (["cat", "dog"], ["a"], "2 class_names for 1 labels"),
        ([], ["a"], "0 class_names for 1 labels"),
        (["cat", "dog"], ["a", "a"], "the label 'a' occurs twice"),
    ],
)
def test_invalid_names_are_an_error_of_one_line(names, labels, message):
    with pytest.raises(ValueError, match=message):
        check_names(names, labels)


def test_the_message_has_the_labels_and_the_closest_names():
    message = no_match_message(["Wrenn", "owl", "x", "y", "z"], 7, ["robin", "Wren", "owls"], [])
    assert message.startswith(
        "5 of its 7 classes match none of the task's 3 class names: 'Wrenn' (did you mean 'Wren'?), 'owl' (did you "
        "mean 'owls'?), 'x' and 2 more; "
    )
    assert "\n" not in message


def records_of(*labels, image=""):
    return [Annotation(list(one) if isinstance(one, tuple) else [one], [], image) for one in labels]


def test_rows_of_other_classes_are_left_out_and_counted():
    matching = match_classes(["cat", "zebra", "DOG", "yak"], ["dog", "cat", "bird"])
    chosen = choose_rows(
        records_of("cat", "zebra", "DOG", "yak", "cat"), matching, ["dog", "cat", "bird"], False, "wait"
    )
    assert chosen.rows == [0, 2, 4] and chosen.classes == [[1], [0], [1]]
    assert chosen.notes == [
        "matched without case, spaces and punctuation: 'DOG' is 'dog'",
        "1 of 3 classes have no image and wait: 'bird'",
        "left out: 2 of 5 records, of 2 classes that are not the task's: 'zebra', 'yak'",
    ]


def test_records_of_one_image_are_one_image():
    names = ["cat", "dog"]
    matching = match_classes(names, names)
    records = [
        *records_of("cat", image="1.png"),
        *records_of("dog", "dog", image="2.png"),
        *records_of("cat", image="1.png"),
    ]
    chosen = choose_rows(records, matching, names, False, "")
    assert chosen.rows == [0, 1] and chosen.classes == [[0], [1]]
    assert chosen.notes == ["2 of 4 records name an image file again; each file counts once"]
    both = [*records_of("cat", "dog", image="1.png")]
    assert choose_rows(both, matching, names, True, "").classes == [[0, 1]]
    with pytest.raises(ValueError, match=r"1 of its 1 images do not .* record 0, has 2 classes .'cat', 'dog'."):
        choose_rows(both, matching, names, False, "")
    assert choose_rows(records_of("cat", "cat"), matching, names, False, "").rows == [0, 1]  # unknown files


def test_images_without_a_class_are_refused_or_counted():
    matching = match_classes(["cat"], ["cat", "dog"])
    records = records_of("cat", (), (), "cat")
    with pytest.raises(
        ValueError, match="2 of its 4 images do not have exactly one class; the first, record 1, has no"
    ):
        choose_rows(records, matching, ["cat", "dog"], False, "")
    assert choose_rows(records, matching, ["cat", "dog"], True, "").notes[-1] == "2 of 4 images have no class"
    with pytest.raises(ValueError, match="no image has one of its 2 classes"):
        choose_rows([], matching, ["cat", "dog"], False, "")


def test_plain_text_keeps_letters_of_every_script():
    assert plain("Great_White-Shark ") == "greatwhiteshark" and plain("狗 犬") == "狗犬" and plain("++") == ""
    assert plain("हिंदी") != plain("हद") and plain("STRASSE") == plain("straße")


def test_any_names_match_themselves_in_any_order():
    random = np.random.default_rng(0)
    for count in (1, 2, 50):
        names = [f"name {number}" for number in range(count)]
        found = [names[index] for index in random.permutation(count)]
        assert match_classes(found, names).index_of == {name: names.index(name) for name in found}
