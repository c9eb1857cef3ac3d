"""Weightings made of weightings."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from methods import EVERYBODY, TASKS, loss_sequence

import mtl_jax
from mtl_jax._lift import all_finite

GRAMIAN = np.float32([[1.0, -0.5, 0.2], [-0.5, 4.0, 0.1], [0.2, 0.1, 0.25]])
WRAPPERS = {
    "every": lambda w: mtl_jax.every(w, 2),
    "after_warmup": lambda w: mtl_jax.after_warmup(w, 2),
    "ema": lambda w: mtl_jax.ema(w, 0.5),
    "clipped": lambda w: mtl_jax.clipped(w, 0.2, 1.1),
    "normalized": lambda w: mtl_jax.normalized(w),
    "with_preference": lambda w: mtl_jax.with_preference(w, {"a": 1.0, "b": 2.0, "c": 0.5}),
    "log_losses": lambda w: mtl_jax.log_losses(w, "losses"),
    "all of them": lambda w: mtl_jax.clipped(
        mtl_jax.with_preference(
            mtl_jax.normalized(mtl_jax.ema(mtl_jax.after_warmup(mtl_jax.every(w, 2), 3), 0.5), 2.0),
            2.0,
        ),
        0.1,
        3.0,
    ),
}


def inverse_norms():
    """A weighting of the Gramian that compiles quickly: the inverse of each gradient's norm."""

    def update(losses, state, present, steps, gramian):
        return jnp.where(present, 1 / jnp.sqrt(jnp.diagonal(gramian)), 0), state

    return mtl_jax.vector_weighting(update, needs=mtl_jax.Signal.GRAMIAN)


INNER = {
    "dwa": lambda: mtl_jax.dwa(window=1),
    "famo": mtl_jax.famo,
    "random_weighting": mtl_jax.random_weighting,
    "inverse_norms": inverse_norms,
    "gradvac": mtl_jax.gradvac,
}
COMPOSITIONS = [
    (wrapper, inner)
    for wrapper in WRAPPERS
    for inner in INNER
    if wrapper == "all of them" or inner in ("famo", "inverse_norms")
]
each_composition = pytest.mark.parametrize(("wrapper", "inner"), COMPOSITIONS)
KEY = jax.random.key(3)
B_ABSENT = EVERYBODY | {"b": np.False_}


@functools.cache
def composed(wrapper, inner):
    return WRAPPERS[wrapper](inner_of(inner))


@functools.cache
def inner_of(name):
    return INNER[name]()


@functools.cache
def jitted(weighting):
    """The update in a function that is compiled, as in a step."""
    return jax.jit(lambda *args, **kwargs: weighting.update(*args, **kwargs))


def measured(weighting, state, gramian):
    """The Gramian where it is due."""
    return gramian if weighting.due is None or bool(weighting.due(state)) else None


def vector(weights):
    return np.array([weights[task] for task in TASKS])


def with_first(value):
    gramian = GRAMIAN.copy()
    gramian[0, 0] = value
    return gramian


def gramians(number):
    """Gramians of the same angles whose norms change from step to step."""
    factors = np.exp(np.random.default_rng(0).normal(size=(number, 3))).astype(np.float32)
    return [GRAMIAN * f[:, None] * f[None, :] for f in factors]


def run(weighting, steps=6, masks=None, update=None):
    """The weights of each step, measuring only when it is due, and the last state.

    A mask is always given, so that all steps that are due are of one program.
    """
    sequence = loss_sequence(steps)
    state = weighting.init(sequence[0], key=KEY)
    update = weighting.update if update is None else update
    history = []
    for step, (losses, gramian) in enumerate(zip(sequence, gramians(steps), strict=True)):
        mask = (masks[step] if masks else None) or EVERYBODY
        gramian = measured(weighting, state, gramian)
        weights, state = update(losses, state, mask=mask, gramian=gramian)
        if weighting.observe is not None:
            after = {task: (0.9 - 0.1 * k) * losses[task] for k, task in enumerate(TASKS)}
            state = weighting.observe(after, state, mask=mask)
        history.append(vector(weights))
    return np.array(history), state


