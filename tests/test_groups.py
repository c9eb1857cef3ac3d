"""Groups of parameters: the method acts on each by itself, with a state and weights for each."""

import functools

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import pytest
from methods import GRAMIAN_METHODS, KEY, TASKS
from trees import assert_trees_close

import mtl_jax

X = jnp.array([0.3, -0.5, 0.8])
PARAMS = {
    "low": {"w": jnp.array([1.5, -2.0, 0.5]), "b": jnp.array(0.7)},
    "high": jnp.array([0.2, 1.0, -1.0]),
    "own": jnp.array([0.4, -0.3]),
    "frozen": jnp.ones(2),
}
GROUPS = ("frozen", "high", "low", "own")
USED = {"low": (True, True, True), "high": (True, True, False), "own": (False, False, True)}


def losses_fn(params, x):
    """Three tasks, of which one does not use "high" and one alone uses "own"."""
    low, high, own = params["low"]["w"] * params["low"]["b"], params["high"], params["own"]
    return {
        "a": jnp.sum((low - x) ** 2) + 0.5 * jnp.sum(jnp.cosh(high - low)),
        "b": 0.1 + 2 * jnp.sum((low + high + x) ** 2),
        "c": jnp.sum(jnp.cosh(low * x)) + jnp.sum((own - x[0]) ** 2),
    }


def first_name(path):
    return path.split("/")[0]


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@jax.jit
def jacobian(params, x):
    return jax.jacrev(losses_fn)(params, x)


def rows_of(params, x, group):
    rows = jacobian(params, x)
    return np.stack([flat(rows[task][group]) for task in TASKS])


def vector(tree):
    return np.array([tree[task] for task in TASKS])


@functools.cache
def grouped(weighting, groups=first_name, **settings):
    gradient = mtl_jax.value_and_grad(losses_fn, weighting, groups=groups, **settings)
    return gradient, jax.jit(gradient)


