"""Tuning: one budget for all, a choice on validation data, a search that repeats itself."""

import dataclasses
import functools
import inspect
import json
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest
from toy_problem import THREE_TARGETS, errors_of, make_problem

import mtl_jax
from mtl_jax.compare import (
    SPACES,
    WEIGHTINGS,
    Choice,
    OtherConfigurationError,
    Range,
    RunSettings,
    TaskWeights,
    TuningError,
    compare,
    compare_and_report,
    named_weightings,
    tune,
)
from mtl_jax.compare.command_line import Options, run
from mtl_jax.compare.referee import make_weightings
from mtl_jax.compare.search import Search
from mtl_jax.compare.settings import TUNING_SEED
from mtl_jax.compare.tuning_table import tuning_table

TASKS = ("right", "wrong")


def linear_split(size, seed, noise):
    draws = np.random.default_rng(seed)
    x = draws.normal(size=(size, 3)).astype(np.float32)
    y = x @ np.array([1.0, -2.0, 0.5], np.float32)
    wrong = draws.normal(size=size).astype(np.float32)
    return {"x": x, "right": y, "wrong": noise * wrong + (1 - noise) * y}


def predictions(params, batch):
    return dict.fromkeys(TASKS, batch["x"] @ params)


def linear_problem(**changes):
    """One linear map for two tasks, of which the second has noise for its training labels."""
    return make_problem(
        TASKS,
        **{
            "name": "linear",
            "train": linear_split(128, 0, 1),
            "validation": linear_split(50, 1, 0),
            "test": linear_split(50, 2, 0),
            "init": lambda key: (jax.random.normal(key, (3,)), {}),
            "losses": lambda params, state, key, batch: (
                errors_of(predictions(params, batch), batch),
                state,
            ),
            "scores": lambda params, state, batch: {
                task: (predictions(params, batch)[task] - batch[task]) ** 2 for task in TASKS
            },
            "learning_rate": 0.05,
            "epochs": 4,
        }
        | changes,
    )


PROBLEM = linear_problem()


def without_seconds(tuning):
    return {
        name: [dataclasses.replace(trial, seconds=0.0) for trial in row]
        for name, row in tuning.trials.items()
    }


@functools.cache
def tuned():
    return tune(PROBLEM, named_weightings(["adaptive"]), trials=3)


def test_the_same_budget_for_all_from_the_shipped_setting_on():
    tuning = tuned()
    assert list(tuning.trials) == ["equal", "constant", "adaptive", "right alone", "wrong alone"]
    for name, trials in tuning.trials.items():
        assert len(trials) == 3
        assert all(trial.epochs == PROBLEM.epochs and trial.failure is None for trial in trials)
        assert trials[0].learning_rate == PROBLEM.learning_rate
        rates = [trial.learning_rate for trial in trials]
        assert len(set(rates)) == 3
        assert rates == pytest.approx([0.05, 0.05 / 10**0.5, 0.05 * 10**0.5])
        assert tuning.chosen(name).score == max(trial.score for trial in trials)
    assert tuning.trials["equal"][0].score == 0
    assert tuning.trials["constant"][0].parameters == {"weights": {"right": 1.0, "wrong": 1.0}}
    assert tuning.trials["constant"][0].validation == tuning.trials["equal"][0].validation
    assert tuning.trials["adaptive"][0].parameters == {
        "emphasis": 1.0,
        "rule": "proportional",
        "decay": 0.0,
    }
    assert tuning.trials["equal"][1].parameters == {}


def test_score_is_the_change_from_equal_weights_as_shipped():
    shipped = tuned().trials["equal"][0].validation
    trial = tuned().trials["adaptive"][2]
    changes = [1 - trial.validation[task][-1] / shipped[task][-1] for task in TASKS]
    assert trial.score == pytest.approx(np.mean(changes), rel=1e-12)
    alone = tuned().trials["right alone"][1]
    assert list(alone.validation) == ["right"]
    expected = 1 - alone.validation["right"][-1] / shipped["right"][-1]
    assert alone.score == pytest.approx(expected, rel=1e-12)


FLIPPED = {"x": PROBLEM.test["x"]} | {task: -PROBLEM.test[task] for task in TASKS}


@functools.cache
def tuned_again():
    """The same on a problem with another test split."""
    problem = PROBLEM.with_settings(test=FLIPPED)
    return tune(problem, named_weightings(["adaptive"]), trials=3, alone=False)


def test_search_repeats_itself_and_does_not_see_the_test_split():
    expected = without_seconds(tuned())
    again = without_seconds(tuned_again())
    assert again == {name: expected[name] for name in again}


