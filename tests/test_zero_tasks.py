"""A task with nothing to say, such as a satisfied constraint, is left out of a step's decision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import METHODS, RunSettings, Signal

TASKS = ("a", "b", "c", "d")
PARAMS = {"x": jnp.array([1.5, -2.0, 0.5]), "y": jnp.array([0.2, 1.0, -1.0])}
SETTINGS = RunSettings(steps_per_epoch=2, epochs=20, optimizer=optax.sgd(0.1))
KEY = jax.random.key(3)


def all_made():
    """Every method, and its variants, by name."""
    for name, method in METHODS.items():
        own = {"weights": dict.fromkeys(TASKS, 0.5)} if name == "constant" else {}
        yield name, method.make(SETTINGS, **own)
        for variant, arguments in method.variants.items():
            yield variant, method.make(SETTINGS, **arguments)


MADE = dict(all_made())


def leaves_out(made):
    """Whether there is anything by which a task can be found to have nothing to say."""
    if isinstance(made, mtl_jax.Aggregator):
        return True
    return made.method.positive_losses or made.needs is not Signal.LOSSES


def losses_fn(params, scales):
    """Four tasks, each of which is 0 with a gradient of 0 where its scale is."""
    x, y = params["x"], params["y"]
    losses = {
        "a": jnp.sum((x - 1) ** 2),
        "b": 0.1 + jnp.sum((x + y) ** 2),
        "c": jnp.sum(jnp.cosh(y)),
        "d": 0.3 + jnp.sum((x * y) ** 2),
    }
    return {task: scales[k] * losses[task] for k, task in enumerate(TASKS)}


def mask_of(scales):
    return {task: jnp.asarray(scale > 0) for task, scale in zip(TASKS, scales, strict=True)}


def plain(tree):
    """The leaves as NumPy arrays, keys by their data."""

    def numbers(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return list(map(numbers, jax.tree.leaves(tree)))


def assert_same(one, other):
    for a, b in zip(plain(one), plain(other), strict=True):
        np.testing.assert_array_equal(a, b)


# Where the tasks take turns, one whose gradient is zero has its turn, too.
@pytest.mark.parametrize("name", [name for name in MADE if name != "conflict_free_momentum"])
def test_a_zero_task_is_as_one_without_labels(name):
    """From the first step on and later, and if nobody has anything to say; no step is lost."""
    gradient = mtl_jax.value_and_grad(losses_fn, MADE[name])
    call = jax.jit(gradient)
    left_out = masked = gradient.init(PARAMS, jnp.ones(4), key=KEY)
    everybody = mask_of(np.ones(4))
    needs = getattr(MADE[name], "needs", None)
    params = PARAMS
    for scales in ([1, 1, 1, 0], [1, 2, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]):
        scales = np.array(scales, np.float32)
        second = {"second": (scales,)} if needs is Signal.SECOND_BATCH else {}
        found, direction, left_out = call(params, left_out, scales, mask=everybody, **second)
        assert found.finite
        assert any(leaf.any() for leaf in plain(direction)) == bool(scales.any())
        if leaves_out(MADE[name]):
            expected = call(params, masked, scales, mask=mask_of(scales), **second)
            assert_same((found.weights, direction, left_out), (expected[0].weights, *expected[1:]))
            masked = expected[2]
        params = jax.tree.map(lambda p, d: p - 0.01 * d, params, direction)
    if found.weights is not None and leaves_out(MADE[name]):
        assert not any(weight.any() for weight in plain(found.weights))


def test_positive_domain_is_what_the_records_say():
    """Those with an answer for positive losses only, and those that learn from the loss's size."""
    found = {
        name
        for name, made in MADE.items()
        if isinstance(made, mtl_jax.Weighting) and made.method.positive_losses
    }
    positive = {name for name, method in METHODS.items() if method.domain == "positive"}
    assert found == positive | {"adaptive_initial", "famo", "imtl_l", "uncertainty"}
    assert not mtl_jax.famo(min_losses=-1.0).method.positive_losses
    of_vectors = {"a": np.zeros(2), "b": 0.0}
    assert mtl_jax.famo(min_losses=of_vectors).method.positive_losses
    assert not mtl_jax.famo(min_losses=of_vectors | {"b": -1.0}).method.positive_losses
    assert not mtl_jax.adaptive().method.positive_losses


def wrapped(weighting):
    yield mtl_jax.every(weighting, 2)
    yield mtl_jax.after_warmup(weighting, 1)
    yield mtl_jax.ema(weighting, 0.9)
    yield mtl_jax.clipped(weighting, 0.0, 5.0)
    yield mtl_jax.normalized(weighting)
    yield mtl_jax.with_preference(weighting, 1.0)


