import matplotlib.text
import numpy as np
import pytest
from made_runs import ACCURACY, EQUAL, TASKS, made_problem, made_results, made_run, shifted

from mtl_jax.compare import MetricInfo, Results
from mtl_jax.compare.analysis import ALONE, Analysis
from mtl_jax.compare.figures import (
    CAPTIONS,
    changes_figure,
    conflict_figure,
    difficulty_figure,
    figures,
    front_figure,
    losses_figure,
    metrics_figure,
    weights_figure,
)


def analysed(rows, tasks=TASKS, **options):
    return Analysis(made_results(rows, tasks, **options), "made")


@pytest.fixture(scope="module")
def analysis():
    """Of two weightings with noisy weights, and one that failed."""
    gain = {"topic": [0.1, 0.2, 0.1, 0.0], "depth": [0.1, -0.1, 0.2, -0.3]}
    made = analysed({"equal": EQUAL, "adaptive": shifted(gain), "bad": EQUAL}, alone=EQUAL)
    for run in made.results.of("made")["bad"]:
        run.failure = "no finite update in epoch 3"
    for seed, run in enumerate(made.results.of("made")["adaptive"]):
        topic = np.random.default_rng(seed).uniform(0, 2, 18)
        run.weights = {"topic": topic, "depth": 2 - topic}
        run.train_losses = {"topic": [2.0, 1.0, 0.5 + seed], "depth": [40.0, 4.0, 0.4]}
    return made


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def names_of(texts):
    return [text.get_text() for text in texts]


def labels(axis):
    return [line.get_label() for line in axis.lines]


def legend(figure):
    return names_of(figure.legends[0].get_texts())


def drawn(figure, path):
    """Lay it out and draw it: a layout that does not fit is a warning, and so an error."""
    figure.savefig(path)
    return path.stat().st_size > 1000


def test_titles_tell_the_seeds_that_are_drawn():
    made = analysed({"equal": EQUAL, "adaptive": shifted({"topic": 0.1, "depth": 0.1})})
    assert "over 4 seeds" in metrics_figure(made).get_suptitle()
    assert "95 % intervals over 4 seeds" in changes_figure(made).get_suptitle()
    runs = made.results.runs
    runs[:] = [run for run in runs if run.seed < 3]
    runs[1].failure = "no finite update in epoch 1"
    interrupted = Analysis(made.results, "made")
    assert "over 2 to 3 seeds" in metrics_figure(interrupted).get_suptitle().replace("\n", " ")
    runs[:] = [run for run in runs if run.seed in (1, 2)]
    both = changes_figure(Analysis(made.results, "made")).get_suptitle()
    assert "mean over 2 seeds" in both
    assert "95 %" not in both


def test_pictures_show_every_task_and_weighting(analysis):
    figure = metrics_figure(analysis)
    assert titles(figure) == ["topic", "depth"]
    assert labels(figure.axes[0]) == ["equal", "adaptive", "task alone"]  # "bad" has no curve
    runs = analysis.weightings["equal"]
    values = 100 * np.array([run.metrics["test"]["topic"]["accuracy"] for run in runs])
    both, spread = values.mean(axis=0), values.std(axis=0)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), both)
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx((both + spread).max())
    assert band[:, 1].min() == pytest.approx((both - spread).min())
    assert "standard deviation" in figure.get_suptitle()

    figure = losses_figure(analysis)
    assert titles(figure) == ["topic", "depth"]
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), [2.0, 1.0, 2.0])
    assert [axis.get_yscale() for axis in figure.axes] == ["linear", "log"]

    figure = weights_figure(analysis)
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
    assert titles(figure) == ["equal", "adaptive", "bad"]
    assert labels(figure.axes[1]) == ["topic", "depth"]
    total = sum(line.get_ydata() for line in figure.axes[1].lines)
    np.testing.assert_allclose(total, 2, rtol=1e-5)
    assert len(total) == 18


