"""Linear probe: logistic regression on frozen features (section 3.2 and appendix A.3 of arXiv 2103.00020).

The objective is that of scikit-learn's ``LogisticRegression``, which the paper used: C times the sum of the examples'
cross entropies, plus half the squared weights; the biases are free. Its optimum is unique, up to a constant on all
biases, so what finds it does not matter: here it is optax's L-BFGS, on the examples of all devices at once.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from clip_jax.evaluation.zero_shot import label_ranks, rank_metrics, top_k_accuracy
from clip_jax.sharding import batch_sharding, replicated

MAX_ITERATIONS = 1000
# A fit ends where the gradient's largest entry is a hundredth of the penalty's alone, which is what the examples'
# gradient has to cancel. That is between these parts of the gradient of a probe that knows only how frequent the
# classes are: more would end too early, less is below float32. scikit-learn's 1e-4 is not relative to anything; on
# features of unit length, whose gradients are small from the start, it ends too early.
OF_THE_PENALTY = 1e-2
MOST_OF_THE_FIRST, LEAST_OF_THE_FIRST = 1e-4, 1e-5
MAX_SEARCH_STEPS = 20  # along one direction

# The paper's grid: 96 steps from 1e-6 to 1e6, eight a decade.
STEPS_PER_DECADE = 8
LOWEST_DECADE, HIGHEST_DECADE = -6, 6
LAST_STEP = STEPS_PER_DECADE * (HIGHEST_DECADE - LOWEST_DECADE)


class Split(NamedTuple):
    """Features float32 ``[M, D]`` and their classes, int ``[M]`` in ``[0, num_classes)``."""

    features: np.ndarray
    labels: np.ndarray


class Probe(NamedTuple):
    """A linear classifier: weights float32 ``[D, C]`` and bias float32 ``[C]``, minus infinity for a class unseen."""

    weights: np.ndarray
    bias: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Features float32 ``[M, D]`` to logits float32 ``[M, C]``."""
        return features @ self.weights + self.bias


def linear_probe(
    train: Split, test: Split, num_classes: int, mesh: Mesh, validation: Split | None = None
) -> dict[str, float]:
    """Chooses C on the validation split, fits again on train and validation together and scores on the test split.

    Args:
      validation: None: a fifth of each class of ``train``, always the same one.

    Returns:
      ``accuracy`` and ``mean_per_class`` on the test split, shares in [0, 1], and ``C``.

    Raises:
      ValueError: a feature is not finite, a label out of range, there is a single class in ``train``, lengths or widths
        do not match, or there is no validation split and classes are too small to take one from them.
    """
    _check(train, "train", num_classes)
    _check(test, "test", num_classes)
    _check_widths(train, test, "test")
    if validation is None:
        held_out = _stratified_fifth(train.labels)
        both = train
    else:
        _check(validation, "validation", num_classes)
        _check_widths(train, validation, "validation")
        held_out = np.arange(len(train.labels) + len(validation.labels)) >= len(train.labels)
        both = Split(*(np.concatenate(parts) for parts in zip(train, validation, strict=True)))

    problem = _Problem(both, num_classes, mesh)
    validation = Split(both.features[held_out], both.labels[held_out])

    fitted: dict[float, _Coordinates] = {}

    def validation_accuracy(C: float) -> float:  # noqa: N803
        below = max((other for other in fitted if other < C), default=None)
        probe, fitted[C] = problem.fit(C, ~held_out, start=fitted.get(below))
        return top_k_accuracy(probe.scores(validation.features), validation.labels, 1)

    C = choose_C(validation_accuracy)  # noqa: N806
    probe, _ = problem.fit(C, start=fitted[C])
    metrics = rank_metrics(label_ranks(probe.scores(test.features), test.labels), test.labels, num_classes)
    return {"accuracy": metrics["top_1"], "mean_per_class": metrics["mean_per_class"], "C": C}


