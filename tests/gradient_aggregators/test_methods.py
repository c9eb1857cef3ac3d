"""Each aggregator against its definition, its special cases, and errors of parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.gradient_aggregators.db_mtl import db_mtl
from mtl_jax.gradient_aggregators.graddrop import graddrop
from mtl_jax.gradient_aggregators.moco import moco
from mtl_jax.gradient_aggregators.trimmed_mean import trimmed_mean

ROWS = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
LOSSES = (1.0, 2.0, 3.0, 4.0, 5.0)


def present(*flags):
    return tuple(np.bool_(flag) for flag in flags)


def once(aggregator, rows, losses=None, mask=None, **kwargs):
    """One call from the state before the first step: the gradient and the next state."""
    losses = LOSSES[: len(rows)] if losses is None else losses
    mask = present(*(True for _ in rows)) if mask is None else mask
    state = aggregator.init(rows[0], losses, **kwargs)
    return aggregator.update(rows, state, losses=losses, mask=mask)


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
    update, rows = aggregator.update, (jnp.array(ROWS), jnp.array(ROWS))
    state = aggregator.init((ROWS[0], ROWS[0]), LOSSES, key=jax.random.key(0))
    (first, other), state = update(rows, state)
    (second, _), _ = update(rows, state)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, second)


def test_graddrop_leaks_by_task():
    aggregator = graddrop({"a": 1.0, "b": 0.0})
    rows = jnp.array([[1.0, 1.0, -1.0], [-2.0, 3.0, -4.0]])
    state = aggregator.init(rows[0], {"a": 0.0, "b": 0.0}, key=jax.random.key(0))
    update, seen = aggregator.update, set()
    for _ in range(8):
        gradient, state = update(rows, state)
        seen.add(float(gradient[0]))  # the first task's passes always, with the second's or without
        np.testing.assert_array_equal(gradient[1:], (4, -5))
    assert seen == {1.0, -1.0}


trimmed_mean_of = functools.cache(trimmed_mean)


@pytest.mark.parametrize("trim", [0, 1, 2])
def test_trimmed_mean_is_robust(trim):
    expected = np.sort(ROWS.astype(np.float64), axis=0)[trim : 5 - trim].mean(0)
    gradient, _ = once(trimmed_mean_of(trim), ROWS)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    # As many outliers as are trimmed on either side leave it within the others' range.
    outliers = ROWS.copy()
    outliers[:trim] = 1e30
    gradient, _ = once(trimmed_mean_of(trim), outliers)
    assert np.all(gradient <= ROWS[trim:].max(0) + 1e-6)
    assert np.all(gradient >= ROWS[trim:].min(0) - 1e-6)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_trimmed_mean_of_too_few_tasks_is_the_median(number):
    mask = present(*(k < number for k in range(5)))
    gradient, _ = once(trimmed_mean_of(2), ROWS, mask=mask)
    np.testing.assert_allclose(gradient, np.median(ROWS[:number], axis=0), rtol=1e-5, atol=1e-7)


def test_db_mtl_brings_all_gradients_to_one_length():
    gradient, _ = once(db_mtl(beta=0.0), np.diag([1e-3, 1.0, 1e3]).astype(np.float32))
    np.testing.assert_allclose(gradient, 1e3 / 3, rtol=1e-4)


MOCO, DB_MTL = moco(), db_mtl()


@pytest.mark.parametrize("aggregator", [MOCO, DB_MTL], ids=["moco", "db_mtl"])
def test_a_negative_loss_is_reported_as_outside_the_domain(aggregator):
    gradient, after = once(aggregator, ROWS, (-1.0, *LOSSES[1:]))
    assert np.all(np.isnan(gradient))
    np.testing.assert_array_equal(after.steps, 0)


@pytest.mark.parametrize(
    "aggregator",
    [MOCO, DB_MTL, moco(eps=0), db_mtl(eps=0)],
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
        (lambda: moco(gamma=-1.0), r"moco: `gamma` must be in \[0, inf\)"),
        (lambda: moco(rho=float("inf")), r"moco: `rho` must be in \[0, inf\)"),
        (lambda: moco(eps=-1e-8), r"moco: `eps` must be in \[0, inf\)"),
        (lambda: db_mtl(1.0), r"db_mtl: `beta` must be in \[0, 1\)"),
        (lambda: db_mtl(beta_sigma=-0.5), r"db_mtl: `beta_sigma` must be in \[0, inf\)"),
        (lambda: db_mtl(eps=float("nan")), r"db_mtl: `eps` must be in \[0, inf\)"),
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