def test_names_are_drawn_as_they_are(tmp_path):
    tasks = {
        "price $_$ x": {"error": MetricInfo(unit="$")},
        "_heat": {"accuracy": MetricInfo(True)},
    }
    rows = {"equal": [3.0, 2.0, 1.0, 2.5], "_own": [2.5, 2.1, 0.8, 2.4]}
    made = analysed({name: dict.fromkeys(tasks, row) for name, row in rows.items()}, tasks)
    for runs in made.results.of("made").values():
        for run in runs:
            run.weights = {task: np.linspace(0.5, 1.5, 18) for task in tasks}
    for kind, figure in figures(made).items():
        assert drawn(figure, tmp_path / f"{kind}.svg")
        whole = names_of(figure.findobj(matplotlib.text.Text))
        assert not any("price" in text and "$_$" not in text for text in whole)
    assert [name.strip() for name in legend(changes_figure(made))[:2]] == list(tasks)
    assert " _own" in legend(front_figure(made))


def test_the_start_does_not_hide_the_end():
    made = analysed({"equal": EQUAL})
    for run in made.weightings["equal"]:
        run.metrics["test"]["topic"]["accuracy"] = [0.1, 0.5, 0.55, 0.6, 0.58, 0.6]
    low, high = metrics_figure(made).axes[0].get_ylim()
    assert 40 < low < 50
    assert 60 < high < 65


