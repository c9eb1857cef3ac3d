"""The train step: against hand-written loops, and what it does when a step goes wrong."""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import TrainState, make_train_step, value_and_grad

KEY = jax.random.key(5)
OPTIMIZER = optax.adam(0.05)
BATCHES = np.random.default_rng(1).normal(size=(6, 8, 3)).astype(np.float32)
SHAPES = {"a": 1.0, "b": 1.0}
WEIGHTINGS = {
    "adaptive": mtl_jax.adaptive(decay=0.5),
    "dwa": mtl_jax.dwa(2),
    "uncertainty": mtl_jax.uncertainty(optax.adam(0.1)),
    "famo": mtl_jax.famo(),
    "random": mtl_jax.random_weighting(),
}


def params_():
    return {
        "w": np.array([1.0, -1.0, 0.5], np.float32),
        "v": np.array([0.3, 0.2, -2.0], np.float32),
    }


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


@functools.cache
def step_of(weighting="adaptive", losses_fn=losses_fn, optimizer=OPTIMIZER, has_aux=False):
    weighting = WEIGHTINGS.get(weighting, weighting)
    return make_train_step(value_and_grad(losses_fn, weighting, has_aux=has_aux), optimizer)


def setting(*args, has_aux=False, x=BATCHES[0], **kwargs):
    """A state and a train step."""
    step = step_of(*args, has_aux=has_aux)
    return step.init(params_(), x, **kwargs), step


def carried(params, model_state, rng, x):
    """Losses of noisy inputs; the model state has a running mean, and the last noise."""
    noise = jax.random.normal(rng, ())
    mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(x)
    return losses_fn(params, x + 0.1 * noise), {"mean": mean, "noise": noise}


def carrying(name="adaptive", rng=KEY):
    """A state that has everything, and a step."""
    model_state = {"mean": np.float32(0), "noise": np.float32(0)}
    return setting(name, carried, has_aux=True, model_state=model_state, rng=rng)


def noisy(params, rng, x):
    return losses_fn(params, x + 0.1 * jax.random.normal(rng, x.shape))


@pytest.mark.parametrize("name", ["adaptive", "dwa", "uncertainty"])
def test_equals_a_hand_written_loop(name):
    weighting = WEIGHTINGS[name]
    state, step = setting(name)
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
        assert value.finite
    assert_trees(state.params, params, rtol=1e-5, atol=1e-6)
    assert_trees(state.opt_state, opt_state, rtol=1e-4, atol=1e-6)
    assert_trees(state.weighting_state, weighting_state, rtol=1e-5, atol=1e-6)
    assert (state.step, state.skipped) == (len(BATCHES), 0)


def test_compiles_once_and_computes_the_losses_once():
    traces = 0

    def counted(params, x):
        nonlocal traces
        traces += 1
        return losses_fn(params, x)

    state, step = setting("adaptive", counted)
    assert traces == 1  # for the tasks' names
    for x in BATCHES:
        state, _ = step(state, x)
    assert traces == 2
    assert step.update._cache_size() == 1


def test_compiles_once_with_weakly_typed_parameters():
    def losses_fn(w, x):
        return {"a": (w - jnp.mean(x)) ** 2}

    step = step_of("uncertainty", losses_fn)
    state = step.init(jnp.asarray(3.0), BATCHES[0])
    for x in BATCHES:
        state, _ = step(state, x)
    assert step.update._cache_size() == 1


# Donation: what a step may overwrite


def test_the_old_state_is_donated_and_nothing_else():
    params, rng = jax.tree.map(jnp.asarray, params_()), jax.random.key(0)
    model_state = {"mean": jnp.zeros(()), "noise": jnp.zeros(())}
    step = step_of("uncertainty", carried, has_aux=True)
    for _ in range(2):  # a second run from the same parameters works
        first = step.init(params, BATCHES[0], model_state=model_state, rng=rng)
        leaves = [leaf for leaf in jax.tree.leaves(first) if leaf.ndim]
        second, _ = step(first, BATCHES[0])
        jax.block_until_ready(second)
        assert all(leaf.is_deleted() for leaf in leaves)
        for leaf in jax.tree.leaves((params, model_state, rng)):
            assert not leaf.is_deleted()
        step(second, BATCHES[0])
    with pytest.raises((RuntimeError, ValueError), match="delete"):
        step(first, BATCHES[0])


