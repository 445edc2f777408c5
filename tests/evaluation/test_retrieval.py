"""Recall on rankings that are known beforehand."""

import numpy as np
import pytest

from clip_jax.evaluation.retrieval import RECALL_AT, recall_at_k, retrieval_metrics


def test_recall_counts_the_queries_whose_match_stands_among_the_first_k():
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
    # Three matches ahead of it don't push a query's own match back.
    scores = np.array([[0.9, 0.8, 0.7, 0.95]])
    assert recall_at_k(scores, np.array([1]), np.array([1, 1, 1, 2])) == {1: 0, 5: 1, 10: 1}


@pytest.mark.parametrize(("count", "expected"), [(5, {1: 0, 5: 1, 10: 1}), (11, {1: 0, 5: 0, 10: 0})])
def test_the_same_score_for_all_is_right_only_where_k_covers_all_candidates(count, expected):
    ids = np.arange(count)
    assert recall_at_k(np.ones((count, count)), ids, ids) == expected


@pytest.mark.parametrize("which", ["all", "matches", "one of a query's matches"])
def test_a_score_that_is_not_a_number_is_never_right(which):
    query_ids, candidate_ids = np.arange(20), np.arange(40) % 20
    matches = query_ids[:, None] == candidate_ids
    scores = np.where(matches, 1.0, 0.0)
    chosen = {"all": matches | True, "matches": matches, "one of a query's matches": np.eye(20, 40, dtype=bool)}[which]
    scores[chosen] = np.nan
    assert recall_at_k(scores, query_ids, candidate_ids) == dict.fromkeys(RECALL_AT, 0)


def test_a_wrong_candidate_whose_score_is_not_a_number_stands_before_the_match():
    scores = np.array([[0.9, np.nan, 0.1]])
    assert recall_at_k(scores, np.array([0]), np.arange(3)) == {1: 0, 5: 1, 10: 1}


def test_a_query_without_any_match_is_never_right():
    scores = np.array([[0.9, 0.1], [0.1, 0.9]])
    assert recall_at_k(scores, np.array([0, 5]), np.array([0, 1])) == dict.fromkeys(RECALL_AT, 0.5)


def test_both_directions_with_several_captions_and_several_pictures_of_one_id():
    # Two pictures of id 0 and one of id 1; two captions of id 0 and two of id 1.
    images = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    texts = np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8], [0, 1, 0]], np.float32)
    result = retrieval_metrics(images, texts, np.array([0, 0, 1]), np.array([0, 0, 1, 1]))
    assert result.keys() == {f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in RECALL_AT}
    # Picture 1 finds caption 3 of id 1 first; caption 3 finds picture 1 of id 0.
    assert result["image_to_text_recall@1"] == pytest.approx(2 / 3)
    assert result["text_to_image_recall@1"] == pytest.approx(3 / 4)
    assert result["image_to_text_recall@5"] == result["text_to_image_recall@5"] == 1


def test_recall_is_that_of_sorting_each_row():
    random = np.random.default_rng(0)
    scores = random.normal(size=(50, 60))
    query_ids, candidate_ids = random.integers(0, 12, 50), np.arange(60) % 12
    for k, value in recall_at_k(scores, query_ids, candidate_ids).items():
        first = candidate_ids[np.argsort(-scores, axis=1)[:, :k]]
        assert value == pytest.approx((first == query_ids[:, None]).any(axis=1).mean())
