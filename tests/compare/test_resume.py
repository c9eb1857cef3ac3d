"""A comparison that was interrupted and resumed is the one that never was."""

import contextlib
import json
import random
import shutil
import signal
import time
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from killed_comparison import run_comparison
from processes import Processes
from toy_problem import IN_PARTS, TARGETS, losses, make_problem, split

import mtl_jax
from mtl_jax.compare import (
    DamagedFileError,
    OtherSettingsError,
    Results,
    Task,
    compare,
    mean_of,
    named_weightings,
)
from mtl_jax.compare.comparison import _Progress
from mtl_jax.compare.report import draw_report
from mtl_jax.compare.results import read_run, record_path, write_run

KILLS = 5


def nothing_finite(settings):
    return mtl_jax.vector_weighting(lambda losses, *rest: (losses * jnp.nan, rest[0]))


WEIGHTINGS = named_weightings(["random_weighting", "graddrop"]) | {"bad": nothing_finite}


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    def write(results, folder, **options):
        results.write(folder)

    monkeypatch.setattr("mtl_jax.compare.comparison.write_report", write)


@pytest.fixture
def trained(monkeypatch):
    """What is trained: the weighting, the seed and the step, at every look."""
    seen, look = [], _Progress.steps

    def steps(self, run, step, losses):
        seen.append((run.weighting, run.seed, step))
        return look(self, run, step, losses)

    monkeypatch.setattr(_Progress, "steps", steps)
    return seen


class Stop(BaseException):
    """Stands for a signal."""


@contextlib.contextmanager
def stopped_at(*place):
    """A context in which the comparison is interrupted there."""
    look = _Progress.steps

    def steps(self, run, step, losses):
        look(self, run, step, losses)
        if (run.weighting, run.seed, step) == place:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(_Progress, "steps", steps)
        yield


def results_of(folder):
    return (folder / "results.json").read_bytes()


def test_resumed_is_undisturbed_bit_for_bit(tmp_path, trained, monkeypatch):
    """Interrupted at the end of an epoch and within one, before, in and after other runs."""
    monkeypatch.setattr("mtl_jax.compare.training.STEPS", 4)
    problem = make_problem(epochs=3)  # of 6 steps, looked at after 4, 6, 8, 12, 16, 18
    options = {"seeds": [0, 1], "alone": False, "checkpoint_seconds": 0}
    compare(problem, WEIGHTINGS, tmp_path / "undisturbed", **options)
    folder = tmp_path / "interrupted"
    for place in (("equal", 0, 4), ("graddrop", 0, 18), ("random_weighting", 1, 12)):
        with stopped_at(*place):
            compare(problem, WEIGHTINGS, folder, resume=True, **options)
    before = {(run.weighting, run.seed): run for run in Results.read(folder).runs}
    assert len(before) == 5
    assert len(Results.read(folder).unfinished("toy")) == 3
    trained.clear()
    compare(problem, WEIGHTINGS, folder, resume=True, **options)
    assert results_of(folder) == results_of(tmp_path / "undisturbed")
    # What was finished was read, and the run that was not went on after its eighth step.
    went_on = [("random_weighting", 1, step) for step in (12, 16, 18)]
    anew = [("graddrop", 1, step) for step in (4, 6, 8, 12, 16, 18)]
    assert trained == [*went_on, *anew, ("bad", 1, 4), ("bad", 1, 6)]
    for run in Results.read(folder).runs:
        if (run.weighting, run.seed) in before:
            assert run.epoch_seconds == before[run.weighting, run.seed].epoch_seconds
    assert not list(folder.glob("checkpoints/*/*"))


