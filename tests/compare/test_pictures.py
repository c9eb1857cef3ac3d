import dataclasses

import numpy as np
import pytest
from made_runs import EQUAL, TASKS, made_comparison, made_run, shifted
from toy_problem import IN_PARTS, make_problem

import mtl_jax
from mtl_jax.compare import Task, compare, named_weightings
from mtl_jax.compare.pictures import (
    conflict_figure,
    difficulty_figure,
    figures,
    front_figure,
    losses_figure,
    metrics_figure,
    weights_figure,
)
from mtl_jax.compare.plots import thinned


def sometimes(settings):
    return mtl_jax.every(mtl_jax.mgda(), 4)


@pytest.fixture(scope="module")
def comparison():
    """Of two weightings with noisy weights, and one that failed."""
    gain = {"topic": [0.1, 0.2, 0.1, 0.0], "depth": [0.1, -0.1, 0.2, -0.3]}
    rows = {"equal": EQUAL, "adaptive": shifted(gain), "bad": EQUAL}
    made = made_comparison(rows, alone=EQUAL)
    for run in made.runs["bad"]:
        run.failure = "no finite update in epoch 3"
    for seed, run in enumerate(made.runs["adaptive"]):
        topic = np.random.default_rng(seed).uniform(0, 2, 18)
        run.weights = {"topic": topic, "depth": 2 - topic}
        run.train_losses = {"topic": [2.0, 1.0, 0.5 + seed], "depth": [40.0, 4.0, 0.4]}
    return made


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def labels(axis):
    return [line.get_label() for line in axis.lines]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def drawn(figure, path):
    """Lay it out and draw it: a layout that does not fit is a warning, and so an error."""
    figure.savefig(path)
    return path.stat().st_size > 1000


def test_pictures_show_every_task_and_weighting(comparison):
    figure = metrics_figure(comparison)
    assert titles(figure) == ["topic", "depth"]
    assert labels(figure.axes[0]) == ["equal", "adaptive", "task alone"]  # "bad" has no curve
    values = 100 * np.array([run.test["topic"] for run in comparison.runs["equal"]])
    both, spread = values.mean(axis=0), values.std(axis=0)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), both)
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx((both + spread).max())
    assert band[:, 1].min() == pytest.approx((both - spread).min())

    figure = losses_figure(comparison)
    assert titles(figure) == ["topic", "depth"]
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), [2.0, 1.0, 2.0])
    assert [axis.get_yscale() for axis in figure.axes] == ["linear", "log"]

    figure = weights_figure(comparison)
    assert titles(figure) == ["equal", "adaptive", "bad"]
    assert labels(figure.axes[1]) == ["topic", "depth"]
    total = sum(line.get_ydata() for line in figure.axes[1].lines)
    np.testing.assert_allclose(total, 2, rtol=1e-5)
    assert len(total) == 18


def test_thinned_keeps_the_mean():
    values = np.arange(1000.0)
    steps, means = thinned(values, points=10)
    np.testing.assert_array_equal(means, values.reshape(10, 100).mean(axis=1))
    np.testing.assert_array_equal(steps, means)
    assert len(thinned(values[:7])[0]) == 7
    values[:150] = np.nan
    np.testing.assert_array_equal(thinned(values, points=10)[1][:2], [np.nan, 174.5])


def test_an_absent_task_is_a_gap_and_not_a_weight_of_0():
    weights = {"topic": np.ones(1000), "depth": np.full(1000, 2.0)}
    weights["depth"][::2] = np.nan  # not there in every second step
    weights["depth"][300:600] = np.nan  # and never in these
    comparison = made_comparison({"equal": EQUAL})
    runs = [made_run("equal", 0, {"topic": 0.5, "depth": 1.0}, weights=weights)]
    comparison = dataclasses.replace(comparison, runs={"equal": runs}, seeds=(0,))
    (axis,) = weights_figure(comparison).axes
    line = axis.lines[1]
    known = np.isfinite(line.get_ydata())
    assert set(line.get_ydata()[known]) == {2.0}
    assert (~known).sum() == 1
    assert not ((line.get_xdata() > 300) & (line.get_xdata() < 599)).any()


