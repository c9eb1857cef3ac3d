"""adaptive: its defining property, its domain, and its definition in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mtl_jax

RULES = ("proportional", "softmax")
LOSS = st.floats(2.0**-20, 2.0**20, width=32)
fast = settings(deadline=None, max_examples=25)


MOST = 8  # tasks of every program: the others are absent
made = functools.cache(mtl_jax.adaptive)


def padded(losses, present=None):
    """The losses with absent tasks after them, and the mask."""
    present = (True,) * len(losses) if present is None else tuple(present)
    absent = MOST - len(losses)
    return (*map(float, losses), *[1.0] * absent), (*present, *[False] * absent)


def weights_of(losses, present=None, **kwargs):
    number, weighting = len(losses), made(**kwargs)
    losses, mask = padded(losses, present)
    weights, _ = weighting.update(losses, weighting.init(losses), mask=mask)
    return np.array(weights)[:number]


def weights_without_compiling(losses, **kwargs):
    """Operation by operation, for parameters that are drawn: each would be a program of its own."""
    weighting = mtl_jax.adaptive(**kwargs)
    padded_losses, mask = padded(losses)
    with jax.disable_jit():
        weights, _ = weighting.update(padded_losses, weighting.init(padded_losses), mask=mask)
        return np.array(weights)[: len(losses)]


def definition(losses, emphasis, rule):
    """The formula, in float64."""
    losses = np.asarray(losses, np.float64)
    if rule == "proportional":
        score = np.where(losses.max() > 0, emphasis * np.log(losses / losses.max()), 0)
    else:
        score = emphasis * (losses - losses.max())
    return len(losses) * np.exp(score) / np.exp(score).sum()


@pytest.mark.parametrize("rule", RULES)
@fast
@given(losses=st.lists(LOSS, min_size=2, max_size=6), emphasis=st.floats(0.25, 4))
def test_the_higher_loss_has_the_higher_weight(losses, emphasis, rule):
    weights = weights_without_compiling(losses, emphasis=emphasis, rule=rule)
    for i, j in np.ndindex(len(losses), len(losses)):
        if losses[i] > losses[j]:
            assert weights[i] >= weights[j]
            # Strictly, where float32 can tell the two apart and neither weight is below it.
            gap = np.log(losses[i] / losses[j]) if rule == "proportional" else losses[i] - losses[j]
            resolution = 1e-5 if rule == "proportional" else 1e-5 * max(1, losses[i])
            if emphasis * gap > resolution and weights[i] > 1e-30:
                assert weights[i] > weights[j]


@pytest.mark.parametrize("rule", RULES)
@fast
@given(losses=st.lists(LOSS, min_size=1, max_size=8), emphasis=st.floats(0, 4))
def test_against_the_definition(losses, emphasis, rule):
    weights = weights_without_compiling(losses, emphasis=emphasis, rule=rule)
    expected = definition(np.asarray(losses, np.float32), emphasis, rule)
    # A softmax multiplies the rounding of its scores, emphasis * L, into the weights.
    size = 30 * emphasis if rule == "proportional" else emphasis * np.max(losses)
    np.testing.assert_allclose(weights, expected, rtol=2e-6 + 3e-7 * size, atol=1e-30)
    np.testing.assert_allclose(weights.sum(), len(losses), rtol=1e-5)


def test_against_the_definition_in_float64(x64):
    rng = np.random.default_rng(0)
    for rule in RULES:
        for emphasis in (0.0, 0.5, 1.0, 4.0):
            losses = rng.uniform(0.1, 5, 7)
            weights = weights_without_compiling(losses, emphasis=emphasis, rule=rule)
            np.testing.assert_allclose(weights, definition(losses, emphasis, rule), rtol=1e-13)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("losses", [(0.3, 5.0, 1e3), (0.0, 0.0, 1.0), (1e-30, 1.0, 1e30)])
def test_emphasis_0_is_equal(losses, rule):
    np.testing.assert_array_equal(weights_of(losses, emphasis=0.0, rule=rule), 1)


@fast
@given(losses=st.lists(LOSS, min_size=2, max_size=5), exponent=st.integers(-60, 60))
def test_the_proportional_rule_does_not_depend_on_a_common_scale(losses, exponent):
    scaled = [loss * 2.0**exponent for loss in losses]
    # The logarithm of a float32, at most 88, has an error of half a unit in its last place, 4e-6.
    np.testing.assert_allclose(weights_of(scaled), weights_of(losses), rtol=1e-5)


@fast
@given(
    losses=st.lists(st.floats(-100, 100, width=16), min_size=2, max_size=5),
    shift=st.integers(-99, 99),
)
def test_the_softmax_rule_does_not_depend_on_a_common_shift(losses, shift):
    shifted = [loss + shift for loss in losses]
    np.testing.assert_allclose(
        weights_of(shifted, rule="softmax"),
        weights_of(losses, rule="softmax"),
        rtol=1e-4,
        atol=1e-30,
    )


@pytest.mark.parametrize("emphasis", [1.0, 4.0])
@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((1e30, 1e30), (1, 1)),
        ((1e-30, 1e-30), (1, 1)),
        ((1e30, 1e-30), (2, 0)),
        ((0.0, 0.0), (1, 1)),
        ((0.0, 1.0), (0, 2)),
        ((3e38, 3e38), (1, 1)),
    ],
)
def test_extreme_losses(losses, expected, emphasis):
    np.testing.assert_allclose(
        weights_of(losses, emphasis=emphasis), expected, rtol=1e-6, atol=1e-30
    )


@pytest.mark.parametrize("losses", [(1e30, 2e30), (1e-30, 2e-30)])
def test_ratios_of_extreme_losses_are_kept(losses):
    np.testing.assert_allclose(weights_of(losses), (2 / 3, 4 / 3), rtol=1e-6)
    np.testing.assert_allclose(weights_of(losses, emphasis=4), (2 / 17, 32 / 17), rtol=1e-5)


def test_a_small_power_of_a_ratio_that_underflows():
    """(1e-30 / 1e30) ** 0.1 is 1e-6: a ratio of 1e-60 is no reason for a weight of 0."""
    expected = definition((1e-30, 1e30), 0.1, "proportional")
    np.testing.assert_allclose(weights_of((1e-30, 1e30), emphasis=0.1), expected, rtol=1e-4)


@pytest.mark.parametrize("losses", [(-1.0, 2.0), (-1.0, -1.0), (-1e-20, 0.0)])
def test_a_negative_loss_is_outside_the_proportional_rule(losses):
    weighting = mtl_jax.adaptive(decay=0.5)
    _, state = weighting.update((1.0, 2.0), weighting.init(losses))
    weights, after = weighting.update(losses, weighting.init(losses))
    assert np.all(np.isnan(weights))
    np.testing.assert_array_equal(after.steps, 0)
    weights, after = weighting.update((1.0, 2.0), state)  # and training goes on
    np.testing.assert_allclose(weights, (2 / 3, 4 / 3), rtol=1e-5)


def test_a_negative_loss_is_seen_behind_the_average():
    """The average, 0.9 * 1 - 0.1 * 0.5, is positive: the loss is still outside the domain."""
    weighting = mtl_jax.adaptive(decay=0.9)
    _, state = weighting.update((1.0, 1.0), weighting.init((1.0, 1.0)))
    weights, after = weighting.update((-0.5, 1.0), state)
    assert np.all(np.isnan(weights))
    np.testing.assert_array_equal(after.inner.average, state.inner.average)


def test_the_softmax_rule_takes_negative_losses():
    expected = definition((-3.0, 1.0, -0.5), 1.0, "softmax")
    np.testing.assert_allclose(weights_of((-3.0, 1.0, -0.5), rule="softmax"), expected, rtol=1e-6)
    np.testing.assert_array_equal(weights_of((0.0, 0.0), rule="softmax"), 1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_relative_to_the_first_losses_no_scale_matters(rule, decay):
    rng = np.random.default_rng(2)
    sequence = rng.uniform(0.5, 2, (6, 3)).astype(np.float32)
    weighting = mtl_jax.adaptive(2.0, rule, "initial", decay)
    update = weighting.update
    state, scaled_state = weighting.init((1.0,) * 3), weighting.init((1.0,) * 3)
    scales = np.array([1.0, 1024.0, 2.0**-40], np.float32)
    for number, losses in enumerate(sequence):
        weights, state = update(tuple(losses), state)
        scaled, scaled_state = update(tuple(losses * scales), scaled_state)
        np.testing.assert_allclose(scaled, weights, rtol=1e-6)
        if number == 0:
            np.testing.assert_allclose(weights, 1, rtol=1e-6)
        if decay == 0:
            expected = definition(losses.astype(float) / sequence[0], 2.0, rule)
            np.testing.assert_allclose(weights, expected, rtol=1e-5)


@pytest.mark.parametrize("first", [0.0, -1.0])
@pytest.mark.parametrize("rule", RULES)
def test_a_first_loss_that_is_not_positive_is_no_reference(rule, first):
    weighting = mtl_jax.adaptive(rule=rule, relative_to="initial")
    weights, state = weighting.update((first, 1.0), weighting.init((1.0, 1.0)))
    assert np.all(np.isnan(weights))
    np.testing.assert_array_equal(state.steps, 0)
    weights, _ = weighting.update((2.0, 1.0), state)
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
def test_decay_against_the_definition(decay):
    rng = np.random.default_rng(3)
    sequence = rng.uniform(0.5, 2, (12, 3)).astype(np.float32)
    weighting = made(decay=decay)
    update = weighting.update
    state = weighting.init((1.0,) * 3)
    average = np.zeros(3)
    for number, losses in enumerate(sequence):
        weights, state = update(tuple(losses), state)
        average = decay * average + (1 - decay) * losses.astype(float)
        smoothed = average / (1 - decay ** (number + 1))
        np.testing.assert_allclose(weights, definition(smoothed, 1.0, "proportional"), rtol=1e-4)


@pytest.mark.parametrize("decay", [0.9999, 1 - 1e-6, 1 - 1e-9])
def test_the_start_of_a_long_average_is_the_loss(decay):
    """1 - decay ** 1 must not be rounded away: for the softmax rule its size counts."""
    weights = weights_of((1.0, 2.0), rule="softmax", decay=decay)
    np.testing.assert_allclose(weights, definition((1.0, 2.0), 1.0, "softmax"), rtol=1e-3)


def test_a_task_that_joins_late_starts_its_own_average():
    weighting = mtl_jax.adaptive(relative_to="initial", decay=0.9)
    state = weighting.init((1.0, 1.0))
    for loss in (1.0, 0.5, 0.25):
        _, state = weighting.update((loss, 7.0), state, mask=(True, False))
    average = 0.9 * (0.9 * (0.9 * 0.1 * 1 + 0.1 * 0.5) + 0.1 * 0.25) + 0.1 * 0.125
    weights, state = weighting.update((0.125, 40.0), state)
    expected = definition((average / (1 - 0.9**4), 1.0), 1.0, "proportional")
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def curves(step):
    """What each task reaches alone, as a schedule of the step."""
    t = jnp.asarray(step, jnp.float32)
    return tuple(0.1 + jnp.exp(-rate * t) for rate in (1.0, 0.1, 0.01))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("relative_to", ["numbers", "schedule", "window"])
def test_relative_to_references_against_the_definition(rule, relative_to):
    """Each task is compared with the reference of its own step; absent ones keep theirs."""
    rng = np.random.default_rng(4)
    sequence = rng.uniform(0.5, 2, (9, 3))
    masks = rng.random((9, 3)) < 0.7
    constants = (0.5, 2.0, 0.1)
    weighting = {
        "numbers": lambda: mtl_jax.adaptive(2.0, rule, constants),
        "schedule": lambda: mtl_jax.adaptive(2.0, rule, curves),
        "window": lambda: mtl_jax.adaptive(2.0, rule, "initial", window=3),
    }[relative_to]()
    state, seen = weighting.init((1.0,) * 3), [[], [], []]
    for losses, present in zip(sequence, masks, strict=True):
        inputs = tuple(np.float32(np.where(present, losses, np.nan)))
        weights, state = weighting.update(inputs, state, mask=tuple(present))
        reference = np.array(constants)
        for k in np.flatnonzero(present):
            if relative_to == "schedule":
                reference[k] = 0.1 + np.exp(-(1.0, 0.1, 0.01)[k] * len(seen[k]))
            seen[k].append(losses[k])
            if relative_to == "window":
                reference[k] = np.mean(seen[k][:3])
        expected = definition((losses / reference)[present], 2.0, rule)
        np.testing.assert_allclose(np.array(weights)[present], expected, rtol=1e-4)
        np.testing.assert_array_equal(np.array(weights)[~present], 0)
    assert min(map(len, seen)) > 3  # the window was left


def test_a_reference_that_is_not_positive_gives_nan():
    weighting = mtl_jax.adaptive(relative_to=lambda step: (1.0, 2.0 - step))
    state = weighting.init((1.0, 1.0))
    for expected in ((2 / 3 * 2, 1 / 3 * 2), (1, 1)):  # references (1, 2) and (1, 1)
        weights, state = weighting.update((1.0, 1.0), state)
        np.testing.assert_allclose(weights, expected, rtol=1e-6)
    weights, after = weighting.update((1.0, 1.0), state)
    assert np.all(np.isnan(weights))
    np.testing.assert_array_equal(after.steps, state.steps)


def test_softmax_is_the_weight_of_two_other_objectives(x64):
    """A tilted objective (TERM), and TorchJD's smooth Tchebycheff with the reference 0."""

    def tilted(losses, tilt):
        return jnp.log(jnp.mean(jnp.exp(tilt * losses))) / tilt

    def tchebycheff(losses, mu):
        return mu * jax.nn.logsumexp(losses / losses.size / mu)

    losses = np.random.default_rng(5).uniform(0.1, 3, 4)
    for p in (0.5, 2.0):
        weights = weights_without_compiling(losses, emphasis=p, rule="softmax")
        expected = jax.grad(tilted)(losses, p)
        np.testing.assert_allclose(weights, 4 * expected, rtol=1e-12)
        expected = jax.grad(tchebycheff)(losses, 1 / (4 * p))
        np.testing.assert_allclose(weights, 16 * expected, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_no_gradient_through_the_weights(rule):
    def losses_fn(w):
        return {"a": w**2, "b": jnp.exp(w)}

    weighting = mtl_jax.adaptive(rule=rule)
    w = jnp.float32(1.5)
    state = weighting.init(losses_fn(w))
    value, gradient, _ = mtl_jax.value_and_grad(losses_fn, weighting)(w, state)
    expected = float(value.weights["a"]) * 3 + float(value.weights["b"]) * np.exp(1.5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)

    # The whole derivative of the weighted sum is another number.
    def total(w):
        losses = jnp.stack([w**2, jnp.exp(w)])
        share = losses / losses.sum() if rule == "proportional" else jax.nn.softmax(losses)
        return jnp.sum(2 * share * losses)

    assert abs(jax.grad(total)(w) - gradient) > 0.1


@given(
    losses=st.lists(LOSS, min_size=2, max_size=4),
    present=st.lists(st.booleans(), min_size=4, max_size=4),
)
@fast
def test_the_weights_of_present_tasks_sum_to_their_number(losses, present):
    present = present[: len(losses)]
    assume(any(present))
    weights = weights_of(losses, present)
    kept = [loss for loss, there in zip(losses, present, strict=True) if there]
    np.testing.assert_allclose(
        weights[np.array(present)], definition(kept, 1.0, "proportional"), rtol=1e-5, atol=1e-30
    )
    np.testing.assert_allclose(sum(weights), sum(present), rtol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"emphasis": -0.1}, "`emphasis` must be in .0, inf."),
        ({"emphasis": float("nan")}, "`emphasis`.*nan"),
        ({"emphasis": float("inf")}, "`emphasis`.*inf"),
        ({"rule": "linear"}, "'proportional' or 'softmax', got 'linear'"),
        ({"relative_to": "first"}, "None or 'initial', got 'first'"),
        ({"relative_to": {"a": 0.0}}, r"a reference loss must be in \(0, inf\), got 0.0"),
        ({"window": 0}, "`window` must be an integer of at least 1"),
        ({"window": 2}, "`window` is for relative_to='initial'"),
        ({"window": 2, "relative_to": (1.0, 2.0)}, "`window` is for relative_to='initial'"),
        ({"decay": 1.0}, r"`decay` must be in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, "`decay`"),
        ({"decay": float("nan")}, "`decay`"),
    ],
)
def test_parameter_errors(kwargs, says):
    with pytest.raises(ValueError, match=f"adaptive: .*{says}"):
        mtl_jax.adaptive(**kwargs)


@pytest.mark.parametrize(
    ("relative_to", "error", "says"),
    [
        ({"a": 1.0}, ValueError, "adaptive: `relative_to` must have the structure of the losses"),
        (lambda step: (1.0,), ValueError, "adaptive: what `relative_to` returned must have the"),
        (lambda step: (jnp.ones(2), 1.0), TypeError, "returned: '0' has shape .*one number"),
        (lambda step: (True, 1.0), TypeError, "returned: '0' has shape .*one number"),
    ],
)
def test_references_of_other_tasks(relative_to, error, says):
    with pytest.raises(error, match=says):
        mtl_jax.adaptive(relative_to=relative_to).init((1.0, 1.0))


def test_without_smoothing_earlier_losses_leave_no_trace():
    weighting = made(decay=0.0)
    state = weighting.init((0.0, 0.0))
    for losses in ((1e30, 1e3), (1e-30, 0.1), (0.1, 0.3)):
        weights, state = weighting.update(losses, state)
        expected = 2 * np.array(losses) / np.sum(losses)
        np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-30)