def test_without_donation_the_old_state_remains():
    """So a part of it can be an argument of the step, too."""

    def losses_of(params, x, number):
        return losses_fn(params, x + number)

    gradient = value_and_grad(losses_of, WEIGHTINGS["adaptive"])
    step = make_train_step(gradient, OPTIMIZER, donate=False)
    first = step.init(params_(), BATCHES[0], jnp.zeros((), jnp.int32))
    second, _ = step(first, BATCHES[0], first.step)
    third, value = step(second, BATCHES[1], second.step)
    again, value_again = step(second, BATCHES[1], second.step)
    assert_trees((third, value), (again, value_again))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((first, second)))
    expected = jax.jit(losses_fn)(second.params, BATCHES[1] + 1)
    assert_trees(value.losses, expected, rtol=1e-6)


# The start


def test_the_state_begins_the_same_however_it_is_made():
    """From arrays, from their shapes, under jit, and as shapes alone."""

    step = step_of("famo", carried, has_aux=True)
    kwargs = {"model_state": {"mean": np.float32(0), "noise": np.float32(0)}, "rng": KEY}
    x = jax.ShapeDtypeStruct(BATCHES[0].shape, jnp.float32)
    state = step.init(params_(), BATCHES[0], **kwargs)
    assert_trees(step.init(params_(), x, **kwargs), state)
    assert_trees(jax.jit(step.init)(params_(), BATCHES[0], **kwargs), state)
    shapes = jax.eval_shape(step.init, params_(), x, **kwargs)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    types = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(t)] for t in (shapes, state)]
    assert types[0] == types[1]
    assert (state.step, state.skipped) == (0, 0)
    assert_trees((state.params, state.model_state), (params_(), kwargs["model_state"]))
    assert_trees(state.opt_state, OPTIMIZER.init(params_()))
    assert_trees(state.weighting_state, WEIGHTINGS["famo"].init(SHAPES))


@pytest.mark.parametrize(
    ("gradient", "says"),
    [
        (losses_fn, "`gradient` must be what mtl_jax.value_and_grad or.*returned, got <function"),
        (jax.value_and_grad(losses_fn), "`gradient` must be what.*returned, got <function"),
        (WEIGHTINGS["adaptive"], "`gradient` must be what.*returned, got Weighting"),
        (mtl_jax.value_and_grad, "`gradient` must be what.*returned, got <function"),
        (None, "`gradient` must be what.*returned, got None"),
    ],
)
def test_the_gradient_knows_its_weighting(gradient, says):
    """It alone is given, so that its weighting and that of the state cannot differ."""
    with pytest.raises(TypeError, match=says):
        make_train_step(gradient, OPTIMIZER)


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (optax.adam, "`optimizer` must be an optax optimizer.*mean to call it"),
        (optax.MultiSteps(optax.sgd(0.1), 2), r"Pass its `.gradient_transformation\(\)`"),
        (0.1, "`optimizer` must be an optax optimizer.*got 0.1"),
    ],
    ids=["not called", "MultiSteps", "number"],
)
def test_what_is_no_optimizer(optimizer, says):
    with pytest.raises(TypeError, match=says):
        make_train_step(value_and_grad(losses_fn, WEIGHTINGS["adaptive"]), optimizer)


def test_no_train_state():
    _, step = setting()
    with pytest.raises(
        TypeError, match="Expected a TrainState, as `init` or a step returns it; got"
    ):
        step(params_(), BATCHES[0])


# What the state carries


