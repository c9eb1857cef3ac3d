"""achievement against the authors' code, and metrics told to dynamic_task_prioritization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax

SINGLE = np.array([0.64, 0.81, 0.86])  # the single-task metrics of the authors' program, rounded
KPIS = np.random.default_rng(0).uniform(0.1, 0.7, (4, 3))
LOSSES = np.random.default_rng(1).uniform(0.2, 3, (4, 3))


def published_shares(kpis, gamma, margin, momentum=0.1):
    """The weights after each evaluation, equal ones before the first, which sum to 1."""
    shares, average = [np.full(3, 1 / 3)], None
    for kpi in kpis:
        average = kpi if average is None else momentum * kpi + (1 - momentum) * average
        scores = (1 - average / (SINGLE * (1 + margin))) ** gamma
        shares.append(np.exp(scores) / np.exp(scores).sum())
    return np.array(shares)


@pytest.mark.parametrize(("gamma", "margin"), [(0.5, 0.15), (2.0, 0.05)])
@pytest.mark.parametrize("form", ["geometric", "arithmetic"])
def test_published(form, gamma, margin, x64):
    def objective(losses, shares):
        return jnp.prod(losses**shares) if form == "geometric" else jnp.dot(losses, shares)

    weighting = mtl_jax.achievement(tuple(SINGLE), gamma, margin, form=form)
    state = weighting.init((1.0,) * 3)
    shares = published_shares(KPIS, gamma, margin)
    for kpi, losses, before, after in zip(KPIS, LOSSES, shares[:-1], shares[1:], strict=True):
        weights, state = weighting.update(tuple(losses), state)
        np.testing.assert_allclose(weights, jax.grad(objective)(losses, before), rtol=1e-10)
        state = mtl_jax.with_metrics(state, tuple(kpi))
        weights, state = weighting.update(tuple(losses), state)
        np.testing.assert_allclose(weights, jax.grad(objective)(losses, after), rtol=1e-10)


def test_without_metrics_it_is_the_geometric_mean():
    losses = tuple(np.float32(LOSSES[0]))
    weighting, geometric = mtl_jax.achievement(), mtl_jax.geometric()
    state = weighting.init(losses)
    expected, _ = geometric.update(losses, geometric.init(losses))
    weights, state = weighting.update(losses, state)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    # And so it is as long as one present task has none.
    state = mtl_jax.with_metrics(state, (0.1, 0.9, np.nan))
    weights, _ = weighting.update(losses, state)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    weights, _ = weighting.update(losses, state, mask=(True, True, False))
    assert weights[0] * losses[0] > weights[1] * losses[1]


def test_direction_and_margin():
    """Errors count by their inverse ratio, and who is beyond the margin has the score 0."""
    weighting = mtl_jax.achievement(
        (0.5, 2.0, 0.8), 1.0, 0.0, 0.0, (True, False, True), form="arithmetic"
    )
    state = mtl_jax.with_metrics(weighting.init((1.0,) * 3), (0.25, 8.0, 1.6))
    weights, _ = weighting.update((1.0,) * 3, state)
    scores = np.exp([0.5, 0.75, 0.0])
    np.testing.assert_allclose(weights, scores / scores.sum(), rtol=1e-6)


def test_higher_is_better_holds_flags():
    with pytest.raises(TypeError, match="achievement: `higher_is_better` must be True or False"):
        mtl_jax.achievement(higher_is_better={"a": 1.0})


def test_dynamic_task_prioritization_of_accuracies(x64):
    """The paper's formula on KPIs that are told, with its moving average."""
    weighting = mtl_jax.dynamic_task_prioritization(2.0, "metrics", decay=0.9)
    state, average = weighting.init((1.0,) * 3), None
    weights, state = weighting.update((-1.0, 0.5, 3.0), state)  # the losses do not count
    np.testing.assert_array_equal(weights, 1)
    for kpi in KPIS:
        average = kpi if average is None else 0.1 * kpi + 0.9 * average
        state = mtl_jax.with_metrics(state, tuple(kpi))
        for _ in range(2):
            weights, state = weighting.update((1.0, 2.0, 3.0), state)
            expected = -((1 - average) ** 2) * np.log(average)
            np.testing.assert_allclose(weights, expected, rtol=1e-10)
    told = mtl_jax.with_metrics(state, (1.1, 0.5, 0.5))
    weights, after = weighting.update((1.0, 2.0, 3.0), told)
    assert np.all(np.isnan(weights))
    told = mtl_jax.with_metrics(after, (1.0, 0.5, 0.5))  # the way back
    weights, _ = weighting.update((1.0, 2.0, 3.0), told)
    assert np.all(np.isfinite(weights))


def test_performance_is_a_function_or_the_metrics():
    with pytest.raises(TypeError, match="`performance` must be a function, got 'metric'"):
        mtl_jax.dynamic_task_prioritization(1.0, "metric")
