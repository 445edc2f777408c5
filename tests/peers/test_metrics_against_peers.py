"""Metrics, recall and zero-shot classifiers as scikit-learn, CLIP_benchmark and open_clip have them.

Without ties the values are the same. With ties torch's order is any; ours is the lowest that any order could give.
"""

import itertools

import numpy as np
import pytest

from clip_jax.data.tokenizer import tokenize
from clip_jax.evaluation.metrics import mean_per_class_accuracy, roc_auc
from clip_jax.evaluation.retrieval import RECALL_AT, ranks
from clip_jax.evaluation.zero_shot import classifier_weights, classify, single_label_metrics, top_k_accuracy
from clip_jax.models.presets import CLIPPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset

torch = pytest.importorskip("torch")
peer_models = pytest.importorskip("peer_models")
open_clip = pytest.importorskip("open_clip")
sklearn_metrics = pytest.importorskip("sklearn.metrics")
zeroshot_classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
zeroshot_retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")

TINY = CLIPPreset(
    16,
    VisionTransformerPreset(image_size=16, patch_size=8, width=64, num_layers=1, num_heads=1),
    TextTransformerPreset(width=64, num_layers=2, num_heads=1),
)


def unit_vectors(seed, count, width=16):
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def peer_top_k(scores, labels, ks):
    """CLIP_benchmark's ``accuracy`` up to its last line, which no NumPy since 2.4 runs: an array of one as a float."""
    best = torch.from_numpy(scores).topk(max(ks), 1, True, True)[1].t()
    correct = best.eq(torch.from_numpy(labels).view(1, -1).expand_as(best))
    return [correct[:k].sum().item() / len(labels) for k in ks]


def our_recalls(scores, query_ids, candidate_ids):
    rank = ranks(scores, query_ids, candidate_ids)
    return {k: float((rank < k).mean()) for k in RECALL_AT}


def peer_recall(scores, query_ids, candidate_ids, k):
    """Share of queries with a match among the first k, as CLIP_benchmark's ``evaluate`` makes it of its recall."""
    matches = torch.from_numpy(query_ids[:, None] == candidate_ids[None, :])
    return (zeroshot_retrieval.recall_at_k(torch.from_numpy(scores), matches, k) > 0).float().mean().item()


@pytest.mark.parametrize("seed", range(3))
def test_zero_shot_metrics_of_embeddings_are_clip_benchmarks_and_scikit_learns(seed):
    images, weights = unit_vectors(seed, 300), unit_vectors(seed + 100, 12)
    labels = np.random.default_rng(seed).integers(0, 12, 300)
    names = [f"class {number}" for number in range(12)]
    ours = single_label_metrics(classify(images, weights, 100.0, names, labels), labels)
    scores = images @ weights.T
    assert [ours["top_1"], ours["top_5"]] == pytest.approx(peer_top_k(scores, labels, (1, 5)))
    balanced = sklearn_metrics.balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert ours["mean_per_class"] == pytest.approx(balanced)


def test_classes_of_one_name_are_answered_as_by_an_arg_max():
    images, weights = unit_vectors(0, 300), unit_vectors(1, 12)
    weights[7] = weights[2]
    names = [f"class {number}" for number in range(12)]
    names[7] = names[2]
    labels = np.random.default_rng(0).choice([2, 7, 5], 300)
    ours = single_label_metrics(classify(images, weights, 100.0, names, labels), labels)["top_1"]
    scores = images @ weights.T
    scores[:, 7] = scores[:, 2]  # of which a product may have rounded one otherwise
    assert ours == pytest.approx((scores.argmax(axis=1) == labels).mean())


@pytest.mark.parametrize("seed", range(3))
def test_recall_is_clip_benchmarks_with_several_captions_per_image(seed):
    images, texts = unit_vectors(seed, 40), unit_vectors(seed + 100, 200)
    image_ids, text_ids = np.arange(40), np.arange(200) // 5
    scores = images @ texts.T
    for queries, candidates, values in ((image_ids, text_ids, scores), (text_ids, image_ids, scores.T.copy())):
        ours = our_recalls(values, queries, candidates)
        assert ours == pytest.approx({k: peer_recall(values, queries, candidates, k) for k in RECALL_AT}, abs=1e-6)