def test_model_state_is_carried():
    state, step = carrying()
    expected = 0.0
    for x in BATCHES:
        expected = 0.9 * expected + 0.1 * float(np.mean(x))
        state, value = step(state, x)
        np.testing.assert_allclose(state.model_state["mean"], expected, rtol=1e-5)
        np.testing.assert_allclose(value.aux["mean"], expected, rtol=1e-5)


def test_new_model_state_selects_it_from_aux():
    def with_state(params, model_state, x):
        return losses_fn(params, x), (model_state + 1, {"accuracy": jnp.mean(x)})

    step = make_train_step(
        value_and_grad(with_state, mtl_jax.equal(), has_aux=True),
        OPTIMIZER,
        new_model_state=lambda aux: aux[0],
    )
    state = step.init(params_(), BATCHES[0], model_state=jnp.zeros((), jnp.int32))
    for x in BATCHES:
        state, value = step(state, x)
    assert state.model_state == len(BATCHES)
    np.testing.assert_allclose(value.aux[1]["accuracy"], np.mean(BATCHES[-1]), rtol=1e-5)


def test_aux_without_model_state_is_only_returned():
    state, step = setting(
        "adaptive", lambda params, x: (losses_fn(params, x), {"x": x}), has_aux=True
    )
    state, value = step(state, BATCHES[0])
    assert state.model_state is None
    np.testing.assert_array_equal(value.aux["x"], BATCHES[0])


def test_model_state_of_another_structure():
    def with_state(params, model_state, x):
        return losses_fn(params, x), {"mean": model_state["mean"], "var": jnp.ones(())}

    state, step = setting("adaptive", with_state, has_aux=True, model_state={"mean": jnp.zeros(())})
    with pytest.raises(ValueError, match="new model state has another structure.*new_model_state"):
        step(state, BATCHES[0])


def test_a_forgotten_model_state_says_how_it_is_returned():
    state, step = setting(
        "adaptive",
        lambda params, model_state, x: losses_fn(params, x),
        model_state=jnp.zeros(3),
    )
    with pytest.raises(ValueError, match="has_aux=True"):
        step(state, BATCHES[0])


@pytest.mark.parametrize("new", [jnp.zeros((), jnp.float32), jnp.zeros(2, jnp.bfloat16)])
def test_model_state_of_another_dtype_or_shape_is_named(new):
    state, step = setting(
        "adaptive",
        lambda params, model_state, x: (losses_fn(params, x), {"mean": new}),
        has_aux=True,
        model_state={"mean": jnp.zeros((), jnp.bfloat16)},
    )
    with pytest.raises(ValueError, match="model state.*'mean'"):
        step(state, BATCHES[0])


def test_model_state_of_another_weak_type_is_the_same():
    state, step = setting(
        "adaptive",
        lambda params, model_state, x: (
            losses_fn(params, x),
            jnp.where(jnp.sum(x) > 0, 1.0, 2.0),
        ),
        has_aux=True,
        model_state=jnp.zeros(()),
    )
    state, _ = step(state, BATCHES[0])
    assert state.model_state in (1.0, 2.0)


def test_every_step_draws_its_own_key_and_the_run_is_reproducible():
    def run(seed):
        state, step = carrying(rng=jax.random.key(seed))
        drawn = []
        for x in BATCHES:
            state, value = step(state, x)
            drawn.append(float(value.aux["noise"]))
        return drawn, state

    drawn, state = run(0)
    again, state_again = run(0)
    assert len(set(drawn)) == len(drawn)
    assert drawn == again
    assert_trees(state, state_again)
    assert not set(drawn) & set(run(1)[0])


def test_legacy_keys_work():
    state, step = setting("adaptive", noisy, rng=jax.random.PRNGKey(0))
    for x in BATCHES:
        state, _ = step(state, x)
    assert state.skipped == 0


