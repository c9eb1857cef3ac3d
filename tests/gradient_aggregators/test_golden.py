"""Every aggregator against published implementations, in float64; data/gradient_sequences.json."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from mtl_jax.gradient_aggregators.db_mtl import db_mtl
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


MOST, SIZE = 5, 10  # tasks and parameters of every program: further ones are absent, or 0


@functools.cache
def made(make, **parameters):
    """The aggregator, made once, so that its program is compiled once for all cases."""
    return make(**parameters)


def padded(rows):
    rows = np.array(rows)
    return np.pad(rows, [(0, MOST - len(rows)), (0, SIZE - rows.shape[1])])


def update(aggregator, rows, state, losses=None):
    mask = tuple(np.arange(MOST) < len(rows))
    losses = None if losses is None else (*map(np.float64, losses), *[1.0] * (MOST - len(rows)))
    gradient, state = aggregator.update(padded(rows), state, losses=losses, mask=mask)
    return gradient[: np.shape(rows)[1]], state


def start(aggregator):
    return aggregator.init(np.zeros(SIZE), (0.0,) * MOST)


def run(aggregator, case):
    """The gradient and the state of every step."""
    state, K = start(aggregator), case["K"]
    for rows, losses in zip(case["J1"], case["losses"], strict=True):
        gradient, state = update(aggregator, rows, state, losses)
        yield gradient, jax.tree.map(lambda leaf: leaf[:K], state.inner)


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
    for step, (gradient, state) in zip(steps, run(made(moco, **parameters), case), strict=True):
        assert_close(gradient, step["g"])
        assert_close(jax.nn.softmax(state.logits), step["weights"])
        if "y" in step:
            assert_close(state.tracked[:, : case["P"]], step["y"])


@each_sequence
@pytest.mark.parametrize(
    ("peer", "parameters"),
    [("libmtl.DB_MTL", {}), ("libmtl.DB_MTL[sigma=0.5]", {"beta_sigma": 0.5})],
)
def test_db_mtl(case, peer, parameters):
    steps = case["peers"][peer]["steps"]
    for step, (gradient, state) in zip(steps, run(made(db_mtl, **parameters), case), strict=True):
        assert_close(gradient, step["g"])
        assert_close(state.smoothed[:, : case["P"]], step["grad_buffer"])


combine = jax.jit(drop_signs)


@each_matrix
def test_graddrop(case):
    """The peers' draws, put in the place of ours."""
    K, P = np.shape(case["J"])
    peers = {name: peer for name, peer in case["peers"].items() if "GradDrop" in name}
    assert len(peers) == 4
    for peer in peers.values():
        ((_, uniform),) = peer["rng_log"]
        leak = peer["params"]["leak"] or 0.0
        leak = np.pad(np.broadcast_to(leak, K), (0, MOST - K))
        uniform = np.pad(uniform, (0, SIZE - P))
        assert_close(combine(padded(case["J"]), leak, uniform)[:P], peer["g"])


@each_matrix
def test_trimmed_mean(case):
    for trim in (1, 2):
        if 2 * trim >= len(case["J"]):
            continue
        aggregator = made(trimmed_mean, trim=trim)
        gradient, _ = update(aggregator, case["J"], start(aggregator))
        assert_close(gradient, case["peers"][f"torchjd.TrimmedMean[{trim}]"]["g"])
