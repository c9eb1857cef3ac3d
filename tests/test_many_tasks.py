"""Losses in vectors: a leaf of shape [n] is n tasks, as n scalars would be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax._tasks import read_mask, read_tasks

TARGETS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
PARAMS = jnp.array([0.5, -1.0, 0.25, 2.0])


def vector(params):
    return 0.1 + jnp.sum((params[None] - TARGETS) ** 2 * jnp.abs(TARGETS), axis=1)


def as_list(params):
    return list(jnp.unstack(vector(params)))


def mixed(params):
    losses = vector(params)
    return {"a": losses[0], "many": losses[1:4], "z": losses[4]}


FORMS = {"list": as_list, "vector": vector, "mixed": mixed}
PRESENT = np.array([True, False, True, True, True])
MASKS = {
    "list": list(PRESENT),
    "vector": PRESENT,
    "mixed": {"a": PRESENT[0], "many": PRESENT[1:4], "z": PRESENT[4]},
}


def flat(tree):
    return np.concatenate([np.atleast_1d(leaf) for leaf in jax.tree.leaves(tree)])


def test_tasks_of_vectors():
    tasks = read_tasks(mixed(PARAMS))
    assert tasks.names == ("a", "many/0", "many/1", "many/2", "z")
    assert tasks.number == 5
    assert read_tasks(vector(PARAMS)).names == ("0", "1", "2", "3", "4")
    numbers = jnp.arange(5.0)
    for form in FORMS.values():
        tasks = read_tasks(form(PARAMS))
        tree = tasks.unstack(numbers)
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, form(PARAMS))
        np.testing.assert_array_equal(tasks.stack(tree), numbers)
        np.testing.assert_array_equal(tasks.vector(tree, "it"), numbers)
        np.testing.assert_array_equal(tasks.vector(3.0, "it"), [3.0] * 5)
    for name, mask in MASKS.items():
        tasks = read_tasks(FORMS[name](PARAMS))
        np.testing.assert_array_equal(read_mask(mask, tasks), PRESENT)
    one_for_all = {"a": 1.0, "many": 2.0, "z": 3.0}
    tasks = read_tasks(mixed(PARAMS))
    np.testing.assert_array_equal(tasks.vector(one_for_all, "it"), [1, 2, 2, 2, 3])


MADE = {
    "adaptive": mtl_jax.adaptive(decay=0.5),
    "constant": None,
    "preference": None,
    "upgrad": mtl_jax.upgrad(),
    "excess_mtl": mtl_jax.excess_mtl(),
    "trimmed_mean": mtl_jax.trimmed_mean(1),
    "every": mtl_jax.every(mtl_jax.nash_mtl(), 2),
}


def made(name, form):
    numbers = read_tasks(FORMS[form](PARAMS)).unstack(jnp.arange(1.0, 6.0))
    if name == "constant":
        return mtl_jax.constant(numbers)
    if name == "preference":
        return mtl_jax.with_preference(mtl_jax.dwa(1), numbers)
    return MADE[name]


@pytest.mark.parametrize("name", MADE)
def test_every_form_trains_alike(name):
    """Weights, gradient and state: a step with all tasks, one with a mask."""
    found = {}
    for form, losses_fn in FORMS.items():
        gradient = mtl_jax.value_and_grad(losses_fn, made(name, form))
        call = jax.jit(gradient)
        state = gradient.init(PARAMS)
        everybody = jax.tree.map(jnp.ones_like, MASKS[form])
        steps = []
        for mask in (everybody, MASKS[form]):
            value, direction, state = call(PARAMS, state, mask=mask)
            assert value.finite
            assert jax.tree.map(jnp.shape, value.losses) == jax.tree.map(jnp.shape, value.present)
            steps += [flat(value.losses), flat(value.present), direction]
            steps += [] if value.weights is None else [flat(value.weights)]
        found[form] = [*steps, *jax.tree.leaves(state)]
    for form in ("vector", "mixed"):
        for one, other in zip(found[form], found["list"], strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("rows", ["unrolled", "map", "vmap", "low_memory", 2])
def test_gramian_of_vectors_in_every_way(rows):
    gradient = mtl_jax.value_and_grad(mixed, mtl_jax.mgda(), rows=rows)
    value, direction, _ = gradient(PARAMS, gradient.init(PARAMS))
    jacobian = np.asarray(jax.jacobian(vector)(PARAMS), np.float64)
    np.testing.assert_allclose(value.gramian, jacobian @ jacobian.T, rtol=1e-5)
    np.testing.assert_allclose(direction, flat(value.weights) @ jacobian, rtol=1e-4, atol=1e-5)


def test_a_train_step_that_observes():
    ends = []
    for losses_fn in FORMS.values():
        gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.famo())
        step = mtl_jax.make_train_step(gradient, optax.contrib.momo(0.1))
        state = step.init(PARAMS)
        for _ in range(3):
            state, value = step(state)
        assert state.skipped == 0
        ends.append([*jax.tree.leaves(state), flat(value.weights)])
    for end in ends[1:]:
        for one, other in zip(end, ends[0], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


def test_losses_in_a_vector_are_added_up_over_microbatches():
    x = jnp.arange(12.0).reshape(6, 2)

    def losses_fn(params, x):
        return jnp.mean((params - x) ** 2, axis=0)

    for count in (None, lambda x: jnp.full(2, x.shape[0])):
        parts = mtl_jax.microbatched(losses_fn, 3, count)
        np.testing.assert_allclose(parts(1.0, x), losses_fn(1.0, x), rtol=1e-6)


def test_errors():
    losses = mixed(PARAMS)
    weighting = mtl_jax.adaptive()
    state = weighting.init(losses)
    with pytest.raises(ValueError, match="'many' has shape .3, 1.; a task's loss is a scalar"):
        weighting.init(losses | {"many": jnp.ones((3, 1))})
    with pytest.raises(ValueError, match="'many' has shape .0,."):
        weighting.init(losses | {"many": jnp.ones(0)})
    with pytest.raises(ValueError, match=r"for 5 tasks, but .* 4: a, many/0, many/1, z"):
        weighting.update(losses | {"many": jnp.ones(2)}, state)
    with pytest.raises(TypeError, match=r"'many' .* must be booleans of shape \(3,\)"):
        weighting.update(losses, state, mask={"a": True, "many": True, "z": True})
    with pytest.raises(ValueError, match=r"the leaf 'many' has shape \(2,\) instead of \(3,\)"):
        mtl_jax.constant(losses | {"many": jnp.ones(2)}).init(losses)
    with pytest.raises(ValueError, match="one weight for each task"):
        mtl_jax.constant(1.0)
    with pytest.raises(ValueError, match=r"with_preference.*\[0, inf\)"):
        mtl_jax.with_preference(weighting, jnp.array([1.0, -1.0]))
    gradient = mtl_jax.representation_value_and_grad(
        lambda params: params,
        lambda params, zs: {"a": zs["a"] ** 2, "b": zs["b"][0]},
        mtl_jax.mgda(),
        tasks=("a", "b"),
    )
    with pytest.raises(ValueError, match=r"'a' has shape \(4,\): at the representation"):
        gradient.init(PARAMS)


def test_the_program_does_not_grow_with_the_number_of_tasks():
    """As many operations for 200 tasks in a vector as for 20."""

    def operations(number):
        targets = jnp.ones((number, 3))

        def losses_fn(params):
            return jnp.sum((params[None] - targets) ** 2, axis=1)

        gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.adaptive(), rows="map")
        step = mtl_jax.make_train_step(gradient, optax.sgd(0.1))
        params = jnp.zeros(3)
        return step.update.lower(step.init(params)).as_text().count("stablehlo.")

    assert operations(200) == operations(20)


def test_statistics_are_carried_over_by_name():
    weighting = mtl_jax.ema(mtl_jax.dwa(2), 0.5)
    old = {"a": 1.0, "many": jnp.array([2.0, 3.0])}
    state = weighting.init(old)
    for scale in (1.0, 0.5, 0.4, 0.2, 0.1):
        losses = jax.tree.map(lambda loss, scale=scale: scale * loss, old)
        _, state = weighting.update(losses, state)
    new = {"b": 1.0, "many": jnp.array([2.0, 3.0, 4.0])}
    fresh = weighting.init(new)
    carried = mtl_jax.carry_over(state, fresh)
    assert carried.tasks == fresh.tasks
    assert jax.tree.structure(carried) == jax.tree.structure(fresh)
    for before, begun, leaf in zip(*map(jax.tree.leaves, (state, fresh, carried)), strict=True):
        np.testing.assert_array_equal(leaf[1:3], before[1:3])
        np.testing.assert_array_equal(leaf[::3], begun[::3])
    weights, _ = weighting.update(new, carried)
    assert np.isfinite(flat(weights)).all()
    # Nothing in common, a number shared by all tasks, and rows like the parameters.
    nothing = mtl_jax.carry_over(weighting.init({"x": 1.0}), fresh)
    assert all(
        np.array_equal(*pair)
        for pair in zip(jax.tree.leaves(nothing), jax.tree.leaves(fresh), strict=True)
    )
    every = mtl_jax.every(mtl_jax.adaptive(), 3)
    _, state = every.update((1.0, 2.0), every.init((1.0, 2.0)))
    assert mtl_jax.carry_over(state, every.init((1.0, 2.0, 3.0))).inner.total == 1
    moco = mtl_jax.moco()
    state = moco.init(PARAMS, {"a": 1.0, "b": 1.0})
    _, state = moco.update(jnp.ones((2, 4)), state, losses={"a": 1.0, "b": 2.0})
    carried = mtl_jax.carry_over(state, moco.init(PARAMS, {"b": 1.0, "c": 1.0}))
    assert jax.tree.map(jnp.shape, jax.tree.leaves(carried)) == jax.tree.map(
        jnp.shape, jax.tree.leaves(state)
    )
    with pytest.raises(ValueError, match="not of the same weighting: they have"):
        mtl_jax.carry_over(state, weighting.init(new))
    with pytest.raises(ValueError, match=r"a leaf is float32.*\[2, 4\].*\[2, 3\]"):
        mtl_jax.carry_over(state, moco.init(PARAMS[:3], {"b": 1.0, "c": 1.0}))
    with pytest.raises(TypeError, match="Expected the state"):
        mtl_jax.carry_over({}, state)
    with pytest.raises(TypeError, match="Expected the state"):
        mtl_jax.carry_over({}, {})


def test_pairs_of_tasks():
    """Both their axes are the tasks: for what is carried over, and for absent ones."""
    weighting = mtl_jax.gradvac()
    losses, key = {"a": 1.0, "b": 1.0, "c": 1.0}, jax.random.key(0)
    gramian = jnp.array([[1.0, 0.5, 0.2], [0.5, 1.0, 0.4], [0.2, 0.4, 1.0]])
    _, state = weighting.update(losses, weighting.init(losses, key=key), gramian=gramian)
    # As many tasks, one of them another, in another order.
    fresh = weighting.init({"b": 1.0, "c": 1.0, "d": 1.0}, key=key)
    before = np.asarray(state.inner.target.values)
    after = np.asarray(mtl_jax.carry_over(state, fresh).inner.target.values)
    np.testing.assert_array_equal(after[:2, :2], before[1:, 1:])
    assert before[1, 2] != 0
    assert not after[2].any()
    assert not after[:, 2].any()

    def update(losses, state, present, steps):
        return losses, mtl_jax.Pairs(state.values + 1)

    counting = mtl_jax.vector_weighting(
        update, lambda tasks, key: mtl_jax.Pairs(jnp.zeros((tasks.number, tasks.number)))
    )
    mask = {"a": True, "b": False, "c": True}
    mask = jax.tree.map(np.asarray, mask)
    _, state = counting.update(losses, counting.init(losses), mask=mask)
    assert state.inner.values.tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]
    wrong = mtl_jax.vector_weighting(update, lambda *_: mtl_jax.Pairs(jnp.zeros((3, 2))))
    with pytest.raises(TypeError, match="a number for each pair of the 3 tasks"):
        wrong.init(losses)


def test_what_is_relative_to_other_tasks_is_carried_over():
    """An order has new tasks in their places, and the first loss is that of the new ones."""
    old, new = {"b": 1.0, "d": 2.0}, {"a": 4.0, "b": 1.0, "c": 8.0, "d": 2.0}
    rows = {"a": [8.0], "b": [2.0], "c": [4.0], "d": [1.0]}
    task_gradients = jnp.array(list(rows.values()))

    def weights(weighting, state):
        found, _ = weighting.update(new, state, task_gradients=task_gradients)
        return list(found.values())

    orders = ((None, None), (("d", "b"), ("d", "c", "b", "a")))
    for before, after in orders:
        weighting = mtl_jax.causal(after, tolerance=0.1)
        fresh = weighting.init(new)
        carried = mtl_jax.carry_over(mtl_jax.causal(before).init(old), fresh)
        assert weights(weighting, carried) == weights(weighting, fresh)
    weighting = mtl_jax.lr_annealing(None, alpha=1.0)
    fresh, before = (weighting.init(losses, params=jnp.zeros(1)) for losses in (new, old))
    found = weights(weighting, mtl_jax.carry_over(before, fresh))
    assert found == weights(weighting, fresh) == [1.0, 4.0, 2.0, 8.0]


def test_statistics_are_carried_over_in_each_group():
    weighting = mtl_jax.gradvac()

    def losses_fn(params, targets):
        return {k: jnp.sum((params["a"] + params["b"] - t) ** 2) for k, t in enumerate(targets)}

    gradient = mtl_jax.value_and_grad(losses_fn, weighting, groups=lambda path: path)
    params = {"a": jnp.ones(2), "b": jnp.arange(2.0)}
    key = jax.random.key(0)
    old, new = (0.0, 1.0), (0.0, 1.0, 2.0)
    _, _, state = gradient(params, gradient.init(params, old, key=key), old)
    fresh = gradient.init(params, new, key=key)
    carried = mtl_jax.carry_over(state, fresh)
    assert jax.tree.structure(carried) == jax.tree.structure(fresh)
    for group in ("a", "b"):
        alone = mtl_jax.carry_over(state[group], fresh[group])
        for got, expected in zip(*map(jax.tree.leaves, (carried[group], alone)), strict=True):
            assert (got == expected).all()
        assert carried[group].steps.tolist() == [1, 1, 0]
    gradient(params, carried, new)
    with pytest.raises(ValueError, match="of other groups: a, b, and a"):
        mtl_jax.carry_over(state, {"a": fresh["a"]})
