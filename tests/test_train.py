"""The train step: against hand-written loops, and what it does when a step goes wrong."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import TrainState, make_train_step, value_and_grad

KEY = jax.random.key(5)
OPTIMIZER = optax.adam(0.05)
RNG = np.random.default_rng(1)
BATCHES = jnp.asarray(RNG.normal(size=(6, 8, 3)), jnp.float32)
SHAPES = {"a": 1.0, "b": 1.0}


def params_():
    return {"w": jnp.array([1.0, -1.0, 0.5]), "v": jnp.array([0.3, 0.2, -2.0])}


def losses_fn(params, x):
    return {"a": jnp.mean((x @ params["w"] - 1) ** 2), "b": jnp.mean(jnp.abs(x @ params["v"] + 1))}


def values(tree):
    """The tree in NumPy, keys as their data."""

    def value(leaf):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(leaf) if key else leaf)

    return jax.tree.map(value, tree)


def assert_trees(actual, expected, rtol=0.0, atol=0.0):
    actual, expected = values(actual), values(expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    check = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(check, actual, expected)


def setting(weighting=None, losses_fn=losses_fn, optimizer=OPTIMIZER, *, observed=None, **kwargs):
    """A state and a train step."""
    weighting = mtl_jax.adaptive(decay=0.5) if weighting is None else weighting
    has_aux = kwargs.pop("has_aux", False)
    gradient_fn = value_and_grad(losses_fn, weighting, has_aux=has_aux)
    if observed is None and weighting.observe is not None:
        observed = losses_fn
    step = make_train_step(gradient_fn, optimizer, weighting, losses_fn=observed)
    return TrainState.create(params_(), optimizer, weighting, SHAPES, **kwargs), step


@pytest.mark.parametrize(
    "make",
    [
        lambda: mtl_jax.adaptive(decay=0.5),
        lambda: mtl_jax.dwa(2),
        lambda: mtl_jax.uncertainty(optax.adam(0.1)),
    ],
    ids=["adaptive", "dwa", "uncertainty"],
)
def test_equals_a_hand_written_loop(make):
    weighting = make()
    state, step = setting(weighting)
    params, opt_state = params_(), OPTIMIZER.init(params_())
    weighting_state = weighting.init(SHAPES)

    @jax.jit
    def by_hand(params, opt_state, weighting_state, x):
        losses = losses_fn(params, x)
        weights, weighting_state = weighting.update(losses, weighting_state)

        def total(params):
            return sum(weights[task] * loss for task, loss in losses_fn(params, x).items())

        updates, opt_state = OPTIMIZER.update(jax.grad(total)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state, weighting_state, losses, weights

    for x in BATCHES:
        state, value = step(state, x)
        params, opt_state, weighting_state, *expected = by_hand(
            params, opt_state, weighting_state, x
        )
        assert_trees((value.losses, value.weights), tuple(expected), rtol=1e-5)
    assert_trees(state.params, params, rtol=1e-5, atol=1e-6)
    assert_trees(state.opt_state, opt_state, rtol=1e-4, atol=1e-6)
    assert_trees(state.weighting_state, weighting_state, rtol=1e-5, atol=1e-6)
    assert (state.step, state.skipped) == (len(BATCHES), 0)


def test_compiles_once():
    traces = 0

    def counted(params, x):
        nonlocal traces
        traces += 1
        return losses_fn(params, x)

    state, step = setting(losses_fn=counted)
    for x in BATCHES:
        state, _ = step(state, x)
    assert traces == 1
    assert step._cache_size() == 1


def test_compiles_once_with_weakly_typed_parameters():
    weighting = mtl_jax.uncertainty(optax.adam(0.1))
    step = make_train_step(
        value_and_grad(lambda w, x: {"a": (w - jnp.mean(x)) ** 2}, weighting), OPTIMIZER, weighting
    )
    state = TrainState.create(jnp.asarray(3.0), OPTIMIZER, weighting, {"a": 1.0})
    for x in BATCHES:
        state, _ = step(state, x)
    assert step._cache_size() == 1


def test_the_old_state_is_donated_and_nothing_else():
    weighting = mtl_jax.uncertainty(optax.adam(0.1))
    params, model_state, rng = params_(), {"n": jnp.zeros(3)}, jax.random.key(0)

    def with_state(params, model_state, rng, x):
        return losses_fn(params, x), {"n": model_state["n"] + jax.random.uniform(rng, (3,))}

    step = make_train_step(
        value_and_grad(with_state, weighting, has_aux=True), OPTIMIZER, weighting
    )
    for _ in range(2):  # a second run from the same parameters works
        first = TrainState.create(
            params, OPTIMIZER, weighting, SHAPES, model_state=model_state, rng=rng
        )
        leaves = [leaf for leaf in jax.tree.leaves(first) if leaf.ndim]
        second, _ = step(first, BATCHES[0])
        jax.block_until_ready(second)
        assert all(leaf.is_deleted() for leaf in leaves)
        for leaf in jax.tree.leaves((params, model_state, rng)):
            assert not leaf.is_deleted()
        step(second, BATCHES[0])
    with pytest.raises((RuntimeError, ValueError), match="delete"):
        step(first, BATCHES[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda rate: optax.contrib.schedule_free_sgd(rate),
        lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate),
    ],
    ids=["schedule_free", "inject_hyperparams"],
)
def test_an_optimizer_state_that_holds_the_parameters_or_an_argument_is_not_aliased(make):
    rate = jnp.asarray(0.05)
    optimizer = make(rate)
    weighting = mtl_jax.equal()
    step = make_train_step(value_and_grad(losses_fn, weighting), optimizer, weighting)
    for _ in range(2):
        state = TrainState.create(params_(), optimizer, weighting, SHAPES)
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.ndim]
        assert len(set(pointers)) == len(pointers)
        state, _ = step(state, BATCHES[0])
        jax.block_until_ready(step(state, BATCHES[1]))
    assert not rate.is_deleted()


# What the state carries


def test_model_state_is_carried():
    def with_state(params, model_state, x):
        mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(x)
        return losses_fn(params, x), {"mean": mean}

    state, step = setting(losses_fn=with_state, has_aux=True, model_state={"mean": jnp.zeros(())})
    expected = 0.0
    for x in BATCHES:
        expected = 0.9 * expected + 0.1 * float(np.mean(x))
        state, value = step(state, x)
        np.testing.assert_allclose(state.model_state["mean"], expected, rtol=1e-5)
        np.testing.assert_allclose(value.aux["mean"], expected, rtol=1e-5)


def test_new_model_state_selects_it_from_aux():
    def with_state(params, model_state, x):
        return losses_fn(params, x), (model_state + 1, {"accuracy": jnp.mean(x)})

    weighting = mtl_jax.equal()
    step = make_train_step(
        value_and_grad(with_state, weighting, has_aux=True),
        OPTIMIZER,
        weighting,
        new_model_state=lambda aux: aux[0],
    )
    state = TrainState.create(
        params_(), OPTIMIZER, weighting, SHAPES, model_state=jnp.zeros((), jnp.int32)
    )
    for x in BATCHES:
        state, value = step(state, x)
    assert state.model_state == len(BATCHES)
    np.testing.assert_allclose(value.aux[1]["accuracy"], np.mean(BATCHES[-1]), rtol=1e-5)


def test_aux_without_model_state_is_only_returned():
    state, step = setting(
        losses_fn=lambda params, x: (losses_fn(params, x), {"x": x}), has_aux=True
    )
    state, value = step(state, BATCHES[0])
    assert state.model_state is None
    np.testing.assert_array_equal(value.aux["x"], BATCHES[0])


def test_model_state_of_another_structure():
    def with_state(params, model_state, x):
        return losses_fn(params, x), {"mean": model_state["mean"], "var": jnp.ones(())}

    state, step = setting(losses_fn=with_state, has_aux=True, model_state={"mean": jnp.zeros(())})
    with pytest.raises(ValueError, match="new model state has another structure.*new_model_state"):
        step(state, BATCHES[0])


def test_a_forgotten_model_state_says_how_it_is_returned():
    state, step = setting(
        losses_fn=lambda params, model_state, x: losses_fn(params, x), model_state=jnp.zeros(3)
    )
    with pytest.raises(ValueError, match="has_aux=True"):
        step(state, BATCHES[0])


@pytest.mark.parametrize("new", [jnp.zeros((), jnp.float32), jnp.zeros(2, jnp.bfloat16)])
def test_model_state_of_another_dtype_or_shape_is_named(new):
    state, step = setting(
        losses_fn=lambda params, model_state, x: (losses_fn(params, x), {"mean": new}),
        has_aux=True,
        model_state={"mean": jnp.zeros((), jnp.bfloat16)},
    )
    with pytest.raises(ValueError, match="model state.*'mean'"):
        step(state, BATCHES[0])


def test_model_state_of_another_weak_type_is_the_same():
    state, step = setting(
        losses_fn=lambda params, model_state, x: (
            losses_fn(params, x),
            jnp.where(jnp.sum(x) > 0, 1.0, 2.0),
        ),
        has_aux=True,
        model_state=jnp.zeros(()),
    )
    state, _ = step(state, BATCHES[0])
    assert state.model_state in (1.0, 2.0)


def test_every_step_draws_its_own_key_and_the_run_is_reproducible():
    def noisy(params, rng, x):
        noise = jax.random.normal(rng, ())
        return losses_fn(params, x + noise), noise

    _, step = setting(losses_fn=noisy, has_aux=True)

    def run(seed):
        state, _ = setting(rng=jax.random.key(seed))
        drawn = []
        for x in BATCHES:
            state, value = step(state, x)
            drawn.append(float(value.aux))
        return drawn, state

    drawn, state = run(0)
    again, state_again = run(0)
    assert len(set(drawn)) == len(drawn)
    assert drawn == again
    assert_trees(state, state_again)
    assert not set(drawn) & set(run(1)[0])


def test_legacy_keys_work():
    state, step = setting(
        losses_fn=lambda params, rng, x: losses_fn(params, x + jax.random.normal(rng, ())),
        rng=jax.random.PRNGKey(0),
    )
    for x in BATCHES:
        state, _ = step(state, x)
    assert state.skipped == 0


def test_a_key_for_the_weighting():
    weighting = mtl_jax.random_weighting()
    with pytest.raises(ValueError, match="random_weighting draws.*key="):
        setting(weighting)
    state, step = setting(weighting, weighting_key=KEY)
    _, expected = weighting.update(
        losses_fn(params_(), BATCHES[0]), weighting.init(SHAPES, key=KEY)
    )
    state, value = step(state, BATCHES[0])
    np.testing.assert_allclose(sum(value.weights.values()), 1, rtol=1e-6)
    assert_trees(state.weighting_state, expected)


def test_the_mask_reaches_the_weighting():
    state, step = setting()
    state, value = step(state, BATCHES[0], mask={"a": True, "b": False})
    assert value.weights == {"a": 1, "b": 0}
    np.testing.assert_array_equal(state.weighting_state.steps, [1, 0])
    assert_trees(state.params["v"], params_()["v"])


# Observing


def test_observe_equals_a_hand_written_loop():
    """famo sees the same batch, with the same key and model state, at the new parameters."""

    def noisy(params, model_state, rng, x):
        return losses_fn(params, x + model_state + jax.random.normal(rng, ()))

    def with_state(params, model_state, rng, x):
        return noisy(params, model_state, rng, x), model_state + 0.1

    weighting = mtl_jax.famo(learning_rate=0.3)
    mask = {"a": True, "b": False}
    state, step = setting(
        weighting, with_state, has_aux=True, observed=noisy, model_state=jnp.zeros(()), rng=KEY
    )
    params, opt_state = params_(), OPTIMIZER.init(params_())
    weighting_state, model_state, rng = weighting.init(SHAPES), jnp.zeros(()), KEY

    @jax.jit
    def by_hand(params, opt_state, weighting_state, *args, mask=None):
        losses = noisy(params, *args)
        weights, weighting_state = weighting.update(losses, weighting_state, mask=mask)

        def total(params):
            return sum(weights[task] * loss for task, loss in noisy(params, *args).items())

        updates, opt_state = OPTIMIZER.update(jax.grad(total)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
        weighting_state = weighting.observe(noisy(params, *args), weighting_state, mask=mask)
        return params, opt_state, weighting_state, weights

    for number, x in enumerate(BATCHES):
        kwargs = {"mask": mask if number == 3 else {"a": True, "b": True}}
        state, value = step(state, x, **kwargs)
        rng, key = jax.random.split(rng)
        params, opt_state, weighting_state, weights = by_hand(
            params, opt_state, weighting_state, model_state, key, x, **kwargs
        )
        model_state = model_state + 0.1
        assert_trees(value.weights, weights, rtol=1e-4)
    assert_trees(state.weighting_state, weighting_state, rtol=1e-3, atol=1e-5)
    assert jnp.any(state.weighting_state.inner.logits != 0)


def test_observe_needs_losses_fn():
    weighting = mtl_jax.famo()
    with pytest.raises(ValueError, match="observes the losses after the step: pass losses_fn"):
        make_train_step(value_and_grad(losses_fn, weighting), OPTIMIZER, weighting)


def test_losses_fn_costs_nothing_where_nobody_observes():
    def never(*_):
        raise AssertionError

    state, step = setting(mtl_jax.equal(), observed=never)
    step(state, BATCHES[0])


def test_no_weighting():
    weighting = mtl_jax.equal()
    gradient_fn = value_and_grad(losses_fn, weighting)
    with pytest.raises(TypeError, match="Expected a Weighting.*mean to call it"):
        make_train_step(gradient_fn, OPTIMIZER, mtl_jax.equal)
    with pytest.raises(TypeError, match="Expected a Weighting.*mean to call it"):
        TrainState.create(params_(), OPTIMIZER, mtl_jax.equal, SHAPES)


# Steps that go wrong


def carried(params, model_state, rng, x):
    return losses_fn(params, x), {"mean": 0.9 * model_state["mean"] + jnp.mean(x)}


def carried_losses(*args):
    return carried(*args)[0]


@pytest.mark.parametrize(
    "make", [mtl_jax.famo, lambda: mtl_jax.dwa(1), lambda: mtl_jax.uncertainty(optax.adam(0.1))]
)
def test_a_step_that_is_not_finite_is_skipped(make):
    state, step = setting(
        make(), carried, has_aux=True, observed=carried_losses,
        model_state={"mean": jnp.zeros(())}, rng=KEY,
    )  # fmt: skip
    state, _ = step(state, BATCHES[0])
    before = values(state)
    state, value = step(state, BATCHES[1].at[0, 0].set(jnp.nan))
    assert all(jnp.isnan(weight) for weight in value.weights.values())
    for name in ("params", "opt_state", "weighting_state", "model_state"):
        assert_trees(getattr(state, name), getattr(before, name))
    assert (state.step, state.skipped) == (2, 1)
    assert not np.array_equal(values(state).rng, before.rng)

    state, value = step(state, BATCHES[2])
    assert (state.step, state.skipped) == (3, 1)
    assert all(jnp.isfinite(weight) for weight in value.weights.values())
    assert not np.array_equal(state.params["w"], before.params["w"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(values(state.params)))


def test_a_gradient_that_is_not_finite_is_skipped():
    state, step = setting(
        mtl_jax.dwa(1),
        lambda params, x: {"a": jnp.sqrt(jnp.sum(params["w"] ** 2) * x), "b": jnp.sum(params["v"])},
    )
    state, _ = step(state, 1.0)
    before = values(state)
    state, value = step(state, 0.0)
    assert value.losses["a"] == 0
    assert_trees(state._replace(step=state.step - 1, skipped=state.skipped - 1), before)


def test_a_loss_that_is_not_finite_is_skipped_though_the_gradient_is():
    """Here the NaN reaches no parameter: the gradient is 0, and Adam would count a step."""
    state, step = setting(
        losses_fn=lambda params, x: {
            "a": jnp.sum(jnp.where(x > 0, params["w"], 0)) + jnp.nan,
            "b": jnp.sum(jnp.where(x > 0, params["v"], 0)),
        }
    )
    before = values(state)
    state, _ = step(state, -1.0)
    assert state.skipped == 1
    assert_trees((state.params, state.opt_state), (before.params, before.opt_state))


@pytest.mark.parametrize("optimizer", [optax.sgd(1e20), optax.adam(0.1)], ids=["sgd", "adam"])
def test_an_update_that_is_not_finite_is_skipped(optimizer):
    """The gradient, 1e25, is finite: the SGD step, and Adam's second moment, are not."""
    state, step = setting(
        mtl_jax.equal(),
        lambda params, x: {"a": x * jnp.sum(params["w"]), "b": jnp.sum(params["v"] ** 2)},
        optimizer,
    )
    before = values(state)
    state, _ = step(state, 1e25)
    assert state.skipped == 1
    for leaf in jax.tree.leaves(values(state)):
        assert np.all(np.isfinite(leaf))
    assert_trees(state.params, before.params)


