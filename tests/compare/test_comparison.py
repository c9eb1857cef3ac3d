import dataclasses
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from toy_problem import IN_PARTS, TARGETS, make_problem, split

import mtl_jax
from mtl_jax.compare import Results, Task, compare, mean_of, named_weightings
from mtl_jax.compare.comparison import _Progress
from mtl_jax.compare.report import print_tables
from tests.compare.problems import ALL

ERROR = "squared error"
scores_of_no_example = mean_of(lambda output, label: output.sum(), "nothing")


def nothing_finite(settings):
    return mtl_jax.vector_weighting(lambda losses, *rest: (losses * jnp.nan, rest[0]))


@pytest.fixture(scope="module")
def problem():
    return make_problem()


@pytest.fixture(scope="module")
def results(problem):
    """Of weightings whose runs are known, with three seeds and each task alone."""
    weightings = named_weightings(["adaptive", "random_weighting"]) | {
        "ones": lambda settings: mtl_jax.constant(dict.fromkeys(TARGETS, 1.0)),
        "line only": lambda settings: mtl_jax.constant({"line": 1.0, "square": 0.0}),
        "bad": nothing_finite,
    }
    return compare(problem, weightings, seeds=[3, 0, 1])


def runs(results):
    return results.of("toy")


def test_same_seed_same_numbers(problem, results):
    """In another comparison, too."""
    again = runs(compare(problem, ["random_weighting", "adaptive"], seeds=[3], alone=False))
    assert list(again) == ["equal", "random_weighting", "adaptive"]
    for name, (run,) in again.items():
        expected = runs(results)[name][0]
        assert run.metrics == expected.metrics
        for task in TARGETS:
            np.testing.assert_array_equal(run.weights[task], expected.weights[task])


def test_weightings_share_initial_parameters_and_batches():
    """Losses that tell which batch it was, and whose gradient is 0: the same for all."""

    def fingerprint(params, model_state, key, batch):
        start = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
        value = 20 + jnp.mean(batch["x"]) + jax.lax.stop_gradient(start) + jax.random.uniform(key)
        return dict.fromkeys(TARGETS, value + 0 * start), model_state

    found = runs(compare(make_problem(losses=fingerprint), ["adaptive", "dwa"], seeds=[0, 1]))
    by_seed = [
        {tuple(next(iter(of_name[seed].train_losses.values()))) for of_name in found.values()}
        for seed in (0, 1)
    ]
    assert len(found) == 5
    assert [len(values) for values in by_seed] == [1, 1]
    assert by_seed[0] != by_seed[1]
    (losses,) = by_seed[0]
    assert len(set(losses)) == len(losses)  # every epoch has its own order


def test_equal_is_always_run_and_is_constant_ones(results):
    names = ["equal", "adaptive", "random_weighting", "ones", "line only", "bad"]
    assert list(runs(results)) == [*names, "line alone", "square alone"]
    equal, ones = (runs(results)[name][0] for name in ("equal", "ones"))
    assert [run.seed for run in runs(results)["equal"]] == [3, 0, 1]
    for task in TARGETS:
        np.testing.assert_allclose(
            equal.metrics["test"][task][ERROR], ones.metrics["test"][task][ERROR], rtol=1e-6
        )


def test_alone_is_the_network_on_that_loss_only(results):
    expected, alone = (runs(results)[name][0] for name in ("line only", "line alone"))
    np.testing.assert_allclose(
        alone.metrics["test"]["line"][ERROR], expected.metrics["test"]["line"][ERROR], rtol=1e-5
    )
    assert alone.task == "line"
    assert list(alone.weights) == ["line"]


def test_a_failing_run_says_so_and_does_not_stop_the_others(results):
    for run in runs(results)["bad"]:
        assert run.failure == "no finite update in epoch 1"
        assert run.skipped == 6
        assert len(run.metrics["test"]["line"][ERROR]) == 1
    assert all(run.failure is None for run in runs(results)["equal"])
    assert results.unfinished("toy") == []


def test_seeds_and_tasks_alone_share_a_compiled_program(results):
    for name in ("adaptive", "random_weighting"):
        compilations = [run.compilations for run in runs(results)[name]]
        assert 1 <= compilations[0] < 10
        assert compilations[1:] == [0, 0]
    assert [run.compilations for run in runs(results)["square alone"]] == [0, 0, 0]
    first = runs(results)["adaptive"][0]
    assert first.compile_seconds > 0
    assert max(first.epoch_seconds) < first.compile_seconds