@each_composition
def test_each_composition_is_a_weighting(wrapper, inner):
    weighting = composed(wrapper, inner)
    assert isinstance(weighting, mtl_jax.Weighting)
    assert weighting.needs is inner_of(inner).needs
    assert (weighting.observe is None) == (inner_of(inner).observe is None)
    history, state = run(weighting)
    assert np.all(np.isfinite(history))
    assert all_finite(state)
    # No leaf is shared, so that the state can be donated; and it is a fixed point of tracing.
    fresh = weighting.init(loss_sequence(1)[0], key=KEY)
    assert jax.tree.structure(fresh) == jax.tree.structure(state)
    pointers = [
        leaf.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(fresh)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    assert len(set(pointers)) == len(pointers)
    types = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(fresh)]
    assert types == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]


@each_composition
def test_jit_equals_eager(wrapper, inner):
    weighting = composed(wrapper, inner)
    compiled = run(weighting, 3, update=jitted(weighting))[0]
    np.testing.assert_allclose(compiled, run(weighting, 3)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrapper", "inner", "what"),
    [(*composition, "loss") for composition in COMPOSITIONS]
    + [(*pair, "gramian") for pair in COMPOSITIONS if pair[1] in ("inverse_norms", "gradvac")],
)
def test_what_is_not_finite_leaves_every_state_as_it_was(wrapper, inner, what):
    weighting = composed(wrapper, inner)
    losses = loss_sequence(1)[0]
    for steps in (3, 4):  # one of them is due
        _, state = run(weighting, steps)
        due = weighting.due is None or bool(weighting.due(state))
        if what == "gramian" and not due:
            continue
        bad = losses | {"b": jnp.float32(jnp.nan)} if what == "loss" else losses
        gramian = with_first(np.inf) if what == "gramian" else GRAMIAN
        weights, after = weighting.update(
            bad, state, mask=EVERYBODY, gramian=measured(weighting, state, gramian)
        )
        assert np.all(np.isnan(vector(weights)))
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
                new, old = jax.random.key_data(new), jax.random.key_data(old)
            np.testing.assert_array_equal(new, old)


@each_composition
def test_an_absent_task_has_weight_zero_and_is_not_looked_at(wrapper, inner):
    weighting = composed(wrapper, inner)
    masks = [None, None, None, B_ABSENT, B_ABSENT, None]
    history, _ = run(weighting, masks=masks)
    np.testing.assert_array_equal(history[3:5, 1], 0)
    assert np.all(history[[0, 1, 2, 5]][:, 1] != 0)
    losses = loss_sequence(1)[0]
    _, state = run(weighting, 4)
    results = []
    for garbage in (0.3, jnp.nan):
        gramian = np.array(GRAMIAN)
        gramian[1], gramian[:, 1] = garbage, garbage
        results.append(
            weighting.update(
                losses | {"b": jnp.float32(garbage)},
                state,
                mask=B_ABSENT,
                gramian=measured(weighting, state, gramian),
            )[0]
        )
    np.testing.assert_array_equal(vector(results[0]), vector(results[1]))
    nobody = dict.fromkeys(TASKS, np.False_)
    weights, _ = weighting.update(losses, state, mask=nobody, gramian=GRAMIAN)
    np.testing.assert_array_equal(vector(weights), 0)


def test_every_decides_at_every_kth_step():
    history, _ = run(mtl_jax.every(inner_of("inverse_norms"), 3), 7)
    each, _ = run(inner_of("inverse_norms"), 7)
    np.testing.assert_allclose(history, each[[0, 0, 0, 3, 3, 3, 6]], rtol=1e-6)


