"""What published implementations got wrong, and errors of parameters.

Each of the first tests is of a flaw that was reproduced in a published implementation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import dynamic_task_prioritization as prioritization


def run(weighting, sequence, masks=None, **kwargs):
    """The weights of every step, and the last state."""
    state = weighting.init(tuple(sequence[0]), **kwargs)
    history = []
    for step, losses in enumerate(sequence):
        mask = (True,) * len(losses) if masks is None else masks[step]
        weights, state = weighting.update(tuple(np.asarray(losses, np.float32)), state, mask=mask)
        history.append(np.array(weights))
    return np.array(history), state


def test_geometric_does_not_overflow():
    """LibMTL: the product of 13 losses of 1e3 is infinite in float32."""
    weights, _ = run(mtl_jax.geometric(), [(1e3,) * 13])
    np.testing.assert_allclose(weights, 1 / 13, rtol=1e-5)


def test_geometric_reports_the_weights_it_applies():
    """LibMTL reports L / (K prod L) and applies M / (K L)."""

    def losses_fn(w):
        return (w, 2 * w**2, jnp.exp(w))

    weighting, w = mtl_jax.geometric(), jnp.float32(0.7)
    value, gradient, _ = mtl_jax.value_and_grad(losses_fn, weighting)(
        w, weighting.init(losses_fn(w))
    )
    derivatives = np.array([1, 4 * 0.7, np.exp(0.7)])
    np.testing.assert_allclose(gradient, np.dot(value.weights, derivatives), rtol=1e-6)
    losses = np.array([0.7, 2 * 0.49, np.exp(0.7)])
    mean = losses.prod() ** (1 / 3)
    np.testing.assert_allclose(value.weights, mean / (3 * losses), rtol=1e-5)


@functools.cache
def softadapt(variant):
    return mtl_jax.softadapt(1, beta=1.0, variant=variant)


@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
def test_softadapt_prefers_the_slower_task_in_every_variant(variant):
    """Published: slopes over their negative sum prefer the faster one, .69 to .31."""
    weights, _ = run(softadapt(variant), [(5.0, 5.0), (4.0, 4.9), (4.0, 4.9)])
    scores = {"normalized": (-1 / 1.1, -0.1 / 1.1)}.get(variant, (-1, -0.1))
    expected = np.exp(scores) * ((4.5, 4.95) if variant == "loss_weighted" else (1, 1))
    np.testing.assert_allclose(weights[2], expected / expected.sum(), rtol=1e-5)
    assert weights[2][1] > weights[2][0]


def test_softadapt_of_risen_losses_prefers_the_faster_one_too():
    for variant in ("original", "normalized", "loss_weighted"):
        weights, _ = run(softadapt(variant), [(5.0, 5.0), (6.0, 5.1), (6.0, 5.1)])
        assert weights[2][0] > weights[2][1]


def test_softadapt_averages_in_the_losses_precision(x64):
    """Published: the averages are float32 whatever the losses are."""
    weighting = mtl_jax.softadapt(2, beta=1.0, variant="loss_weighted")
    state = weighting.init((1.0, 1.0))
    for losses in [(1.0, 2.0), (1.0 + 1e-10, 2.0), (1.0, 2.0), (1.0, 2.0), (1.0, 1.0)]:
        weights, state = weighting.update(losses, state)
    rate, mean = -0.5e-10, 1.0 + 0.25e-10
    scores = np.array([mean * np.exp(rate), 2.0])
    np.testing.assert_allclose(weights, scores / scores.sum(), rtol=1e-14)


def test_relobralo_looks_back_to_the_first_step():
    """The published driver takes the losses of the second step for the first."""
    sequence = np.array([(1.0, 4.0), (3.0, 2.0), (2.0, 2.0)])
    weighting = mtl_jax.relobralo(alpha=0.5, rho=0.0)
    weights, state = run(weighting, sequence, key=jax.random.key(0))
    np.testing.assert_array_equal(state.inner.initial, sequence[0])

    def balanced(losses, reference):
        scores = np.exp(losses / reference)
        return 2 * scores / scores.sum()

    expected = 0.5 * balanced(sequence[2], sequence[0]) + 0.5 * balanced(sequence[2], sequence[1])
    np.testing.assert_allclose(weights[2], expected, rtol=1e-5)


def test_relobralo_of_a_task_that_joins_late():
    """Its ratio to the step before, which it has not had, is 1, whatever its scale."""
    weighting = mtl_jax.relobralo(alpha=0.5)
    for scale in (1.0, 100.0):
        masks = [(True, True, False)] * 2 + [(True,) * 3] * 2
        sequence = [(1.0, 2.0, scale), (0.5, 2.0, scale), (0.4, 1.0, scale), (0.4, 0.9, scale)]
        weights, _ = run(weighting, sequence, masks)
        if scale == 1:
            expected = weights
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_relobralo_does_not_overflow():
    """exp(1e6) is infinite; the published code divides by it."""
    weights, _ = run(mtl_jax.relobralo(), [(1e-3, 1.0), (1e3, 1.0)])
    np.testing.assert_allclose(weights[1], (2, 0), atol=1e-6)


def test_softadapt_does_not_overflow():
    weights, _ = run(mtl_jax.softadapt(1, beta=1e30), [(1.0, 1.0), (1e12, 1.0), (1e12, 1.0)])
    np.testing.assert_array_equal(weights[2], (1, 0))


def test_uncertainty_forms():
    """LibMTL, mtan and nash-mtl take half of what the authors' code takes; one names which."""
    weight = {
        form: run(mtl_jax.uncertainty(optax.sgd(0.0), 0.7, form), [(1.0, 2.0)])[0][0]
        for form in ("kendall", "half", "revised")
    }
    np.testing.assert_allclose(weight["kendall"], np.exp(-0.7), rtol=1e-6)
    np.testing.assert_allclose(weight["half"], np.exp(-0.7) / 2, rtol=1e-6)
    np.testing.assert_allclose(weight["revised"], np.exp(-0.7) / 2, rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_famo_weight_decay_is_added_to_the_gradient(weight_decay):
    """Not decoupled: Adam's first step has the size of the learning rate whatever the decay."""
    weighting = mtl_jax.famo(0.1, weight_decay)
    losses = (1.0, 1.0)
    state = weighting.init(losses)
    for _ in range(2):
        _, state = weighting.update(losses, state)
        state = weighting.observe((0.5, 1.0), state)
    # By hand, in float64.
    logits, first, second = np.zeros(2), np.zeros(2), np.zeros(2)
    for step in (1, 2):
        z = np.exp(logits) / np.exp(logits).sum()
        delta = np.array([np.log(2), 0.0])
        gradient = z * (delta - z @ delta) + weight_decay * logits
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        logits = logits - 0.1 * update
    np.testing.assert_allclose(state.inner.logits, logits, rtol=1e-5)
    assert logits[1] > logits[0]  # the task whose loss fell less gains


def test_dynamic_task_prioritization_sees_a_negative_loss_behind_the_average():
    """Its indicator, exp(0.3), is above 1; the average of it and exp(-1) is not."""
    weighting = mtl_jax.dynamic_task_prioritization(1.0, decay=0.5)
    weights, state = run(weighting, [(1.0, 1.0), (-0.3, 1.0)])
    assert np.all(np.isnan(weights[1]))
    np.testing.assert_array_equal(state.steps, 1)


def test_stch_warm_up_of_a_negative_loss():
    """1 / L would be a weight below 0, and the nadir would take the loss in."""
    weights, state = run(mtl_jax.stch(3), [(-1.0, 2.0)])
    assert np.all(np.isnan(weights))
    np.testing.assert_array_equal(state.inner.nadir, 0)


def test_cov_weighting_weights_are_never_negative():
    sequence = [(1.0, 1.0), (-3.0, 1.0), (-1.0, 1.0), (-1.0, 1.0)]
    weights, _ = run(mtl_jax.cov_weighting(), sequence)
    assert not np.any(weights < 0)


@functools.cache
def cov_weighting():
    return mtl_jax.cov_weighting(0.9)


@pytest.mark.parametrize("steps", [50, 900])
def test_cov_weighting_of_a_loss_that_stays_at_zero(steps):
    """The mean ratio decays to 0: dividing by it must not end the run."""
    sequence = [(1.0, 1.0)] * 2 + [(0.0, 1.0)] * steps + [(1.0, 1.0)]
    weights, _ = run(cov_weighting(), sequence)
    assert np.all(np.isfinite(weights))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(optax.cosine_decay_schedule(0.1, 10)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
        optax.adamw(0.1),
    ],
    ids=["schedule", "chain", "inject", "multi_steps", "adamw"],
)
@pytest.mark.parametrize("make", [mtl_jax.uncertainty, mtl_jax.imtl_l])
def test_a_learned_weighting_keeps_its_optimizer_for_each_task(make, optimizer):
    """A task that was absent has taken as many optimizer steps as it was present in."""
    weighting = make(optimizer)
    sequence = [(3.0, 0.2)] * 4
    masks = [(True, True), (False, True), (True, True), (False, True)]
    together, state = run(weighting, sequence, masks)
    # With the other never there, which is as one task.
    alone, _ = run(weighting, [(3.0, 0.2)] * 2, [(True, False)] * 2)
    np.testing.assert_allclose(together[[0, 2], 0], alone[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(state.steps, [2, 4])
    assert together[3][1] != together[0][1]


# Errors of parameters

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("window", [0, -1, 1.5, 2.0, True, None, "epoch"])
def test_a_window_is_a_number_of_steps(window):
    for make, name in (
        (mtl_jax.dwa, "dwa: `window`"),
        (mtl_jax.softadapt, "softadapt: `window`"),
        (mtl_jax.stch, "stch: `warmup`"),
    ):
        with pytest.raises(
            ValueError, match=f"{name} must be an integer of at least 1, got {window!r}"
        ):
            make(window)


def test_numpy_integers_are_numbers_of_steps():
    mtl_jax.dwa(np.int64(3))


@pytest.mark.parametrize("make", [mtl_jax.dwa, mtl_jax.softadapt, mtl_jax.stch])
def test_a_missing_window_is_python_s_own_error(make):
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        make()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: mtl_jax.dwa(1, temperature=0.0), r"dwa: `temperature` must be in \(0, inf\)"),
        (lambda: mtl_jax.dwa(1, temperature=-1.0), "dwa: `temperature`"),
        (lambda: mtl_jax.dwa(1, temperature=INF), "dwa: `temperature`.*inf"),
        (lambda: mtl_jax.group_dro(-1.0), r"group_dro: `step_size` must be in \[0, inf\)"),
        (lambda: mtl_jax.group_dro(smoothing=1.1), "group_dro: `smoothing`"),
        (lambda: mtl_jax.group_dro(reference={"a": NAN}), "group_dro: a reference loss.*nan"),
        (lambda: mtl_jax.go4align(0), "go4align: `groups` must be an integer of at least 1, got 0"),
        (lambda: mtl_jax.go4align(2.0), "go4align: `groups`.*2.0"),
        (lambda: mtl_jax.go4align(step_size=-1.0), r"go4align: `step_size` must be in \[0, inf\)"),
        (lambda: mtl_jax.uw_so(0.0), r"uw_so: `temperature` must be in \(0, inf\)"),
        (lambda: mtl_jax.softadapt(1, beta=NAN), "softadapt: `beta`"),
        (lambda: mtl_jax.softadapt(1, beta=INF), "softadapt: `beta`"),
        (lambda: mtl_jax.softadapt(1, order=0), "softadapt: `order`"),
        (lambda: mtl_jax.softadapt(1, variant="best"), "softadapt: `variant`.*'best'"),
        (lambda: mtl_jax.relobralo(rho=1.1), r"relobralo: `rho` must be in \[0, 1\], got 1.1"),
        (lambda: mtl_jax.relobralo(rho=NAN), "relobralo: `rho`"),
        (lambda: mtl_jax.relobralo(alpha=-0.1), "relobralo: `alpha`"),
        (lambda: mtl_jax.relobralo(temperature=0.0), "relobralo: `temperature`"),
        (lambda: mtl_jax.cov_weighting(1.0), r"cov_weighting: `decay` must be in \[0, 1\)"),
        (lambda: prioritization(-1.0), "dynamic_task_prioritization: `gamma`.*-1.0"),
        (lambda: prioritization(NAN), "dynamic_task_prioritization: `gamma`.*nan"),
        (lambda: prioritization({"a": INF}), "dynamic_task_prioritization: `gamma`"),
        (lambda: prioritization(1.0, decay=1.0), "dynamic_task_prioritization: `decay`"),
        (lambda: mtl_jax.achievement(0.0), "achievement: a single-task metric must be in"),
        (lambda: mtl_jax.achievement(gamma=-1.0), "achievement: `gamma`"),
        (lambda: mtl_jax.achievement(margin=-0.1), "achievement: `margin`"),
        (lambda: mtl_jax.achievement(decay=1.0), "achievement: `decay`"),
        (lambda: mtl_jax.achievement(form="sum"), "achievement: `form`.*'sum'"),
        (lambda: mtl_jax.causal(None, tolerance=0.0), r"causal: `tolerance` must be in \(0, inf\)"),
        (lambda: mtl_jax.famo(learning_rate=0.0), r"famo: `learning_rate` must be in \(0, inf\)"),
        (lambda: mtl_jax.famo(weight_decay=-1.0), "famo: `weight_decay`"),
        (lambda: mtl_jax.famo(min_losses=NAN), "famo: `min_losses`"),
        (lambda: mtl_jax.stch(1, mu=0.0), r"stch: `mu` must be in \(0, inf\)"),
        (lambda: mtl_jax.stch(2, window=3), r"`window` \(3\) is longer than `warmup` \(2\)"),
        (lambda: mtl_jax.stch(2, window=0), "stch: `window`"),
        (lambda: mtl_jax.random_weighting("uniform"), "`distribution`.*'uniform'"),
        (lambda: mtl_jax.uncertainty(optax.sgd(1.0), form="both"), "uncertainty: `form`.*'both'"),
        (lambda: mtl_jax.uncertainty(optax.sgd(1.0), NAN), "`initial_log_variance`.*nan"),
        (lambda: mtl_jax.uncertainty(optax.sgd(1.0), -1e3), "`initial_log_variance`.*-1000"),
        (lambda: mtl_jax.constant({"a": -1.0}), "constant: the weight 'a' must be in .*, got -1.0"),
        (lambda: mtl_jax.constant({"a": NAN}), "constant: the weight 'a' must be in .*, got nan"),
        (lambda: mtl_jax.constant({"h": [1.0, INF]}), "constant: the weight 'h/1'.*got inf"),
        (lambda: mtl_jax.constant({}), "constant: expected a pytree"),
        (lambda: mtl_jax.constant(1.0), "constant: expected a pytree"),
        (lambda: mtl_jax.constant(np.array([1.0, -1.0])), "constant: a weight must .*, got -1.0"),
    ],
)  # fmt: skip
def test_parameters_out_of_range(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("weight", ["x", np.ones((2, 1))], ids=["text", "array"])
def test_a_constant_weight_that_is_no_number(weight):
    with pytest.raises(TypeError, match="constant: the weight 'a' must be a number"):
        mtl_jax.constant({"a": weight})


@pytest.mark.parametrize(
    "weights", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "x": 1.0}]
)
def test_constant_weights_for_other_tasks(weights):
    with pytest.raises(ValueError, match=r"constant: the weights.*\{'a': \*, 'b': \*\}; got"):
        mtl_jax.constant(weights).init({"a": 1.0, "b": 1.0})


@pytest.mark.parametrize("make", [mtl_jax.random_weighting, lambda: mtl_jax.relobralo(rho=0.9)])
def test_a_missing_key(make):
    with pytest.raises(ValueError, match=r"draws random numbers.*key=jax.random.key\(seed\)"):
        make().init((1.0, 1.0))


def test_a_seed_is_no_key():
    with pytest.raises(TypeError, match=r"jax.random.key"):
        mtl_jax.random_weighting().init((1.0, 1.0), key=0)


@pytest.mark.parametrize("optimizer", [0.1, optax.adam, None], ids=["rate", "adam", "none"])
@pytest.mark.parametrize("make", [mtl_jax.uncertainty, mtl_jax.imtl_l])
def test_something_that_is_no_optimizer(make, optimizer):
    with pytest.raises(TypeError, match="`optimizer`.*optax"):
        make(optimizer)