def test_every_metric_of_a_task_has_a_panel():
    tasks = {"depth": {"error": MetricInfo(False, "m"), "within 10 %": MetricInfo(True, "%")}}
    rows = {"equal": {"depth": {"error": [0.5, 0.6], "within 10 %": [0.7, 0.8]}}}
    figure = metrics_figure(analysed(rows, tasks))
    assert titles(figure) == ["depth error", "depth within 10 %"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["m", "%"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata()[-1], 0.55)
    assert titles(losses_figure(analysed(rows, tasks))) == ["depth"]


def test_change_of_every_task(analysis):
    axes = changes_figure(analysis).axes
    assert [axis.get_xlabel() for axis in axes] == [
        "change from equal weights (%)",
        "change from each task alone (%)",
    ]
    names = names_of(axes[0].get_yticklabels())
    assert names == ["adaptive", ALONE, "equal"]  # the best on top; "bad" has none
    for axis, reference in zip(axes, ("equal", ALONE), strict=True):
        shown = [name for name in names if name != reference]
        for place, name in enumerate(shown):
            topic, depth, mean = axis.containers[3 * place : 3 * place + 3]
            of_mean = analysis.mean_change(name, reference).mean
            assert mean.lines[0].get_xdata()[0] == pytest.approx(100 * of_mean)
            heights = [one.lines[0].get_ydata()[0] for one in (mean, topic, depth)]
            row = names.index(name)
            np.testing.assert_allclose(heights, [row - 0.3, row, row + 0.3])
            changes = analysis.task_changes(name, reference)
            for task, container in (("topic", topic), ("depth", depth)):
                value = container.lines[0].get_xdata()[0]
                assert value == pytest.approx(100 * changes[task].mean(), abs=1e-9)
    without = analysed({"equal": EQUAL, "other": shifted(EQUAL)})
    (axis,) = changes_figure(without).axes
    assert "from equal weights" in axis.get_xlabel()
    assert names_of(axis.get_yticklabels()) == ["other"]
    assert changes_figure(analysed({"equal": EQUAL})) is None


def made_weights(*weights):
    """The results of a run of equal weights for each of these."""
    info = made_problem()
    runs = [
        made_run(info, "equal", seed, {"topic": 0.5, "depth": 1.0}, weights=of_run)
        for seed, of_run in enumerate(weights)
    ]
    planned = {"made": [("equal", seed) for seed in range(len(runs))]}
    return Analysis(Results({"made": info}, runs, planned=planned), "made")


def test_an_absent_task_is_a_gap_and_not_a_weight_of_0():
    weights = {"topic": np.ones(1000), "depth": np.full(1000, 2.0)}
    weights["depth"][::2] = np.nan  # not there in every second step
    weights["depth"][300:600] = np.nan  # and never in these
    (axis,) = weights_figure(made_weights(weights)).axes
    line = axis.lines[1]
    known = np.isfinite(line.get_ydata())
    np.testing.assert_allclose(line.get_ydata()[known], 2 / 1.5)
    assert (~known).sum() == 1
    # Relative to the tasks that are there: alone, a task has the mean of all.
    np.testing.assert_allclose(np.unique(np.round(axis.lines[0].get_ydata(), 6)), [0.666667, 1])
    assert not ((line.get_xdata() > 300) & (line.get_xdata() < 599)).any()


def test_a_run_that_ended_early_has_other_steps():
    long, short = ({task: np.full(n, 2.0) for task in TASKS} for n in (1000, 300))
    analysis = made_weights(long, short)
    for run in analysis.results.runs:
        run.failure = "it did"
    (axis,) = weights_figure(analysis).axes
    assert axis.lines[0].get_xdata().max() > 990


def test_picture_of_conflicts(analysis, tmp_path):
    assert conflict_figure(analysis) is None  # nothing was measured
    made = analysed({"equal": EQUAL, "mgda": EQUAL, "sometimes": EQUAL, "graddrop": EQUAL})
    rng = np.random.default_rng(0)
    for run in made.results.runs:
        if run.weighting == "equal":
            continue
        run.measured_at = "parameters" if run.weighting == "graddrop" else "representation"
        run.conflict = {"share": rng.uniform(0, 1, 18), "cosine": rng.uniform(-1, 1, 18)}
        if run.weighting == "sometimes":
            for values in run.conflict.values():
                values[np.arange(18) % 4 != 0] = np.nan
        if run.weighting == "graddrop":
            run.weights = {}
    figure = conflict_figure(made)
    places = ["at the representation"] * 2 + ["over the shared parameters"] * 2
    assert titles(figure) == places
    lines = [
        {line.get_label(): line for line in axis.lines if line.get_label()[0] != "_"}
        for axis in figure.axes
    ]
    assert [list(by_name) for by_name in lines] == [["mgda", "sometimes"]] * 2 + [["graddrop"]] * 2
    for name, share, cosine in (("mgda", *lines[:2]), ("graddrop", *lines[2:])):
        for kind, scale, line in (("share", 100, share[name]), ("cosine", 1, cosine[name])):
            mean = np.mean([run.conflict[kind] for run in made.weightings[name]], axis=0)
            np.testing.assert_allclose(line.get_ydata(), scale * mean)
    # The steps that were not measured are not shown.
    np.testing.assert_array_equal(lines[0]["sometimes"].get_xdata(), [0, 4, 8, 12, 16])
    assert drawn(figure, tmp_path / "conflict.png")
    # An aggregator has no weights to show.
    assert titles(weights_figure(made)) == ["equal", "mgda", "sometimes"]
    for run in made.results.runs:
        run.weights = {}
    assert weights_figure(Analysis(made.results, "made")) is None


def test_two_metrics_against_each_other():
    gain = {"topic": [0.1] * 4, "depth": [0.3] * 4}
    loss = {"topic": [-0.1] * 4, "depth": [0.2] * 4}
    rows = {"equal": EQUAL, "other": shifted(gain), "worst": shifted(loss)}
    (axis,) = front_figure(analysed(rows)).axes
    seeds, mean = axis.collections[2:4]
    points = np.stack([100 * np.add(EQUAL["topic"], 0.1), np.add(EQUAL["depth"], 0.3)], axis=1)
    np.testing.assert_allclose(seeds.get_offsets(), points)
    np.testing.assert_allclose(mean.get_offsets(), [points.mean(axis=0)])
    (front,) = [line for line in axis.lines if line.get_label() == "Pareto front"]
    np.testing.assert_allclose(front.get_xdata(), [52.25, 62.25])
    assert "higher is better" in axis.get_xlabel()
    assert "lower is better" in axis.get_ylabel()
    three = {"equal": EQUAL | {"third": [0.1] * 4}}
    assert front_figure(analysed(three, TASKS | {"third": ACCURACY})) is None


def test_difficulty_against_weight():
    tasks = dict.fromkeys(("easy", "middle", "hard"), ACCURACY)
    row = {task: [0.5] for task in tasks}
    made = analysed({"equal": row, "other": row}, tasks, alone=row)
    for task, left in zip(tasks, (0.1, 0.4, 0.9), strict=True):
        made.alone[task][0].train_losses = {task: [2.0, 1.0, 2.0 * left]}
    made.weightings["equal"][0].weights = {task: np.ones(3) for task in tasks}
    weights = zip(tasks, (2.0, 4.0, 6.0), strict=True)
    steps = {task: np.array([weight, np.nan, weight]) for task, weight in weights}
    made.weightings["other"][0].weights = steps
    (axis,) = difficulty_figure(made).axes
    assert names_of(axis.get_yticklabels()) == ["equal", "other (+1.00)"]
    assert names_of(axis.get_xticklabels()) == ["easy\n0.1", "middle\n0.4", "hard\n0.9"]
    assert names_of(axis.texts) == ["1.00", "1.00", "1.00", "0.50", "1.00", "1.50"]
    colors = axis.images[0].get_array()
    np.testing.assert_allclose(colors, np.log2([[1, 1, 1], [0.5, 1, 1.5]]))
    made.weightings["other"][0].weights = dict(zip(tasks, reversed(steps.values()), strict=True))
    (axis,) = difficulty_figure(made).axes
    assert names_of(axis.get_yticklabels())[1] == "other (-1.00)"
    made.alone["easy"][0].train_losses = {"easy": [2.0, 1.0, 1.0]}  # the tasks are in their order
    (axis,) = difficulty_figure(made).axes
    assert names_of(axis.get_xticklabels()) == ["middle\n0.4", "easy\n0.5", "hard\n0.9"]
    assert names_of(axis.texts)[3:] == ["1.00", "1.50", "0.50"]
    made.alone["hard"][0].train_losses["hard"][0] = -1.0  # no share of that is left
    assert difficulty_figure(made) is None
    assert "difficulty" not in figures(made)
    two = analysed({"equal": EQUAL, "other": EQUAL}, alone=EQUAL)
    two.weightings["other"][0].weights = {"topic": np.array([1.0, 3.0]), "depth": np.ones(2)}
    (axis,) = difficulty_figure(two).axes
    assert names_of(axis.get_yticklabels()) == ["equal", "other"]  # of two tasks, no correlation


def test_twenty_tasks_have_a_small_panel_each(tmp_path):
    tasks = {f"a superclass with a long name {number}": ACCURACY for number in range(20)}
    row = {task: [0.5, 0.6] for task in tasks}
    rows = dict.fromkeys(("equal", "adaptive", "uncertainty"), row)
    made = figures(analysed(rows, tasks, alone=row))
    assert list(made) == ["changes", "metrics", "losses", "weights", "difficulty"]
    assert set(made) < set(CAPTIONS)
    assert len(made["weights"].axes) == 20
    assert labels(made["weights"].axes[7]) == list(rows)
    assert legend(made["metrics"]) == [*rows, "task alone"]
    assert legend(made["weights"]) == list(rows)
    assert legend(made["changes"]) == ["a task", "mean of the tasks"]
    assert not made["difficulty"].legends
    assert drawn(made["weights"], tmp_path / "weights.png")
    assert drawn(made["difficulty"], tmp_path / "difficulty.png")
    assert made["weights"].axes[0].get_ylim()[1] > 20  # all tasks' weight on one


def test_a_long_legend_leaves_room_for_a_single_panel(tmp_path):
    tasks = {"the only task there is": ACCURACY}
    names = ["equal", *(f"a weighting with a long name {number}" for number in range(45))]
    made = analysed({name: {task: [0.5] for task in tasks} for name in names}, tasks)
    figure = metrics_figure(made)
    assert legend(figure) == names
    assert not figure.axes[0].collections  # so many bands would hide the curves
    assert drawn(figure, tmp_path / "metrics.png")
    assert figure.axes[0].get_position().width * figure.get_figwidth() > 2
