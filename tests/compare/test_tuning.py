"""Tuning: one budget for all, a choice on validation data, a search that repeats itself."""

import dataclasses
import functools
import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest
from toy_problem import SQUARED_ERROR, THREE_TARGETS, errors_of, make_problem

import mtl_jax
from mtl_jax.compare import (
    SPACES,
    WEIGHTINGS,
    Choice,
    DamagedFileError,
    OtherSettingsError,
    Range,
    RunSettings,
    Task,
    TaskWeights,
    TuningError,
    compare,
    mean_absolute_error,
    named_weightings,
    tune,
)
from mtl_jax.compare.command_line import Options, run
from mtl_jax.compare.training import Setting, Trainer, single_task
from mtl_jax.compare.tuning import TUNING_SEED, _Search

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
        **{
            "tasks": dict.fromkeys(TASKS, Task([SQUARED_ERROR, mean_absolute_error()])),
            "name": "linear",
            "train": linear_split(128, 0, 1),
            "validation": linear_split(50, 1, 0),
            "test": linear_split(50, 2, 0),
            "init": lambda key: (jax.random.normal(key, (3,)), {}),
            "losses": lambda params, state, key, batch: (
                errors_of(predictions(params, batch), batch),
                state,
            ),
            "predict": lambda params, state, batch: predictions(params, batch),
            "learning_rate": 0.05,
            "epochs": 4,
        }
        | changes,
    )


PROBLEM = linear_problem()
METRICS = [metric.name for metric in PROBLEM.tasks["right"].metrics]


def without_times(tuning):
    times = {"seconds": 0.0, "compile_seconds": 0.0, "compilations": 0}
    return {
        name: [dataclasses.replace(trial, **times) for trial in row]
        for name, row in tuning.trials.items()
    }


@functools.cache
def tuned():
    return tune(PROBLEM, named_weightings(["adaptive"]), trials=3)


def test_the_same_budget_for_all_from_the_default_setting_on():
    tuning = tuned()
    assert list(tuning.trials) == ["equal", "constant", "adaptive", "right alone", "wrong alone"]
    for name, trials in tuning.trials.items():
        assert len(trials) == 3
        assert all(trial.epochs == PROBLEM.epochs and trial.failure is None for trial in trials)
        assert trials[0].learning_rate == PROBLEM.learning_rate
        rates = [trial.learning_rate for trial in trials]
        assert len(set(rates)) == 3
        assert rates == pytest.approx([0.05, 0.05 * 10**0.5, 0.05 / 10**0.5])
        assert tuning.chosen(name).score == max(trial.score for trial in trials)
    assert tuning.trials["equal"][0].score == 0
    assert tuning.trials["constant"][0].parameters == {"weights": {"right": 1.0, "wrong": 1.0}}
    for task in TASKS:
        np.testing.assert_allclose(
            tuning.trials["constant"][0].validation[task][METRICS[1]],
            tuning.trials["equal"][0].validation[task][METRICS[1]],
            rtol=1e-6,
        )
    assert tuning.trials["adaptive"][0].parameters == {
        "emphasis": 1.0,
        "rule": "proportional",
        "decay": 0.0,
    }
    assert tuning.trials["equal"][1].parameters == {}


def test_first_the_learning_rate_then_both_near_the_best_of_it():
    tuning = tune(PROBLEM.with_settings(epochs=1), {}, trials=11, alone=False)
    for name, trials in tuning.trials.items():
        places = np.log10([trial.learning_rate / PROBLEM.learning_rate for trial in trials])
        assert places[:5] == pytest.approx([0, 0.5, -0.5, 1, -1])
        assert all(trial.parameters == trials[0].parameters for trial in trials[:5])
        best = places[np.argmax([trial.score for trial in trials[:5]])]
        away = np.array([-0.1, 0.15, -0.2, 0.25, -0.05])
        expected = best - np.abs(away) if best == 1 else best + away  # turned back at the end
        assert places[5:10] == pytest.approx(expected)
        assert abs(places[10]) <= 1
        if name == "constant":
            assert len({str(trial.parameters) for trial in trials[5:]}) == 6


