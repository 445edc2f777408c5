"""Linear probe: logistic regression on frozen features (section 3.2 and appendix A.3 of arXiv 2103.00020).

The objective is that of scikit-learn's ``LogisticRegression``, which the paper used: C times the sum of the examples'
cross entropies, plus half the squared weights. Biases are not penalized. The optimum is unique up to a constant added
to all biases, so any solver finds it: this one is optax's L-BFGS, with the examples split over all devices.
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
# A fit ends when the largest entry of the gradient is below this fraction of the penalty's largest gradient. At the
# optimum the gradient of the examples cancels that of the penalty. The bound is clipped to fractions of the gradient at
# zero weights: above them a fit would end too early, below them float32 has no precision. scikit-learn's absolute bound
# of 1e-4 ends too early for features of unit length, whose gradients are small from the start.
PENALTY_FRACTION = 1e-2
MAX_FIRST_FRACTION, MIN_FIRST_FRACTION = 1e-4, 1e-5
MAX_SEARCH_STEPS = 20  # of one line search

# The paper's grid: 96 steps from 1e-6 to 1e6, eight for each decade.
STEPS_PER_DECADE = 8
LOWEST_DECADE, HIGHEST_DECADE = -6, 6
LAST_STEP = STEPS_PER_DECADE * (HIGHEST_DECADE - LOWEST_DECADE)


class Split(NamedTuple):
    """Features float32 ``[M, D]`` and their classes, int ``[M]`` in ``[0, num_classes)``."""

    features: np.ndarray
    labels: np.ndarray


class Probe(NamedTuple):
    """A linear classifier: weights float32 ``[D, C]`` and bias float32 ``[C]``, minus infinity for unseen classes."""

    weights: np.ndarray
    bias: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Returns the logits float32 ``[M, C]`` of features float32 ``[M, D]``."""
        return features @ self.weights + self.bias


def linear_probe(
    train: Split, test: Split, num_classes: int, mesh: Mesh, validation: Split | None = None
) -> dict[str, float]:
    """Chooses C on the validation split, fits on train and validation together, and scores on the test split.

    Args:
      train, test: features and labels.
      num_classes: C; labels are below it.
      mesh: examples are split over all its devices.
      validation: None takes a fifth of each class of ``train``, drawn with a fixed seed.

    Returns:
      ``accuracy`` and ``mean_per_class`` on the test split, shares in [0, 1], and ``C``.

    Raises:
      ValueError: a feature is not finite, a label is out of range, ``train`` has a single class, lengths or widths do
        not match, or every class of ``train`` is too small to take a validation split from it.
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

    fitted: dict[float, _ScaledProbe] = {}

    def validation_accuracy(C: float) -> float:  # noqa: N803
        below = max((other for other in fitted if other < C), default=None)
        probe, fitted[C] = problem.fit(C, ~held_out, start=fitted.get(below))
        return top_k_accuracy(probe.scores(validation.features), validation.labels, 1)

    C = choose_C(validation_accuracy)  # noqa: N806
    probe, _ = problem.fit(C, start=fitted[C])
    metrics = rank_metrics(label_ranks(probe.scores(test.features), test.labels), test.labels, num_classes)
    return {"accuracy": metrics["top_1"], "mean_per_class": metrics["mean_per_class"], "C": C}


def choose_C(accuracy_of: Callable[[float], float]) -> float:  # noqa: N802
    """Returns the C of the highest accuracy, by the paper's binary search (appendix A.3).

    Starts with 1e-6, 1e-4, 1e-2, 1, 1e2, 1e4 and 1e6, and halves the interval around the best until it is an eighth of
    a decade: 15 values at most. Finds the peak if there is only one. Among equal accuracies the smallest C is best.

    Args:
      accuracy_of: from C to accuracy; called once for each value.
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
    """Returns the probe that minimizes C times the sum of cross entropies plus half the squared weights.

    Compiled once for each shape, not for each C. A class without examples is never predicted.

    Args:
      features: float32 ``[M, D]``, used unchanged.
      labels: int ``[M]``, in ``[0, num_classes)``.
      num_classes: number of classes.
      C: as in scikit-learn: a larger C regularizes less.
      mesh: examples are split over all its devices. The result does not depend on their number.
      max_iterations: of L-BFGS, which ends earlier if the gradient vanishes.

    Raises:
      ValueError: a feature is not finite, a label is out of range, there is a single class, lengths do not match, or C
        is not above zero.
    """
    return _Problem(Split(features, labels), num_classes, mesh).fit(C, max_iterations=max_iterations)[0]


