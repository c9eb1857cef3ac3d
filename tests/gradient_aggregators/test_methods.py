"""Each aggregator against its definition, its special cases, and errors of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.gradient_aggregators.db_mtl import db_mtl
from mtl_jax.gradient_aggregators.excess_mtl import excess_mtl
from mtl_jax.gradient_aggregators.graddrop import graddrop
from mtl_jax.gradient_aggregators.moco import moco
from mtl_jax.gradient_aggregators.trimmed_mean import trimmed_mean

ROWS = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
LOSSES = (1.0, 2.0, 3.0, 4.0, 5.0)


def present(*flags):
    return tuple(jnp.array(flag) for flag in flags)


def once(aggregator, rows, losses=None, mask=None, **kwargs):
    """One call from the state before the first step: the gradient and the next state."""
    losses = LOSSES[: len(rows)] if losses is None else losses

    def first_step(rows, losses, mask):
        state = aggregator.init(rows[0], losses, **kwargs)
        return aggregator.update(rows, state, losses=losses, mask=mask)

    return jax.jit(first_step)(jnp.asarray(rows), losses, mask)


@jax.jit
def graddrop_of_many_seeds(rows):
    """One call for each of 4000 seeds."""
    aggregator = graddrop()

    def one(key):
        state = aggregator.init(rows[0], LOSSES, key=key)
        return aggregator.update(rows, state)[0]

    return jax.vmap(one)(jax.random.split(jax.random.key(0), 4000))


def test_graddrop_keeps_one_sign_with_the_published_probability():
    drawn = np.array(graddrop_of_many_seeds(ROWS))
    positive, negative = np.maximum(ROWS, 0).sum(0), np.minimum(ROWS, 0).sum(0)
    is_positive = np.isclose(drawn, positive, rtol=1e-5)
    assert np.all(is_positive | np.isclose(drawn, negative, rtol=1e-5))
    probability = 0.5 * (1 + ROWS.sum(0) / np.abs(ROWS).sum(0))
    # Five standard errors at 4000 draws.
    np.testing.assert_allclose(is_positive.mean(0), probability, atol=5 * 0.5 / 4000**0.5)
    # Coordinates are drawn independently of each other.
    correlation = np.corrcoef(is_positive[:, (probability > 0.1) & (probability < 0.9)].T)
    assert np.max(np.abs(correlation - np.eye(len(correlation)))) < 0.1


def test_graddrop_drops_nothing_where_the_tasks_agree():
    for rows in (np.abs(ROWS), -np.abs(ROWS), 0 * ROWS):
        expected = np.tile(rows.sum(0), (4000, 1))
        np.testing.assert_allclose(graddrop_of_many_seeds(rows), expected, rtol=1e-5)


def test_graddrop_draws_anew_at_every_step_and_leaf():
    aggregator = graddrop()
    update, rows = jax.jit(aggregator.update), (jnp.array(ROWS), jnp.array(ROWS))
    state = aggregator.init((ROWS[0], ROWS[0]), LOSSES, key=jax.random.key(0))
    (first, other), state = update(rows, state)
    (second, _), _ = update(rows, state)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, second)


def test_graddrop_leaks_by_task():
    aggregator = graddrop({"a": 1.0, "b": 0.0})
    rows = jnp.array([[1.0, 1.0, -1.0], [-2.0, 3.0, -4.0]])
    state = aggregator.init(rows[0], {"a": 0.0, "b": 0.0}, key=jax.random.key(0))
    update, seen = jax.jit(aggregator.update), set()
    for _ in range(8):
        gradient, state = update(rows, state)
        seen.add(float(gradient[0]))  # the first task's passes always, with the second's or without
        np.testing.assert_array_equal(gradient[1:], (4, -5))
    assert seen == {1.0, -1.0}


@pytest.mark.parametrize("trim", [0, 1, 2])
def test_trimmed_mean_is_robust(trim):
    expected = np.sort(ROWS.astype(np.float64), axis=0)[trim : 5 - trim].mean(0)
    gradient, _ = once(trimmed_mean(trim), ROWS)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    # As many outliers as are trimmed on either side leave it within the others' range.
    outliers = ROWS.copy()
    outliers[:trim] = 1e30
    gradient, _ = once(trimmed_mean(trim), outliers)
    assert np.all(gradient <= ROWS[trim:].max(0) + 1e-6)
    assert np.all(gradient >= ROWS[trim:].min(0) - 1e-6)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_trimmed_mean_of_too_few_tasks_is_the_median(number):
    mask = present(*(k < number for k in range(5)))
    gradient, _ = once(trimmed_mean(2), ROWS, mask=mask)
    np.testing.assert_allclose(gradient, np.median(ROWS[:number], axis=0), rtol=1e-5, atol=1e-7)


def test_excess_mtl_first_step_only_sets_the_baseline():
    rows = np.diag([1e-3, 1e3]).astype(np.float32)
    gradient, state = once(excess_mtl(step_size=1.0), rows)
    np.testing.assert_allclose(gradient, rows.sum(0), rtol=1e-6)
    np.testing.assert_allclose(state.inner.log_weights, 0, atol=1e-6)


def test_excess_mtl_bears_a_first_gradient_of_0():
    """LibMTL: one weight is NaN at step 2 and all are from step 3."""
    aggregator = excess_mtl(step_size=0.5)
    update = jax.jit(aggregator.update)
    rows = jnp.array([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    state = aggregator.init(rows[0], (1.0, 1.0, 1.0))
    _, state = update(rows, state)
    gradient, state = update(rows.at[0, 0].set(2.0), state)
    # The first gradient of the first task sets its baseline, with a ratio of 1; the others' second
    # squares are half of the accumulated ones.
    gains = np.exp(0.5 * np.array([1, 0.5**0.5, 0.5**0.5]))
    expected = 3 * gains / gains.sum() * (2, 1, 1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    for _ in range(5):
        gradient, state = update(rows, state)
        assert np.all(np.isfinite(gradient))


def test_excess_mtl_returning_task_keeps_its_share():
    aggregator = excess_mtl(step_size=1.0)
    update = jax.jit(aggregator.update)
    rows = jnp.array(ROWS[:3])
    state = aggregator.init(rows[0], LOSSES[:3])
    everybody = present(True, True, True)
    for factor in (jnp.array([[1.0], [2.0], [5.0]]), jnp.array([[1.0], [2.0], [0.1]])):
        _, state = update(factor * rows, state, mask=everybody)
    shares = jax.nn.softmax(state.inner.log_weights)
    for _ in range(3):
        _, state = update(rows, state, mask=present(True, False, True))
    after = jax.nn.softmax(state.inner.log_weights)
    np.testing.assert_allclose(after[1], shares[1], rtol=1e-5)
    assert abs(after[0] - shares[0]) > 1e-4


def test_db_mtl_brings_all_gradients_to_one_length():
    gradient, _ = once(db_mtl(beta=0.0), np.diag([1e-3, 1.0, 1e3]).astype(np.float32))
    np.testing.assert_allclose(gradient, 1e3 / 3, rtol=1e-4)


@pytest.mark.parametrize("aggregator", [moco(), db_mtl()], ids=["moco", "db_mtl"])
def test_a_negative_loss_is_reported_as_outside_the_domain(aggregator):
    gradient, after = once(aggregator, ROWS, (-1.0, *LOSSES[1:]))
    assert np.all(np.isnan(gradient))
    np.testing.assert_array_equal(after.steps, 0)


@pytest.mark.parametrize(
    "aggregator",
    [moco(), db_mtl(), moco(eps=0), db_mtl(eps=0)],
    ids=["moco", "db_mtl", "moco[eps=0]", "db_mtl[eps=0]"],
)
def test_a_task_at_its_optimum_is_no_harm(aggregator):
    """A loss and a gradient of 0."""
    rows = np.concatenate([0 * ROWS[:1], ROWS[1:]])
    gradient, state = once(aggregator, rows, (0.0, *LOSSES[1:]))
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(state.steps, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: graddrop(-0.1), r"graddrop: `leak` must be in \[0, 1\]"),
        (lambda: graddrop({"a": 0.0, "b": 1.5}), r"graddrop: `leak` must be in \[0, 1\]"),
        (lambda: graddrop(float("nan")), r"graddrop: `leak` must be in \[0, 1\]"),
        (lambda: trimmed_mean(-1), "trimmed_mean: `trim` must be an integer"),
        (lambda: trimmed_mean(0.2), "trimmed_mean: `trim` must be an integer"),
        (lambda: moco(beta=0.0), "moco: `beta` must be in"),
        (lambda: moco(beta=1.5), r"moco: `beta` must be in \(0, 1\]"),
        (lambda: moco(gamma=-1.0), "moco: `gamma` must be at least 0"),
        (lambda: moco(rho=float("inf")), "moco: `rho` must be at least 0"),
        (lambda: moco(eps=-1e-8), "moco: `eps` must be at least 0"),
        (lambda: excess_mtl(0.0), "excess_mtl: `step_size` must be positive"),
        (lambda: excess_mtl(eps=-1.0), "excess_mtl: `eps` must be at least 0"),
        (lambda: db_mtl(1.0), r"db_mtl: `beta` must be in \[0, 1\)"),
        (lambda: db_mtl(beta_sigma=-0.5), "db_mtl: `beta_sigma` must be at least 0"),
        (lambda: db_mtl(eps=float("nan")), "db_mtl: `eps` must be at least 0"),
    ],
)
def test_parameters_outside_their_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_errors_of_init():
    with pytest.raises(ValueError, match=r"graddrop draws random numbers: call its `init` with"):
        graddrop().init(ROWS[0], LOSSES)
    with pytest.raises(ValueError, match="graddrop: `leak` must have the structure of the losses"):
        graddrop({"a": 0.0}).init(ROWS[0], LOSSES, key=jax.random.key(0))
    with pytest.raises(ValueError, match="leaves none of 4 tasks; `trim` must be at most 1"):
        trimmed_mean(2).init(ROWS[0], LOSSES[:4])
