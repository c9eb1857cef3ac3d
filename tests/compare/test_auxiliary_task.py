"""A task without a metric: it is trained and weighted, and counts in no mean over the tasks."""

import dataclasses

import numpy as np
import pytest
from toy_problem import SQUARED_ERROR, make_problem

from mtl_jax.compare import Task, compare, tune
from mtl_jax.compare.analysis import Analysis
from mtl_jax.compare.report import write_report

NAMES = ["adaptive", "adaptive_alone", "dynamic_task_prioritization"]


@pytest.fixture(scope="module")
def problem():
    problem = make_problem(tasks={"line": Task(SQUARED_ERROR), "square": Task(())})
    predict = problem.predict  # a task without a metric needs no output and no labels
    without = {
        split: {
            field: values for field, values in getattr(problem, split).items() if field != "square"
        }
        for split in ("validation", "test")
    }
    return dataclasses.replace(
        problem, predict=lambda *args: {"line": predict(*args)["line"]}, **without
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def results(problem, folder):
    return compare(problem, NAMES, folder, seeds=[0, 1])


def test_it_is_trained_and_weighted(problem, results):
    runs = results.of(problem.name)
    assert {"line alone", "square alone", *NAMES} < set(runs)
    for run in runs["adaptive"]:
        assert run.failure is None
        assert run.train_losses["square"][-1] < run.train_losses["square"][0]
        assert np.ptp(run.weights["square"]) > 0
        assert run.metrics["test"]["square"] == {}
    assert "square" not in runs["line alone"][0].train_losses


def assert_changed(estimate, expected):
    assert estimate is not None
    np.testing.assert_allclose(estimate.values, expected, rtol=1e-6)


def test_it_counts_in_no_mean(problem, results):
    analysis = Analysis(results, problem.name)
    assert [column.task for column in analysis.columns] == ["line"]
    rows = {row.name: row for row in analysis.rows}
    errors = {
        name: np.array([run.metrics["test"]["line"]["squared error"][-1] for run in runs])
        for name, runs in results.of(problem.name).items()
        if name != "square alone"
    }
    for name in NAMES:
        change = (errors["equal"] - errors[name]) / errors["equal"]
        assert_changed(rows[name].against_equal, change)
        assert rows[name].worst_task == "line"
        change = (errors["line alone"] - errors[name]) / errors["line alone"]
        assert_changed(rows[name].against_alone, change)


def test_it_is_named_in_the_report(results, folder):
    write_report(results, folder / "report")
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert "square (no metric)" in page


@pytest.mark.parametrize("select", ["mean", "worst"])
def test_tuning_is_for_the_others(problem, select):
    tuning = tune(problem, {}, trials=2, select=select)

    def error_of(trial):
        return trial.validation["line"]["squared error"][-1]

    first, second = tuning.trials["equal"]
    reference = error_of(first if select == "mean" else tuning.chosen("line alone"))
    assert second.score == pytest.approx(1 - error_of(second) / reference, rel=1e-6)
    assert tuning.chosen("square alone") == tuning.trials["square alone"][0]  # nothing to choose by


def test_a_weighting_of_the_metrics_says_what_it_misses(problem):
    with pytest.raises(ValueError, match="achievement needs a metric of every task; square: none"):
        compare(problem, ["achievement"], seeds=[0])