def choose_C(accuracy_of: Callable[[float], float]) -> float:  # noqa: N802
    """The C of the highest accuracy, by the paper's search: seven values, then ever closer ones around the best.

    Starts from 1e-6, 1e-4, 1e-2, 1, 1e2, 1e4 and 1e6 and halves the interval around the best until it is an eighth of a
    decade: 15 values at most. If accuracy rises to one peak and falls again, that peak is found. Of equals the smallest
    is the best.

    Args:
      accuracy_of: from C to what is to be highest; called once for each value.
    """
    distance = 2 * STEPS_PER_DECADE
    accuracies = {step: accuracy_of(_C_of(step)) for step in range(0, LAST_STEP + 1, distance)}

    def best() -> int:
        return max(sorted(accuracies), key=accuracies.__getitem__)

    while distance > 1:
        distance //= 2
        center = best()
        for step in (center - distance, center + distance):
            if 0 <= step <= LAST_STEP:
                accuracies[step] = accuracy_of(_C_of(step))
    return _C_of(best())


def _C_of(step: int) -> float:  # noqa: N802
    return 10.0 ** (LOWEST_DECADE + step / STEPS_PER_DECADE)


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    C: float,  # noqa: N803
    mesh: Mesh,
    max_iterations: int = MAX_ITERATIONS,
) -> Probe:
    """The probe that minimises C times the sum of cross entropies plus half the squared weights.

    Compiled once for each shape; C is no part of it. A class without examples takes no part and is never predicted.

    Args:
      features: float32 ``[M, D]``, used as they come.
      labels: int ``[M]``, in ``[0, num_classes)``.
      C: as scikit-learn has it, so more is less regularisation.
      mesh: the examples are split over all its devices; the result does not depend on their number.
      max_iterations: of L-BFGS; fewer are done where the gradient has vanished before.

    Raises:
      ValueError: a feature is not finite, a label out of range, there is a single class, lengths do not match, or C is
        not above zero.
    """
    return _Problem(Split(features, labels), num_classes, mesh).fit(C, max_iterations=max_iterations)[0]