def test_choice_is_that_of_the_validation_split():
    chosen = tuned_again().chosen("equal")
    assert chosen.learning_rate == tuned().chosen("equal").learning_rate
    problem = PROBLEM.with_settings(test=FLIPPED, validation=FLIPPED)
    peeking = tune(problem, {}, trials=3, alone=False)
    assert peeking.chosen("equal").learning_rate != chosen.learning_rate


def test_constant_weights_leave_out_the_task_with_wrong_labels():
    problem = PROBLEM.with_settings(epochs=16)
    tuning = tune(problem, {}, trials=12, alone=False)
    chosen = tuning.chosen("constant")
    weights = chosen.parameters["weights"]
    assert sum(weights.values()) == pytest.approx(2)
    assert weights["right"] > 5 * weights["wrong"]
    assert chosen.score > 0.5 > tuning.chosen("equal").score


def test_failing_trials_are_counted_and_not_chosen():
    def brittle(settings, broken="no"):
        def update(losses, state, *rest):
            return losses * (jnp.nan if broken == "yes" else 0) + 1, state

        return mtl_jax.vector_weighting(update)

    def bad(settings):
        return mtl_jax.vector_weighting(lambda losses, *rest: (losses * jnp.nan, rest[0]))

    spaces = {"brittle": {"broken": Choice("no", "yes")}, "constant": {}}
    weightings = {"brittle": brittle, "bad": bad}
    tuning = tune(PROBLEM, weightings, trials=4, seed=1, alone=False, spaces=spaces)
    assert [trial.parameters for trial in tuning.trials["constant"]] == [{}] * 4
    trials = tuning.trials["brittle"]
    failed = [trial for trial in trials if trial.parameters["broken"] == "yes"]
    assert failed
    assert all(trial.failure == "no finite update in epoch 1" for trial in failed)
    assert all(trial.score is None and trial.epochs == 1 for trial in failed)
    assert all((trial.score is None) == (trial in failed) for trial in trials)
    assert tuning.chosen("brittle").parameters == {"broken": "no"}
    assert tuning.chosen("bad") == tuning.trials["bad"][0]
    assert f"4 ({len(failed)} failed)" in tuning_table(tuning).markdown()
    assert "4 (4 failed)" in tuning_table(tuning).markdown()


def test_without_a_baseline_there_is_an_error():
    nothing = PROBLEM.with_settings(
        epochs=1,
        losses=lambda params, state, key, batch: (
            dict.fromkeys(TASKS, jnp.nan * jnp.sum(params)),
            state,
        ),
    )
    with pytest.raises(TuningError, match="learning rate, 0.05; but there no finite update"):
        tune(nothing, {}, trials=2, alone=False)
    zero = PROBLEM.with_settings(
        epochs=1,
        scores=lambda params, state, batch: dict.fromkeys(TASKS, jnp.zeros(len(batch["x"]))),
    )
    with pytest.raises(TuningError, match="metric of right, wrong is 0"):
        tune(zero, {}, trials=2, alone=False)


def test_interrupted_and_resumed_with_pruning(tmp_path):
    options = {"trials": 9, "alone": False, "prune": True}
    undisturbed = tune(PROBLEM, {}, **options)
    pruned = [trial for trial in undisturbed.trials["constant"] if trial.failure == "pruned"]
    assert pruned
    assert all(2 <= trial.epochs < PROBLEM.epochs and trial.score is None for trial in pruned)
    assert f"9 ({len(pruned)} pruned)" in tuning_table(undisturbed).markdown()

    class StopError(Exception):
        pass

    def stop_at(name, number):
        def on_trial(now, trials):
            if (now, len(trials)) == (name, number):
                raise StopError

        return on_trial

    for place in (("equal", 7), ("constant", 8)):
        with pytest.raises(StopError):
            tune(PROBLEM, {}, folder=tmp_path, on_trial=stop_at(*place), **options)
    trained = []
    resumed = tune(PROBLEM, {}, folder=tmp_path, on_epoch=trained.append, **options)
    assert without_seconds(resumed) == without_seconds(undisturbed)
    assert len(trained) == undisturbed.trials["constant"][-1].epochs
    again = tune(PROBLEM, {}, folder=tmp_path, **options)
    assert again == resumed
    for changed, message in (
        (PROBLEM.with_settings(batch_size=16), "batch_size is .*16.* and was .*32"),
        (PROBLEM.with_settings(validation=PROBLEM.test), "the data differ"),
    ):
        with pytest.raises(OtherConfigurationError, match=message):
            tune(changed, {}, folder=tmp_path, **options)
    spaces = {"constant": {"weights": TaskWeights(limit=1.0)}}
    with pytest.raises(OtherConfigurationError, match="what is searched differs"):
        tune(PROBLEM, {}, folder=tmp_path, spaces=spaces, **options)