def orders(scores, seed, count=40):
    """The same scores with the ties of each row broken at random."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield scores + 1e-3 * random.permuted(np.broadcast_to(np.arange(scores.shape[1]), scores.shape), axis=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 3])
def test_tied_scores_get_the_lowest_top_k_accuracy_of_any_order(seed, k):
    random = np.random.default_rng(seed)
    scores, labels = random.integers(0, 4, (60, 6)).astype(np.float64), random.integers(0, 6, 60)
    ours = top_k_accuracy(scores, labels, k)
    assert all(ours <= peer_top_k(broken, labels, (k,))[0] for broken in orders(scores, seed))
    label_last = scores - 1e-3 * np.eye(6)[labels]
    assert ours == pytest.approx(peer_top_k(label_last, labels, (k,))[0])
    assert ours <= peer_top_k(scores, labels, (k,))[0]


@pytest.mark.parametrize("seed", range(3))
def test_duplicates_get_the_lowest_recall_of_any_order(seed):
    random = np.random.default_rng(seed)
    vectors = np.round(unit_vectors(seed, 6) * 4)  # whole numbers, so equal vectors score exactly alike
    queries, candidates = vectors[random.integers(0, 6, 30)], vectors[random.integers(0, 6, 30)]
    ids = np.arange(30)
    scores = (queries @ candidates.T).astype(np.float64)
    ours = our_recalls(scores, ids, ids)
    for k in RECALL_AT:
        assert all(ours[k] <= peer_recall(broken, ids, ids, k) + 1e-6 for broken in orders(scores, seed))
        assert ours[k] == pytest.approx(peer_recall(scores - 1e-3 * np.eye(30), ids, ids, k), abs=1e-6)
        assert ours[k] <= peer_recall(scores, ids, ids, k) + 1e-6


def test_the_lowest_of_all_orders_by_trying_each():
    scores, labels = np.array([[1.0, 1, 1, 0], [2, 2, 0, 1]]), np.array([1, 0])
    broken = [
        [scores + 1e-3 * np.array([first, second]) for second in itertools.permutations(range(4))]
        for first in itertools.permutations(range(4))
    ]
    for k in (1, 2, 3):
        lowest = min(peer_top_k(one, labels, (k,))[0] for row in broken for one in row)
        assert top_k_accuracy(scores, labels, k) == pytest.approx(lowest)


@pytest.mark.parametrize("seed", range(3))
def test_mean_per_class_accuracy_is_scikit_learns_balanced_accuracy(seed):
    random = np.random.default_rng(seed)
    labels = np.minimum(random.geometric(0.3, 400), 9)
    predictions = np.where(random.random(400) < 0.6, labels, random.integers(1, 10, 400))
    ours = mean_per_class_accuracy(predictions, labels)
    assert ours == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, predictions))


@pytest.mark.parametrize("levels", [3, 50, 10**9])
def test_roc_auc_is_scikit_learns_with_ties_and_without(levels):
    random = np.random.default_rng(levels)
    labels = (random.random(500) < 0.2).astype(int)
    scores = (random.integers(0, levels, 500) + labels * levels // 3).astype(np.float64)
    assert roc_auc(scores, labels) == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores))


def test_classifier_weights_are_open_clips_and_clip_benchmarks():
    model = peer_models.open_clip_model(TINY)
    names, templates = ["zebra", "hot dog", "bird of paradise"], ["{}", "a photo of a {}.", "art of the {}."]

    def tokens(texts):
        return torch.from_numpy(tokenize(list(texts), TINY.text.context_length).astype(np.int64))

    def encode_text(texts):
        with torch.no_grad():
            return model.encode_text(tokens(texts), normalize=True).numpy()

    ours = classifier_weights(encode_text, names, templates)
    theirs = open_clip.build_zero_shot_classifier(model, tokens, names, templates)
    np.testing.assert_allclose(ours, theirs.numpy().T, rtol=0, atol=1e-6)
    named = [template.replace("{}", "{c}") for template in templates]
    other = zeroshot_classification.zero_shot_classifier(model, tokens, names, named, "cpu", amp=False)
    np.testing.assert_allclose(ours, other.numpy().T, rtol=0, atol=1e-6)
