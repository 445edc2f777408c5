"""Tests comparisons of results whose intervals are known."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from clip_jax.evaluation.comparison import bootstrap, compare, interval, statistic_of, write_comparison
from clip_jax.evaluation.results import Results, TaskResult, write_results


def zero_shot(hits, name="animals", metric="top_1", classes=2):
    """A task with these right and wrong first answers (bool)."""
    labels = np.arange(len(hits), dtype=np.int32) % classes
    best = np.where(hits, labels, (labels + 1) % classes)[:, None].astype(np.int32)
    value = np.mean([hits[labels == label].mean() for label in range(classes)])
    metrics = {"top_1": float(hits.mean()), "mean_per_class": float(value), "roc_auc": 0.75}
    counts = {"images": len(hits), "classes": classes}
    names = [f"class {label}" for label in range(classes)]
    arrays = {"labels": labels, "best": best}
    return TaskResult(name, name.title(), "zero_shot", metric, metrics, counts, class_names=names, arrays=arrays)


def retrieval(ranks):
    metrics = {"image_to_text_recall@5": float((ranks < 5).mean())}
    counts = {"images": len(ranks), "texts": len(ranks)}
    return TaskResult(
        "pairs", "", "retrieval", "image_to_text_recall@5", metrics, counts, arrays={"image_to_text_rank": ranks}
    )


def written(folder, *tasks, model="a model"):
    write_results(epath.Path(folder), Results(model, "ViT-B/32", list(tasks)))
    return epath.Path(folder)


def draws(share, count=400):
    return np.arange(count) < share * count


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution():
    for count, share in [(400, 0.5), (2_500, 0.2)]:
        low, high = interval(bootstrap(*statistic_of("top_1", zero_shot(draws(share, count)).arrays)))
        half = 1.96 * np.sqrt(share * (1 - share) / count)
        assert (low, high) == pytest.approx((share - half, share + half), abs=0.2 * half)


def test_the_interval_covers_the_true_value_about_as_often_as_stated():
    rng = np.random.default_rng(0)
    intervals = [
        interval(bootstrap(*statistic_of("top_1", zero_shot(rng.random(200) < 0.3).arrays))) for _ in range(100)
    ]
    assert 88 <= sum(low <= 0.3 <= high for low, high in intervals) <= 100


@pytest.mark.parametrize("metric", ["top_1", "mean_per_class"])
def test_intervals_shrink_with_the_root_of_the_number_of_examples(metric):
    widths = []
    for count in (400, 6_400):
        low, high = interval(bootstrap(*statistic_of(metric, zero_shot(draws(0.4, count)).arrays)))
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.2)


def test_resampled_metrics_are_those_of_all_examples_when_each_is_drawn_once():
    rng = np.random.default_rng(1)
    labels, best = rng.integers(0, 7, 90), np.array([rng.permutation(7)[:5] for _ in range(90)])
    ranks = rng.integers(0, 30, 90)
    arrays = {"labels": labels, "best": best, "text_to_image_rank": ranks}
    first = best[:, 0] == labels
    expected = {
        "top_1": first.mean(),
        "top_5": np.mean([label in row for label, row in zip(labels, best, strict=True)]),
        "mean_per_class": np.mean([first[labels == label].mean() for label in range(7)]),
        "text_to_image_recall@10": (ranks < 10).mean(),
    }
    for metric, value in expected.items():
        examples, statistic = statistic_of(metric, arrays)
        assert statistic(np.arange(examples)[None]) == pytest.approx([value])
    assert statistic_of("roc_auc", arrays) is None
    assert statistic_of("image_to_text_recall@1", arrays) is None
    assert statistic_of("top_1", {"best": best}) is None


def test_a_class_that_was_not_drawn_does_not_count():
    arrays = zero_shot(np.array([True, False, True, False])).arrays
    _, statistic = statistic_of("mean_per_class", arrays)
    assert statistic(np.array([[0, 2, 2, 0], [1, 1, 1, 1], [0, 0, 0, 1]])) == pytest.approx([1, 0, 0.5])


def test_large_tasks_are_resampled_in_parts(monkeypatch):
    task = statistic_of("top_1", zero_shot(draws(0.3)).arrays)
    monkeypatch.setattr("clip_jax.evaluation.comparison.CHUNK", 400 * 7)
    values = bootstrap(*task)
    assert values.shape == (1_000,) and values.mean() == pytest.approx(0.3, abs=0.01)


def test_the_difference_of_models_that_fail_on_the_same_images_has_a_narrow_interval(tmp_path):
    hits = draws(0.5, 1_000)
    better = hits.copy()
    better[500:520] = True
    comparison = compare(
        [written(tmp_path / "a", zero_shot(hits)), written(tmp_path / "b", zero_shot(better), model="b")]
    )
    (task,) = comparison.tasks
    assert comparison.models == ["a model", "b"]
    assert (task.title, task.metric, task.differences[0]) == ("Animals", "top_1", None)
    assert [estimate.value for estimate in task.values] == pytest.approx([0.5, 0.52])
    own, difference = task.values[0], task.differences[1]
    assert difference.value == pytest.approx(0.02)
    assert 0 < difference.low < 0.02 < difference.high
    assert difference.high - difference.low < (own.high - own.low) / 3


def test_other_images_are_not_paired_and_other_metrics_have_no_interval(tmp_path):
    tasks = [
        [zero_shot(draws(0.5, 100)), zero_shot(draws(0.5), "birds", "roc_auc"), retrieval(np.arange(10))],
        [zero_shot(draws(0.5, 200)), zero_shot(draws(0.5), "birds", "roc_auc"), retrieval(np.arange(10) // 2)],
    ]
    comparison = compare([written(tmp_path / str(index), *some) for index, some in enumerate(tasks)])
    animals, birds, pairs = comparison.tasks
    assert animals.values[1].low is not None and animals.differences[1].low is None
    assert birds.values[0] == (0.75, None, None) and birds.differences[1] == (0, None, None)
    assert pairs.title == "pairs" and pairs.differences[1].low is not None
    assert pairs.differences[1].value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "paired", "expected"),
    [
        ({}, True, []),
        ({"identity": {"images": "1", "classes": "1", "templates": "1"}}, True, []),
        ({"identity": {"images": "1", "classes": "1", "templates": "2"}}, True, ["other templates"]),
        ({"identity": {"images": "2", "classes": "1", "templates": "1"}}, False, ["other images"]),
        ({"identity": {"images": "1", "classes": "2", "templates": "1"}}, False, ["other classes or labels"]),
        ({"counts": {"images": 400, "classes": 3}}, False, ["3 instead of 2 classes"]),
        ({"counts": {"images": 1_000, "texts": 2}}, False, ["1,000 instead of 400 images", "no instead of 2 classes"]),
        ({"metric": "mean_per_class"}, True, ["its metric is mean per class"]),
    ],
)
def test_results_of_other_versions_of_a_task_are_compared_with_a_note(tmp_path, changes, paired, expected):
    own = {"identity": {"images": "1", "classes": "1", "templates": "1"}} if "identity" in changes else {}
    one, other = (
        dataclasses.replace(zero_shot(draws(share)), **values) for share, values in ((0.5, own), (0.6, changes))
    )
    comparison = compare([written(tmp_path / "a", one, model="a"), written(tmp_path / "b", other, model="b")])
    (task,) = comparison.tasks
    assert task.differences[1].value == pytest.approx(0.1) and (task.differences[1].low is not None) == paired
    if not expected:
        assert not task.notes
        return
    (note,) = task.notes
    assert note.startswith("b differs from a in more than the model: ") and all(part in note for part in expected)
    write_comparison(tmp_path / "page", comparison)
    assert f"note: {note}" in comparison.table()
    assert f"Note: {note}." in (tmp_path / "page/comparison.html").read_text(encoding="utf-8")


def test_a_result_that_does_not_exceed_a_baseline_is_marked(tmp_path):
    levels = {"chance": {"top_1": 0.5}, "largest_class": {"top_1": 0.55}, "baseline": {"top_1": 0.7}}
    folders = [
        written(tmp_path / name, dataclasses.replace(zero_shot(draws(share)), **levels), model=name)
        for name, share in (("low", 0.5), ("middle", 0.6), ("high", 0.75))
    ]
    comparison = compare(folders)
    everything = ["nearest mean image", "largest class", "chance"]
    assert comparison.tasks[0].not_above == [everything, everything[:1], []]
    lines = [line for line in comparison.table().splitlines() if line.startswith("  ")]
    assert lines[0].endswith("(not above nearest mean image, largest class, chance)")
    assert lines[1].endswith("(not above nearest mean image)") and "above" not in lines[2]
    write_comparison(tmp_path / "page", comparison)
    assert (tmp_path / "page/comparison.html").read_text(encoding="utf-8").count("not above") == 2


def test_models_that_lack_a_task_are_left_out_of_it(tmp_path):
    tasks = {"a": ["one"], "b": ["one", "two"], "c": ["two"]}
    folders = [
        written(tmp_path / model, *(zero_shot(draws(0.5), name) for name in names), model=model)
        for model, names in tasks.items()
    ]
    one, two = compare(folders).tasks
    assert one.values[2] is None and one.differences[2] is None
    assert two.values[0] is None and two.differences[1] is None and two.differences[2] is not None


def test_without_arrays_there_is_still_the_value(tmp_path):
    folders = [written(tmp_path / name, zero_shot(draws(0.5))) for name in "ab"]
    (folders[1] / "arrays" / "animals.npz").unlink()
    (task,) = compare(folders).tasks
    assert task.values[1] == (0.5, None, None) and task.differences[1] == (0, None, None)


def test_the_text_and_the_page_hold_the_numbers(tmp_path):
    folders = [
        written(tmp_path / "a", zero_shot(draws(0.5)), model="<one> & $x$"),
        written(tmp_path / "b", zero_shot(draws(0.625)), model="two"),
    ]
    comparison = compare(folders)
    text = comparison.table()
    assert "Animals: top-1, %" in text and "50.0 [4" in text and "+12.5 [+" in text
    write_comparison(tmp_path / "made" / "here", comparison)
    html = (tmp_path / "made" / "here" / "comparison.html").read_text(encoding="utf-8")
    assert "&lt;one&gt; &amp; $x$" in html and "<one>" not in html
    assert "50.0 [4" in html and "+12.5 [+" in html and html.count("<img ") == 2


def test_models_are_shown_by_name_if_names_differ(tmp_path):
    models = ["/home/me/runs/one", "/home/me/runs/two", "/home/you/runs/two"]
    folders = [written(tmp_path / f"{n}", zero_shot(draws(0.5)), model=model) for n, model in enumerate(models)]
    assert compare(folders[:2]).models == ["one", "two"]
    assert compare(folders[1:]).models == models[1:]


def test_equal_names_are_distinguished_by_their_folders(tmp_path):
    folders = [written(tmp_path / name, zero_shot(draws(0.5))) for name in "ab"]
    assert compare(folders).models == [f"a model ({folder})" for folder in folders]


def test_invalid_comparisons_are_an_error_of_one_line(tmp_path):
    good = written(tmp_path / "good", zero_shot(draws(0.5)))
    with pytest.raises(ValueError, match="at least two"):
        compare([good])
    with pytest.raises(FileNotFoundError, match=r"python -m clip_jax.evaluate --model=... --output=\S*empty writes it"):
        compare([good, tmp_path / "empty"])
    with pytest.raises(ValueError, match="no task was evaluated in two"):
        compare([good, written(tmp_path / "other", retrieval(np.arange(3)))])
    bad = written(tmp_path / "bad", zero_shot(draws(0.5)))
    (bad / "arrays" / "animals.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"animals.npz is damaged"):
        compare([good, bad])
    for text in ["{", "[]", json.dumps({"model": "x", "tasks": {"a": {}}})]:
        (bad / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results.json was not written by an evaluation"):
            compare([good, bad])
