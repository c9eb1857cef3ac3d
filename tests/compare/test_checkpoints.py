"""What a checkpoint holds comes back as it was, and what is damaged is never used."""

import gc
import resource
import shutil
import warnings
from typing import NamedTuple
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_problem import IN_PARTS, THREE_TARGETS, make_problem

from mtl_jax._train import TrainState
from mtl_jax.compare import WEIGHTINGS, OtherSettingsError, Run, digest
from mtl_jax.compare.checkpoints import Epoch, RunCheckpoints
from mtl_jax.compare.training import Setting, Trainer, single_task

# What Orbax leaves behind when it fails warns when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect():
    yield
    gc.collect()


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


ROWS = np.random.default_rng(9).normal(size=(3, 4)).astype(np.float32)
NEW = {"measured_at": "parameters", "learning_rate": 0.1, "parameters": {"c": 0.3, "w": {"b": 2.0}}}


def new_run(**changes):
    """A run before its first step."""
    return Run("toy", "the name / of it", 3, **(NEW | changes))


def make_run(epochs):
    steps = np.random.default_rng(epochs).normal(size=(2, 4 * epochs)).astype(np.float32)
    return new_run(
        train_losses={"b": [0.1] * epochs, "a": [float("nan")] * epochs},
        metrics={"test": {"b": {"error": [1 / 3] * epochs}, "a": {"error": [1e-300] * epochs}}},
        weights={"b": steps[0], "a": steps[1]},
        epoch_seconds=[0.25] * epochs,
    )


def save(folder, *epochs, seconds=0):
    """Checkpoints three steps after the ends of these epochs, which have ten each."""
    for epoch in epochs:
        with RunCheckpoints(folder / "run", seconds) as checkpoints:
            checkpoints.restore(new_run(), make_state(0))
            current = Epoch([ROWS[:1], ROWS[1:]], 0.125)
            checkpoints.save(10 * epoch + 3, make_run(epoch), current, make_state(epoch))


def restore(folder, **changes):
    with RunCheckpoints(folder / "run", 0) as checkpoints:
        return checkpoints.restore(new_run(**changes), make_state(0))


def assert_same(run, other):
    assert str(vars(run)) == str(vars(other))  # the order of the names, and NaN
    for name, values in run.weights.items():
        assert values.dtype == other.weights[name].dtype
        np.testing.assert_array_equal(values, other.weights[name])


def test_all_comes_back_bit_for_bit(tmp_path):
    assert restore(tmp_path) is None
    save(tmp_path, 1, 2)
    run, epoch, state = restore(tmp_path)
    assert_same(run, make_run(2))
    assert epoch.seconds == 0.125
    np.testing.assert_array_equal(np.concatenate(epoch.rows), ROWS)
    assert jax.tree.structure(state) == jax.tree.structure(make_state(2))
    assert digest(state) == digest(make_state(2)) != digest(make_state(1))
    np.testing.assert_array_equal(state.params["kernel"], make_state(2).params["kernel"])


def test_the_newest_three_are_kept(tmp_path):
    with RunCheckpoints(tmp_path / "run", 0) as checkpoints:
        for epoch in range(1, 6):
            checkpoints.save(10 * epoch, make_run(epoch), Epoch(), make_state(epoch))
    kept = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert kept == {"30", "40", "50"}


def test_before_anything_is_found(tmp_path):
    """At the end of an epoch of a run without curves there are no arrays but the state."""
    with RunCheckpoints(tmp_path / "run", 0) as checkpoints:
        checkpoints.save(1, new_run(), Epoch(), make_state(1))
    run, epoch, state = restore(tmp_path)
    assert_same(run, new_run())
    assert epoch.rows == []
    assert digest(state) == digest(make_state(1))


def test_other_versions_go_on_and_are_remembered(tmp_path):
    old, now = {"versions": {"jax": "0.4.1"}}, {"versions": {"jax": "9.9"}}
    with RunCheckpoints(tmp_path / "run", 0) as checkpoints:
        run = make_run(1)
        run.provenance, run.compile_seconds = old, 2.0
        checkpoints.save(10, run, Epoch(), make_state(1))
    run, *_ = restore(tmp_path, provenance=now, compile_seconds=1.0)
    assert run.provenance == now | {"begun with": old}
    assert run.compile_seconds == 3.0
    assert restore(tmp_path, provenance=old)[0].provenance == old