def test_a_weighting_is_compiled_once_for_all_its_trials():
    """Numbers are arguments of a program; only another rule, a text, is another program."""
    for name, trials in tuned().trials.items():
        compiled = [trial.compilations > 0 for trial in trials]
        rules = [trial.parameters.get("rule") for trial in trials]
        new = [rule not in rules[:number] for number, rule in enumerate(rules)]
        assert compiled == (new if name != "wrong alone" else [False] * 3)
        assert all(trial.compilations < 12 for trial in trials)


def change(trial, task):
    """The mean over a task's metrics of the relative change from equal weights by default."""
    default = tuned().trials["equal"][0].validation[task]
    found = [1 - trial.validation[task][name][-1] / default[name][-1] for name in METRICS]
    return np.mean(found)


def test_score_is_the_change_from_equal_weights_by_default():
    trial = tuned().trials["adaptive"][2]
    assert trial.score == pytest.approx(np.mean([change(trial, t) for t in TASKS]), rel=1e-12)
    first, alone, _ = tuned().trials["right alone"]
    assert list(alone.validation) == ["right"]
    ends = [[trial.validation["right"][name][-1] for name in METRICS] for trial in (first, alone)]
    assert first.score == 0
    assert alone.score == pytest.approx(np.mean(1 - np.divide(ends[1], ends[0])), rel=1e-12)


def test_the_worst_task_is_measured_against_what_it_reaches_alone():
    """The same trials, as long as the same learning rate is the best; another score."""
    tuning = tune(PROBLEM, {}, trials=3, select="worst")
    assert tuning.select == "worst"
    alone = {task: tuned().chosen(f"{task} alone").validation[task] for task in TASKS}
    assert {task: tuning.chosen(f"{task} alone").validation[task] for task in TASKS} == alone
    for trial, other in zip(tuning.trials["equal"], tuned().trials["equal"], strict=True):
        assert trial.validation == other.validation
        changes = [
            np.mean(
                [1 - trial.validation[task][name][-1] / alone[task][name][-1] for name in METRICS]
            )
            for task in TASKS
        ]
        assert trial.score == pytest.approx(min(changes), rel=1e-12)
    # So equal weights leave their default where another learning rate serves the worst task better.
    assert tuning.chosen("equal") != tuning.trials["equal"][0]


def test_a_metric_that_equal_weights_leave_at_0_is_left_out():
    zero = dataclasses.replace(
        mean_absolute_error(), name="nothing", compute=lambda sums: 0.0, higher_is_better=True
    )
    problem = linear_problem(tasks=dict.fromkeys(TASKS, Task([zero, SQUARED_ERROR])), epochs=1)
    (_, trial), *_ = tune(problem, {}, trials=2, alone=False).trials.values()
    first = tune(problem, {}, trials=1, alone=False).trials["equal"][0].validation
    changes = [
        1 - trial.validation[task]["squared error"][-1] / first[task]["squared error"][-1]
        for task in TASKS
    ]
    assert trial.score == pytest.approx(np.mean(changes), rel=1e-12)


FLIPPED = {"x": PROBLEM.test["x"]} | {task: -PROBLEM.test[task] for task in TASKS}


@functools.cache
def tuned_again():
    """The same on a problem with another test split."""
    problem = PROBLEM.with_settings(test=FLIPPED)
    return tune(problem, named_weightings(["adaptive"]), trials=3, alone=False)


