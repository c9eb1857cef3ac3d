"""A comparison that was interrupted and resumed is the one that never was."""

import json
import random
import shutil
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest
from killed_comparison import run_comparison
from processes import Processes
from toy_problem import IN_PARTS, make_problem, scores, split

import mtl_jax
from mtl_jax.compare import (
    Checkpoints,
    OtherConfigurationError,
    compare,
    compare_and_report,
    named_weightings,
)
from mtl_jax.compare.report import results

KILLS = 5


def nothing_finite(settings):
    return mtl_jax.vector_weighting(lambda losses, *rest: (losses * jnp.nan, rest[0]))


@pytest.fixture
def problem():
    return make_problem(epochs=4)


WEIGHTINGS = named_weightings(["random_weighting", "graddrop"]) | {"bad": nothing_finite}


class Stop(BaseException):
    """Stands for a signal."""


def stop_at(name, seed, epochs):
    def on_epoch(run):
        if (run.weighting, run.seed, run.epochs) == (name, seed, epochs):
            raise Stop

    return on_epoch


def all_runs(comparison):
    runs = (*comparison.runs.values(), *comparison.alone.values())
    return {(run.weighting, run.seed): run for same in runs for run in same}


def test_resumed_is_undisturbed_bit_for_bit(problem, tmp_path):
    undisturbed = compare(problem, WEIGHTINGS, seeds=[0, 1], alone=False)
    interrupted = []
    for name, seed, epochs in (("equal", 0, 1), ("graddrop", 0, 3), ("random_weighting", 1, 2)):
        with pytest.raises(Stop):
            compare(
                problem,
                WEIGHTINGS,
                seeds=[0, 1],
                alone=False,
                checkpoints=Checkpoints(tmp_path, seconds=0, resume=True),
                on_epoch=stop_at(name, seed, epochs),
                on_run=interrupted.append,
            )
    trained = []
    resumed = compare(
        problem,
        WEIGHTINGS,
        seeds=[0, 1],
        alone=False,
        checkpoints=Checkpoints(tmp_path, seconds=0, resume=True),
        on_epoch=lambda run: trained.append((run.weighting, run.seed, run.epochs)),
    )
    assert json.dumps(results(resumed)) == json.dumps(results(undisturbed))
    for key, run in all_runs(resumed).items():
        expected = all_runs(undisturbed)[key]
        assert run.test == expected.test
        for task, weights in expected.weights.items():
            np.testing.assert_array_equal(run.weights[task], weights)
    # What was finished was read, and the run that was not went on after its second epoch.
    done = [("equal", 0, 4), ("random_weighting", 0, 4), ("graddrop", 0, 4), ("bad", 0, 1)]
    done += [("equal", 1, 4)]
    went_on = [("random_weighting", 1, 3), ("random_weighting", 1, 4)]
    anew = [("graddrop", 1, epoch) for epoch in (1, 2, 3, 4)] + [("bad", 1, 1)]
    assert trained == done + went_on + anew
    before = all_runs(interrupted[-1])
    assert len(before) == len(done)
    assert interrupted[-1].unfinished == 3
    for key, run in before.items():
        assert all_runs(resumed)[key].epoch_seconds == run.epoch_seconds


def test_weightings_and_seeds_can_be_added(problem, tmp_path):
    problem = problem.with_settings(epochs=1)
    weightings = named_weightings(["adaptive"])
    compare(problem, {}, seeds=[0], alone=False, checkpoints=tmp_path)
    with pytest.raises(FileExistsError, match=r"'toy'. Continue it with resume=True, or choose"):
        compare(problem, weightings, seeds=[0, 1], alone=False, checkpoints=tmp_path)
    more = Checkpoints(tmp_path, resume=True)
    extended = compare(problem, weightings, seeds=[0, 1], alone=False, checkpoints=more)
    at_once = compare(problem, weightings, seeds=[0, 1], alone=False)
    assert results(extended) == results(at_once)