def test_every_with_a_weighting_of_the_losses_sees_only_those_of_its_steps():
    history, _ = run(composed("every", "dwa"), 8)
    weighting = inner_of("dwa")
    state, expected = weighting.init(loss_sequence(1)[0]), []
    for losses in loss_sequence(8)[::2]:
        weights, state = weighting.update(losses, state)
        expected += [vector(weights)] * 2
    np.testing.assert_allclose(history, expected, rtol=1e-6)


def test_every_is_due_again_after_a_step_that_was_skipped():
    weighting = composed("every", "inverse_norms")
    losses = loss_sequence(1)[0]
    state = weighting.init(losses)
    weights, state = weighting.update(losses, state, gramian=with_first(np.nan))
    assert np.all(np.isnan(vector(weights)))
    assert weighting.due(state)


def test_every_asks_for_the_gramian_when_it_is_due():
    """Whoever leaves it out then gets NaN, not the weights of another step."""
    weighting = composed("every", "inverse_norms")
    losses = loss_sequence(1)[0]
    weights, _ = weighting.update(losses, weighting.init(losses))
    assert np.all(np.isnan(vector(weights)))


def test_every_holds_the_weight_of_a_task_that_comes_back():
    weighting = mtl_jax.every(inverse_norms(), 4)
    history, _ = run(weighting, 4, masks=[None, B_ABSENT, None, None])
    assert history[1, 1] == 0
    np.testing.assert_allclose(history[2], history[0])
    history, _ = run(weighting, 2, masks=[B_ABSENT, None])
    others = np.delete(history[0], 1)
    assert history[1, 1] == pytest.approx(np.mean(np.abs(others)))  # never decided
    history, _ = run(weighting, 2, masks=[dict.fromkeys(EVERYBODY, np.False_), None])
    assert not history[0].any()
    np.testing.assert_array_equal(history[1], 1)  # nor was any other one


def test_after_warmup_starts_the_weighting_with_the_first_step_after():
    history, _ = run(mtl_jax.after_warmup(inner_of("dwa"), 3), 7)
    np.testing.assert_array_equal(history[:3], 1)
    weighting = inner_of("dwa")
    state = weighting.init(loss_sequence(1)[0])
    for step, losses in enumerate(loss_sequence(7)[3:], start=3):
        weights, state = weighting.update(losses, state)
        np.testing.assert_allclose(history[step], vector(weights), rtol=1e-6)


def test_after_warmup_does_not_measure_in_the_warmup():
    weighting = mtl_jax.after_warmup(mtl_jax.every(inverse_norms(), 2), 3)
    losses, due = loss_sequence(1)[0], []
    state = weighting.init(losses)
    for gramian in gramians(8):
        due.append(bool(weighting.due(state)))
        _, state = weighting.update(losses, state, gramian=gramian if due[-1] else None)
    assert due == [False, False, False, True, False, True, False, True]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_ema_is_the_weighted_mean_of_the_weights(decay):
    masks = [None, None, B_ABSENT, B_ABSENT, None, None]
    history, _ = run(mtl_jax.ema(inverse_norms(), decay), masks=masks)
    each, _ = run(inner_of("inverse_norms"), masks=masks)
    for k, (step, present) in enumerate([(5, range(6)), (5, (0, 1, 4, 5)), (5, range(6))]):
        values = each[list(present), k]
        factors = decay ** np.arange(len(values) - 1, -1, -1.0)
        np.testing.assert_allclose(history[step, k], factors @ values / factors.sum(), rtol=1e-5)


@pytest.mark.parametrize("initial", ["first", {"a": 0.0, "b": 1.0, "c": 2.0}, 0.5])
def test_ema_with_initial_weights(initial):
    """Each task begins with its own first step, and is kept while it is absent."""
    masks = [B_ABSENT, None, B_ABSENT, None, None]
    history, _ = run(mtl_jax.ema(inverse_norms(), 0.9, initial), 5, masks=masks)
    each, _ = run(inner_of("inverse_norms"), 5, masks=masks)
    for k, present in enumerate([range(5), (1, 3, 4), range(5)]):
        average = {"a": 0.5} if initial == 0.5 else initial
        average = each[present[0], k] if initial == "first" else average.get(TASKS[k], 0.5)
        for step in present:
            average = 0.9 * average + 0.1 * each[step, k]
            np.testing.assert_allclose(history[step, k], average, rtol=1e-5)


