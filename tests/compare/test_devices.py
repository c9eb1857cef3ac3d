"""A comparison on several devices finds what one device finds."""

import functools

import jax
import numpy as np
import pytest
from toy_problem import IN_PARTS, make_problem, make_two_sources

from mtl_jax.compare import Checkpoints, compare, named_weightings
from mtl_jax.compare.devices import all_devices
from mtl_jax.compare.fingerprint import OtherConfigurationError

NAMES = ["adaptive", "upgrad", "db_mtl"]
PROBLEMS = {
    "in parts": make_problem(**IN_PARTS, epochs=2),
    "two sources": make_two_sources(batch_size=8),
}


def found(runs):
    return [(run.train_losses, run.validation, run.test, run.weights) for run in runs]


def of_all(comparison):
    return found([run for runs in comparison.runs.values() for run in runs])


@functools.cache
def compared(kind, mesh):
    return compare(PROBLEMS[kind], named_weightings(NAMES), seeds=[0], alone=False, mesh=mesh)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_eight_devices_find_what_one_finds(kind):
    one, eight = compared(kind, None), compared(kind, all_devices())
    assert jax.device_count() == 8
    pairs = zip(jax.tree.leaves(of_all(eight)), jax.tree.leaves(of_all(one)), strict=True)
    for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_checkpoints_on_several_devices(tmp_path):
    """Resumed it is as it was; one device cannot go on, for it would round differently."""
    problem, mesh = PROBLEMS["in parts"], all_devices()
    stop = []

    def on_epoch(run):
        stop.append(run)
        if len(stop) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder = Checkpoints(tmp_path, seconds=0)
        compare(
            problem, {}, seeds=[0], alone=False, mesh=mesh, checkpoints=folder, on_epoch=on_epoch
        )
    again = Checkpoints(tmp_path, seconds=0, resume=True)
    with pytest.raises(OtherConfigurationError, match="devices is 1 and was 8"):
        compare(problem, {}, seeds=[0], alone=False, checkpoints=again)
    resumed = compare(problem, {}, seeds=[0], alone=False, mesh=mesh, checkpoints=again)
    ours, undisturbed = resumed.runs["equal"], compared("in parts", mesh).runs["equal"]
    pairs = zip(jax.tree.leaves(found(ours)), jax.tree.leaves(found(undisturbed)), strict=True)
    for same, expected in pairs:
        np.testing.assert_array_equal(same, expected)


def test_a_batch_that_cannot_be_spread_is_an_error():
    with pytest.raises(ValueError, match=r"batch size of 'toy', 20, must be .*devices, 8"):
        compare(make_problem(batch_size=20), {}, mesh=all_devices())