def test_search_repeats_itself_and_does_not_see_the_test_split():
    expected = without_times(tuned())
    again = without_times(tuned_again())
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
    tuning = tune(PROBLEM, weightings, trials=9, seed=1, alone=False, spaces=spaces)
    assert [trial.parameters for trial in tuning.trials["constant"]] == [{}] * 9
    trials = tuning.trials["brittle"]
    failed = [trial for trial in trials if trial.parameters["broken"] == "yes"]
    assert failed
    assert all(trial.failure == "no finite update in epoch 1" for trial in failed)
    assert all(trial.score is None and trial.epochs == 1 for trial in failed)
    assert all((trial.score is None) == (trial in failed) for trial in trials)
    assert tuning.chosen("brittle").parameters == {"broken": "no"}
    assert tuning.chosen("bad") == tuning.trials["bad"][0]


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
    wrong = dataclasses.replace(mean_absolute_error(), compute=lambda sums: float("nan"))
    undefined = PROBLEM.with_settings(epochs=1, tasks=dict.fromkeys(TASKS, Task(wrong)))
    with pytest.raises(TuningError, match="metrics of right, wrong are 0 or undefined"):
        tune(undefined, {}, trials=2, alone=False)


def test_interrupted_and_resumed_with_pruning(tmp_path):
    options = {"trials": 9, "alone": False, "prune": True}
    undisturbed = tune(PROBLEM, {}, **options)
    pruned = [trial for trial in undisturbed.trials["constant"] if trial.failure == "pruned"]
    assert pruned
    assert all(2 <= trial.epochs < PROBLEM.epochs and trial.score is None for trial in pruned)

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
    resumed = tune(
        PROBLEM,
        {},
        folder=tmp_path,
        on_steps=lambda run, step, losses: trained.append(run.epochs),
        **options,
    )
    assert without_times(resumed) == without_times(undisturbed)
    assert len(trained) == undisturbed.trials["constant"][-1].epochs
    again = tune(PROBLEM, {}, folder=tmp_path, **options)
    assert again == resumed
    for changed, message in (
        (PROBLEM.with_settings(batch_size=16), "batch_size is .*16.* and was .*32"),
        (PROBLEM.with_settings(validation=PROBLEM.test), "the data differ"),
    ):
        with pytest.raises(OtherSettingsError, match=message):
            tune(changed, {}, folder=tmp_path, **options)
    spaces = {"constant": {"weights": TaskWeights(limit=1.0)}}
    with pytest.raises(OtherSettingsError, match="space is .*limit=1.0.* and was .*limit=2.5"):
        tune(PROBLEM, {}, folder=tmp_path, spaces=spaces, **options)
    with pytest.raises(OtherSettingsError, match="select is 'worst' and was 'mean'"):
        tune(PROBLEM, {}, folder=tmp_path, **(options | {"select": "worst", "alone": True}))
    file = tmp_path / "linear" / "equal.json"
    file.write_text(file.read_text().replace("COMPLETE", "FAIL"))
    with pytest.raises(DamagedFileError, match=r"equal.json is damaged.*Remove it"):
        tune(PROBLEM, {}, folder=tmp_path, **options)


def test_comparison_runs_with_what_was_chosen(tmp_path):
    results = compare(PROBLEM, ["adaptive"], tune=3, seeds=[0], alone=True)
    assert list(results.of("linear")) == [*tuned().trials]
    assert without_times(results.tunings["linear"]) == without_times(tuned())
    trainer = Trainer(PROBLEM)
    for name, (found,) in results.of("linear").items():
        chosen = tuned().chosen(name)
        assert (found.learning_rate, found.parameters) == (chosen.learning_rate, chosen.parameters)
        assert found.compilations == 0 or name == "equal"  # for which the test split is new
        if found.task is None:
            setting = Setting(name, WEIGHTINGS[name], chosen.learning_rate, chosen.parameters)
            *_, expected = trainer.run(setting, 0)
            assert found.metrics == expected.metrics
    assert tuned().chosen("equal").learning_rate != PROBLEM.learning_rate


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="number of trials must be at least 1, got 0"):
        tune(PROBLEM, {}, trials=0)
    with pytest.raises(ValueError, match="`select` must be 'mean' or 'worst', got 'best'"):
        tune(PROBLEM, {}, trials=1, select="best")
    with pytest.raises(ValueError, match="to tune for it .*, leave `alone` .* at its default"):
        tune(PROBLEM, {}, trials=1, select="worst", alone=False)
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
    problem = make_problem(THREE_TARGETS)
    settings = RunSettings(4, 5, PROBLEM.optimizer(0.1, 20), single_task(problem, {}))
    trainer = Trainer(problem)
    for parameter, dimension in SPACES[name].items():
        if isinstance(dimension, TaskWeights):
            continue
        first = dimension.first(parameter, [])[parameter]
        methods = [one for one in mtl_jax.METHODS.values() if name in one.spaces]
        factory = methods[0].factory if methods else mtl_jax.adaptive  # adaptive_alone
        parameters = inspect.signature(factory).parameters
        default = "end" if parameter == "reference" else parameters[parameter].default
        required = {"dynamic_task_prioritization": {"gamma": 1.0}, "uw_so": {"temperature": 1.0}}
        assert first == required.get(name.removesuffix("_metrics"), {}).get(parameter, default)
        extremes = (
            dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)
        )
        for value in extremes:
            make = functools.partial(WEIGHTINGS[name], **{parameter: value})
            setting = Setting(name, make, 0.1, single_task=settings.single_task)
            trainer.new_run(setting, 0)
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


