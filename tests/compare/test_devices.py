"""A comparison on several devices finds what one device finds."""

import functools

import jax
import numpy as np
import pytest
from toy_problem import IN_PARTS, make_problem, make_two_datasets, split

from mtl_jax.compare import compare, training
from mtl_jax.compare.comparison import _Progress
from mtl_jax.compare.devices import all_devices

NAMES = ["adaptive", "upgrad", "db_mtl"]


def one_by_one():
    train = split(200, 0)
    return [{field: values[i] for field, values in train.items()} for i in range(200)]


PROBLEMS = {
    "in parts": make_problem(**IN_PARTS, epochs=2),
    "two datasets": make_two_datasets(batch_size=8),
    "read one by one": make_problem(train=one_by_one(), epochs=2),
}


def found(runs):
    return [(run.train_losses, run.metrics, run.weights, run.conflict) for run in runs]


@functools.cache
def compared(kind, mesh):
    names = NAMES if kind == "in parts" else NAMES[1:2]
    return compare(PROBLEMS[kind], names, seeds=[0], alone=kind == "in parts", mesh=mesh)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_eight_devices_find_what_one_finds(kind):
    one, eight = compared(kind, None), compared(kind, all_devices())
    assert jax.device_count() == 8
    assert all(run.provenance["devices of a batch"] == 8 for run in eight.runs)
    pairs = zip(jax.tree.leaves(found(eight.runs)), jax.tree.leaves(found(one.runs)), strict=True)
    for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_checkpoints_on_several_devices(tmp_path, monkeypatch):
    """Resumed on them it is as it was, bit for bit; one device goes on, too, and rounds its way."""
    problem, mesh = PROBLEMS["in parts"], all_devices()
    monkeypatch.setattr(training, "STEPS", 4)
    options = {"seeds": [0], "alone": False, "checkpoint_seconds": 0}
    look = _Progress.steps

    def stop(self, run, step, losses):
        look(self, run, step, losses)
        if step == 8:  # in the second epoch
            raise KeyboardInterrupt

    expected = compared("in parts", mesh).of("toy")["equal"]
    for resumed_on in (mesh, None):
        folder = tmp_path / str(resumed_on is None)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(_Progress, "steps", stop)
            compare(problem, {}, folder, mesh=mesh, **options)
        results = compare(problem, {}, folder, mesh=resumed_on, resume=True, **options)
        (run,) = results.runs
        pairs = zip(jax.tree.leaves(found([run])), jax.tree.leaves(found(expected)), strict=True)
        for ours, theirs in pairs:
            if resumed_on is None:
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
            else:
                np.testing.assert_array_equal(ours, theirs)
        begun = run.provenance.get("begun with", {}).get("devices of a batch")
        assert begun == (8 if resumed_on is None else None)


def test_a_batch_that_cannot_be_spread_is_an_error():
    with pytest.raises(ValueError, match=r"batch size of 'toy', 20, must be .*devices, 8"):
        compare(make_problem(batch_size=20), {}, mesh=all_devices())