def test_wrappers_leave_out_what_the_weighting_inside_does():
    weighting = mtl_jax.geometric()
    for wrapper in wrapped(weighting):
        assert wrapper.method.positive_losses
        assert wrapper.method.needs is Signal.LOSSES
    for wrapper in wrapped(mtl_jax.upgrad()):
        assert not wrapper.method.positive_losses
        assert wrapper.method.needs is Signal.GRAMIAN


def test_a_weighting_of_the_gramian_that_is_not_due_still_leaves_out_a_zero_loss():
    weighting = mtl_jax.every(mtl_jax.gradnorm(optax.sgd(0.1)), 2)
    gradient = mtl_jax.value_and_grad(losses_fn, weighting)
    state = gradient.init(PARAMS, jnp.ones(4))
    for scales in ([1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]):
        value, _, state = jax.jit(gradient)(PARAMS, state, jnp.array(scales, jnp.float32))
        assert value.finite
        assert bool(value.weights["d"] > 0) == bool(scales[3])


def test_a_loss_of_zero_counts_where_it_has_a_gradient_and_no_domain_forbids_it():
    def losses_fn(x):
        return {"a": x[0], "b": 1 + jnp.sum(x**2)}  # 0 with a gradient of (1, 0)

    x = jnp.array([0.0, 1.0])
    for weighting, takes_part in ((mtl_jax.mgda(), True), (mtl_jax.famo(), False)):
        gradient = mtl_jax.value_and_grad(losses_fn, weighting)
        value, _, _ = gradient(x, gradient.init(x))
        assert bool(value.weights["a"] > 0) == takes_part
        assert value.weights["b"] > 0


READ_INNER_PRODUCTS = [
    name for name, made in MADE.items() if getattr(made, "needs", None) is Signal.GRAMIAN
]


@pytest.mark.parametrize("name", READ_INNER_PRODUCTS)
def test_what_a_loss_of_zero_has_for_a_gradient_is_not_seen(name):
    """A cross-entropy that rounds to 0 has a small gradient, of which the others know nothing."""

    def losses_fn(x):
        sure = jax.nn.logsumexp(jnp.stack([jnp.float32(20), x[2]])) - 20
        return {"a": 1 + (x[0] - 1) ** 2, "b": 1 + (x[1] + 1) ** 2 + x[0], "c": sure}

    gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.log_losses(MADE[name]))
    x = jnp.array([0.2, 0.1, 0.0])
    assert losses_fn(x)["c"] == 0
    assert jax.grad(lambda x: losses_fn(x)["c"])(x)[2] > 0
    state = gradient.init(x, key=KEY)
    found = gradient(x, state)
    masked = gradient(x, state, mask={"a": True, "b": True, "c": False})
    assert found[0].weights["a"] > 0
    assert_same((found[0].weights, *found[1:]), (masked[0].weights, *masked[1:]))


def test_theory_can_be_restored():
    """Then a task that cannot be improved has all the weight, or the step has no answer."""
    scales = jnp.array([1.0, 1.0, 1.0, 0.0])
    for name, expected in (("mgda", [0, 0, 0, 1]), ("geometric", [np.nan] * 4)):
        gradient = mtl_jax.value_and_grad(losses_fn, MADE[name], leave_out_zero=False)
        value, _, _ = gradient(PARAMS, gradient.init(PARAMS, scales), scales)
        np.testing.assert_array_equal([value.weights[task] for task in TASKS], expected)
    gradient = mtl_jax.value_and_grad(losses_fn, MADE["trimmed_mean"], leave_out_zero=False)
    rows = jax.jacobian(losses_fn)(PARAMS, scales)
    _, direction, _ = gradient(PARAMS, gradient.init(PARAMS, scales), scales)
    four = np.sort(np.stack([rows[task]["x"] for task in TASKS]), axis=0)
    np.testing.assert_allclose(direction["x"], four[1:3].mean(axis=0), rtol=1e-6)
    with pytest.raises(TypeError, match="`leave_out_zero` must be True or False"):
        mtl_jax.value_and_grad(losses_fn, MADE["mgda"], leave_out_zero="no")