def test_weightings_and_seeds_can_be_added(tmp_path, trained):
    problem = make_problem(epochs=1)
    compare(problem, {}, tmp_path / "more", seeds=[0], alone=False)
    trained.clear()
    options = {"seeds": [0, 1], "alone": False}
    compare(problem, ["adaptive"], tmp_path / "more", resume=True, **options)
    assert [run[:2] for run in trained] == [("adaptive", 0), ("equal", 1), ("adaptive", 1)]
    compare(problem, ["adaptive"], tmp_path / "at once", **options)
    assert results_of(tmp_path / "more") == results_of(tmp_path / "at once")


def setting(trial):
    return trial.learning_rate, trial.parameters


def test_what_another_comparison_has_is_not_trained_again(tmp_path, trained):
    """Tuned for the worst task after the mean, with the trials and runs of that."""
    problem = make_problem(epochs=1)
    options = {"tune": 7, "seeds": [0, 1], "alone": True}
    mean = compare(problem, ["adaptive"], tmp_path / "mean", **options)
    options["select"] = "worst"
    expected = compare(problem, ["adaptive"], tmp_path / "anew", **options)
    trained.clear()
    reused = [tmp_path / "mean"]
    found = compare(problem, ["adaptive"], tmp_path / "worst", reuse=reused, **options)
    assert results_of(tmp_path / "worst") == results_of(tmp_path / "anew")
    assert len(list((tmp_path / "worst").glob("records/toy/*"))) == len(expected.runs)
    new = set()
    for name, trials in found.tunings["toy"].trials.items():
        known = [setting(trial) for trial in mean.tunings["toy"].trials[name]]
        new |= {(name, 1000) for trial in trials if setting(trial) not in known}
        chosen = [setting(results.tunings["toy"].chosen(name)) for results in (mean, found)]
        if chosen[0] != chosen[1]:
            new |= {(name, seed) for seed in (0, 1)}
    assert {run[:2] for run in trained} == new
    trained.clear()
    compare(problem, ["adaptive"], tmp_path / "worst", resume=True, **options)
    assert trained == []
    with pytest.raises(FileNotFoundError, match="holds no results of a comparison"):
        compare(problem, {}, tmp_path / "other", reuse=[tmp_path / "nowhere"], seeds=[0])
    with pytest.raises(OtherSettingsError, match="epochs is 2 and was 1"):
        compare(
            make_problem(epochs=2), {}, tmp_path / "other", reuse=[tmp_path / "mean"], seeds=[0]
        )
    with pytest.raises(ValueError, match="`resume`, `reuse` and `log` need a folder"):
        compare(problem, {}, reuse=[tmp_path / "mean"], seeds=[0])
    assert not (tmp_path / "other").exists()


def another_example():
    train = split(200, 0)
    train["x"][7, 0] += 1e-6
    return train


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder with the results of a comparison."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mtl_jax.compare.comparison.write_report",
            lambda results, folder, **options: results.write(folder),
        )
        compare(make_problem(**IN_PARTS, epochs=1), ["cagrad"], folder, seeds=[0], alone=False)
    return folder


OTHER_METRIC = Task(mean_of(optax.squared_error, "another error", higher_is_better=False))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"learning_rate": 0.02}, {}, r"learning_rate is 0.02 and was 0.01\. Go on"),
        ({"epochs": 2}, {}, r"epochs is 2 and was 1"),
        ({"batch_size": 16}, {}, r"batch_size is \{'': 16\} and was \{'': 32\}"),
        ({"train": another_example()}, {}, r"other settings: the data differ\. "),
        ({"tasks": dict.fromkeys(TARGETS, OTHER_METRIC)}, {}, "another error"),
        ({}, {"conflict": True}, r"equal_seed0.json is .*measured_at is 'representation' and was"),
    ],
)
def test_other_settings_are_an_error_before_anything_is_trained(
    changes, options, message, once, tmp_path, trained
):
    folder = tmp_path / "folder"
    shutil.copytree(once, folder)
    problem = make_problem(**({"epochs": 1} | IN_PARTS | changes))
    with pytest.raises(OtherSettingsError, match=message):
        compare(problem, ["cagrad"], folder, seeds=[0, 1], alone=False, resume=True, **options)
    assert trained == []
    assert results_of(folder) == results_of(once)


