import math

import numpy as np
import pytest
import scipy.stats

from mtl_jax.evaluation import delta_m, mean_interval


def test_delta_m_on_hand_computed_cases():
    directions = {"up": True, "down": False}
    assert delta_m({"up": 1.1, "down": 2.0}, {"up": 1.0, "down": 2.0}, directions) == (
        pytest.approx(0.05)
    )
    assert delta_m({"up": 1.0, "down": 1.0}, {"up": 1.0, "down": 2.0}, directions) == 0.25
    # A negative baseline, such as a log-likelihood: larger is still better.
    assert delta_m({"up": -1.0}, {"up": -2.0}, {"up": True}) == 0.5


def test_delta_m_errors():
    with pytest.raises(ValueError, match="same tasks"):
        delta_m({"a": 1.0}, {"b": 1.0}, {"a": True})
    with pytest.raises(ValueError, match="baseline of a is 0"):
        delta_m({"a": 1.0}, {"a": 0.0}, {"a": True})


def test_mean_interval_is_that_of_a_t_test():
    values = np.random.default_rng(0).normal(3, 2, 7)
    mean, half_width = mean_interval(values)
    interval = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half_width, mean + half_width], interval)


def test_mean_interval_of_one_or_no_value():
    mean, half_width = mean_interval([2.0])
    assert mean == 2.0
    assert math.isnan(half_width)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
