"""Weightings as aggregators of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods import GRAMIAN_METHODS, KEY, METHODS, ROW_METHODS, TASKS, loss_sequence, made
from optax.experimental import aggregating

import mtl_jax

PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(())}
KEYS = jax.random.split(jax.random.key(0))
ROWS = {"w": jax.random.normal(KEYS[0], (4, 2, 3)), "b": jax.random.normal(KEYS[1], (4,))}


def flat_rows(rows):
    return np.concatenate([np.asarray(leaf).reshape(4, -1) for leaf in jax.tree.leaves(rows)], 1)


def test_the_weighted_sum():
    weighting = mtl_jax.nash_mtl()
    aggregator = mtl_jax.as_aggregator(weighting, num_tasks=4)
    assert isinstance(aggregator, aggregating.Aggregator)
    got, state = jax.jit(aggregator.update)(ROWS, aggregator.init(PARAMS))
    J = flat_rows(ROWS)
    weights, _ = weighting.update((1.0,) * 4, weighting.init((1.0,) * 4), gramian=J @ J.T)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(got)])
    np.testing.assert_allclose(flat, np.array(weights) @ J, rtol=1e-4, atol=1e-6)
    assert jax.tree.structure(got) == jax.tree.structure(PARAMS)
    np.testing.assert_array_equal(state.steps, 1)


def test_inside_process_and_chain():
    """Preprocessing of the rows, aggregation, and an optimizer after it."""
    optimizer = aggregating.process(
        optax.identity(),
        mtl_jax.as_aggregator(mtl_jax.pcgrad(), 4, key=jax.random.key(0)),
        optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0)),
    )
    update, _ = jax.jit(optimizer.update)(ROWS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(
        np.sqrt(sum(np.sum(np.square(leaf)) for leaf in update.values())), 1e-3, rtol=1e-5
    )


def test_losses_and_mask():
    losses = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    aggregator = mtl_jax.as_aggregator(mtl_jax.mgda("loss"), 4)
    state = aggregator.init(PARAMS)
    everybody = dict.fromkeys(losses, np.True_)
    plain, _ = aggregator.update(ROWS, state, losses=dict.fromkeys(losses, 1.0))
    scaled, _ = aggregator.update(ROWS, state, losses=losses, mask=everybody)
    assert not np.allclose(plain["w"], scaled["w"])
    mask = dict.fromkeys(losses, np.False_) | {"c": np.True_}
    only, _ = aggregator.update(ROWS, state, losses=losses, mask=mask)
    np.testing.assert_allclose(only["w"], ROWS["w"][2], rtol=1e-6)


def test_a_weighting_of_the_task_gradients():
    weighting = mtl_jax.excess_mtl(0.5)
    aggregator = mtl_jax.as_aggregator(weighting, 4)
    state = aggregator.init(PARAMS)
    factors = jnp.arange(1.0, 5.0)
    rows = {"w": factors[:, None, None] * ROWS["w"], "b": factors * ROWS["b"]}
    _, state = aggregator.update(ROWS, state)
    got, after = aggregator.update(rows, state)
    weights, _ = weighting.update((1.0,) * 4, state, task_gradients=rows)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(got)])
    np.testing.assert_allclose(flat, np.array(weights) @ flat_rows(rows), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(after.steps, 2)


@pytest.mark.parametrize("method", ["pcgrad", "excess_mtl", "every"])
def test_a_part_without_parameters(method):
    """Of `optax.partition`, with a label that no parameter has; and what it gives for the other."""
    weighting = {
        "pcgrad": mtl_jax.pcgrad,
        "excess_mtl": mtl_jax.excess_mtl,
        "every": lambda: mtl_jax.every(mtl_jax.imtl_g(), 2),
    }[method]()

    def aggregator():
        return mtl_jax.as_aggregator(weighting, 4, key=jax.random.key(0))

    parts = optax.partition(
        {"all": aggregator(), "none": aggregator(), "more": optax.adam(0.1)},
        {"w": "all", "b": "all"},
    )
    state = parts.init(PARAMS)
    got, after = parts.update(ROWS, state, PARAMS)
    alone = aggregator()
    expected, _ = alone.update(ROWS, alone.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert np.all(after.inner_states["none"].inner_state.steps == 0)
    assert np.all(after.inner_states["all"].inner_state.steps == 1)
    empty = aggregator()
    for nothing in ({}, (), {"a": None}):
        state = empty.init(nothing)
        assert empty.update(nothing, state) == (nothing, state)


def test_what_is_not_finite():
    aggregator = mtl_jax.as_aggregator(mtl_jax.upgrad(), 4)
    state = aggregator.init(PARAMS)
    got, after = aggregator.update(ROWS | {"b": ROWS["b"].at[0].set(jnp.inf)}, state)
    assert np.all(np.isnan(got["w"]))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    # Of an absent task it is nothing to anybody.
    rows = ROWS | {"b": ROWS["b"].at[0].set(jnp.nan)}
    mask = (np.False_, np.True_, np.True_, np.True_)
    got, after = aggregator.update(rows, state, mask=mask)
    expected, _ = aggregator.update(ROWS, state, mask=mask)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    np.testing.assert_array_equal(after.steps, [0, 1, 1, 1])
    # A sum that overflows leaves the state as it was, too.
    large = {name: jnp.full_like(leaf, 1.5e19) for name, leaf in ROWS.items()}
    summed = mtl_jax.as_aggregator(mtl_jax.constant((1e20,) * 4), 4)
    state = summed.init(PARAMS)
    got, after = summed.update(large, state)
    assert np.all(np.isnan(got["w"]))
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_errors():
    with pytest.raises(ValueError, match="`num_tasks` must be an integer of at least 1"):
        mtl_jax.as_aggregator(mtl_jax.mgda(), 0)
    with pytest.raises(TypeError, match="Expected a Weighting"):
        mtl_jax.as_aggregator(mtl_jax.graddrop(), 2)
    aggregator = mtl_jax.as_aggregator(mtl_jax.mgda(), 3)
    with pytest.raises(ValueError, match="made for 3 tasks, but there are gradients of 4"):
        aggregator.update(ROWS, aggregator.init(PARAMS))
    with pytest.raises(ValueError, match="as the leading axis of every leaf"):
        aggregator.update(ROWS | {"b": jnp.ones(2)}, aggregator.init(PARAMS))
    with pytest.raises(TypeError, match="second batch, which optax does not hand on"):
        mtl_jax.as_aggregator(mtl_jax.modo(), 4)
    with pytest.raises(TypeError, match="losses after the step, which optax does not hand on"):
        mtl_jax.as_aggregator(mtl_jax.famo(), 4)
    for weighting in (mtl_jax.adaptive(), mtl_jax.norm_balance(norm_of="root_loss")):
        aggregator = mtl_jax.as_aggregator(weighting, 4)
        with pytest.raises(TypeError, match="reads the losses; hand them to `update`"):
            aggregator.update(ROWS, aggregator.init(PARAMS))
        aggregator.update(ROWS, aggregator.init(PARAMS), losses=jnp.arange(1.0, 5.0))
    with pytest.raises(ValueError, match="draws random numbers"):
        mtl_jax.as_aggregator(mtl_jax.pcgrad(), 4).init(PARAMS)


def test_an_own_weighting_reads_the_losses_unless_it_says_otherwise():
    """It would silently be given losses of 1 else."""

    def update(losses, state, present, steps, gramian):
        return losses / jnp.sqrt(jnp.diagonal(gramian)), state

    balanced = mtl_jax.vector_weighting(update, needs=mtl_jax.Signal.GRAMIAN)
    for weighting in (balanced, mtl_jax.every(balanced, 2), mtl_jax.log_losses(mtl_jax.upgrad())):
        aggregator = mtl_jax.as_aggregator(weighting, 4)
        with pytest.raises(TypeError, match="reads the losses"):
            aggregator.update(ROWS, aggregator.init(PARAMS))
    for weighting in (mtl_jax.upgrad(), mtl_jax.ema(mtl_jax.equal(), 0.9)):
        aggregator = mtl_jax.as_aggregator(weighting, 4)
        update, _ = aggregator.update(ROWS, aggregator.init(PARAMS))
        assert np.all(np.isfinite(update["w"]))


WEIGHTINGS = [
    name
    for name in [*METHODS, *GRAMIAN_METHODS, *ROW_METHODS, "modo", "sdmgrad", "auto_lambda"]
    if isinstance(made(name), mtl_jax.Weighting)
]


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_whether_a_method_reads_the_losses_is_as_it_says(name):
    """The weights under the same signal and state, with other losses."""
    weighting = made(name)
    rows = jax.random.normal(jax.random.key(1), (3, 5))
    signals = {"gramian": rows @ rows.T, "task_gradients": rows}
    falling = loss_sequence()
    rising = falling[::-1]
    state = other = weighting.init(falling[0], key=KEY, params=rows[0])
    same = True
    for step in range(8):
        if weighting.needs is mtl_jax.Signal.SECOND_BATCH:
            number = weighting.method.directions(state, jnp.ones(3, bool))[0].shape[0]
            signals["products"] = (rows @ rows.T)[:, :1].repeat(number, 1)
        weights, state = weighting.update(falling[step], state, **signals)
        others, other = weighting.update(rising[step], other, **signals)
        same &= all(np.array_equal(weights[task], others[task]) for task in TASKS)
    assert same != weighting.method.reads_losses