DATA = pathlib.Path(__file__).parent / "data"
CR_MOGM = json.loads((DATA / "torchjd_averages_and_preferences.json").read_text())["cr_mogm"]
SEQUENCES = json.loads((DATA / "gradient_sequences.json").read_text())["sequences"]


@functools.cache
def cr_mogm(weighting, alpha, initial):
    return mtl_jax.ema(getattr(mtl_jax, weighting)(), alpha, initial)


@pytest.mark.parametrize("record", CR_MOGM, ids=lambda r: f"{r['weighting']}-{r['sequence']}")
def test_cr_mogm_of_torchjd(record, x64):
    (J,) = (np.array(one["J1"]) for one in SEQUENCES if one["id"] == record["sequence"])
    number, most = J.shape[1], 4  # tasks of every program: the others are absent
    given = record["initial_weights"]
    weighting = cr_mogm(record["weighting"], record["alpha"], 0.0 if given else "first")
    state = weighting.init((1.0,) * most)
    if given:
        weights = np.pad(given, (0, most - number))
        state = state._replace(inner=state.inner._replace(weights=weights))
    mask = tuple(np.arange(most) < number)
    for rows, expected in zip(J, record["weights"], strict=True):
        gramian = np.zeros((most, most))
        gramian[:number, :number] = rows @ rows.T
        weights, state = weighting.update((1.0,) * most, state, mask=mask, gramian=gramian)
        np.testing.assert_allclose(weights[:number], expected, rtol=1e-8, atol=1e-9)


def test_the_stateless_ones():
    each, _ = run(inner_of("inverse_norms"))
    np.testing.assert_allclose(run(composed("clipped", "inverse_norms"))[0], each.clip(0.2, 1.1))
    scaled, _ = run(composed("normalized", "inverse_norms"))
    np.testing.assert_allclose(scaled, 3 * each / each.sum(axis=1)[:, None], rtol=1e-5)
    scaled, _ = run(mtl_jax.normalized(inverse_norms(), 5.0), masks=[B_ABSENT] * 6)
    np.testing.assert_allclose(scaled.sum(axis=1), 5, rtol=1e-5)
    prior, _ = run(composed("with_preference", "inverse_norms"))
    np.testing.assert_allclose(prior, each * [1, 2, 0.5], rtol=1e-6)


WEIGHTS_AS_LOSSES = mtl_jax.vector_weighting(lambda losses, state, *_: (losses, state))
NORMALIZED = mtl_jax.normalized(WEIGHTS_AS_LOSSES)


def positive_losses(params, x):
    """Losses above e, whose logarithms are positive, too."""
    z = jnp.tanh(x @ params["encoder"])
    return {task: 3 + (k + 1) * jnp.mean((z @ params[task] - k) ** 2) for k, task in
            enumerate(TASKS)}  # fmt: skip


LOGARITHMS = {
    "losses": lambda: mtl_jax.adaptive(2.0, decay=0.5),
    "after the step": mtl_jax.famo,
    "gramian": mtl_jax.imtl_g,
    "now and then": lambda: mtl_jax.every(mtl_jax.imtl_g(), 2),
    "losses and gramian": lambda: mtl_jax.gradnorm(optax.adam(0.1)),
    "task gradients": mtl_jax.excess_mtl,
}