def another_example():
    train = split(200, 0)
    train["x"][7, 0] += 1e-6
    return train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.02}, r"learning_rate is 0.02 and was 0.01; the training program"),
        ({"epochs": 2}, r"epochs is 2 and was 1"),
        ({"train": another_example()}, r"configuration: the data differ\. "),
        (
            {"scores": lambda *args: {t: s + 1 for t, s in scores(*args).items()}},
            r"configuration: the metrics are computed differently\. ",
        ),
    ],
)
def test_another_problem_is_an_error_before_anything_is_trained(changes, message, once):
    folder, weightings = once
    compare_again(folder, weightings, message, make_problem(**({"epochs": 1} | IN_PARTS | changes)))


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (
            lambda settings: mtl_jax.cagrad(c=0.4),
            r"configuration: the training program \(network, losses, weighting, opt",
        ),
        (
            lambda settings: mtl_jax.uncertainty(settings.optimizer, initial_log_variance=0.5),
            r"the parameters or states that it starts from differ",
        ),
    ],
)
def test_another_parameter_of_a_weighting_is_an_error(weighting, message, once):
    folder, weightings = once
    name = "uncertainty" if "starts" in message else "cagrad"
    changed = dict(weightings) | {name: weighting}
    compare_again(folder, changed, message, make_problem(**IN_PARTS, epochs=1))


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder with the checkpoints of a comparison, and its weightings."""
    folder = tmp_path_factory.mktemp("once")
    weightings = named_weightings(["cagrad", "uncertainty"])
    compare(
        make_problem(**IN_PARTS, epochs=1), weightings, seeds=[0], alone=False, checkpoints=folder
    )
    return folder, weightings


def compare_again(folder, weightings, message, problem):
    trained = []
    with pytest.raises(OtherConfigurationError, match=message):
        compare(
            problem,
            weightings,
            seeds=[0, 1],
            alone=False,
            checkpoints=Checkpoints(folder, resume=True),
            on_epoch=lambda run: trained.append(run.seed),
        )
    assert 1 not in trained


def test_a_folder_holds_one_comparison(tmp_path, capsys):
    problem = make_problem(epochs=1)
    compare_and_report([problem], {}, tmp_path / "mine", seeds=[0], alone=False)
    before = (tmp_path / "mine" / "results.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"mine holds a comparison already.*--resume.*--name"):
        compare_and_report([problem], {}, tmp_path / "mine", seeds=[0], alone=False)
    other = make_problem(name="other", epochs=1)
    with pytest.raises(FileExistsError, match=r"holds a comparison on toy, too"):
        compare_and_report([other], {}, tmp_path / "mine", seeds=[0], alone=False, resume=True)
    with pytest.raises(OtherConfigurationError):
        changed = problem.with_settings(learning_rate=0.3)
        compare_and_report([changed], {}, tmp_path / "mine", seeds=[0], alone=False, resume=True)
    assert (tmp_path / "mine" / "results.json").read_bytes() == before
    shutil.rmtree(tmp_path / "mine" / "checkpoints")
    with pytest.raises(FileExistsError, match=r"no checkpoints to resume from"):
        compare_and_report([problem], {}, tmp_path / "mine", seeds=[0], alone=False, resume=True)
    with pytest.raises(ValueError, match="To resume, `checkpoint_seconds` must be a number"):
        compare_and_report([problem], {}, tmp_path, checkpoint_seconds=None, resume=True)


def test_killed_again_and_again(tmp_path):
    """With SIGKILL at random moments, and resumed: the same results, byte for byte."""
    begin = time.monotonic()
    run_comparison(tmp_path / "undisturbed", resume=False)
    duration = time.monotonic() - begin
    expected = (tmp_path / "undisturbed" / "results.json").read_bytes()

    kills, seed = 0, random.randrange(10**6)
    moments = random.Random(seed)
    folder = tmp_path / "killed"
    with Processes() as processes:
        while True:
            process = processes.start("-m", "killed_comparison", folder, devices=8)
            assert process.stdout.readline() == "started\n", process.communicate()
            if kills < KILLS:
                time.sleep(moments.uniform(0, duration / 2))
                process.kill()
            _, errors = process.communicate()
            assert "damaged" not in errors
            if process.returncode == -signal.SIGKILL:
                kills += 1
                continue
            assert process.returncode == 0, errors
            assert (folder / "results.json").read_bytes() == expected, f"random seed {seed}"
            if kills == KILLS:
                break
            shutil.rmtree(folder)  # it was faster than its killer
    assert json.loads(expected)["toy"]["weightings"]["random_weighting"][0]["failure"] is None