@pytest.mark.parametrize("rate", [0.01 / 3, 10**-2.5, np.float32(0.1)])
def test_settings_may_have_any_number_of_digits(rate, tmp_path, trained):
    """And those of NumPy become Python's."""
    problem = make_problem(epochs=1, learning_rate=rate, batch_size=np.int64(50))
    options = {"alone": False, "checkpoint_seconds": 0}
    compare(problem, {}, tmp_path / "one", seeds=[0], tune=1, **options)
    trained.clear()
    compare(problem, {}, tmp_path / "one", seeds=[0, 1], tune=1, resume=True, **options)
    compare(problem, {}, tmp_path / "two", seeds=[1], tune=1, reuse=[tmp_path / "one"], **options)
    assert {run[:2] for run in trained} == {("equal", 1), ("constant", 1)}


def test_what_another_version_made_is_kept_and_said(once, tmp_path, trained):
    """The provenance of the record is written by hand."""
    folder = tmp_path / "folder"
    shutil.copytree(once, folder)
    old = read_run(record_path(folder, "toy", "cagrad", 0))
    old.provenance |= {
        "versions": old.provenance["versions"] | {"jax": "0.4.1"},
        "device": "1 x TPU v9 (tpu)",
    }
    write_run(folder, old)
    problem = make_problem(**IN_PARTS, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"seeds": [0, 1], "alone": False, "resume": True}
        results = compare(problem, ["cagrad"], folder, **options)
    assert [run[:2] for run in trained] == [("equal", 1), ("cagrad", 1)]
    assert results.of("toy")["cagrad"][0].metrics == old.metrics
    draw_report(Results.read(folder), folder, pictures=[])
    report = (folder / "toy.md").read_text()
    assert "jax 0.4.1 (1 run)" in report or "0.4.1 (1 run)" in report
    assert "TPU v9 (tpu) (1 run)" in report


