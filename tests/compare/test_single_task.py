"""Weightings that are made of what each task reaches alone, or are told the metrics."""

import dataclasses
import re
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from toy_problem import IN_PARTS, TARGETS, THREE_TARGETS, make_problem

import mtl_jax
from mtl_jax._metrics import MetricsState
from mtl_jax.compare import SPACES, WEIGHTINGS, Run, Task, compare, r2, tune
from mtl_jax.compare.training import single_task

PROBLEM = make_problem(THREE_TARGETS, **IN_PARTS)
TASKS = list(PROBLEM.tasks)


def first_metric(run, task, epoch=-1):
    return run.metrics["validation"][task][PROBLEM.tasks[task].metrics[0].name][epoch]


def weights_of(select):
    """A weighting whose weights are numbers of the baselines, to see them."""

    def make(settings):
        assert settings.single_task is not None
        values = select(settings.single_task)
        return mtl_jax.vector_weighting(
            lambda losses, state, present, steps: (state, state),
            lambda tasks, key: tasks.vector(values, "the baselines"),
        )

    return make


def told(settings):
    """A weighting whose weights are the metrics that it was told last, 1 before."""

    def update(losses, state, present, steps):
        state = state.taken_in()
        return jnp.where(state.updates > 0, state.latest, 1), state

    return mtl_jax.vector_weighting(update, lambda tasks, key: MetricsState.create(tasks))