def test_several_at_once_find_the_same_and_end_together(tmp_path):
    weightings = named_weightings(["adaptive"])
    seen = []
    at_once = tune(
        PROBLEM, weightings, trials=3, jobs=3, on_trial=lambda name, trials: seen.append(name)
    )
    assert without_seconds(at_once) == without_seconds(tuned())
    assert list(at_once.trials) == list(tuned().trials)
    assert seen[0] == "equal"
    assert sorted(seen) == sorted(list(tuned().trials) * 3)

    class StopError(BaseException):
        """Stands for a signal."""

    def stop(name, trials):
        if name == "constant":
            raise StopError

    before = threading.active_count()
    with pytest.raises(StopError):
        tune(PROBLEM, weightings, trials=1000, jobs=2, on_trial=stop)
    assert threading.active_count() == before


def test_comparison_runs_with_what_was_chosen():
    weightings = named_weightings(["adaptive"])
    comparison = compare(PROBLEM, weightings, tuning=tuned(), seeds=[0])
    assert list(comparison.runs) == ["equal", "constant", "adaptive"]
    for name in ("equal", "adaptive"):
        chosen = tuned().chosen(name)
        assert chosen.learning_rate != PROBLEM.learning_rate
        problem = PROBLEM.with_settings(learning_rate=chosen.learning_rate)
        make = functools.partial(WEIGHTINGS[name], **chosen.parameters)
        expected = compare(problem, {name: make}, seeds=[0], alone=False)
        assert comparison.runs[name][0].test == expected.runs[name][0].test
    lone = tuned().chosen("right alone").learning_rate
    expected = compare(PROBLEM.with_settings(learning_rate=lone), {}, seeds=[0])
    assert comparison.alone["right"][0].test == expected.alone["right"][0].test
    with pytest.raises(ValueError, match="Seed 1000 is the one of the tuning"):
        compare(PROBLEM, weightings, tuning=tuned(), seeds=[0, TUNING_SEED])
    with pytest.raises(ValueError, match="'dwa' was not tuned"):
        compare(PROBLEM, named_weightings(["dwa"]), tuning=tuned())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="`trials` must be at least 1"):
        tune(PROBLEM, {}, trials=0)
    with pytest.raises(ValueError, match="`jobs` must be at least 1"):
        tune(PROBLEM, {}, trials=1, jobs=0)
    with pytest.raises(ValueError, match="spaces for \\['dwa'\\]"):
        tune(PROBLEM, {}, trials=1, spaces={"dwa": {}})
    with pytest.raises(ValueError, match="'krum' cannot run on 'linear'"):
        tune(PROBLEM, named_weightings(["krum"]), trials=1)
    with pytest.raises(ValueError, match="low <= default <= high"):
        Range(2.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="0 < low on a logarithmic scale"):
        Range(0.5, 0.0, 1.0, log=True)
    with pytest.raises(ValueError, match="at least one value"):
        Choice()


def test_optuna_logs_no_trials_and_is_left_as_it_was(capfd):
    optuna.logging.set_verbosity(optuna.logging.INFO)
    tune(PROBLEM, {}, trials=1, alone=False)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", SPACES)
def test_spaces_begin_at_the_defaults_and_hold_valid_parameters(name):
    settings = RunSettings(4, 5, PROBLEM.optimizer(0.1, 20))
    problem = make_problem(THREE_TARGETS)
    for parameter, dimension in SPACES[name].items():
        if isinstance(dimension, TaskWeights):
            continue
        first = dimension.first(parameter, [])[parameter]
        (method,) = (one for one in mtl_jax.METHODS.values() if name in one.spaces)
        default = inspect.signature(method.factory).parameters[parameter].default
        required = {"dynamic_task_priority": {"gamma": 1.0}, "uw_so": {"temperature": 1.0}}
        assert first == required.get(name, {}).get(parameter, default)
        extremes = (
            dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)
        )
        for value in extremes:
            make = functools.partial(WEIGHTINGS[name], **{parameter: value})
            make_weightings(problem, {name: make})
            assert make(settings).update is not None


def test_task_weights_are_orthonormal_log_ratios():
    tasks, dimension = ["a", "b", "c", "d"], TaskWeights()
    first = optuna.trial.FixedTrial(dimension.first("w", tasks))
    assert dimension.draw(first, "w", tasks) == dict.fromkeys(tasks, 1.0)
    z = np.array([0.3, -2.0, 1.1])
    trial = optuna.trial.FixedTrial({f"w {i}": value for i, value in enumerate(z, start=1)})
    weights = np.array(list(dimension.draw(trial, "w", tasks).values()))
    assert weights.sum() == pytest.approx(4, rel=1e-12)
    logs = np.log(weights) - np.log(weights).mean()
    assert np.linalg.norm(logs) == pytest.approx(np.linalg.norm(z), rel=1e-12)
    assert dimension.draw(optuna.trial.FixedTrial({}), "w", ["a"]) == {"a": 1.0}