def test_a_key_for_the_weighting():
    with pytest.raises(ValueError, match="random_weighting draws.*key="):
        setting("random", noisy, rng=KEY)
    state, step = setting("random", noisy, rng=KEY, weighting_key=KEY)
    weighting = WEIGHTINGS["random"]
    _, expected = weighting.update(SHAPES, weighting.init(SHAPES, key=KEY))  # reads no losses
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
    state, step = setting(weighting, with_state, has_aux=True, model_state=jnp.zeros(()), rng=KEY)
    params, opt_state = params_(), OPTIMIZER.init(params_())
    weighting_state, model_state, rng = weighting.init(SHAPES), np.float32(0), KEY

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
        model_state += np.float32(0.1)
        assert_trees(value.weights, weights, rtol=1e-4)
    assert_trees(state.weighting_state, weighting_state, rtol=1e-3, atol=1e-5)
    assert jnp.any(state.weighting_state.inner.logits != 0)


def test_only_a_weighting_that_observes_costs_a_pass_more():
    assert value_and_grad(losses_fn, WEIGHTINGS["famo"]).observe is not None
    assert value_and_grad(losses_fn, WEIGHTINGS["adaptive"]).observe is None


# Steps that go wrong


@pytest.mark.parametrize("name", ["famo", "dwa", "uncertainty"])
def test_a_step_that_is_not_finite_is_skipped(name):
    state, step = carrying(name)
    state, _ = step(state, BATCHES[0])
    before = values(state)
    bad = BATCHES[1].copy()
    bad[0, 0] = np.nan
    state, value = step(state, bad)
    assert not value.finite
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


class Batch(NamedTuple):
    scale: Any = 1.0
    root: Any = 1.0
    shift: Any = 0.0
    on: Any = True


# The loss is not finite; the gradient, by the square root at 0, is not; the loss is not, but the
# gradient is 0, with which Adam would count a step.
NOT_FINITE = [Batch(np.nan), Batch(np.inf), Batch(root=0.0), Batch(shift=np.nan, on=False)]


@pytest.mark.parametrize(
    ("optimizer", "good", "bad"),
    [
        (optax.sgd(0.1), Batch(), NOT_FINITE),
        # The gradient is finite; its square, the second moment, is not.
        (optax.adam(0.1), Batch(), [*NOT_FINITE, Batch(1e25)]),
        (optax.sgd(1e20), Batch(1e-25, 1e-30), [Batch(1e25)]),
        # The square is finite, and the step that is made of it is not.
        (optax.sgd(1e30), None, [Batch(1e10)]),
        # The unused parameter's is 0 divided by 0.
        (optax.adam(0.1, eps=0.0), None, [Batch()]),
    ],
    ids=["sgd", "adam", "sgd(1e20)", "sgd(1e30)", "adam(eps=0)"],
)
def test_a_skipped_step_leaves_everything_as_it_was(optimizer, good, bad):
    def losses_fn(params, model_state, batch):
        square = jnp.where(batch.on, jnp.sum(params["w"] ** 2), 0)
        root = jnp.where(batch.on, jnp.sqrt(batch.root * square), 0)
        losses = {
            "a": batch.scale * square + root + batch.shift,
            "b": jnp.where(batch.on, batch.scale * jnp.sum(params["v"] ** 2), 1),
        }
        return losses, model_state + 1

    step = step_of("adaptive", losses_fn, optimizer, has_aux=True)
    params = params_() | {"unused": np.zeros(2, np.float32)}
    state = step.init(params, Batch(), model_state=jnp.zeros((), jnp.int32))
    if good is not None:
        state, value = step(state, good)
        assert value.finite
        assert (state.step, state.skipped, state.model_state) == (1, 0, 1)
        assert np.any(values(state.params)["w"] != params["w"])
        assert np.all(values(state.weighting_state).steps == 1)
    for batch in bad:
        before = values(state)
        state, value = step(state, batch)
        assert not value.finite
        losses_finite = np.all(np.isfinite(list(value.losses.values())))
        assert losses_finite == np.all(np.isfinite([batch.scale, batch.shift]))
        expected = before._replace(step=before.step + 1, skipped=before.skipped + 1)
        jax.tree.map(np.testing.assert_array_equal, values(state), expected)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(values(state)))
    assert state.skipped == len(bad)
    assert step.update._cache_size() == 1