def assert_combined(value, direction, params=PARAMS, x=X):
    """The gradient is made of the task gradients in each group with the weights of that group."""
    for group in GROUPS:
        expected = vector(value.weights[group]) @ rows_of(params, x, group)
        np.testing.assert_allclose(flat(direction[group]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GRAMIAN_METHODS)
def test_every_method_of_the_gramian_acts_on_each_group_by_itself(name):
    """A task without a gradient in a group is absent there; two steps, for the states."""
    weighting = methods.made(name)
    gradient, call = grouped(weighting)
    state = gradient.init(PARAMS, X, key=KEY)
    alone, params = dict(state), PARAMS
    assert set(state) == set(GROUPS)
    for _ in range(2):
        value, direction, state = call(params, state, X)
        assert value.finite
        for group in GROUPS:
            rows = rows_of(params, X, group)
            mask = dict(zip(TASKS, map(np.bool_, USED.get(group, (False,) * 3)), strict=True))
            assert {task: bool(flag) for task, flag in value.present[group].items()} == mask
            np.testing.assert_allclose(value.gramian[group], rows @ rows.T, rtol=1e-5, atol=1e-5)
            weights, alone[group] = weighting.update(
                value.losses, alone[group], mask=mask, gramian=value.gramian[group]
            )
            np.testing.assert_allclose(
                vector(value.weights[group]), vector(weights), rtol=2e-4, atol=1e-5
            )
        assert_combined(value, direction, params)
        assert_trees_close(state, alone, rtol=2e-4, atol=1e-5)
        params = jax.tree.map(lambda p, d: p - 0.01 * d, params, direction)


READ_ROWS = {
    "excess_mtl": mtl_jax.excess_mtl(0.5),
    "db_mtl": mtl_jax.db_mtl(),
    "moco": mtl_jax.moco(rho=0.1),
    "graddrop": mtl_jax.graddrop(),
    "conflict_free_momentum": mtl_jax.conflict_free_momentum(),
    "upgrad": mtl_jax.upgrad(),
}


@pytest.mark.parametrize("name", READ_ROWS)
def test_a_group_is_as_if_it_were_all_that_is_shared(name):
    made = READ_ROWS[name]
    gradient, call = grouped(made)
    state = gradient.init(PARAMS, X, key=KEY)
    alone = mtl_jax.value_and_grad(losses_fn, made, shared=lambda path: path == "high")
    own, call_alone = state["high"], jax.jit(alone)
    assert jax.tree.structure(own) == jax.tree.structure(alone.init(PARAMS, X, key=KEY))
    for _ in range(2):
        value, direction, state = call(PARAMS, state, X)
        found, expected, own = call_alone(PARAMS, own, X)
        np.testing.assert_allclose(direction["high"], expected["high"], rtol=1e-5, atol=1e-6)
        assert value.finite
        assert_trees_close(state["high"], own, rtol=1e-5, atol=1e-6)
        if value.weights is not None:
            assert_combined(value, direction)
            np.testing.assert_allclose(
                vector(value.weights["high"])[:2], vector(found.weights)[:2], rtol=1e-5
            )


def test_one_group_of_all_parameters_is_as_no_groups():
    plain = mtl_jax.value_and_grad(losses_fn, mtl_jax.upgrad())
    found, expected, _ = jax.jit(plain)(PARAMS, plain.init(PARAMS, X), X)
    for rows in ("unrolled", "map", "vmap", 2):
        gradient, call = grouped(mtl_jax.upgrad(), lambda path: "all", rows=rows)
        value, direction, _ = call(PARAMS, gradient.init(PARAMS, X), X)
        assert_trees_close(value.weights["all"], found.weights, rtol=1e-5, atol=0)
        assert_trees_close(direction, expected, rtol=1e-5, atol=1e-6)


def test_groups_may_be_a_tree_and_are_of_what_is_shared():
    """What is not shared has the gradient of the plain sum, since no one weight is the task's."""
    names = {"low": {"w": "w", "b": "b"}, "high": "w", "own": None, "frozen": None}
    names |= {"own": "unread", "frozen": "unread"}
    gradient, call = grouped(
        mtl_jax.nash_mtl(),
        groups=first_name,
        shared=lambda path: path.startswith(("low", "high")),
        diagnostics=True,
    )
    by_tree = mtl_jax.value_and_grad(
        losses_fn, mtl_jax.nash_mtl(), groups=names, shared=lambda path: path[0] in "lh"
    )
    assert set(by_tree.init(PARAMS, X)) == {"w", "b"}
    value, direction, _ = call(PARAMS, gradient.init(PARAMS, X), X)
    assert set(value.weights) == set(value.diagnostics) == {"low", "high"}
    expected = jax.grad(lambda params: sum(losses_fn(params, X).values()))(PARAMS)
    np.testing.assert_allclose(direction["own"], expected["own"], rtol=1e-5)
    for group in ("low", "high"):
        rows = rows_of(PARAMS, X, group)
        np.testing.assert_allclose(
            flat(direction[group]), vector(value.weights[group]) @ rows, rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(
            value.diagnostics[group].norms, np.linalg.norm(rows, axis=1), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("rows", ["unrolled", "map"])
@pytest.mark.parametrize("number", [2, 4])
def test_weights_are_held_in_every_group(number, rows):
    """With fewer groups than tasks, one backward pass for each; with more, one for each task."""
    two = first_name if number == 4 else lambda path: "low" if path.startswith("low") else "rest"
    gradient, call = grouped(mtl_jax.every(mtl_jax.upgrad(), 2), two, rows=rows)
    state = gradient.init(PARAMS, X)
    assert len(state) == number
    first, _, state = call(PARAMS, state, X)
    params = jax.tree.map(lambda leaf: 0.9 * leaf, PARAMS)
    held, direction, state = call(params, state, X)
    assert (bool(first.measured), bool(held.measured)) == (True, False)
    for group in state:
        parts = [part for part in GROUPS if two(part) == group]
        rows_ = np.concatenate([rows_of(params, X, part) for part in parts], axis=1)
        decided, kept = (vector(value.weights[group]) for value in (first, held))
        some = rows_.any(axis=1)  # a task without a gradient in the group was not decided for
        np.testing.assert_array_equal(kept[some], decided[some])
        usual = np.abs(decided[some]).mean() if some.any() else 1
        np.testing.assert_allclose(kept[~some], usual, rtol=1e-6)
        own = flat({part: direction[part] for part in parts})
        np.testing.assert_allclose(own, vector(held.weights[group]) @ rows_, rtol=1e-5, atol=1e-5)
    third, _, _ = call(params, state, X)
    assert third.measured


def test_a_task_without_labels_is_absent_in_every_group():
    gradient, call = grouped(mtl_jax.upgrad())
    state = gradient.init(PARAMS, X)
    mask = {"a": jnp.asarray(True), "b": jnp.asarray(False), "c": jnp.asarray(True)}
    value, direction, state = call(PARAMS, state, X, mask=mask)
    assert value.finite
    assert not any(weights["b"] for weights in value.weights.values())
    assert value.weights["high"]["a"] == 1
    assert state["low"].steps.tolist() == [1, 0, 1]
    assert state["high"].steps.tolist() == [1, 0, 0]
    assert_combined(value, direction)


def test_random_numbers_differ_between_the_groups():
    gradient, _ = grouped(mtl_jax.pcgrad())
    state = gradient.init(PARAMS, X, key=jax.random.PRNGKey(3))
    keys = {tuple(np.ravel(jax.random.key_data(own.inner.key))) for own in state.values()}
    assert len(keys) == len(GROUPS)
    with pytest.raises(ValueError, match="draws random numbers"):
        gradient.init(PARAMS, X)


def test_what_is_observed_is_about_the_tasks_of_the_group():
    def observe(losses, state, present):
        return state + losses

    watching = mtl_jax.vector_weighting(
        lambda losses, state, present, steps, gramian: (jnp.ones_like(losses), state),
        lambda tasks, key: tasks.full(0),
        observe=observe,
        needs=mtl_jax.Signal.GRAMIAN,
    )
    gradient, call = grouped(watching)
    value, _, state = call(PARAMS, gradient.init(PARAMS, X), X)
    after = gradient.observe(PARAMS, state, X, mask=value.present)
    losses = vector(value.losses)
    for group in GROUPS:
        expected = losses * np.array(USED.get(group, (False,) * 3))
        np.testing.assert_allclose(after[group].inner, expected, rtol=1e-6)
    everybody = gradient.observe(PARAMS, state, X)
    np.testing.assert_allclose(everybody["high"].inner, losses, rtol=1e-6)


def test_a_train_step_and_what_optimizers_are_given():
    """There is no one weighted sum: it is the plain one. A step that is not finite is skipped."""
    seen = []

    def update(updates, state, params=None, *, value, value_fn, **_):
        seen.append(True)
        return jax.tree.map(lambda u: -0.01 * u, updates), (value, value_fn(params))

    optimizer = optax.GradientTransformationExtraArgs(
        lambda params: (jnp.zeros(()), jnp.zeros(())), update
    )
    gradient, _ = grouped(mtl_jax.nash_mtl())
    step = mtl_jax.make_train_step(gradient, optimizer, donate=False)
    state = step.init(PARAMS, X)
    state, value = step(state, X)
    assert seen
    total = sum(map(float, value.losses.values()))
    np.testing.assert_allclose(state.opt_state, total, rtol=1e-6)
    assert value.finite
    skipped, value = step(state, X * jnp.nan)
    assert not value.finite
    assert skipped.skipped == 1
    assert_trees_close(skipped.weighting_state, state.weighting_state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("weighting", "settings", "error", "message"),
    [
        (mtl_jax.adaptive, {"groups": first_name}, ValueError, "same weights in every group"),
        (
            mtl_jax.upgrad,
            {"groups": first_name, "rows": "low_memory"},
            ValueError,
            "'low_memory' does not hold.*choose rows='map'",
        ),
    ],
)
def test_what_cannot_be_had_by_group(weighting, settings, error, message):
    with pytest.raises(error, match=message):
        mtl_jax.value_and_grad(losses_fn, weighting(), **settings)


def test_errors_name_the_parameter():
    for groups, error, message in (
        (lambda path: 3, TypeError, r"a string, .*; for 'frozen' it says 3"),
        ({"low": "low"}, ValueError, "`groups` must be a function of the path of a parameter, or"),
    ):
        gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.upgrad(), groups=groups)
        with pytest.raises(error, match=message):
            gradient.init(PARAMS, X)
    gradient, call = grouped(mtl_jax.upgrad())
    other = mtl_jax.value_and_grad(losses_fn, mtl_jax.upgrad())
    with pytest.raises(ValueError, match="a dictionary of the groups frozen, high, low, own"):
        call(PARAMS, other.init(PARAMS, X), X)
    with pytest.raises(TypeError, match="Expected the state that this weighting's `init`"):
        jax.jit(other)(PARAMS, gradient.init(PARAMS, X), X)