def test_report_tells_what_was_chosen_and_resumes(tmp_path, monkeypatch):
    options = {"seeds": [0, 1], "alone": False, "tune": 3}
    results = compare(PROBLEM, {}, tmp_path / "whole", **options)

    class StopError(Exception):
        pass

    written = json.loads((tmp_path / "whole" / "results.json").read_text())
    chosen = results.tunings["linear"].chosen("constant")
    tuning = written["tunings"]["linear"]
    assert (tuning["seed"], tuning["select"]) == (TUNING_SEED, "mean")
    assert len(tuning["trials"]["equal"]) == 3
    found = max(tuning["trials"]["constant"], key=lambda trial: trial["score"])
    assert found["learning_rate"] == pytest.approx(chosen.learning_rate, rel=1e-5)
    report = (tmp_path / "whole" / "linear.md").read_text()
    assert f"{chosen.learning_rate:.3g}" in report
    assert "learning rate as tuned (default: 0.05)" in report

    # Killed in the fifth trial, which is the second of constant weights.
    trained, original = [], _Search._next

    def train(self, *args):
        trained.append(self.setting.name)
        if len(trained) == 5:
            raise StopError
        return original(self, *args)

    monkeypatch.setattr(_Search, "_next", train)
    folder = tmp_path / "killed"
    with pytest.raises(StopError):
        compare(PROBLEM, {}, folder, **options)
    with pytest.raises(FileExistsError, match="holds a comparison already"):
        compare(PROBLEM, {}, folder, **options)
    compare(PROBLEM, {}, folder, resume=True, **options)
    assert trained == ["equal"] * 3 + ["constant"] * 4
    found = [(tmp_path / name / "results.json").read_bytes() for name in ("whole", "killed")]
    assert found[0] == found[1]
    with pytest.raises(OtherSettingsError, match="learning_rate is 0.05 and was"):
        compare(PROBLEM, {}, folder, seeds=[0, 1], alone=False, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": 0}, "The number of trials must be at least 1, got 0"),
        ({"prune": True}, "(--prune, --select) are about the trials of tuning"),
        ({"select": "worst"}, "(--prune, --select) are about the trials of tuning"),
        ({"tune": 2, "seeds": 1001}, "Seed 1000 is the one of the tuning"),
        (
            {"tune": 1, "select": "worst"},
            "leave `alone` (--alone, also the problem's)",
        ),
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
        "mtl_jax.compare.command_line.compare",
        lambda *args, **options: given.update(options),
    )
    options = Options(runs_dir=tmp_path, tune=3, select="worst", prune=True)
    run(options, ["linear"], lambda name, data_dir: PROBLEM, ["mtl-jax"])
    assert (given["tune"], given["select"], given["prune"]) == (3, "worst", True)