def other(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(leaf)[1]
    return ~leaf if leaf.dtype == bool else leaf + 1


def test_a_run_goes_on_while_it_is_saved(tmp_path, monkeypatch):
    run = make_run(1)
    with RunCheckpoints(tmp_path / "run", 0) as checkpoints:
        write, later = checkpoints._manager.save, []
        monkeypatch.setattr(
            checkpoints._manager,
            "save",
            lambda *args, **options: later.append(lambda: write(*args, **options)),
        )
        checkpoints.save(1, run, Epoch(), make_state(1))
        run.epoch_seconds.append(0.5)
        run.metrics["test"]["a"]["error"].append(0.5)
        later[0]()
    assert_same(restore(tmp_path)[0], make_run(1))


def test_state_of_every_known_weighting_comes_back(tmp_path):
    problem = make_problem(THREE_TARGETS, **IN_PARTS)
    trainer, (params, model_state) = Trainer(problem), problem.init(jax.random.key(0))
    baselines = single_task(problem, {})
    batch = {field: values[:32] for field, values in problem.train.items()}
    states = {}
    for name, make in WEIGHTINGS.items():
        step = trainer.train_step(Setting(name, make, 0.01), 0.01, {}, baselines)
        states[name] = step.init(
            params,
            batch,
            model_state=model_state,
            rng=jax.random.key(0),
            weighting_key=jax.random.key(1),
        )
    changed = jax.tree.map(other, states)
    with RunCheckpoints(tmp_path / "run", 0) as checkpoints:
        checkpoints.save(1, new_run(), Epoch(), changed)
    with RunCheckpoints(tmp_path / "run", 0) as checkpoints:
        *_, restored = checkpoints.restore(new_run(), states)
    assert digest(restored) == digest(changed) != digest(states)


def test_the_last_few_are_kept_and_none_of_a_finished_run(tmp_path):
    def steps():
        return {int(path.name) for path in (tmp_path / "run").iterdir() if path.name.isdigit()}

    save(tmp_path, *range(1, 7))
    assert steps() == {43, 53, 63}
    folder = tmp_path / "run"
    shutil.copytree(folder / "63", folder / "73.orbax-checkpoint-tmp")  # killed while it wrote this
    assert_same(restore(tmp_path)[0], make_run(6))
    assert {path.name for path in folder.iterdir()} == {"43", "53", "63"}
    RunCheckpoints(folder, 0).remove()
    assert not folder.exists()


def test_not_more_often_than_asked_for(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with RunCheckpoints(tmp_path / "run", 100) as checkpoints:
        for step, clock[0] in ((1, 99.0), (2, 101.0), (3, 200.0), (4, 202.0), (5, 301.0)):
            checkpoints.save(step, new_run(), Epoch(), make_state(step))
        checkpoints._manager.wait_until_finished()
        assert checkpoints._manager.all_steps() == [2, 4]


def cut(content):
    return content[: len(content) // 2]


def flipped(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [cut, flipped])
def test_a_damaged_checkpoint_is_left_out_with_a_warning(damage, tmp_path):
    """Whatever file is damaged: what is restored is the last state or the one before, exactly."""
    save(tmp_path / "good", 1, 2)
    newest = tmp_path / "good" / "run" / "23"
    good = {epoch: (make_run(epoch), digest(make_state(epoch))) for epoch in (1, 2)}
    found = {}
    for number, file in enumerate(path for path in newest.rglob("*") if path.is_file()):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        damaged = folder / file.relative_to(tmp_path / "good")
        damaged.write_bytes(damage(damaged.read_bytes()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run, _, state = restore(folder)
        messages = [str(warning.message) for warning in caught]
        found[file.relative_to(newest).as_posix()] = " ".join(m for m in messages if "step 23" in m)
        expected_run, expected_digest = good[1 if any("step 23" in m for m in messages) else 2]
        assert_same(run, expected_run)
        assert digest(state) == expected_digest, file
    warned = {file for file, message in found.items() if "is damaged and left out" in message}
    assert {"record/metadata", "state/_METADATA", "state/manifest.ocdbt"} <= warned
    # Which of the files that OCDBT writes still count cannot be seen from outside.
    assert any(file.startswith("state/ocdbt.process_0/d/") for file in warned)
    if damage is flipped:
        assert any("its state is not what was written" in message for message in found.values())
    # It goes on from the one before as from any other.
    (newest / "record" / "metadata").write_bytes(b"{")
    with pytest.warns(UserWarning, match="step 23 in .* is damaged"):
        save(tmp_path / "good", 2)
    assert_same(restore(tmp_path / "good")[0], make_run(2))


def test_nothing_good_left_is_a_new_start(tmp_path):
    save(tmp_path, 1)
    for path in tmp_path.rglob("record/*"):
        path.write_bytes(b"{}")
    with pytest.warns(UserWarning, match="step 13 .* is damaged"):
        assert restore(tmp_path) is None
    assert restore(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.2}, r"learning_rate is 0.2 and was 0.1\. Go on with the old ones"),
        ({"parameters": {"c": 0.5}}, r"parameters is \{'c': 0.5\} and was \{'c': 0.3, 'w'"),
        ({"measured_at": None, "task": "b"}, "task is 'b' and was None; measured_at is None and"),
    ],
)
def test_other_settings_are_an_error_and_leave_all_there(changes, message, tmp_path):
    save(tmp_path, 1)
    with pytest.raises(OtherSettingsError, match=message):
        restore(tmp_path, **changes)
    assert_same(restore(tmp_path)[0], make_run(1))


def test_another_network_is_an_error_and_leaves_all_there(tmp_path):
    save(tmp_path, 1, 2)
    state = make_state(0)
    others = {
        "a shape": state._replace(params=state.params | {"kernel": jnp.zeros((50, 41))}),
        "a dtype": state._replace(step=jnp.float32(0)),
        "a name": state._replace(model_state={"empty": {}, "flag": jnp.array([True, False])}),
    }
    for changed in others.values():
        said = pytest.raises(OtherSettingsError, match="are of another network")
        with RunCheckpoints(tmp_path / "run", 0) as checkpoints, said:
            checkpoints.restore(new_run(), changed)
    assert_same(restore(tmp_path)[0], make_run(2))


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()])
def test_what_passes_is_not_taken_for_damage(error, tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(RunCheckpoints, "_read", Mock(side_effect=error))
        restore(tmp_path)
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
    run, _, state = restore(tmp_path)
    assert_same(run, make_run(1))
    assert digest(state) == digest(make_state(1))
    save(tmp_path, 2)
    assert_same(restore(tmp_path)[0], make_run(2))