def primitives(jaxpr):
    """All primitives of a jaxpr and of the jaxprs in it, with their equations."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)


def test_skipping_is_a_branch():
    """A select would compute both, and hold both."""
    state, step = setting()
    jaxpr = jax.make_jaxpr(step)(state, BATCHES[0]).jaxpr
    conditions = [equation for name, equation in primitives(jaxpr) if name == "cond"]
    assert len(conditions) == 1
    branches = conditions[0].params["branches"]
    roots = [[name for name, _ in primitives(branch.jaxpr)].count("sqrt") for branch in branches]
    assert sorted(roots) == [0, 2]  # Adam's, for two parameters, in one branch alone
    outside = [name for name, _ in primitives(jaxpr)].count("sqrt")
    assert outside == 2
    assert "conditional(" in step.lower(state, BATCHES[0]).compile().as_text()


# As a pytree, and under other transformations


def test_the_state_survives_flattening():
    state, step = setting(rng=KEY, losses_fn=lambda params, rng, x: losses_fn(params, x))
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert isinstance(rebuilt, TrainState)
    other, _ = setting(rng=KEY)
    assert_trees(step(rebuilt, BATCHES[0]), step(other, BATCHES[0]))


@pytest.mark.parametrize("make", [mtl_jax.famo, lambda: mtl_jax.dwa(1)], ids=["famo", "dwa"])
def test_inside_scan(make):
    with warnings.catch_warnings():  # donated or not, there is nothing to warn of
        warnings.simplefilter("error")
        state, step = setting(make())
        scanned, seen = jax.jit(lambda state: jax.lax.scan(step, state, BATCHES))(state)
    state, _ = setting(make())
    for number, x in enumerate(BATCHES):
        state, value = step(state, x)
        expected = jax.tree.map(lambda leaf, number=number: leaf[number], seen)
        assert_trees(value, expected, rtol=1e-5)
    assert_trees(scanned, state, rtol=1e-4, atol=1e-6)


def test_vmap_over_seeds_equals_one_by_one():
    """One seed's step is not finite: only that one is skipped."""
    weighting = mtl_jax.random_weighting()

    def noisy(params, rng, x):
        return losses_fn(params, x + 0.1 * jax.random.normal(rng, x.shape))

    step = make_train_step(value_and_grad(noisy, weighting), OPTIMIZER, weighting)

    def create(key):
        keys = jax.random.split(key, 3)
        params = {"w": jax.random.normal(keys[0], (3,)), "v": jnp.ones(3)}
        return TrainState.create(
            params, OPTIMIZER, weighting, SHAPES, rng=keys[1], weighting_key=keys[2]
        )

    keys = jax.random.split(KEY, 3)
    bad = jnp.zeros((len(BATCHES), 3)).at[2, 1].set(jnp.nan)
    state = jax.jit(jax.vmap(create))(keys)
    many = jax.jit(jax.vmap(lambda state, x, bad: step(state, x + bad), in_axes=(0, None, 0)))
    for x, offsets in zip(BATCHES, bad, strict=True):
        state, _ = many(state, x, offsets)
    np.testing.assert_array_equal(state.skipped, [0, 1, 0])
    for seed in range(3):
        one = jax.jit(create)(keys[seed])
        for x, offsets in zip(BATCHES, bad, strict=True):
            one, _ = step(one, x + offsets[seed])
        got = jax.tree.map(lambda leaf, seed=seed: leaf[seed], state)
        assert_trees(got, one, rtol=1e-4, atol=1e-6)


def test_training_in_bfloat16():
    weighting = mtl_jax.uncertainty(optax.adam(0.1))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_())
    state = TrainState.create(
        params, OPTIMIZER, weighting, jax.eval_shape(losses_fn, params, BATCHES[0])
    )
    step = make_train_step(value_and_grad(losses_fn, weighting), OPTIMIZER, weighting)
    before = losses_fn(params, BATCHES[0].astype(jnp.bfloat16))
    for _ in range(50):
        state, value = step(state, BATCHES[0].astype(jnp.bfloat16))
    assert step._cache_size() == 1
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))
    assert all(value.losses[task] < before[task] for task in before)