@pytest.mark.parametrize("name", LOGARITHMS)
def test_log_losses_is_the_weighting_on_the_logarithms(name, x64):
    """The gradient, and all states, are those of a function that returns the logarithms."""
    weighting, rng = LOGARITHMS[name](), np.random.default_rng(0)
    params = {"encoder": rng.normal(size=(4, 3))} | {t: rng.normal(size=3) for t in TASKS}
    x, mask = rng.normal(size=(5, 4)), EVERYBODY

    def logarithms(params, x):
        return jax.tree.map(jnp.log, positive_losses(params, x))

    found = []
    for losses_fn, used in (
        (positive_losses, mtl_jax.log_losses(weighting)),
        (logarithms, weighting),
    ):
        step = mtl_jax.make_train_step(mtl_jax.value_and_grad(losses_fn, used), optax.sgd(0.1))
        state, weights = step.init(params, x), []
        for mask in (EVERYBODY, B_ABSENT, EVERYBODY, EVERYBODY):
            state, value = step(state, x, mask=mask)
            factor = value.losses if losses_fn is positive_losses else dict.fromkeys(TASKS, 1.0)
            weights.append(jax.tree.map(jnp.multiply, value.weights, factor))
        assert state.skipped == 0
        found.append((weights, state))
    trees.assert_trees_close(*found, rtol=1e-10, atol=1e-13)
    assert not np.allclose(found[0][1].params["encoder"], params["encoder"], rtol=1e-2)


def test_igbv1():
    """K softmax(L / B), trained on the logarithms; B is the mean of the second epoch."""
    losses = np.random.default_rng(1).uniform(0.2, 3, (3, 4, 3))  # epochs, batches, tasks
    adaptive = mtl_jax.adaptive(rule="softmax", relative_to="initial", window=4)
    weighting = mtl_jax.log_losses(mtl_jax.after_warmup(adaptive, 4), "losses")
    state, weights = weighting.init((1.0,) * 3), []
    for row in losses.reshape(12, 3):
        found, state = weighting.update(tuple(np.float32(row)), state)
        weights.append(found)
    of_logarithms = np.array(weights).reshape(3, 4, 3) * losses
    np.testing.assert_allclose(of_logarithms[0], 1, rtol=1e-5)
    scores = np.exp(losses[2] / losses[1].mean(axis=0))
    expected = 3 * scores / scores.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(of_logarithms[2], expected, rtol=1e-5)


@pytest.mark.parametrize("decide_on", ["logarithms", "losses"])
@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_log_losses_of_a_loss_that_is_not_positive(loss, decide_on):
    weighting = mtl_jax.log_losses(mtl_jax.equal(), decide_on)
    state = weighting.init((1.0, 1.0))
    weights, after = weighting.update((loss, 1.0), state)
    assert np.all(np.isnan(weights))
    trees.assert_trees_equal(after, state)


@pytest.mark.parametrize("weights", [(1e-37, 3e-37), (1e37, 3e37), (0.0, 0.0), (-1.0, 3.0)])
def test_normalized_at_the_ends(weights):
    got, _ = NORMALIZED.update(weights, NORMALIZED.init(weights))
    exact = np.array(weights, np.float64)
    np.testing.assert_allclose(got, 2 * exact / (np.abs(exact).sum() or 1), rtol=1e-5)