def test_one_bad_label_of_one_task_costs_a_step_an_epoch_and_is_shown():
    """Each task alone is skipped as often: the losses of the others are computed, too."""

    def plain(params, zs, batch):
        return {t: jnp.mean((zs[t] @ head - batch[t]) ** 2) for t, head in params["heads"].items()}

    train = split(96, 0)  # all of which are met in every epoch
    train["line"][17] = np.nan
    problem = make_problem(**IN_PARTS | {"heads": plain}, train=train, epochs=2)
    found = runs(compare(problem, ["mgda", "excess_mtl"], seeds=[0]))
    for name, (run,) in found.items():
        assert run.failure is None
        assert run.skipped == 2
        for task in run.train_losses:
            assert np.isfinite(run.train_losses[task] + run.metrics["test"][task][ERROR]).all()
        for weights in run.weights.values():
            assert np.isnan(weights).sum() == (0 if name == "square alone" else 2)


def test_conflicts_of_all_weightings_on_request():
    problem = make_problem(**IN_PARTS, epochs=1)
    found = runs(compare(problem, ["graddrop"], seeds=[0], conflict=True))
    places = {name: of_name[0].measured_at for name, of_name in found.items()}
    assert places == {
        "equal": "representation",
        "graddrop": "parameters",
        "line alone": None,
        "square alone": None,
    }
    for name in ("equal", "graddrop"):
        share, cosine = (found[name][0].conflict[kind] for kind in ("share", "cosine"))
        assert cosine.shape == (6,)
        assert (np.abs(cosine) < 1).all()
        np.testing.assert_array_equal(share, cosine < 0)  # there is one pair
    assert found["line alone"][0].conflict == {}  # one task has no conflict


@pytest.mark.parametrize("name", ALL)
def test_problems_with_the_metrics_of_the_field(name, tmp_path):
    """mIoU and depth errors; ROC-AUC with missing labels; read by Grain; three metrics a task."""
    problem = ALL[name]()
    text = io.StringIO()
    compare(problem, [], tmp_path, seeds=[0], console=rich.console.Console(file=text, width=400))
    results = Results.read(tmp_path)
    (run,) = results.of(name)["equal"]
    info = results.problems[name]
    for part in ("validation", "test"):
        assert {task: list(found) for task, found in run.metrics[part].items()} == {
            task: list(metrics) for task, metrics in info.tasks.items()
        }
    before, after = (sum(losses[epoch] for losses in run.train_losses.values()) for epoch in (0, 1))
    assert after < before
    for task, metrics in info.tasks.items():
        (alone,) = results.of(name)[f"{task} alone"]
        assert list(alone.metrics["test"][task]) == list(metrics)
        for metric in metrics:
            assert np.isfinite(run.metrics["test"][task][metric][-1]), metric
            assert metric in text.getvalue()


def test_several_problems_go_into_one_folder(tmp_path):
    problems = [make_problem(name=name, epochs=1) for name in ("one", "another")]
    compare(problems, [], tmp_path, seeds=[0], alone=False)
    results = Results.read(tmp_path)
    assert [(run.problem, run.weighting) for run in results.runs] == [
        ("one", "equal"),
        ("another", "equal"),
    ]
    assert {"one.md", "another.md", "report.html"} < {path.name for path in tmp_path.iterdir()}