class _Problem:
    """Examples on the devices, ready to be fitted with any C, all of them or a part.

    Centred and divided by their spread, which changes the coordinates but not the optimum, as the biases are free and
    the penalty is divided alike. Image embeddings all point about the same way, and without their common part L-BFGS
    needs a fraction of the iterations.
    """

    def __init__(self, split: Split, num_classes: int, mesh: Mesh):
        _check(split, "train", num_classes)
        count, width = split.features.shape
        padded = -(-count // mesh.size) * mesh.size
        self._mean = split.features.mean(axis=0)
        features = np.zeros((padded, width), np.float32)
        np.subtract(split.features, self._mean, out=features[:count])
        self._spread = np.float32(np.sqrt(np.vdot(features, features) / (count * width))) or np.float32(1)
        features /= self._spread

        self._labels = split.labels
        self._num_classes = num_classes
        self._mesh = mesh
        self._padding = (0, padded - count)
        self._features = self._split_over_devices(features)
        self._padded_labels = self._split_over_devices(np.pad(split.labels.astype(np.int32), self._padding))

    def _split_over_devices(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, batch_sharding(self._mesh), array.__getitem__)

    def fit(
        self,
        C: float,  # noqa: N803
        taking_part: np.ndarray | None = None,
        start: "_Coordinates | None" = None,
        max_iterations: int = MAX_ITERATIONS,
    ) -> tuple[Probe, "_Coordinates"]:
        """The optimum for the examples of ``taking_part``, bool ``[M]``, or all, and where a similar fit can start.

        Examples that take no part stay where they are and weigh nothing, so every fit is the same program.
        """
        if not C > 0:
            raise ValueError(f"C={C} has to be above zero")
        taking_part = np.ones(len(self._labels), bool) if taking_part is None else taking_part
        count = np.count_nonzero(taking_part)
        frequencies = np.bincount(self._labels[taking_part], minlength=self._num_classes) / max(count, 1)
        if np.count_nonzero(frequencies) < 2:
            raise ValueError("the examples to fit have a single class")
        # Of two classes scikit-learn has one vector, their difference, and penalises it as it is: twice as much.
        own_C = C / 2 if self._num_classes == 2 else C  # noqa: N806
        penalty = 1 / (own_C * count * self._spread**2)
        # So small for a class without examples that it has no part in any sum, yet a number.
        log_frequencies = np.log(np.maximum(frequencies, 1e-30)).astype(np.float32)
        importance = np.pad(taking_part.astype(np.float32) / count, self._padding)

        shape = (self._features.shape[1], self._num_classes)
        coordinates = _minimise(
            self._features,
            self._padded_labels,
            self._split_over_devices(importance),
            log_frequencies,
            np.float32(penalty),
            _Coordinates(np.zeros(shape, np.float32), np.zeros(shape[1:], np.float32)) if start is None else start,
            np.int32(max_iterations),
            self._mesh,
        )
        coordinates = _Coordinates(*map(np.asarray, coordinates))
        weights = coordinates.weights / self._spread
        bias = coordinates.bias + log_frequencies - self._mean @ weights
        return Probe(weights, np.where(frequencies > 0, bias, np.float32(-np.inf))), coordinates


class _Coordinates(NamedTuple):
    """A probe of centred features of unit spread; ``bias`` is added to the logarithms of the class frequencies."""

    weights: np.ndarray
    bias: np.ndarray


@functools.partial(jax.jit, static_argnames="mesh")
def _minimise(
    features: jax.Array,  # float32 [N, D]
    labels: jax.Array,  # int32 [N]
    importance: jax.Array,  # float32 [N], sums to 1
    log_frequencies: jax.Array,  # float32 [C]
    penalty: jax.Array,
    start: _Coordinates,
    max_iterations: jax.Array,
    mesh: Mesh,
) -> _Coordinates:
    def objective(probe: _Coordinates) -> jax.Array:
        # By default accelerators round to bfloat16 here, which would hide the gradient near the optimum.
        logits = jnp.matmul(features, probe.weights, precision=jax.lax.Precision.HIGHEST) + probe.bias + log_frequencies
        cross_entropies = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return cross_entropies @ importance + penalty / 2 * jnp.square(probe.weights).sum()

    def largest(gradient: _Coordinates) -> jax.Array:
        return optax.tree.norm(gradient, ord=jnp.inf)

    at_first = largest(jax.grad(objective)(jax.tree.map(jnp.zeros_like, start)))
    line_search = optax.scale_by_zoom_linesearch(MAX_SEARCH_STEPS, initial_guess_strategy="one")
    solver = optax.lbfgs(linesearch=line_search)

    def unfinished(state: tuple) -> jax.Array:
        iteration, probe, solver_state, _, gradient = state
        of_the_penalty = OF_THE_PENALTY * penalty * jnp.abs(probe.weights).max()
        small_enough = jnp.clip(of_the_penalty, LEAST_OF_THE_FIRST * at_first, MOST_OF_THE_FIRST * at_first)
        # A search that long found nothing better: float32 knows no more.
        found = optax.tree.get(solver_state, "num_linesearch_steps") < MAX_SEARCH_STEPS
        return (iteration < max_iterations) & (largest(gradient) > small_enough) & found

    def step(state: tuple) -> tuple:
        iteration, probe, solver_state, value, gradient = state
        update, solver_state = solver.update(
            gradient, solver_state, probe, value=value, grad=gradient, value_fn=objective
        )
        # The line search ended at the new probe, so it knows both there already.
        value, gradient = (optax.tree.get(solver_state, name) for name in ("value", "grad"))
        return iteration + 1, optax.apply_updates(probe, update), solver_state, value, gradient

    first = (jnp.int32(0), start, solver.init(start), *jax.value_and_grad(objective)(start))
    probe = jax.lax.while_loop(unfinished, step, first)[1]
    return jax.lax.with_sharding_constraint(probe, replicated(mesh))


def _check(split: Split, name: str, num_classes: int) -> None:
    features, labels = split
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels):
        raise ValueError(f"{name}: features {features.shape} and labels {labels.shape} do not match")
    if not len(labels):
        raise ValueError(f"{name}: there are no examples")
    wrong = np.count_nonzero(~np.isfinite(features).all(axis=1))
    if wrong:
        raise ValueError(f"{name}: the features of {wrong} of {len(features)} examples are not finite")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"{name}: labels reach {labels.min()} to {labels.max()}, outside 0 to {num_classes - 1}")


def _check_widths(train: Split, other: Split, name: str) -> None:
    widths = train.features.shape[1], other.features.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"{name}: features have width {widths[1]}, those of train {widths[0]}")


def _stratified_fifth(labels: np.ndarray) -> np.ndarray:
    """Bool ``[M]``: a fifth of each class's examples, rounded, drawn with a fixed seed."""
    random = np.random.default_rng(0)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        examples = random.permutation(np.flatnonzero(labels == label))
        chosen[examples[: round(len(examples) / 5)]] = True
    if not chosen.any():
        raise ValueError(
            "train: no class has the 3 examples that it takes to choose C on some; give a validation split"
        )
    return chosen