def test_skipping_needs_the_memory_of_what_is_selected():
    """Whether the update is finite is known only when all of it is there. So besides what a step
    without the check holds, here Adam's update and its new moments are held: 2.3 times the
    parameters, with jax 0.6.0 3.5 times.
    """
    width, size, number = 128, 64, 4
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params, x = {"layers": [shape((width, width))] * number}, shape((size, width))

    def losses_fn(params, x):
        for kernel in params["layers"]:
            x = jnp.tanh(x @ kernel)
        return {"a": jnp.mean(x**2), "b": jnp.mean(x[:, 0])}

    def plain(params, opt_state, x):
        def total(params):
            losses = losses_fn(params, x)
            return sum(losses.values()), losses

        gradient, losses = jax.grad(total, has_aux=True)(params)
        updates, opt_state = OPTIMIZER.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses

    def bytes_of(program, *args):
        return program.lower(*args).compile().memory_analysis().temp_size_in_bytes

    step = make_train_step(value_and_grad(losses_fn, mtl_jax.equal()), OPTIMIZER)
    ours = bytes_of(step.update, jax.eval_shape(step.init, params, x), x)
    opt_state = jax.eval_shape(OPTIMIZER.init, params)
    expected = bytes_of(jax.jit(plain, donate_argnums=(0, 1)), params, opt_state, x)
    assert ours < expected + 4 * 4 * number * width**2


# Optimizers of all kinds


def bowls(params, x):
    """Two tasks, each with a parameter of its own."""
    return {"a": jnp.sum((params["w"] - x) ** 2), "b": jnp.sum((params["v"] + x) ** 2)}


class AveragedState(NamedTuple):
    average: Any
    inner: Any


def averaged(inner):
    """An optimizer that also averages the parameters, beginning with them."""

    def update(updates, state, params=None):
        updates, inner_state = inner.update(updates, state.inner, params)
        average = optax.incremental_update(params, state.average, 0.1)
        return updates, AveragedState(average, inner_state)

    init = lambda params: AveragedState(params, inner.init(params))  # noqa: E731
    return optax.GradientTransformation(init, update)


EQUAL = mtl_jax.equal()
RATE = jnp.asarray(0.05)
SGD, ADAM = optax.sgd(0.05), optax.adam(0.05)
OPTIMIZERS = {
    "lbfgs": optax.lbfgs(),
    "sam": optax.contrib.sam(SGD, optax.sgd(0.01)),
    "sam[opaque]": optax.contrib.sam(SGD, optax.sgd(0.01), opaque_mode=True),
    "schedule_free_sgd": optax.contrib.schedule_free_sgd(RATE),
    "schedule_free_adamw": optax.contrib.schedule_free_adamw(0.05),
    "MultiSteps": optax.MultiSteps(SGD, 2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(SGD, 3),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=RATE),
    "partition": optax.partition({"one": SGD, "other": ADAM}, {"w": "one", "v": "other"}),
    "masked": optax.chain(optax.masked(optax.trace(0.5), {"w": True, "v": False}), SGD),
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), SGD),
    "reduce_on_plateau": optax.chain(ADAM, optax.contrib.reduce_on_plateau()),
    "polyak_sgd": optax.polyak_sgd(),
    "momo": optax.contrib.momo(0.1),
    "sophia": optax.contrib.sophia(0.1),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
    "zoom": optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(5)),
    "prodigy": optax.contrib.prodigy(estim_lr0=0.01),
    "mechanize": optax.contrib.mechanize(SGD, s_init=0.1),
    "cocob": optax.contrib.cocob(),
    "madgrad": optax.contrib.madgrad(0.05),
    "distance_over_gradients": optax.chain(
        optax.scale_by_distance_over_gradients(reps_rel=0.1), optax.sgd(1.0)
    ),
    "dog": optax.contrib.dog(init_step=("distance", 0.1)),
    "dowg": optax.contrib.dowg(init_estim_sq_dist=0.1),
    "average": averaged(SGD),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_from_a_state_without_shared_buffers(name):
    """Though its state may begin as the parameters, or hold an argument."""
    x = np.array([1.0, 2.0], np.float32)
    params = {"w": jnp.array([2.0, -1.0]), "v": jnp.array([0.5, 1.0])}
    step = make_train_step(value_and_grad(bowls, EQUAL), OPTIMIZERS[name])
    history = []
    for _ in range(2):  # a second run from the same parameters
        state = step.init(params, x)
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, params, RATE))]
        assert len(set(pointers)) == len(pointers)
        for _ in range(20):
            state, value = step(state, x)
            history.append(sum(map(float, value.losses.values())))
    assert (state.step, state.skipped) == (20, 0)
    assert history[:20] == history[20:]
    assert history[19] < 0.9 * history[0]
    assert step.update._cache_size() == 1


