import dataclasses
import math

import numpy as np
import pytest
from made_runs import EQUAL, TASKS, made_problem, made_results, made_run, made_tuning

from mtl_jax.compare import DamagedFileError, Results, Run, Tuning, load_curves, load_results
from mtl_jax.compare.results import (
    PRUNED,
    Trial,
    file_name,
    read_run,
    record_path,
    thin,
    write_run,
)


@pytest.fixture
def run():
    """A run with all that can be in one."""
    weights = {"topic": np.linspace(0, 2, 1000), "depth": np.full(1000, 0.1, np.float32)}
    weights["depth"][:5] = np.nan
    return made_run(
        made_problem(epochs=2),
        "a/b",
        3,
        {"topic": 1 / 3, "depth": [math.nan, 2.0]},
        parameters={"weights": {"topic": 0.3, "depth": 1.7}, "form": "half", "decay": None},
        failure="no finite update in epoch 2",
        skipped=6,
        weights=weights,
        measured_at="parameters",
        conflict={"share": np.zeros(1000), "cosine": np.where(np.arange(1000) % 2, np.nan, 0.1)},
    )


def same(one, other):
    """Whether two runs are the same, NaN being the same as NaN."""
    return all(
        np.testing.assert_equal(getattr(one, field.name), getattr(other, field.name)) is None
        for field in dataclasses.fields(Run)
    )


def test_a_record_holds_the_whole_run(run, tmp_path):
    path = write_run(tmp_path, run)
    assert path == record_path(tmp_path, "made", "a/b", 3)
    assert path.relative_to(tmp_path).as_posix() == "records/made/a%2Fb_seed3.json"
    read = read_run(path)
    assert same(read, run.thinned())
    assert len(read.weights["topic"]) == len(read.steps) == 200
    np.testing.assert_allclose(read.steps, np.arange(1000).reshape(200, 5).mean(axis=1))
    assert math.isnan(read.weights["depth"][0])
    np.testing.assert_allclose(read.conflict["cosine"], 0.1)  # what was not measured is no number
    assert read.epochs == 2
    assert same(read_run(write_run(tmp_path, read)), read)
    short = dataclasses.replace(run, weights={"topic": np.arange(12.0)}, conflict={})
    read = read_run(write_run(tmp_path, dataclasses.replace(short, seed=4)))
    assert read.seed == 4
    np.testing.assert_array_equal(read.steps, np.arange(12))
    assert len(list(tmp_path.rglob("*"))) == 4  # nothing temporary is left


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("0.3333333333333333", "0.3433333333333333"),
        lambda text: text[: len(text) // 2],
        lambda text: "{}",
        lambda text: text.replace('"seed": 3', '"seed": 4'),
    ],
)
def test_a_damaged_record_is_named(run, damage, tmp_path):
    path = write_run(tmp_path, run)
    path.write_text(damage(path.read_text()))
    with pytest.raises(DamagedFileError, match="a%2Fb_seed3.json is damaged"):
        read_run(path)


def test_results_are_written_and_read(tmp_path):
    results = made_results({"equal": EQUAL, "dwa": EQUAL}, alone=EQUAL, tuning=made_tuning("equal"))
    results.planned["made"].append(("famo", 0))
    results.runs[1].metrics["test"]["topic"]["accuracy"][0] = math.nan
    results.runs[1].train_losses["topic"][0] = 1.23456789
    results.write(tmp_path)
    read = Results.read(tmp_path)
    assert read.problems == results.problems
    assert read.planned == results.planned
    assert read.tunings == results.tunings
    assert read.command == results.command
    assert read.unfinished("made") == [("famo", 0)]
    assert list(read.of("made")) == ["equal", "dwa", "topic alone", "depth alone"]
    assert [run.seed for run in read.of("made")["dwa"]] == [0, 1, 2, 3]
    values = [run.metrics["test"]["depth"]["error"] for run in read.of("made")["dwa"]]
    np.testing.assert_allclose(values, [np.linspace(e / 2, e, 3) for e in EQUAL["depth"]], 1e-5)
    assert read.runs[0].provenance == results.runs[0].provenance
    loss = read.of("made")["dwa"][0].train_losses["topic"][0]
    assert loss == 1.23457
    # Written again it is the same, in whatever order the runs came.
    before = [(tmp_path / name).read_bytes() for name in ("results.json", "timing.json")]
    read.runs.reverse()
    read.write(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("results.json", "timing.json")] == before