class _Problem:
    """Examples on the devices, to be fitted with any C, all of them or a subset.

    The features are centered and divided by their standard deviation. The optimum stays the same: biases are not
    penalized, and the penalty is scaled accordingly. Image embeddings have similar directions; without their mean,
    L-BFGS needs far fewer iterations.
    """

    def __init__(self, split: Split, num_classes: int, mesh: Mesh):
        _check(split, "train", num_classes)
        count, width = split.features.shape
        padded = -(-count // mesh.size) * mesh.size
        self._mean = split.features.mean(axis=0)
        features = np.zeros((padded, width), np.float32)
        np.subtract(split.features, self._mean, out=features[:count])
        self._std = np.float32(np.sqrt(np.vdot(features, features) / (count * width))) or np.float32(1)
        features /= self._std

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
        mask: np.ndarray | None = None,
        start: "_ScaledProbe | None" = None,
        max_iterations: int = MAX_ITERATIONS,
    ) -> tuple[Probe, "_ScaledProbe"]:
        """Returns the optimum for the examples of ``mask``, bool ``[M]``, or all, and a start for similar fits.

        Examples outside the mask have the weight 0, so every fit has the same shapes and is the same program.
        """
        if not C > 0:
            raise ValueError(f"C={C} must be above zero")
        mask = np.ones(len(self._labels), bool) if mask is None else mask
        count = np.count_nonzero(mask)
        frequencies = np.bincount(self._labels[mask], minlength=self._num_classes) / max(count, 1)
        if np.count_nonzero(frequencies) < 2:
            raise ValueError("the examples to fit have a single class; a probe needs two or more")
        # For two classes scikit-learn has a single vector, their difference. Its penalty is twice as large.
        scaled_C = C / 2 if self._num_classes == 2 else C  # noqa: N806
        penalty = 1 / (scaled_C * count * self._std**2)
        # Finite for a class without examples, yet too small to change any sum.
        log_frequencies = np.log(np.maximum(frequencies, 1e-30)).astype(np.float32)
        sample_weights = np.pad(mask.astype(np.float32) / count, self._padding)

        shape = (self._features.shape[1], self._num_classes)
        scaled = _minimize(
            _Examples(self._features, self._padded_labels, self._split_over_devices(sample_weights)),
            log_frequencies,
            np.float32(penalty),
            _ScaledProbe(np.zeros(shape, np.float32), np.zeros(shape[1:], np.float32)) if start is None else start,
            np.int32(max_iterations),
            self._mesh,
        )
        scaled = _ScaledProbe(*map(np.asarray, scaled))
        weights = scaled.weights / self._std
        bias = scaled.bias + log_frequencies - self._mean @ weights
        return Probe(weights, np.where(frequencies > 0, bias, np.float32(-np.inf))), scaled


class _Examples(NamedTuple):
    """Features float32 ``[N, D]``, labels int32 ``[N]``, and weights float32 ``[N]`` whose sum is 1."""

    features: jax.Array
    labels: jax.Array
    sample_weights: jax.Array


class _ScaledProbe(NamedTuple):
    """A probe of the scaled features. Its biases are relative to the logarithms of the class frequencies."""

    weights: np.ndarray
    bias: np.ndarray


@functools.partial(jax.jit, static_argnames="mesh")
def _minimize(
    examples: _Examples,
    log_frequencies: jax.Array,  # float32 [C]
    penalty: jax.Array,
    start: _ScaledProbe,
    max_iterations: jax.Array,
    mesh: Mesh,
) -> _ScaledProbe:
    features, labels, sample_weights = examples

    def objective(probe: _ScaledProbe) -> jax.Array:
        # Accelerators round to bfloat16 by default, which would hide the gradient near the optimum.
        logits = jnp.matmul(features, probe.weights, precision=jax.lax.Precision.HIGHEST) + probe.bias + log_frequencies
        cross_entropies = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return cross_entropies @ sample_weights + penalty / 2 * jnp.square(probe.weights).sum()

    def largest(gradient: _ScaledProbe) -> jax.Array:
        return optax.tree.norm(gradient, ord=jnp.inf)

    first_gradient = largest(jax.grad(objective)(jax.tree.map(jnp.zeros_like, start)))
    line_search = optax.scale_by_zoom_linesearch(MAX_SEARCH_STEPS, initial_guess_strategy="one")
    solver = optax.lbfgs(linesearch=line_search)

    def unfinished(state: tuple) -> jax.Array:
        iteration, probe, solver_state, _, gradient = state
        bound = PENALTY_FRACTION * penalty * jnp.abs(probe.weights).max()
        bound = jnp.clip(bound, MIN_FIRST_FRACTION * first_gradient, MAX_FIRST_FRACTION * first_gradient)
        # A line search that uses all its steps has found no improvement: float32 has no more precision.
        found = optax.tree.get(solver_state, "num_linesearch_steps") < MAX_SEARCH_STEPS
        return (iteration < max_iterations) & (largest(gradient) > bound) & found

    def step(state: tuple) -> tuple:
        iteration, probe, solver_state, value, gradient = state
        update, solver_state = solver.update(
            gradient, solver_state, probe, value=value, grad=gradient, value_fn=objective
        )
        # The line search has already computed both at the new probe.
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
        raise ValueError(f"{name}: labels are in [{labels.min()}, {labels.max()}], outside [0, {num_classes - 1}]")


def _check_widths(train: Split, other: Split, name: str) -> None:
    widths = train.features.shape[1], other.features.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"{name}: features have width {widths[1]}, those of train {widths[0]}")


def _stratified_fifth(labels: np.ndarray) -> np.ndarray:
    """Returns a mask, bool ``[M]``, of a fifth of each class's examples, rounded, drawn with a fixed seed."""
    random = np.random.default_rng(0)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        examples = random.permutation(np.flatnonzero(labels == label))
        chosen[examples[: round(len(examples) / 5)]] = True
    if not chosen.any():
        raise ValueError(
            "train: no class has 3 examples or more, so none can be set aside to choose C; give a validation split"
        )
    return chosen