def test_wrong_settings_are_errors_before_training(problem, tmp_path, monkeypatch):
    def train(*args, **options):
        raise AssertionError("something was trained")

    monkeypatch.setattr("mtl_jax.compare.training.Trainer.run", train)
    with pytest.raises(ValueError, match=r"no weighting 'adaptiv'.*'adaptive'.*Known: equal,"):
        compare(problem, ["adaptiv"])
    for name in ("krum", "trimmed_mean"):
        with pytest.raises(ValueError, match=f"'{name}' cannot run on 'toy': {name}.* tasks"):
            compare(problem, ["adaptive", name])
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match="seed"):
            compare(problem, {}, seeds=seeds)
    for options, message in (
        ({"log": "wandb"}, "`log` must be 'tensorboard' or None, got 'wandb'"),
        ({"checkpoint_seconds": -1}, "`checkpoint_seconds` must be at least 0, got -1"),
        ({"tune": 1, "seeds": [1000]}, "Seed 1000 is the one of the tuning"),
        ({"tune": 0}, "number of trials must be at least 1, got 0"),
        ({"tune": 1, "select": "best"}, "`select` must be 'mean' or 'worst', got 'best'"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(problem, {}, tmp_path / "none", **options)
    with pytest.raises(ValueError, match="`resume`, `reuse` and `log` need a folder"):
        compare(problem, {}, resume=True)
    with pytest.raises(ValueError, match="the same name"):
        compare([problem, problem], {})
    for changes, message in (
        ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
        ({"learning_rate": math.inf}, r"`learning_rate` must be in \[0, inf\), got inf"),
        ({"learning_rate": -0.1}, r"`learning_rate` must be in \[0, inf\), got -0.1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"batch_size": 500}, "batch size, 500, is larger .* 200 examples"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(problem.with_settings(**changes), {})
    first = next(iter(problem.tasks))
    unfit = dataclasses.replace(problem, tasks={**problem.tasks, first: Task(scores_of_no_example)})
    message = f"metric 'nothing' of the task '{first}' does not fit what `predict`.*each of the"
    with pytest.raises(ValueError, match=message):
        compare(unfit, {}, tmp_path / "none")
    assert not any(tmp_path.iterdir())


def test_an_error_of_a_metric_ends_the_comparison(tmp_path):
    def broken(statistics):
        raise RuntimeError("this metric is broken")

    metric = dataclasses.replace(scores_of_no_example, statistics=lambda *args: {}, compute=broken)
    problem = make_problem()
    problem = dataclasses.replace(problem, tasks=dict.fromkeys(problem.tasks, Task(metric)))
    with pytest.raises(RuntimeError, match="this metric is broken"):
        compare(problem, {}, tmp_path, seeds=[0], alone=False)
    assert Results.read(tmp_path).unfinished("toy") == [("equal", 0)]


def test_what_is_printed_is_what_the_report_says(tmp_path):
    """Records hold rounded numbers, by which a tie could be broken in one of the two."""
    console = rich.console.Console(file=io.StringIO(), width=200)
    compare(make_problem(), ["adaptive", "dwa"], tmp_path, seeds=[0, 1, 2], console=console)
    printed = io.StringIO()
    print_tables(Results.read(tmp_path), "toy", rich.console.Console(file=printed, width=200))
    assert console.file.getvalue().count("equal") > 3
    assert printed.getvalue().strip() in console.file.getvalue()


# What is shown while it runs


class Plan:
    """Two weightings, two seeds, four epochs of ten steps."""

    def __init__(self, name):
        self.name, self.seeds = name, (0, 1)
        self.settings = [mtl_jax.compare.training.Setting(n, None, 0.1) for n in ("fast", "slow")]
        self.trainer = self
        self.steps_per_epoch, self.problem = 10, make_problem(epochs=4)


def test_the_time_that_is_left_is_that_of_the_whole_comparison(monkeypatch):
    now, text = 0.0, io.StringIO()
    monkeypatch.setattr("time.monotonic", lambda: now)
    console = rich.console.Console(file=text, width=200)

    def lines():
        found = text.getvalue().splitlines()
        text.seek(text.truncate(0))
        return found

    with _Progress([Plan("one"), Plan("two")], 0, console) as progress:
        for name, seconds in (("fast", 1.0), ("slow", 3.0)):
            run = mtl_jax.compare.Run("one", name, 0, compile_seconds=100.0)
            now += run.compile_seconds
            for step in (5, 10, 20, 30, 40):
                now += seconds * (0.5 if step < 20 else 1)
                progress.steps(run, step, {"line": 0.25})
            progress.run(run)
        # One more of each here, and on the other problem two of each, as long as those here.
        assert lines()[-1] == "one: slow, seed 0: finished; 0:00:48 left"
        run = mtl_jax.compare.Run("one", "fast", 1)
        now += 4.0
        progress.steps(run, 40, {"line": 0.25})
        run.failure = "no finite update in epoch 4"
        progress.run(run)
        assert lines()[-1] == "one: fast, seed 1: no finite update in epoch 4; 0:00:39 left"
        progress.run(mtl_jax.compare.Run("one", "slow", 1))  # was read
        assert lines() == []


def test_a_terminal_shows_losses_metrics_and_time():
    console = rich.console.Console(file=io.StringIO(), width=150, force_terminal=True)
    run = mtl_jax.compare.Run("one", "fast", 0)
    run.metrics = {"validation": {"line": {ERROR: [4.0, 2.0]}}}
    with _Progress([Plan("one")], 0, console) as progress:
        progress.steps(run, 25, {"line": 0.25, "square": 0.5})
        assert progress._bar.line == (
            "one: fast, seed 0, epoch 2.5 of 4; losses: line 0.25, square 0.5; validation: line "
            "squared error 2"
        )
    assert " left" in console.file.getvalue()
    assert "one: fast, seed 0" in console.file.getvalue()
