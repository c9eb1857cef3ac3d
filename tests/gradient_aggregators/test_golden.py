"""Every aggregator against published implementations, in float64; data/gradient_sequences.json."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.gradient_aggregators.db_mtl import db_mtl
from mtl_jax.gradient_aggregators.excess_mtl import excess_mtl
from mtl_jax.gradient_aggregators.graddrop import drop_signs
from mtl_jax.gradient_aggregators.moco import moco
from mtl_jax.gradient_aggregators.trimmed_mean import trimmed_mean

pytestmark = pytest.mark.usefixtures("x64")
TOLERANCE = 1e-9
DATA = json.loads(
    (pathlib.Path(__file__).parents[1] / "data" / "gradient_sequences.json").read_text()
)
each_sequence = pytest.mark.parametrize("case", DATA["sequences"], ids=lambda case: case["id"])
each_matrix = pytest.mark.parametrize("case", DATA["matrices"], ids=lambda case: case["id"])


def assert_close(actual, expected, tolerance=TOLERANCE):
    """The error is measured against the largest entry: coordinates cancel between the tasks."""
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance * np.max(np.abs(expected))
    )


def run(aggregator, case):
    """The gradient and the state of every step."""
    rows, losses = jnp.array(case["J1"]), [tuple(jnp.array(row)) for row in case["losses"]]
    state = aggregator.init(rows[0, 0], losses[0])
    update = jax.jit(aggregator.update)
    for row, loss in zip(rows, losses, strict=True):
        gradient, state = update(row, state, losses=loss)
        yield gradient, state.inner


@each_sequence
@pytest.mark.parametrize(
    ("peer", "parameters"),
    [
        ("libmtl.MoCo", {}),
        (
            "libmtl.MoCo[rho=0.2]",
            {"beta": 0.7, "beta_sigma": 0, "gamma": 0.3, "gamma_sigma": 0, "rho": 0.2},
        ),
    ],
)
def test_moco(case, peer, parameters):
    steps = case["peers"][peer]["steps"]
    for step, (gradient, state) in zip(steps, run(moco(**parameters), case), strict=True):
        assert_close(gradient, step["g"])
        assert_close(jax.nn.softmax(state.logits), step["weights"])
        if "y" in step:
            assert_close(state.tracked, step["y"])


@each_sequence
@pytest.mark.parametrize(
    ("peer", "parameters"),
    [("libmtl.DB_MTL", {}), ("libmtl.DB_MTL[sigma=0.5]", {"beta_sigma": 0.5})],
)
def test_db_mtl(case, peer, parameters):
    steps = case["peers"][peer]["steps"]
    for step, (gradient, state) in zip(steps, run(db_mtl(**parameters), case), strict=True):
        assert_close(gradient, step["g"])
        assert_close(state.smoothed, step["grad_buffer"])


@each_sequence
@pytest.mark.parametrize(
    ("peer", "step_size"), [("libmtl.ExcessMTL", 0.01), ("libmtl.ExcessMTL[step=1]", 1.0)]
)
def test_excess_mtl(case, peer, step_size):
    steps = case["peers"][peer]["steps"]
    for step, (gradient, state) in zip(steps, run(excess_mtl(step_size), case), strict=True):
        assert_close(gradient, step["g"])
        # Relative to each weight: they range down to 1e-30.
        weights = case["K"] * jax.nn.softmax(state.log_weights)
        np.testing.assert_allclose(weights, step["weights"], rtol=TOLERANCE)


@each_sequence
def test_excess_mtl_from_the_other_start(case):
    """TorchJD's first step moves the weights by the risk; from there on, the two are the same.

    But for 1e-7 that TorchJD adds to the first risk, to which the weights are as sensitive as the
    exponents are large.
    """
    aggregator, K, rows = excess_mtl(step_size=1.0), case["K"], jnp.array(case["J1"])
    steps, update = case["peers"]["torchjd.ExcessMTL"]["steps"], jax.jit(aggregator.update)
    _, state = update(rows[0], aggregator.init(rows[0, 0], (jnp.zeros(()),) * K))
    log_weights = jax.nn.log_softmax(state.inner.initial_risk)
    np.testing.assert_allclose(jnp.exp(log_weights), steps[0]["weights"], rtol=TOLERANCE)
    state = state._replace(inner=state.inner._replace(log_weights=log_weights))
    for row, step in zip(rows[1:], steps[1:], strict=True):
        gradient, state = update(row, state)
        assert_close(gradient / K, step["g"], 2e-5)


@each_matrix
def test_graddrop(case):
    """The peers' draws, put in the place of ours."""
    rows = jnp.array(case["J"])
    peers = {name: peer for name, peer in case["peers"].items() if "GradDrop" in name}
    combine = jax.jit(drop_signs)
    assert len(peers) == 4
    for peer in peers.values():
        ((_, uniform),) = peer["rng_log"]
        leak = peer["params"]["leak"] or 0.0
        leak = jnp.broadcast_to(jnp.array(leak), rows.shape[0])
        assert_close(combine(rows, leak, jnp.array(uniform)), peer["g"])


@each_matrix
def test_trimmed_mean(case):
    rows = jnp.array(case["J"])
    for trim in (1, 2):
        if 2 * trim >= len(rows):
            continue
        aggregator = trimmed_mean(trim)
        state = aggregator.init(rows[0], (jnp.zeros(()),) * len(rows))
        gradient, _ = jax.jit(aggregator.update)(rows, state)
        assert_close(gradient, case["peers"][f"torchjd.TrimmedMean[{trim}]"]["g"])