class Seen(NamedTuple):
    """What an optimizer was given, and what the functions among that give."""

    updates: Any
    value: Any
    grad: Any
    values: Any
    grads: Any


def elsewhere(params):
    return jax.tree.map(lambda leaf: leaf + 0.5, params)


def spy():
    def init(params):
        zero = jnp.zeros(())
        return Seen(params, zero, params, (zero, zero), (params, params, params, params))

    def update(updates, state, params=None, *, value, grad, value_fn, grad_fn):
        points = params, elsewhere(params)
        values = tuple(value_fn(point) for point in points)
        grads = tuple(jax.grad(value_fn)(point) for point in points)
        grads += tuple(grad_fn(point, 0) for point in points)
        return updates, Seen(updates, value, grad, values, grads)

    return optax.GradientTransformationExtraArgs(init, update)


def plain_sum():
    """An aggregator whose gradient is that of a function."""
    return mtl_jax.rows_aggregator(
        lambda rows, state, present, steps: (jax.tree.map(lambda leaf: jnp.sum(leaf, 0), rows), ())
    )


@jax.jit
def value_and_gradient(params, weights):
    """The weighted sum, of the model state and of the key of the first step, and its gradient."""

    def total(params):
        losses, _ = carried(params, {"mean": 0.0}, jax.random.split(KEY)[1], BATCHES[0])
        return sum(weights[task] * losses[task] for task in losses)

    return jax.value_and_grad(total)(params)


@pytest.mark.parametrize(
    "weighting", [WEIGHTINGS["adaptive"], plain_sum()], ids=["weighting", "aggregator"]
)
def test_what_an_optimizer_is_given(weighting):
    """The weighted sum, its gradient and both as functions, of the step's key and model state."""
    step = make_train_step(value_and_grad(carried, weighting, has_aux=True), spy(), donate=False)
    model_state = {"mean": np.float32(0), "noise": np.float32(0)}
    state = step.init(params_(), BATCHES[0], model_state=model_state, rng=KEY)
    for present in ({"a": True, "b": True}, {"a": True, "b": False}):
        new_state, value = step(state, BATCHES[0], mask=present)
        seen = new_state.opt_state
        weights = jax.tree.map(jnp.float32, present if value.weights is None else value.weights)
        here, there = (
            value_and_gradient(point, weights) for point in (params_(), elsewhere(params_()))
        )
        close = functools.partial(assert_trees, rtol=1e-5, atol=1e-6)
        close((seen.value, seen.grad), here)
        close(seen.values, (here[0], there[0]))
        close(seen.grads, (here[1], there[1]) * 2)
        assert_trees(seen.updates, seen.grad)
        assert (weights["b"] != 0) == present["b"]


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: optax.chain(one, SGD)])
def test_an_optimizer_that_needs_what_is_unknown_is_told_what_there_is(wrap):
    def update(updates, state, params=None, *, hessian, **extra):
        return updates, state

    needing = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    state, step = setting("adaptive", losses_fn, wrap(needing))
    says = "needs the argument 'hessian', which is unknown here.*value, grad, value_fn, grad_fn"
    with pytest.raises(TypeError, match=says):
        step(state, BATCHES[0])