def test_results_hold_nothing_that_differs_when_run_again(tmp_path):
    results = made_results({"equal": EQUAL}, tuning=made_tuning("equal"))
    results.write(tmp_path / "first")
    for run in results.runs:
        run.epoch_seconds, run.compile_seconds, run.memory_bytes = [7.0] * 3, 8.0, None
        run.provenance, run.steps_per_call, run.compilations = {"device": "gpu"}, 32, 0
    trials = [dataclasses.replace(trial, seconds=9.0) for trial in made_tuning("a").trials["a"]]
    results.tunings["made"] = Tuning(1000, "mean", {"equal": trials})
    results.write(tmp_path / "second")
    first, second = (tmp_path / name / "results.json" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    run = Results.read(tmp_path / "second").runs[0]
    assert (run.epoch_seconds, run.provenance) == ([7.0] * 3, {"device": "gpu"})
    assert Results.read(tmp_path / "second").tunings["made"].trials["equal"][0].seconds == 9.0
    (tmp_path / "second" / "timing.json").unlink()
    assert Results.read(tmp_path / "second").runs[0].epoch_seconds == []


def test_results_of_another_version_are_read(tmp_path):
    """Versions are only something that is said of a run."""
    results = made_results({"equal": EQUAL})
    results.write(tmp_path)
    path = tmp_path / "timing.json"
    path.write_text(path.read_text().replace('"jax": "0.10.0"', '"jax": "0.4.1", "old": "1"'))
    assert "0.4.1" in path.read_text()
    read = Results.read(tmp_path)
    assert read.runs[0].provenance["versions"] == {"jax": "0.4.1", "old": "1", "numpy": "2.3.1"}
    assert read.runs[0].metrics == results.runs[0].metrics


def test_what_a_killed_comparison_finished_is_read(tmp_path):
    results = made_results({"equal": EQUAL, "dwa": EQUAL})
    whole = list(results.runs)
    del results.runs[3:]
    results.write(tmp_path)
    for run in whole[2:5]:
        write_run(tmp_path, run)
    write_run(tmp_path, dataclasses.replace(whole[0], weighting="not planned"))
    read = Results.read(tmp_path)
    assert len(read.runs) == 5
    assert len(read.unfinished("made")) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"runs": [', "results.json is damaged"), ("[]", "does not hold results")],
)
def test_damaged_results_are_named(text, message, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no results"):
        Results.read(tmp_path)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DamagedFileError, match=message):
        Results.read(tmp_path)


def test_results_are_combined():
    one = made_results({"equal": EQUAL, "dwa": EQUAL}, tuning=made_tuning("equal", "dwa"))
    two = made_results({"equal": EQUAL, "famo": EQUAL}, tuning=made_tuning("equal", "famo"))
    other = made_results({"equal": EQUAL}, name="other")
    two.runs[0].skipped = 5
    whole = Results.combine([one, two, other])
    assert list(whole.problems) == ["made", "other"]
    assert list(whole.of("made")) == ["equal", "dwa", "famo"]
    assert list(whole.tunings["made"].trials) == ["equal", "famo", "dwa"]
    assert [run.skipped for run in whole.of("made")["equal"]] == [0] * 4  # the first one's
    assert whole.command == one.command
    for changed, message in (
        (made_results({"equal": EQUAL}), "tuning"),
        (made_results({"equal": EQUAL}, epochs=5, tuning=made_tuning("equal")), "epochs, 3 and 5"),
        (made_results({"equal": EQUAL}, tuning=made_tuning("equal", select="worst")), "tuning"),
    ):
        with pytest.raises(ValueError, match=f"'made' differs .* {message}"):
            Results.combine([one, changed])
    tuned_more = made_results({"equal": EQUAL, "dwa": EQUAL}, tuning=made_tuning("equal", "dwa"))
    for run in tuned_more.runs:
        run.seed += run.weighting == "dwa"  # one seed more
        run.learning_rate = 0.05 if run.weighting == "dwa" else 0.01
    tuned_more.planned["made"].append(("dwa", 4))
    with pytest.raises(ValueError, match=r"'dwa' on 'made' differ .* learning rate, 0.01 and 0.05"):
        Results.combine([one, tuned_more])


def test_the_chosen_trial():
    tuning = made_tuning("equal")
    assert tuning.chosen("equal").learning_rate == 0.03
    failed = [Trial(0.1, failure=PRUNED), Trial(0.2, failure="it did")]
    assert Tuning(0, "worst", {"equal": failed}).chosen("equal").learning_rate == 0.1
    with pytest.raises(ValueError, match="'dwa' was not tuned; tuned: equal"):
        tuning.chosen("dwa")


def test_one_table(tmp_path):
    tasks = TASKS | {"depth": {"error": TASKS["depth"]["error"], "r2": TASKS["topic"]["accuracy"]}}
    rows = {"equal": {"topic": [0.5, 0.6], "depth": {"error": [1.0, 2.0], "r2": [0.1, 0.2]}}}
    results = made_results(rows, tasks=tasks, alone={"topic": [0.7, 0.8]})
    results.write(tmp_path)
    table = load_results(tmp_path)
    assert list(table.columns) == [
        *("problem", "weighting", "seed", "task", "metric", "split", "epoch", "value")
    ]
    # Three epochs; two seeds; two losses and six metrics, or one loss and two metrics.
    assert len(table) == 3 * 2 * (8 + 3)
    last = table[(table["epoch"] == 3) & (table["split"] == "test")]
    means = last.groupby(["weighting", "task", "metric"])["value"].mean()
    assert means["equal", "depth", "r2"] == pytest.approx(0.15)
    assert means["topic alone", "topic", "accuracy"] == pytest.approx(0.75)
    losses = table[(table["metric"] == "loss") & (table["split"] == "train")]
    assert set(losses["value"]) == {2.0, 1.0}


def test_curves_are_a_table(run, tmp_path):
    results = Results({"made": made_problem()}, [run], planned={"made": [("a/b", 3)]})
    results.write(tmp_path)
    curves = load_curves(tmp_path)
    assert len(curves) == 4 * 200
    cosine = curves[curves["curve"] == "cosine"]
    assert set(cosine["task"]) == {""}
    assert cosine["step"].iloc[0] == 2
    depth = curves[(curves["curve"] == "weight") & (curves["task"] == "depth")]
    assert depth["value"].isna().sum() == 1


def test_thinning_keeps_the_mean():
    values = np.arange(1000.0)
    means = thin(values, 10)
    np.testing.assert_array_equal(means, values.reshape(10, 100).mean(axis=1))
    np.testing.assert_array_equal(thin(values[:7], 10), values[:7])
    values[:150] = np.nan
    np.testing.assert_array_equal(thin(values, 10)[:2], [np.nan, 174.5])


def test_file_names_are_safe():
    assert file_name("a/b c") == "a%2Fb c"