MAKES = {
    "metrics": weights_of(lambda reached: reached.metrics),
    "second": weights_of(lambda reached: {t: curve[1] for t, curve in reached.losses.items()}),
    "told": told,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare") / "runs"


@pytest.fixture(scope="module")
def results(folder):
    return compare(PROBLEM, MAKES, folder, seeds=[3, 4])


def test_baselines_are_those_of_the_same_seed(results):
    runs = results.of(PROBLEM.name)
    assert next(iter(runs)) == "equal"  # the order of the tables
    for index in range(2):
        for task in TASKS:
            alone = runs[f"{task} alone"][index]
            seen = runs["metrics"][index].weights[task]
            np.testing.assert_allclose(seen, first_metric(alone, task), rtol=1e-6)
            seen = runs["second"][index].weights[task]
            np.testing.assert_allclose(seen, alone.train_losses[task][1], rtol=1e-6)
    assert runs["metrics"][0].weights[TASKS[0]][0] != runs["metrics"][1].weights[TASKS[0]][0]
    assert runs["metrics"][1].compilations == 0  # numbers are arguments of one program


def test_metrics_are_told_after_every_epoch(results):
    steps = PROBLEM.steps_per_epoch
    for run in results.of(PROBLEM.name)["told"]:
        for task in TASKS:
            by_epoch = run.weights[task].reshape(PROBLEM.epochs, steps)
            expected = [1.0] + [first_metric(run, task, e) for e in range(PROBLEM.epochs - 1)]
            np.testing.assert_allclose(by_epoch, np.repeat([expected], steps, 0).T, rtol=1e-6)


def test_a_run_that_is_made_again_is_made_of_the_records(results, folder):
    (path,) = (folder / "records" / PROBLEM.name).glob("second_seed4*")
    path.unlink()
    again = compare(PROBLEM, MAKES, folder, seeds=[3, 4], resume=True)
    after = {run.weighting: run for run in again.runs if run.seed == 4}["second"]
    then = {run.weighting: run for run in results.runs if run.seed == 4}["second"]
    assert after.train_losses == then.train_losses
    assert path.exists()


def test_tuning_makes_them_of_the_chosen_trials_of_each_task_alone():
    makes = {"adaptive_alone": WEIGHTINGS["adaptive_alone"]}
    space = {"reference": SPACES["adaptive_alone"]["reference"]}
    tuning = tune(PROBLEM, makes, trials=2, spaces={"adaptive_alone": space})
    assert {trial.failure for trial in tuning.trials["adaptive_alone"]} == {None}
    assert tuning.trials["adaptive_alone"][0].parameters == {"reference": "end"}
    for task in TASKS:
        assert len(tuning.chosen(f"{task} alone").train_losses[task]) == PROBLEM.epochs
    assert list(tuning.trials)[:3] == ["equal", "constant", "adaptive_alone"]


def test_what_cannot_be_made_of_the_baselines_has_failed_and_the_others_run(tmp_path):
    """The R2 of a task is below 0 at first, of which there is no achievement."""
    problem = make_problem(tasks=dict.fromkeys(TARGETS, Task(r2())), epochs=1, learning_rate=1e-6)
    options = {"seeds": [0, 1], "tune": 1}
    results = compare(problem, ["achievement", "dwa"], tmp_path, **options)
    trials = results.tunings["toy"].trials
    reason = r"not to be made of what the tasks reach alone: .*metric must be in \(0, inf\)"
    assert re.match(reason, trials["achievement"][0].failure)
    assert trials["dwa"][0].failure is None
    runs = results.of("toy")
    assert all(re.match(reason, run.failure) and run.epochs == 0 for run in runs["achievement"])
    assert [run.failure for run in runs["dwa"]] == [None, None]
    assert "Failed: achievement, seed 1: not to be made" in (tmp_path / "toy.md").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = compare(problem, ["achievement", "dwa"], tmp_path, resume=True, **options)
    assert len(again.runs) == len(results.runs)


def test_a_task_that_failed_alone_stays_where_it_was():
    run = Run("toy", "", 0, train_losses={"line": [3.0, np.nan]})
    run.metrics = {"validation": {"line": {"squared error": [2.0, np.nan]}}}
    problem = make_problem(epochs=4)
    reached = single_task(problem, {"line": run})
    np.testing.assert_array_equal(reached.losses["line"], [3, 3, 3, 3])
    np.testing.assert_array_equal(reached.losses["square"], [1, 1, 1, 1])  # not known yet
    assert reached.metrics == {"line": 2.0, "square": 1.0}
    run.train_losses["line"] = [np.nan]
    assert np.isnan(single_task(problem, {"line": run}).losses["line"]).all()


@pytest.mark.parametrize("name", ["adaptive_alone", "achievement"])
def test_without_the_baselines_it_is_an_error_at_once(name):
    with pytest.raises(ValueError, match=f"{name} needs what each task reaches alone"):
        compare(PROBLEM, [name], seeds=[0], alone=False)


def test_relative_to_the_curve_is_at_the_same_epoch():
    """Weights by NumPy, for losses that are held."""
    curves = {"a": np.array([4.0, 2.0], np.float32), "b": np.array([1.0, 0.5], np.float32)}
    reached = mtl_jax.SingleTask(curves, {"a": 1.0, "b": 1.0}, {"a": True, "b": True})
    settings = mtl_jax.RunSettings(3, 2, PROBLEM.optimizer(0.1, 6), reached)
    losses = {"a": 2.0, "b": 1.0}
    for reference, references in (("end", [1] * 8), ("curve", [0] * 3 + [1] * 5)):
        weighting = WEIGHTINGS["adaptive_alone"](settings, reference=reference, emphasis=2.0)
        state = weighting.init(losses)
        for epoch in references:
            weights, state = weighting.update(losses, state)
            behind = np.array([losses[t] / curves[t][epoch] for t in "ab"]) ** 2
            np.testing.assert_allclose(list(weights.values()), 2 * behind / behind.sum(), rtol=1e-5)


def test_tasks_that_mean_nothing_alone_are_not_trained_alone():
    """As the terms of a physics-informed loss."""
    together = dataclasses.replace(PROBLEM, alone=False)
    results = compare(together, [], seeds=[0])
    assert list(results.of(PROBLEM.name)) == ["equal"]
    assert list(tune(together, {}, trials=1).trials) == ["equal", "constant"]
    with pytest.raises(ValueError, match="adaptive_alone needs what each task reaches alone"):
        compare(together, ["adaptive_alone"], seeds=[0])
    with pytest.raises(ValueError, match="leave `alone` .*also the problem's"):
        compare(together, [], seeds=[0], tune=1, select="worst")
