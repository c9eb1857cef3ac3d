"""What a checkpoint holds comes back as it was, and what is damaged is never used."""

import gc
import resource
import shutil
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_problem import IN_PARTS, THREE_TARGETS, make_problem

from mtl_jax._train import TrainState
from mtl_jax.compare import WEIGHTINGS, Checkpoints, OtherConfigurationError, Run, digest
from mtl_jax.compare.referee import make_weightings
from mtl_jax.compare.training import Evaluator, Trainer

# What Orbax leaves behind when it fails warns when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect():
    yield
    gc.collect()


FINGERPRINT = {"learning_rate": 0.1, "data": "a digest"}


class Statistics(NamedTuple):
    mean: jax.Array
    count: jax.Array


def make_state(epoch):
    """A state of all kinds of leaves, other ones for each epoch."""
    values = np.random.default_rng(epoch).normal(size=(50, 40))
    params = {
        "kernel": jnp.asarray(values, jnp.float32),
        "b.as": jnp.asarray(values[0], jnp.bfloat16),
    }
    return TrainState(
        params=params,
        opt_state=optax.adam(0.1).init(params),
        weighting_state=Statistics(jnp.float32(epoch), jnp.int32(epoch)),
        step=jnp.int32(10 * epoch),
        skipped=jnp.int32(0),
        model_state={"empty": {}, "flags": jnp.array([True, False])},
        rng=jax.random.key(epoch),
    )


def make_run(epochs, **changes):
    steps = np.random.default_rng(epochs).normal(size=(2, 4 * epochs)).astype(np.float32)
    found = {
        "train_losses": {"b": [0.1] * epochs, "a": [float("nan")] * epochs},
        "test": {"b": [1 / 3] * epochs, "a": [1e-300] * epochs},
        "weights": {"b": steps[0], "a": steps[1]},
        "epoch_seconds": [0.25] * epochs,
        "measured_at": "parameters",
    }
    return Run("the name / of it", 3, **(found | changes))


def of_run(folder, **options):
    return Checkpoints(folder, **({"seconds": 0} | options)).of_run("toy", "the name / of it", 3)


def save(folder, *epochs, finished=False, **options):
    for epoch in epochs:
        with of_run(folder, **options) as checkpoints:
            checkpoints.restore(FINGERPRINT, make_state(0))
            checkpoints.save(make_run(epoch), make_state(epoch), finished)


def restore(folder, fingerprint=FINGERPRINT):
    with of_run(folder) as checkpoints:
        return checkpoints.restore(fingerprint, make_state(0))


def assert_same(run, other):
    assert str(vars(run)) == str(vars(other))  # the order of the names, and NaN
    for name, values in run.weights.items():
        assert values.dtype == other.weights[name].dtype
        np.testing.assert_array_equal(values, other.weights[name])


def test_all_comes_back_bit_for_bit(tmp_path):
    assert restore(tmp_path) is None
    save(tmp_path, 1, 2)
    run, state = restore(tmp_path)
    assert_same(run, make_run(2))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(2))
    assert digest(state) == digest(make_state(2)) != digest(make_state(1))
    np.testing.assert_array_equal(state.params["kernel"], make_state(2).params["kernel"])


