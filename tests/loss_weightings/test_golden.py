"""Every method against published implementations, in float64; data/loss_weightings.json."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax

pytestmark = pytest.mark.usefixtures("x64")
TOLERANCE = 1e-9
CASES = json.loads(
    (pathlib.Path(__file__).parents[1] / "data" / "loss_weightings.json").read_text()
)["cases"]


@pytest.fixture(params=CASES, ids=lambda case: case["id"])
def case(request):
    return request.param


def batches(case):
    return np.reshape(case["losses_batches"], (-1, case["K"]))


MOST = 4  # tasks of every program: the others are absent, so that all cases share them


@functools.cache
def made(make, *arguments):
    """The weighting, made once, so that its program is compiled once for all cases."""
    return make(*arguments)


def padded(row, fill=1.0):
    return (*map(np.float64, row), *[np.float64(fill)] * (MOST - len(row)))


def start(weighting, row, **kwargs):
    """The state before the first step, and the update at a row of losses."""
    mask = tuple(np.arange(MOST) < len(row))

    def update(losses, state, function=weighting.update):
        return function(padded(losses), state, mask=mask)

    return weighting.init(padded(row), **kwargs), update


def weights_of(weighting, rows, **kwargs):
    """The weights at every row of losses, and the states after them."""
    state, update = start(weighting, rows[0], **kwargs)
    weights, states = [], []
    for row in rows:
        new, state = update(row, state)
        weights.append(new[: len(row)])
        states.append(state)
    return np.array(weights), states


SGD, SLOW_SGD = optax.sgd(1.0), optax.sgd(0.05)


def assert_close(actual, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=0)


def test_equal(case):
    expected = [step["weights"] for step in case["methods"]["EW/libmtl"]["steps"]]
    assert_close(weights_of(made(mtl_jax.equal), case["losses_epoch_mean"])[0], expected)


@pytest.mark.parametrize("temperature", [2.0, 0.5])
@pytest.mark.parametrize("per_batch", [True, False])
def test_dwa(case, temperature, per_batch):
    expected = np.array(case["methods"][f"DWA/libmtl[T={temperature}]"]["weights"])
    if per_batch:  # the window averages the batches, as the epoch does
        window, rows = case["batches"], batches(case)
        expected = np.repeat(expected, window, axis=0)
    else:
        window, rows = 1, case["losses_epoch_mean"]
    assert_close(weights_of(made(mtl_jax.dwa, window, temperature), rows)[0], expected)


@pytest.mark.parametrize(
    ("form", "peer", "factor"), [("half", "libmtl", 1), ("kendall", "yaringal", 2)]
)
def test_uncertainty_points(case, form, peer, factor):
    for point in case["methods"]["UW/points"]["points"]:
        K, s = case["K"], np.array(point["s"])
        weighting = made(mtl_jax.uncertainty, SGD, 0.0, form)
        state, update = start(weighting, point["losses"])
        state = state._replace(inner=state.inner._replace(parameter=jnp.array(padded(s))))
        weights, new = update(point["losses"], state)
        weights = weights[:K]
        assert_close(weights, factor * np.array(point["libmtl"]["grad_losses"]))
        step = s - new.inner.parameter[:K]
        np.testing.assert_allclose(
            step, factor * np.array(point["libmtl"]["grad_s"]), rtol=TOLERANCE, atol=1e-14
        )
        if peer == "yaringal":
            total = np.sum(weights * np.array(point["losses"])) + np.sum(s)
            assert_close(total, point["yaringal"]["total"])


@pytest.mark.parametrize("form", ["kendall", "half", "revised"])
def test_uncertainty_steps_follow_the_derivative_of_the_total(form):
    def total(s, losses):
        likelihood = jnp.exp(-s) * losses
        if form == "kendall":
            return jnp.sum(likelihood + s)
        if form == "half":
            return jnp.sum(likelihood / 2 + s / 2)
        return jnp.sum(likelihood / 2 + jnp.log(1 + jnp.exp(s)))

    losses = jnp.array([0.3, 5.0])
    weighting = mtl_jax.uncertainty(optax.sgd(0.1), initial_log_variance=0.7, form=form)
    weights, state = weighting.update(tuple(losses), weighting.init(tuple(losses)))
    s = jnp.full((2,), 0.7)
    by_s, by_losses = jax.grad(total, argnums=(0, 1))(s, losses)
    assert_close(weights, by_losses)
    assert_close(state.inner.parameter, s - 0.1 * by_s)


@pytest.mark.parametrize(
    ("name", "optimizer"), [("sgd_lr0.1", optax.sgd(0.1)), ("adam_lr0.025", optax.adam(0.025))]
)
def test_uncertainty_trajectory(case, name, optimizer):
    steps = case["methods"][f"UW/libmtl_trajectory[{name}]"]["steps"]
    weighting = made(mtl_jax.uncertainty, optimizer, -0.5, "half")
    weights, states = weights_of(weighting, case["losses_epoch_mean"])
    assert_close(weights, [step["weights_before"] for step in steps])
    for state, step in zip(states, steps, strict=True):
        np.testing.assert_allclose(
            state.inner.parameter[: case["K"]], step["s_after"], rtol=TOLERANCE, atol=1e-11
        )


def test_imtl_l(case):
    K = case["K"]
    for point in case["methods"]["IMTL_L/points"]["points"]:
        s = np.array(point["s"])
        state, update = start(made(mtl_jax.imtl_l, SGD), point["losses"])
        state = state._replace(inner=state.inner._replace(parameter=jnp.array(padded(s))))
        weights, new = update(point["losses"], state)
        assert_close(weights[:K], point["grad_losses"])
        step = s - new.inner.parameter[:K]
        np.testing.assert_allclose(step, point["grad_s"], rtol=1e-9, atol=1e-14)

    steps = case["methods"]["IMTL_L/torchjd_trajectory[sgd_lr0.05]"]["steps"]
    _, states = weights_of(made(mtl_jax.imtl_l, SLOW_SGD), case["losses_epoch_mean"])
    for state, step in zip(states, steps, strict=True):
        parameter = state.inner.parameter[:K]
        np.testing.assert_allclose(parameter, step["s_after"], rtol=1e-9, atol=1e-14)


def test_geometric(case):
    for step in case["methods"]["GLS"]["steps"]:
        losses = step["losses"]
        (weights,), _ = weights_of(made(mtl_jax.geometric), [losses])
        assert_close(weights, step["torchjd_grad_losses"])
        # The weighted sum of the losses is their geometric mean.
        assert_close(np.dot(weights, losses), step["torchjd_total"])


def test_random_weighting(case, monkeypatch):
    weighting = mtl_jax.random_weighting()
    for draw in case["methods"]["RLW/libmtl"]["draws"]:
        monkeypatch.setattr(
            jax.random, "normal", lambda *_, draw=draw, **__: jnp.array(draw["randn"])
        )
        state = weighting.init(tuple(draw["losses"]), key=jax.random.key(0))
        with jax.disable_jit():  # a program would hold the first draw
            weights, _ = weighting.update(tuple(draw["losses"]), state)
        assert_close(weights, draw["weights"])
        assert_close(np.dot(weights, draw["losses"]), draw["total"])


@pytest.mark.parametrize(
    "record",
    [
        "FAMO/libmtl[lr=0.025,wd=0.001]",
        "FAMO/official_famo.py[lr=0.025,wd=0.01]",
        "FAMO/torchjd[lr=0.1,wd=1e-05]",
        "FAMO/official_famo.py[min_losses]",
    ],
)
def test_famo(case, record):
    method = case["methods"][record]
    params = method["params"]
    min_losses = padded(params["min_losses"], 0.0)
    weighting = made(mtl_jax.famo, params["w_lr"], params["gamma"], min_losses)
    rows = batches(case)
    after = np.reshape(case["next_losses_batches"], rows.shape)
    state, update = start(weighting, rows[0])
    assert weighting.observe is not None
    for losses, losses_after, step in zip(rows, after, method["steps"], strict=True):
        weights, state = update(losses, state)
        assert_close(weights[: case["K"]], step["grad_losses"])
        state = update(losses_after, state, weighting.observe)
        logits = state.inner.logits[: case["K"]]
        np.testing.assert_allclose(logits, step["w_after"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mu", [1.0, 0.1])
def test_stch(case, mu):
    method = case["methods"][f"STCH/libmtl[mu={mu},warmup=4]"]
    # LibMTL warms up in the epochs 0 to 4 and takes the mean of epoch 4 as the nadir.
    window = case["batches"]
    weights, states = weights_of(made(mtl_jax.stch, 5 * window, mu, window), batches(case))
    assert_close(weights, [step["grad_losses"] for step in method["steps"]])
    assert_close(states[-1].inner.nadir[: case["K"]], method["nadir_vector"])


@pytest.mark.parametrize(("name", "decay"), [("full", None), ("decay", 0.9)])
def test_cov_weighting(case, name, decay):
    steps = case["methods"][f"CoV/official[{name}]"]["steps"]
    weights, _ = weights_of(made(mtl_jax.cov_weighting, decay), batches(case))
    assert_close(weights, [step["weights"] for step in steps])


@pytest.mark.parametrize(("beta", "order"), [(0.1, 1), (1.0, 3), (1.0, 4), (1.0, 5)])
@pytest.mark.parametrize("variant", ["original", "loss_weighted"])
def test_softadapt(case, variant, beta, order):
    steps = case["methods"][f"SoftAdapt/{variant}[beta={beta},order={order}]"]["steps"]
    window = case["batches"]
    weighting = made(mtl_jax.softadapt, window, beta, order, variant)
    weights, _ = weights_of(weighting, batches(case))
    # The published weights after epoch e are those used in our window e + 1.
    used = [weights[window * (step["epoch"] + 1)] for step in steps[:-1]]
    # The published code adds 1e-8 to the sum that it divides by, and averages in float32.
    expected = np.array([step["weights"] for step in steps[:-1]])
    expected /= expected.sum(axis=1, keepdims=True)
    assert_close(used, expected, 1e-6 if variant == "loss_weighted" else TOLERANCE)
    assert_close(weights[: window * (order + 1)], 1 / case["K"])


def test_softadapt_variants_against_the_definition(case):
    means = np.array(case["losses_epoch_mean"])
    rates, average = means[1] - means[0], means[:2].mean(axis=0)
    normalized = np.exp(0.5 * rates / np.abs(rates).sum())
    loss_weighted = average * np.exp(0.5 * rates)
    for variant, scores in (("normalized", normalized), ("loss_weighted", loss_weighted)):
        weighting = made(mtl_jax.softadapt, 1, 0.5, 1, variant)
        assert_close(weights_of(weighting, means[:3])[0][2], scores / scores.sum())


@functools.cache
def dynamic_task_prioritization(gamma, decay):
    return mtl_jax.dynamic_task_prioritization(gamma, decay=decay)


def test_dynamic_task_prioritization(case):
    for point in CASES[0]["methods"]["DTP/formula"]["points"]:
        weighting = made(mtl_jax.dynamic_task_prioritization, point["gamma"])
        (weights,), _ = weights_of(weighting, [[-np.log(point["kpi"])]])
        np.testing.assert_allclose(weights[0], point["weight"], rtol=1e-9, atol=1e-14)

    method = case["methods"]["DTP/formula"]
    params = method["params"]
    weighting = dynamic_task_prioritization(params["gamma_trajectory"], 1 - params["ema_alpha"])
    trajectory = method["trajectory"]
    weights, states = weights_of(weighting, -np.log([step["kpi"] for step in trajectory]))
    assert_close(weights, [step["weights"] for step in trajectory])
    assert_close(states[-1].inner.performance[: case["K"]], trajectory[-1]["kpi_ema"])


@pytest.mark.parametrize(
    "name", ["alpha=0.999,T=1.0,rho=1.0", "alpha=0.9,T=1.0,rho=0.7", "alpha=0.95,T=0.1,rho=0.9"]
)
def test_relobralo(case, name, monkeypatch):
    method = case["methods"][f"ReLoBRaLo/official[{name}]"]
    params, K = method["params"], case["K"]

    def step_of_definition(losses, weights, previous, step, number, epsilon):
        def balanced(reference):
            ratios = losses / (params["T"] * reference + epsilon)
            scores = np.exp(ratios - np.max(ratios))
            return K * scores / np.sum(scores)

        alpha = {0: 1, 1: 0}.get(number, params["alpha"])
        back = balanced(np.array(step["l0"]))
        history = step["rho"] * weights + (1 - step["rho"]) * back
        return alpha * history + (1 - alpha) * balanced(previous)

    # The draws are the recorded ones: each is in the key that the state holds.
    monkeypatch.setattr(jax.random, "split", lambda key: (key, key))
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, _: jax.random.key_data(key)[-1] == 1)
    weighting = mtl_jax.relobralo(params["alpha"], params["T"], params["E_rho"])
    rows = batches(case)
    state, update = start(weighting, rows[0], key=jax.random.key(0))
    published = exact = previous = np.ones(K)
    for number, (losses, step) in enumerate(zip(rows, method["steps"], strict=True)):
        # The published code adds 1e-12 to T times the loss, which ours does not.
        published = step_of_definition(losses, published, previous, step, number, 1e-12)
        assert_close(published, step["weights"])
        exact = step_of_definition(losses, exact, previous, step, number, 0)
        # The published driver looks back to the losses of its second step; ours to the first.
        inner = state.inner._replace(initial=jnp.array(padded(step["l0"])))
        if inner.key is not None:
            inner = inner._replace(key=jax.random.key(int(step["rho"])))
        weights, state = update(losses, state._replace(inner=inner))
        assert_close(weights[:K], exact)
        previous = losses