# As a pytree, and under other transformations


def test_the_state_survives_flattening():
    state, step = carrying()
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert isinstance(rebuilt, TrainState)
    other, _ = carrying()
    assert_trees(step(rebuilt, BATCHES[0]), step(other, BATCHES[0]))


@pytest.mark.parametrize("name", ["famo", "dwa"])
def test_inside_scan(name):
    with warnings.catch_warnings():  # donated or not, there is nothing to warn of
        warnings.simplefilter("error")
        state, step = carrying(name)
        scanned, seen = jax.jit(lambda state: jax.lax.scan(step, state, BATCHES))(state)
    state, _ = carrying(name)
    seen = values(seen)
    for number, x in enumerate(BATCHES):
        state, value = step(state, x)
        expected = jax.tree.map(lambda leaf, number=number: leaf[number], seen)
        assert_trees(value, expected, rtol=1e-5)
    assert_trees(scanned, state, rtol=1e-4, atol=1e-6)


def test_vmap_over_seeds_equals_one_by_one():
    """One seed's step is not finite: only that one is skipped."""
    step = step_of("random", noisy)

    def create(key):
        keys = jax.random.split(key, 3)
        params = {"w": jax.random.normal(keys[0], (3,)), "v": jnp.ones(3)}
        return step.init(params, BATCHES[0], rng=keys[1], weighting_key=keys[2])

    keys = jax.random.split(KEY, 3)
    bad = np.zeros((len(BATCHES), 3), np.float32)
    bad[2, 1] = np.nan
    state = jax.jit(jax.vmap(create))(keys)
    many = jax.jit(jax.vmap(lambda state, x, bad: step(state, x + bad), in_axes=(0, None, 0)))
    for x, offsets in zip(BATCHES, bad, strict=True):
        state, _ = many(state, x, offsets)
    np.testing.assert_array_equal(state.skipped, [0, 1, 0])
    create_one = jax.jit(create)
    state = values(state)
    for seed in range(3):
        one = create_one(keys[seed])
        for x, offsets in zip(BATCHES, bad, strict=True):
            one, _ = step(one, x + offsets[seed])
        got = jax.tree.map(lambda leaf, seed=seed: leaf[seed], state)
        assert_trees(got, one, rtol=1e-4, atol=1e-6)


def test_training_in_bfloat16():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_())
    x = BATCHES[0].astype(jnp.bfloat16)
    step = step_of("uncertainty", losses_fn)
    state = step.init(params, x)
    before = None
    for _ in range(51):
        state, value = step(state, x)
        before = value.losses if before is None else before
    assert step.update._cache_size() == 1
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))
    assert all(value.losses[task] < before[task] for task in before)


def test_complex_parameters_with_a_conjugate_before_the_optimizer():
    """As the docstring says; plain gradient descent on |z - z0|^2 halves the distance here."""
    goal = jnp.array([1 + 2j, -3j], jnp.complex64)

    def losses_fn(z):
        return {"a": jnp.sum(jnp.abs(z - goal) ** 2), "b": jnp.sum(jnp.abs(z - goal) ** 2)}

    conjugate = optax.stateless(lambda updates, _: jax.tree.map(jnp.conj, updates))
    optimizer = optax.chain(conjugate, optax.sgd(0.125))
    step = make_train_step(value_and_grad(losses_fn, mtl_jax.equal()), optimizer)
    state = step.init(jnp.zeros(2, jnp.complex64))
    for number in range(1, 5):
        state, _ = step(state)
        np.testing.assert_allclose(state.params, goal * (1 - 0.5**number), rtol=1e-5)