def test_another_network_is_said(once, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(once, folder)
    problem = make_problem(epochs=1)  # not in parts
    said = "losses of 'toy' are not those that its finished runs"
    with pytest.warns(UserWarning, match=said):
        compare(problem, {}, folder, seeds=[0, 1], alone=False, resume=True)
    with pytest.warns(UserWarning, match=said):  # also where nothing is left to train
        compare(problem, {}, folder, seeds=[0, 1], alone=False, resume=True)


def test_another_network_is_said_of_trials(tmp_path):
    def thousandfold(*args):
        errors, state = losses(*args)
        return {task: 1000 * error for task, error in errors.items()}, state

    problem = make_problem(epochs=1)
    other = make_problem(epochs=1, losses=thousandfold)
    options = {"alone": False, "tune": 1, "checkpoint_seconds": None}
    said = "losses of 'toy' are not those that its trials"
    with stopped_at("equal", 0, 6):  # after the tuning
        compare(problem, {}, tmp_path / "one", seeds=[0], **options)
    with pytest.warns(UserWarning, match=said):
        compare(other, {}, tmp_path / "two", seeds=[0], reuse=[tmp_path / "one"], **options)
    for folder in ("one", "two"):  # also of what was taken from there
        with pytest.warns(UserWarning, match=said):
            compare(other, {}, tmp_path / folder, seeds=[0], resume=True, **options)


def test_what_was_tuned_stays_until_it_is_tuned_again(tmp_path):
    problems = [make_problem(epochs=1), make_problem(epochs=1, name="second")]
    options = {"alone": False, "tune": 1, "seeds": [0, 1], "checkpoint_seconds": None}
    compare(problems, {}, tmp_path, **options)
    (tmp_path / "records" / "toy" / "equal_seed1.json").unlink()
    with stopped_at("equal", 1, 6):
        compare(problems, {}, tmp_path, resume=True, **options)
    assert set(Results.read(tmp_path).tunings) == {"toy", "second"}


def test_a_damaged_record_is_an_error_that_names_it(once, tmp_path, trained):
    folder = tmp_path / "folder"
    shutil.copytree(once, folder)
    path = record_path(folder, "toy", "cagrad", 0)
    path.write_text(path.read_text().replace('"skipped": 0', '"skipped": 1'))
    problem = make_problem(**IN_PARTS, epochs=1)
    with pytest.raises(DamagedFileError, match=r"cagrad_seed0.json is damaged.*Remove it to train"):
        compare(problem, ["cagrad"], folder, seeds=[0], alone=False, resume=True)
    assert trained == []
    path.unlink()
    compare(problem, ["cagrad"], folder, seeds=[0], alone=False, resume=True)
    assert [run[:2] for run in trained] == [("cagrad", 0)]
    assert results_of(folder) == results_of(once)


def test_a_folder_holds_one_comparison(once, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(once, folder)
    problem, options = make_problem(**IN_PARTS, epochs=1), {"seeds": [0], "alone": False}
    with pytest.raises(FileExistsError, match=r"mine holds a comparison already.*--resume.*--name"):
        compare(problem, {}, folder, **options)
    other = make_problem(name="other", epochs=1)
    with pytest.raises(FileExistsError, match=r"holds a comparison on toy, too"):
        compare(other, {}, folder, resume=True, **options)
    assert results_of(folder) == results_of(once)
    (folder / "records" / ".DS_Store").write_text("what a file browser leaves")
    compare(problem, ["cagrad"], folder, resume=True, **options)
    assert results_of(folder) == results_of(once)
    for part in ("results.json", "records/toy", "checkpoints/toy", "tuning/toy"):
        some = tmp_path / part.replace("/", "_")
        (some / part).mkdir(parents=True)
        (some / part / "a file").write_text("something")
        with pytest.raises(FileExistsError, match="holds a comparison already"):
            compare(problem, {}, some, **options)


def test_a_folder_in_which_nothing_was_finished_holds_none(tmp_path, trained):
    """A mistake that stopped the first run need not be cleaned up after."""

    options = {"seeds": [0], "alone": False, "checkpoint_seconds": None}
    with stopped_at("equal", 0, 6):
        compare(make_problem(epochs=1), {}, tmp_path, **options)
    assert Results.read(tmp_path).runs == []
    mended = make_problem(epochs=2, learning_rate=0.02)
    results = compare(mended, {}, tmp_path, **options)
    assert Results.read(tmp_path).problems["toy"].epochs == 2
    assert [run.epochs for run in results.runs] == [2]


def test_without_checkpoints_finished_runs_are_kept_all_the_same(tmp_path, trained):
    options = {"seeds": [0], "alone": False, "checkpoint_seconds": None}
    problem = make_problem(epochs=2)
    with stopped_at("adaptive", 0, 6):
        compare(problem, ["adaptive"], tmp_path, **options)
    assert not (tmp_path / "checkpoints").exists()
    trained.clear()
    compare(problem, ["adaptive"], tmp_path, resume=True, **options)
    assert trained == [("adaptive", 0, 6), ("adaptive", 0, 12)]


def test_killed_again_and_again(tmp_path):
    """With SIGKILL at random moments, and resumed: the same results, byte for byte."""
    begin = time.monotonic()
    run_comparison(tmp_path / "undisturbed", resume=False)
    duration = time.monotonic() - begin
    expected = results_of(tmp_path / "undisturbed")

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
            assert results_of(folder) == expected, f"random seed {seed}"
            if kills == KILLS:
                break
            shutil.rmtree(folder)  # it was faster than its killer
    runs = json.loads(expected)["runs"]
    assert [run["failure"] for run in runs] == [None, None]
    assert len(runs[1]["train_losses"]["line"]) == 20