@pytest.mark.parametrize("through", ["representation", "encoder", "shared"])
@pytest.mark.parametrize("steps", [1, 3])
def test_heads_that_begin_at_zero_begin_to_learn(through, steps):
    """With them no task has a gradient at the representation, and all have one in their head."""

    def encoder(params, x):
        return jnp.tanh(x @ params["encoder"])

    def heads(params, zs, x):
        return {t: jnp.mean((zs[t] @ params[t] - x[:, k]) ** 2) for k, t in enumerate("ab")}

    def losses_fn(params, x):
        z = encoder(params, x)
        return heads(params, {"a": z, "b": z}, x)

    x = jax.random.normal(jax.random.key(0), (16, 3))
    params = {"encoder": jax.random.normal(jax.random.key(1), (3, 4))}
    params |= {"a": jnp.zeros(4), "b": jnp.zeros(4)}
    weighting = mtl_jax.nash_mtl() if steps == 1 else mtl_jax.every(mtl_jax.nash_mtl(), steps)
    if through == "shared":
        gradient = mtl_jax.value_and_grad(
            losses_fn, weighting, shared=lambda path: path == "encoder"
        )
    else:
        gradient = mtl_jax.representation_value_and_grad(
            encoder, heads, weighting, tasks=("a", "b"), gramian=through
        )
    state = gradient.init(params, x)
    expected = jax.grad(lambda p: sum(losses_fn(p, x).values()))(params)
    for _ in range(steps):  # the first one decides
        value, direction, state = jax.jit(gradient)(params, state, x)
        assert value.finite
        assert (value.weights["a"], value.weights["b"]) == (1, 1)
        for task in "ab":
            np.testing.assert_allclose(direction[task], expected[task], rtol=1e-5)
        assert not direction["encoder"].any()
    # One head at zero: it learns at the other's weight, which is decided as if that were alone.
    params["b"] = jnp.array([1.0, -1.0, 2.0, 0.5])
    value, direction, state = jax.jit(gradient)(params, state, x)
    assert value.weights["a"] == value.weights["b"] != 1
    assert direction["a"].any()
    alone, _, _ = jax.jit(gradient)(
        params, gradient.init(params, x), x, mask={"a": jnp.asarray(False), "b": jnp.asarray(True)}
    )
    assert alone.weights["b"] == value.weights["b"]
    for _ in range(steps - 1):  # in between, too
        held, direction, state = jax.jit(gradient)(params, state, x)
        assert held.weights == value.weights
        assert direction["a"].any()


def constrained_losses(params):
    """Two ordinary losses, and a constraint that holds."""
    return {
        "a": jnp.mean((params - 1) ** 2 * jnp.array([1.0, 2.0, 3.0])),
        "b": jnp.mean((params + 1) ** 2 * jnp.array([3.0, 1.0, 0.2])) + 0.1,
        "constraint": jnp.mean(jax.nn.relu(-params - 9) ** 2),
    }


@pytest.mark.parametrize("name", ["famo", "geometric", "nash_mtl", "uncertainty"])
def test_a_satisfied_constraint_does_not_stop_the_training(name):
    """It ends where the two other losses end without it."""

    def ordinary(params):
        losses = constrained_losses(params)
        return {"a": losses["a"], "b": losses["b"]}

    ends = []
    for function in (ordinary, constrained_losses):
        step = mtl_jax.make_train_step(
            mtl_jax.value_and_grad(function, MADE[name]), optax.sgd(1e-3)
        )
        state = step.init(jnp.array([3.0, -2.0, 0.5]))
        state, _ = jax.jit(lambda s, step=step: jax.lax.scan(lambda s, _: step(s), s, length=100))(
            state
        )
        assert state.skipped == 0
        ends.append(state)
    np.testing.assert_allclose(ends[1].params, ends[0].params, rtol=1e-3)
    moved = np.linalg.norm(np.asarray(ends[0].params) - [3.0, -2.0, 0.5])
    assert moved > 0.05


def test_what_is_observed_is_about_the_tasks_that_took_part():
    """A constraint that the step breaks: its loss before the step was 0, not what famo knows."""
    famo = mtl_jax.famo()
    gradient = mtl_jax.value_and_grad(constrained_losses, famo)
    holds, broken = jnp.array([3.0, -2.0, 0.5]), jnp.array([2.0, -12.0, 0.5])
    state = gradient.init(holds)
    for params in (broken, holds):
        value, _, state = gradient(params, state)
    assert [bool(flag) for flag in value.present.values()] == [True, True, False]
    after = gradient.observe(broken, state, mask=value.present)
    moved = np.asarray(after.inner.logits != state.inner.logits)
    np.testing.assert_array_equal(moved, [True, True, False])


def test_as_aggregator_leaves_out_a_zero_task():
    rows = jnp.array([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0], [-0.25, 1.0, 0.5]])
    for weighting, losses in (
        (mtl_jax.nash_mtl(), None),
        (mtl_jax.gradnorm(optax.sgd(0.1)), (jnp.array([1.0, 0.0]), 2.0)),
    ):
        found = []
        for number, given, task_losses in (
            (3, rows, losses),
            (2, rows[::2], None if losses is None else (1.0, 2.0)),
        ):
            aggregator = mtl_jax.as_aggregator(weighting, number)
            state = aggregator.init(rows[0])
            found.append(aggregator.update(given, state, losses=task_losses)[0])
        np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
        assert found[0].any()
    theory = mtl_jax.as_aggregator(mtl_jax.mgda(), 3, leave_out_zero=False)
    assert not theory.update(rows, theory.init(rows[0]))[0].any()
