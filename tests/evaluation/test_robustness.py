"""Effective robustness on lines that are known beforehand."""

import numpy as np
import pytest

from clip_jax.evaluation.robustness import MIN_SHARE, effective_robustness, fit_standard_line, logit, predicted_shift

IMAGENET = np.linspace(0.55, 0.88, 20)


def on_line(imagenet, slope, intercept):
    return 1 / (1 + np.exp(-(slope * np.log(imagenet / (1 - imagenet)) + intercept)))


@pytest.mark.parametrize("line", [(1.0, 0.0), (0.9, -0.5), (1.6, -2.0)])
def test_the_fit_recovers_a_line(line):
    assert fit_standard_line(IMAGENET, on_line(IMAGENET, *line)) == pytest.approx(line)


def test_the_fit_is_the_least_squares_line_in_logits():
    noisy = on_line(IMAGENET, 1.1, -0.7) + np.random.default_rng(0).normal(0, 0.02, len(IMAGENET))
    assert fit_standard_line(IMAGENET, noisy) == pytest.approx(np.polyfit(logit(IMAGENET), logit(noisy), 1))


def test_effective_robustness_is_the_distance_from_the_line_in_shares():
    line = (0.9, -0.5)
    promised = on_line(0.762, *line)
    assert effective_robustness(0.762, promised, line) == pytest.approx(0)
    assert effective_robustness(0.762, promised + 0.2, line) == pytest.approx(0.2)
    assert effective_robustness(0.762, 0.1, line) == pytest.approx(0.1 - promised)


def test_nothing_and_everything_right_stay_finite():
    assert logit([0, 1]) == pytest.approx([-np.log(1 / MIN_SHARE - 1), np.log(1 / MIN_SHARE - 1)])
    line = fit_standard_line([0, 0.5, 1], [0, 0.5, 1])
    assert line == pytest.approx((1, 0), abs=1e-9)
    assert predicted_shift([0, 0.5, 1], line) == pytest.approx([MIN_SHARE, 0.5, 1 - MIN_SHARE])


@pytest.mark.parametrize(("imagenet", "shift"), [([0.5], [0.4]), ([0.5, 0.5], [0.4, 0.3]), ([0.5, 0.6], [0.4])])
def test_what_gives_no_line_is_refused(imagenet, shift):
    with pytest.raises(ValueError, match="a line needs"):
        fit_standard_line(imagenet, shift)