def test_picture_of_conflicts(comparison):
    assert conflict_figure(comparison) is None  # nothing was measured
    weightings = named_weightings(["adaptive", "mgda", "graddrop"]) | {"sometimes": sometimes}
    measured = compare(make_problem(**IN_PARTS), weightings, seeds=[0, 1], alone=False)
    figure = conflict_figure(measured)
    places = ["at the representation"] * 2 + ["over the shared parameters"] * 2
    assert titles(figure) == places
    lines = [
        {line.get_label(): line for line in axis.lines if line.get_label()[0] != "_"}
        for axis in figure.axes
    ]
    assert [list(by_name) for by_name in lines] == [["mgda", "sometimes"]] * 2 + [["graddrop"]] * 2
    for name, share, cosine in (("mgda", *lines[:2]), ("graddrop", *lines[2:])):
        for kind, scale, line in (("share", 100, share[name]), ("cosine", 1, cosine[name])):
            both = np.mean([run.conflict[kind] for run in measured.runs[name]], axis=0)
            np.testing.assert_allclose(line.get_ydata(), scale * both)
    # The steps that were not measured are not shown.
    np.testing.assert_array_equal(lines[0]["sometimes"].get_xdata(), [0, 4, 8, 12, 16])

    figure = weights_figure(measured)  # where an aggregator has nothing to show
    assert titles(figure) == ["equal", "adaptive", "mgda", "sometimes"]
    only = {"graddrop": measured.runs["graddrop"]}
    assert weights_figure(dataclasses.replace(measured, runs=only)) is None


def test_two_tasks_against_each_other():
    gain = {"topic": [0.1] * 4, "depth": [0.3] * 4}
    loss = {"topic": [-0.1] * 4, "depth": [0.2] * 4}
    comparison = made_comparison({"equal": EQUAL, "other": shifted(gain), "worst": shifted(loss)})
    (axis,) = front_figure(comparison).axes
    seeds, mean = axis.collections[2:4]
    points = np.stack([100 * np.add(EQUAL["topic"], 0.1), np.add(EQUAL["depth"], 0.3)], axis=1)
    np.testing.assert_allclose(seeds.get_offsets(), points)
    np.testing.assert_allclose(mean.get_offsets(), [points.mean(axis=0)])
    (front,) = [line for line in axis.lines if line.get_label() == "Pareto front"]
    np.testing.assert_allclose(front.get_xdata(), [52.25, 62.25])
    assert "higher is better" in axis.get_xlabel()
    assert "lower is better" in axis.get_ylabel()
    three = TASKS | {"third": Task()}
    rows = {"equal": EQUAL | {"third": [0.1] * 4}}
    assert front_figure(made_comparison(rows, tasks=three)) is None


def test_difficulty_against_weight():
    tasks = {name: Task() for name in ("easy", "middle", "hard")}
    rows = {"equal": {task: [0.5] for task in tasks}, "other": {task: [0.5] for task in tasks}}
    comparison = made_comparison(rows, tasks=tasks, alone=rows["equal"])
    for task, left in zip(tasks, (0.1, 0.4, 0.9), strict=True):
        comparison.alone[task][0].train_losses = {task: [2.0, 1.0, 2.0 * left]}
    weights = zip(tasks, (2.0, 4.0, 6.0), strict=True)
    steps = {task: np.array([weight, np.nan, weight]) for task, weight in weights}
    comparison.runs["other"][0].weights = steps
    figure = difficulty_figure(comparison)
    assert titles(figure) == ["equal", "other (+1.00)"]
    points = [container.lines[0].get_xydata()[0] for container in figure.axes[1].containers]
    np.testing.assert_allclose(points, [[0.1, 0.5], [0.4, 1.0], [0.9, 1.5]])
    comparison.runs["other"][0].weights = dict(zip(tasks, reversed(steps.values()), strict=True))
    assert titles(difficulty_figure(comparison))[1] == "other (-1.00)"
    comparison.alone["hard"][0].train_losses["hard"][0] = -1.0  # no share of that is left
    assert difficulty_figure(comparison) is None
    assert "difficulty" not in figures(comparison)


def test_twenty_tasks_have_a_small_panel_each(tmp_path):
    tasks = {f"a superclass with a long name {number}": Task() for number in range(20)}
    row = {task: [0.5, 0.6] for task in tasks}
    rows = dict.fromkeys(("equal", "adaptive", "uncertainty"), row)
    comparison = made_comparison(rows, tasks=tasks, alone=row)
    made = figures(comparison)
    assert set(made) == {"metrics", "losses", "weights", "difficulty"}
    assert titles(made["weights"]) == list(tasks)
    assert labels(made["weights"].axes[7]) == list(rows)
    assert legend(made["metrics"]) == [*rows, "task alone"]
    assert legend(made["weights"]) == list(rows)
    assert not made["difficulty"].legends
    assert drawn(made["weights"], tmp_path / "weights.png")


def test_a_long_legend_leaves_room_for_a_single_panel(tmp_path):
    tasks = {"the only task there is": Task()}
    names = ["equal", *(f"a weighting with a long name {number}" for number in range(45))]
    comparison = made_comparison({name: {t: [0.5] for t in tasks} for name in names}, tasks=tasks)
    figure = metrics_figure(comparison)
    assert legend(figure) == names
    assert drawn(figure, tmp_path / "metrics.png")
    assert figure.axes[0].get_position().width * figure.get_figwidth() > 3
