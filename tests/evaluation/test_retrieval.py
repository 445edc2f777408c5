"""Tests recall on known rankings."""

import numpy as np
import pytest

from clip_jax.evaluation import retrieval
from clip_jax.evaluation.retrieval import RECALL_AT, chance, nearest, ranks, recalls, retrieval_ranks


def recall_at_k(scores, query_ids, candidate_ids):
    found = ranks(scores, query_ids, candidate_ids)
    return {k: (found < k).mean() for k in RECALL_AT}


def retrieval_metrics(images, texts, image_ids, text_ids):
    return recalls(
        retrieval_ranks(images, texts, image_ids, text_ids), retrieval_ranks(texts, images, text_ids, image_ids)
    )


def test_recall_counts_the_queries_with_a_match_among_the_first_k():
    candidates = np.arange(20)
    ranks = [0, 0, 3, 4, 5, 9, 10, 19]  # of each query's match, from 0
    scores = np.zeros((len(ranks), 20))
    for query, rank in enumerate(ranks):
        order = np.roll(candidates, rank - query)  # puts candidate ``query`` at ``rank``
        scores[query, order] = -np.arange(20)
    recall = recall_at_k(scores, np.arange(len(ranks)), candidates)
    assert recall == {1: 2 / 8, 5: 4 / 8, 10: 6 / 8}


def test_the_best_of_several_matches_counts():
    scores = np.array([[0.1, 0.9, 0.5, 0.2], [0.8, 0.1, 0.3, 0.2]])
    candidate_ids = np.array([7, 7, 9, 9])
    assert recall_at_k(scores, np.array([7, 9]), candidate_ids)[1] == 0.5
    # Matches of the query before the best one do not lower its rank.
    scores = np.array([[0.9, 0.8, 0.7, 0.95]])
    assert recall_at_k(scores, np.array([1]), np.array([1, 1, 1, 2])) == {1: 0, 5: 1, 10: 1}


@pytest.mark.parametrize(("count", "expected"), [(5, {1: 0, 5: 1, 10: 1}), (11, {1: 0, 5: 0, 10: 0})])
def test_equal_scores_are_right_only_if_k_covers_all_candidates(count, expected):
    ids = np.arange(count)
    assert recall_at_k(np.ones((count, count)), ids, ids) == expected


@pytest.mark.parametrize("which", ["all", "matches", "one of a query's matches"])
def test_a_score_that_is_nan_is_never_right(which):
    query_ids, candidate_ids = np.arange(20), np.arange(40) % 20
    matches = query_ids[:, None] == candidate_ids
    scores = np.where(matches, 1.0, 0.0)
    chosen = {"all": matches | True, "matches": matches, "one of a query's matches": np.eye(20, 40, dtype=bool)}[which]
    scores[chosen] = np.nan
    assert recall_at_k(scores, query_ids, candidate_ids) == dict.fromkeys(RECALL_AT, 0)


def test_a_wrong_candidate_with_the_score_nan_ranks_before_the_match():
    scores = np.array([[0.9, np.nan, 0.1]])
    assert recall_at_k(scores, np.array([0]), np.arange(3)) == {1: 0, 5: 1, 10: 1}


def test_a_query_without_any_match_is_never_right():
    scores = np.array([[0.9, 0.1], [0.1, 0.9]])
    assert recall_at_k(scores, np.array([0, 5]), np.array([0, 1])) == dict.fromkeys(RECALL_AT, 0.5)


def test_both_directions_with_several_captions_and_images_of_one_id():
    # Two images of id 0 and one of id 1; two captions of id 0 and two of id 1.
    images = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    texts = np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8], [0, 1, 0]], np.float32)
    result = retrieval_metrics(images, texts, np.array([0, 0, 1]), np.array([0, 0, 1, 1]))
    assert result.keys() == {f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in RECALL_AT}
    # Image 1 finds caption 3 of id 1 first; caption 3 finds image 1 of id 0.
    assert result["image_to_text_recall@1"] == pytest.approx(2 / 3)
    assert result["text_to_image_recall@1"] == pytest.approx(3 / 4)
    assert result["image_to_text_recall@5"] == result["text_to_image_recall@5"] == 1


def test_recall_equals_that_of_sorted_rows():
    random = np.random.default_rng(0)
    scores = random.normal(size=(50, 60))
    query_ids, candidate_ids = random.integers(0, 12, 50), np.arange(60) % 12
    for k, value in recall_at_k(scores, query_ids, candidate_ids).items():
        first = candidate_ids[np.argsort(-scores, axis=1)[:, :k]]
        assert value == pytest.approx((first == query_ids[:, None]).any(axis=1).mean())


@pytest.fixture(params=["distinct", "captions twice"])
def example(request):
    """60 images of 5 captions each; in one case every tenth caption is that of another image too."""
    random = np.random.default_rng(3)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    images, text_ids = unit(random.normal(size=(60, 24))), np.repeat(np.arange(60), 5)
    texts = unit(images[text_ids] + 0.8 * random.normal(size=(300, 24)))
    if request.param == "captions twice":
        texts[::10] = texts[3::10]
    return images, texts, np.arange(60), text_ids


def test_blocks_give_the_same_ranks_as_all_scores_at_once(example, monkeypatch):
    images, texts, image_ids, text_ids = example
    scores = images.astype(np.float64) @ texts.T.astype(np.float64)
    for block in (1, 7, 10_000):
        monkeypatch.setattr(retrieval, "BLOCK_BYTES", 4 * 300 * block)
        np.testing.assert_array_equal(retrieval_ranks(*example), ranks(scores, image_ids, text_ids))
        np.testing.assert_array_equal(
            retrieval_ranks(texts, images, text_ids, image_ids), ranks(scores.T, text_ids, image_ids)
        )


def test_a_caption_of_two_images_counts_against_both():
    random = np.random.default_rng(5)
    images = random.normal(size=(33, 40)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts = images.copy()
    texts[17] = texts[2]
    found = retrieval_ranks(images, texts, np.arange(33), np.arange(33))
    assert found[2] == 1 and found[17] > 0
    assert (np.delete(found, [2, 17]) == 0).all()


def test_chance_is_the_mean_over_random_orders(example):
    _, _, image_ids, text_ids = example
    random, got = np.random.default_rng(0), []
    for _ in range(600):
        scores = random.random((60, 300))
        got.append(recalls(ranks(scores, image_ids, text_ids), ranks(scores.T, text_ids, image_ids)))
    for name, value in chance(image_ids, text_ids).items():
        assert np.mean([one[name] for one in got]) == pytest.approx(value, abs=0.006), name


def test_the_nearest_are_in_order(example):
    images, texts, _, _ = example
    scores = texts[:4] @ images.T
    np.testing.assert_array_equal(nearest(texts[:4], images, 3), np.argsort(-scores, axis=1)[:, :3])