def other(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(leaf)[1]
    return ~leaf if leaf.dtype == bool else leaf + 1


def test_a_run_goes_on_while_it_is_saved(tmp_path, monkeypatch):
    run = make_run(1)
    with of_run(tmp_path) as checkpoints:
        write, later = checkpoints._manager.save, []
        monkeypatch.setattr(
            checkpoints._manager,
            "save",
            lambda *args, **options: later.append(lambda: write(*args, **options)),
        )
        checkpoints.save(run, make_state(1), finished=False)
        run.epoch_seconds.append(0.5)
        run.test["a"].append(0.5)
        later[0]()
    assert_same(restore(tmp_path, {})[0], make_run(1))


def test_state_of_every_known_weighting_comes_back(tmp_path):
    problem = make_problem(THREE_TARGETS, **IN_PARTS)
    params, model_state = problem.init(jax.random.key(0))
    states = {}
    for name, weighting in make_weightings(problem, WEIGHTINGS).items():
        step = Trainer(problem, Evaluator(problem), weighting, name).train_step
        arguments = {"model_state": model_state, "rng": jax.random.key(0)}
        states[name] = step.init(
            params, problem.train, **arguments, weighting_key=jax.random.key(1)
        )
    changed = jax.tree.map(other, states)
    with of_run(tmp_path) as checkpoints:
        checkpoints.save(make_run(1), changed, finished=False)
    with of_run(tmp_path) as checkpoints:
        _, restored = checkpoints.restore({}, states)
    assert digest(restored) == digest(changed) != digest(states)


def test_the_last_few_are_kept_and_of_a_finished_run_what_it_found(tmp_path):
    def epochs():
        return {int(path.name) for path in (tmp_path / "toy").glob("*/*") if path.name.isdigit()}

    save(tmp_path, *range(1, 7), keep=2)
    assert epochs() == {5, 6}
    save(tmp_path, 7, finished=True, keep=2, seconds=1000)
    assert epochs() == {7}
    (folder,) = (tmp_path / "toy").iterdir()
    shutil.copytree(folder / "7", folder / "6")  # killed before it could remove that
    shutil.copytree(folder / "7", folder / "8.orbax-checkpoint-tmp")  # while it wrote this
    run, state = restore(tmp_path)
    assert_same(run, make_run(7))
    assert digest(state) == digest(make_state(0))  # as given
    assert [path.name for path in folder.iterdir()] == ["7"]
    assert not list(tmp_path.rglob("7/state"))


def test_not_more_often_than_asked_for(tmp_path):
    for epoch in (1, 2, 3):
        with of_run(tmp_path, seconds=1000) as checkpoints:
            checkpoints.save(make_run(epoch), make_state(epoch), finished=False)
    assert restore(tmp_path, {})[0].epochs == 1
    for options, message in (
        ({"seconds": -1}, "`seconds` .* at least 0, got -1"),
        ({"keep": 0}, "`keep` .* at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Checkpoints(tmp_path, **options)


def cut(content):
    return content[: len(content) // 2]


def flipped(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [cut, flipped])
def test_a_damaged_checkpoint_is_left_out_with_a_warning(damage, tmp_path):
    """Whatever file is damaged: what is restored is the last state or the one before, exactly."""
    save(tmp_path / "good", 1, 2)
    (newest,) = (tmp_path / "good" / "toy").glob("*/2")
    good = {epoch: (make_run(epoch), digest(make_state(epoch))) for epoch in (1, 2)}
    found = {}
    for number, file in enumerate(path for path in newest.rglob("*") if path.is_file()):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        damaged = folder / file.relative_to(tmp_path / "good")
        damaged.write_bytes(damage(damaged.read_bytes()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run, state = restore(folder)
        messages = [str(warning.message) for warning in caught]
        found[file.relative_to(newest).as_posix()] = " ".join(m for m in messages if "epoch 2" in m)
        expected_run, expected_digest = good[1 if any("epoch 2" in m for m in messages) else 2]
        assert_same(run, expected_run)
        assert digest(state) == expected_digest, file
    warned = {file for file, message in found.items() if "is damaged and left out" in message}
    assert {"record/metadata", "state/_METADATA", "state/manifest.ocdbt"} <= warned
    # Which of the files that OCDBT writes still count cannot be seen from outside.
    assert any(file.startswith("state/ocdbt.process_0/d/") for file in warned)
    if damage is flipped:
        assert any("its state is not what was written" in message for message in found.values())
    # It goes on from the one before as from any other.
    (folder,) = newest.parents[1].glob("*")
    (folder / "2" / "record" / "metadata").write_bytes(b"{")
    with pytest.warns(UserWarning, match="epoch 2 in .* is damaged"):
        save(tmp_path / "good", 2)
    assert_same(restore(tmp_path / "good")[0], make_run(2))


def test_nothing_good_left_is_a_new_start(tmp_path):
    save(tmp_path, 1)
    for path in tmp_path.rglob("record/*"):
        path.write_bytes(b"{}")
    with pytest.warns(UserWarning, match="epoch 1 .* is damaged"):
        assert restore(tmp_path) is None
    assert restore(tmp_path) is None


def test_another_configuration_is_an_error_and_leaves_all_there(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(
        OtherConfigurationError, match=r"learning_rate is 0.2 and was 0.1; the data"
    ):
        restore(tmp_path, {"learning_rate": 0.2, "data": "another digest"})
    assert_same(restore(tmp_path)[0], make_run(1))


def test_a_full_disk_is_an_error_and_the_last_good_checkpoint_stays(tmp_path):
    """A limit to the size of files stands for the full disk."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="could not be written.*those before it are kept"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run, state = restore(tmp_path)
    assert_same(run, make_run(1))
    assert digest(state) == digest(make_state(1))
    save(tmp_path, 2)
    assert_same(restore(tmp_path)[0], make_run(2))