PAGE = pathlib.Path(__file__).parents[2] / "docs" / "tuning.md"


def row(name):
    entries = []
    for parameter, dimension in SPACES[name].items():
        default = f", {dimension.default:g} by default" if isinstance(dimension, Range) else ""
        entries.append(f"`{parameter}`: {dimension}{default}")
    return f"| `{name}` | {'; '.join(entries)} |"


def test_page_lists_what_is_searched():
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [row(name) for name in SPACES]
    assert f"All trials have one seed, {TUNING_SEED}," in text


def test_report_tells_what_was_chosen_and_resumes(tmp_path):
    weightings = named_weightings(["equal"])
    options = {"seeds": [0, 1], "alone": False, "tune_trials": 3}
    (comparison,) = compare_and_report([PROBLEM], weightings, tmp_path / "whole", **options)

    class StopError(Exception):
        pass

    written = json.loads((tmp_path / "whole" / "results.json").read_text())["linear"]
    chosen = comparison.tuning.chosen("constant")
    found = written["tuning"]["chosen"]["constant"]
    assert found["learning_rate"] == chosen.learning_rate
    assert found["parameters"] == chosen.parameters
    assert found["validation_change"] == chosen.score
    assert len(written["tuning"]["trials"]["equal"]) == 3
    assert written["tuning"]["seed"] == TUNING_SEED
    report = (tmp_path / "whole" / "linear.md").read_text()
    section = report[report.index("## Chosen by tuning") :]
    assert f"{chosen.learning_rate:.3g}" in section
    assert f"{100 * chosen.score:+.2f}" in section
    assert "learning rate as tuned (shipped: 0.05)" in report
    assert "Chosen by tuning" in (tmp_path / "whole" / "report.html").read_text()

    with pytest.MonkeyPatch.context() as patch:
        # Killed in the fifth trial, which is the second of constant weights.
        trained = []

        def train(self, *args, original=Search._train):
            trained.append(self.name)
            if len(trained) == 5:
                raise StopError
            return original(self, *args)

        patch.setattr(Search, "_train", train)
        patch.setattr("mtl_jax.compare.report.figures", lambda comparison: {})
        with pytest.raises(StopError):
            compare_and_report([PROBLEM], weightings, tmp_path / "killed", **options)
        with pytest.raises(FileExistsError, match="holds a comparison already"):
            compare_and_report([PROBLEM], weightings, tmp_path / "killed", **options)
        compare_and_report([PROBLEM], weightings, tmp_path / "killed", resume=True, **options)
        assert trained == ["equal"] * 3 + ["constant"] * 4
    results = [(tmp_path / name / "results.json").read_bytes() for name in ("whole", "killed")]
    assert results[0] == results[1]
    with pytest.raises(OtherConfigurationError, match="learning_rate is 0.05 and was"):
        compare_and_report(
            [PROBLEM], weightings, tmp_path / "killed", resume=True, seeds=[0, 1], alone=False
        )
    with pytest.raises(ValueError, match="Seed 1000 is the one of the tuning"):
        compare_and_report(
            [PROBLEM], weightings, tmp_path / "new", tune_trials=1, seeds=[TUNING_SEED]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": 0}, "--tune must be at least 1, got 0"),
        ({"tune": 2, "jobs": 0}, "--jobs must be at least 1, got 0"),
        ({"prune": True}, "--prune and --jobs are about the trials of --tune"),
        ({"jobs": 2}, "--prune and --jobs are about the trials of --tune"),
        ({"tune": 2, "jobs": 2, "data_parallel": True}, "--jobs must be 1"),
        ({"tune": 2, "seeds": 1001}, "--seeds must be at most 1000 with --tune"),
        ({"tune": 1, "epochs": 1, "learning_rate": 1e30}, "measured against equal weights"),
    ],
)
def test_command_line_says_what_is_wrong(options, message, tmp_path, capsys):
    options = Options(weightings=("equal",), alone=False, runs_dir=tmp_path, **options)
    with pytest.raises(SystemExit) as exit_:
        run(options, ["linear"], lambda name, data_dir: PROBLEM, ["mtl-jax"])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_command_line_passes_the_options_on(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(
        "mtl_jax.compare.command_line.compare_and_report",
        lambda *args, **options: given.update(options),
    )
    options = Options(runs_dir=tmp_path, tune=3, jobs=2, prune=True)
    run(options, ["linear"], lambda name, data_dir: PROBLEM, ["mtl-jax"])
    assert (given["tune_trials"], given["jobs"], given["prune"]) == (3, 2, True)