def test_errors():
    weighting = inverse_norms()
    for wrap in WRAPPERS.values():
        with pytest.raises(TypeError, match="got an Aggregator"):
            wrap(mtl_jax.graddrop())
        with pytest.raises(TypeError, match="Did you mean to call it"):
            wrap(inverse_norms)
    with pytest.raises(ValueError, match="put `every` innermost"):
        mtl_jax.every(mtl_jax.after_warmup(weighting, 3), 2)
    for steps in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every: `steps`"):
            mtl_jax.every(weighting, steps)
        with pytest.raises(ValueError, match="after_warmup: `steps`"):
            mtl_jax.after_warmup(weighting, steps)
    with pytest.raises(ValueError, match="ema: `decay`"):
        mtl_jax.ema(weighting, 1.0)
    with pytest.raises(ValueError, match="ema: `initial` must be 'first' or None, got 'last'"):
        mtl_jax.ema(weighting, 0.9, "last")
    with pytest.raises(ValueError, match="ema: an initial weight must be in .*nan"):
        mtl_jax.ema(weighting, 0.9, {"a": jnp.nan})
    with pytest.raises(ValueError, match="ema: `initial` must have the structure of the losses"):
        mtl_jax.ema(weighting, 0.9, (1.0,)).init({"a": 1.0})
    for low, says in [(1.5, "the bounds"), (jnp.nan, "`low`.*nan"), (-jnp.inf, "`low`.*inf")]:
        with pytest.raises(ValueError, match=f"clipped: {says}"):
            mtl_jax.clipped(weighting, low, 1.0)
    with pytest.raises(ValueError, match="normalized: `total`"):
        mtl_jax.normalized(weighting, 0.0)
    with pytest.raises(ValueError, match="with_preference: a factor"):
        mtl_jax.with_preference(weighting, {"a": -1.0})
    with pytest.raises(ValueError, match="log_losses: `decide_on` must be 'logarithms' or"):
        mtl_jax.log_losses(weighting, "logs")
    wrapped = mtl_jax.with_preference(mtl_jax.equal(), {"a": 1.0})
    with pytest.raises(ValueError, match="with_preference: `preference` must have the structure"):
        wrapped.update({"b": 1.0}, wrapped.init({"b": 1.0}))


@each_composition
def test_extremes(wrapper, inner):
    """Losses of 1e-30 to 1e30, gradients of norm 1e-18 to 1e18, tasks that come and go."""
    weighting, rng = composed(wrapper, inner), np.random.default_rng(0)
    state, names = weighting.init(loss_sequence(1)[0], key=KEY), dict.fromkeys(TASKS)
    reach = 1 / 4 if wrapper == "log_losses" else 1  # it divides by the losses, twice
    for step in range(24):
        losses = {task: np.float32(10.0 ** (reach * rng.uniform(-30, 30))) for task in names}
        norms = (10.0 ** (reach * rng.uniform(-18, 18, size=3))).astype(np.float32)
        mask = {task: np.bool_(rng.random() < 0.8 and step != 7) for task in names}
        broken = step == 13
        if broken:
            losses["b"], mask["b"] = np.float32(np.inf), np.True_
        gramian = measured(weighting, state, GRAMIAN * norms[:, None] * norms[None, :])
        weights, after = weighting.update(losses, state, mask=mask, gramian=gramian)
        present, got = vector(mask), vector(weights)
        np.testing.assert_array_equal(got[~present], 0)
        if broken:
            assert np.all(np.isnan(got[present]))
            trees.assert_trees_equal(after, state)
        else:
            assert np.all(np.isfinite(got)), step
            assert all_finite(after)
        state = after


@pytest.fixture
def debug_nans():
    jax.config.update("jax_debug_nans", True)
    yield
    jax.config.update("jax_debug_nans", False)


@pytest.mark.usefixtures("debug_nans")
@pytest.mark.parametrize(
    "weighting",
    [mtl_jax.after_warmup(mtl_jax.upgrad(), 2), mtl_jax.every(mtl_jax.upgrad(), 3)],
    ids=["after_warmup", "every"],
)
def test_debug_nans_has_nothing_to_say_of_healthy_training(weighting):
    """Not even of steps in which the Gramian is not measured."""

    def losses_fn(params, target):
        return {"a": jnp.sum((params - target) ** 2), "b": jnp.sum((params + target) ** 2)}

    gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting)
    gradient = jax.jit(gradient_fn)
    params, target = jnp.array([0.3, -0.4, 2.0]), jnp.array([1.0, 0.5, -1.0])
    state, measured = gradient_fn.init(params, target), []
    for _ in range(5):
        value, grads, state = gradient(params, state, target)
        measured.append(bool(value.measured))
        assert value.finite
        params = params - 0.05 * grads
    assert True in measured
    assert False in measured
