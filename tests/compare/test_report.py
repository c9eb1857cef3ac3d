import json

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from toy_problem import IN_PARTS, make_problem

import mtl_jax
from mtl_jax.compare import Task, compare, compare_and_report, named_weightings
from mtl_jax.compare.pictures import conflict_figure, metrics_figure, thinned, weights_figure
from mtl_jax.compare.report import results
from mtl_jax.compare.tables import markdown_report, markdown_table
from mtl_jax.evaluation import mean_interval


def nothing_finite(settings):
    return mtl_jax.vector_weighting(lambda losses, *rest: (losses * jnp.nan, rest[0]))


@pytest.fixture(scope="module")
def stages():
    """A comparison after each of its runs, as far as it had come."""
    weightings = named_weightings(["adaptive"]) | {"bad": nothing_finite}
    found = []
    whole = compare(make_problem(), weightings, seeds=[0, 1], on_run=found.append)
    assert len(found) == 10
    assert found[-1] == whole
    return found


@pytest.fixture(scope="module")
def comparison(stages):
    return stages[-1]


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table_holds_means_and_intervals(comparison):
    header, _, *rows = cells(markdown_table(comparison))
    assert header[0] == "weighting"
    assert header[1].startswith("line squared error")
    assert "lower is better" in header[1]
    assert [row[0] for row in rows] == ["equal", "adaptive", "bad", "each task alone"]
    mean, half_width = mean_interval([run.test["line"][-1] for run in comparison.runs["adaptive"]])
    assert rows[1][1] == f"{mean:.4f} ± {half_width:.4f}"
    changes = [100 * comparison.change_from_alone(run) for run in comparison.runs["adaptive"]]
    mean, half_width = mean_interval(changes)
    assert rows[1][3] == f"{mean:+.2f} ± {half_width:.2f}"
    assert rows[0][4] == "1.00"
    assert rows[2][1] == "failed (2 of 2 seeds)"
    assert rows[2][-1] == "12"
    alone = mean_interval([run.test["square"][-1] for run in comparison.alone["square"]])
    assert rows[3][2] == f"{alone[0]:.4f} ± {alone[1]:.4f}"


def test_table_at_the_best_epoch(comparison):
    rows = cells(markdown_table(comparison, best=True, timing=False))
    values = [run.test["line"][comparison.best_epoch(run)] for run in comparison.runs["equal"]]
    assert rows[2][1].startswith(f"{np.mean(values):.4f} ±")
    assert "step time" not in rows[0]


def test_tables_of_an_interrupted_comparison(stages):
    for number, stage in enumerate(stages, start=1):
        assert stage.unfinished == 10 - number
        assert ("Interrupted" in markdown_report(stage)) == (number < 10)
        assert results(stage).get("unfinished_runs", 0) == 10 - number
        json.dumps(results(stage), allow_nan=False)
    assert "**Interrupted: 1 run not finished.**" in markdown_report(stages[8])
    assert [row[0] for row in cells(markdown_table(stages[0]))[2:]] == ["equal"]
    # After three weightings and one task alone; after both tasks; with a second seed of equal.
    tables = [cells(markdown_table(stages[number - 1])) for number in (4, 5, 6)]
    for table in tables:
        assert table[0][3] == "change from alone, %"
        assert table[4][:2] == ["bad", "failed (1 of 1 seeds)"]
        assert table[5][1]
    runs = stages[4].runs["equal"]
    change = f"{100 * stages[4].change_from_alone(runs[0]):+.2f}"
    assert [table[2][3] for table in tables] == ["", change, change]
    assert [table[5][2] == "" for table in tables] == [True, False, False]
    assert "±" in tables[2][2][1]
    assert np.isnan(stages[5].change_from_alone(stages[5].runs["equal"][1]))


def test_one_seed_has_no_interval_and_shares_are_percentages():
    tasks = {"line": Task(), "square": Task("error", higher_is_better=False, percent=False)}
    comparison = compare(make_problem(tasks=tasks), {}, seeds=[0], alone=False)
    header, _, row = cells(markdown_table(comparison))
    run = comparison.runs["equal"][0]
    assert header[1] == "line accuracy, %"
    assert row[1:3] == [f"{100 * run.test['line'][-1]:.2f}", f"{run.test['square'][-1]:.4f}"]
    assert not any("alone" in cell for cell in header)
    assert "skipped steps" not in header
    report = markdown_report(comparison, command="python -m experiments.compare")
    assert "1 seed;" in report or "1 seed." in report
    assert "    python -m experiments.compare" in report


def test_pictures_show_every_task_and_weighting(comparison):
    figure = metrics_figure(comparison)
    assert [axis.get_title() for axis in figure.axes] == ["line", "square"]
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["equal", "adaptive", "task alone"]  # the failed one has no curve
    run = comparison.runs["equal"][0]
    both = np.mean([run.test["line"] for run in comparison.runs["equal"]], axis=0)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), both)

    figure = weights_figure(comparison)
    assert [axis.get_title() for axis in figure.axes] == ["equal", "adaptive", "bad"]
    assert [line.get_label() for line in figure.axes[1].lines] == ["line", "square"]
    total = sum(line.get_ydata() for line in figure.axes[1].lines)
    np.testing.assert_allclose(total, 2, rtol=1e-5)
    assert len(total) == len(run.weights["line"])


def test_thinned_keeps_the_mean():
    values = np.arange(1000.0)
    steps, means = thinned(values, points=10)
    np.testing.assert_array_equal(means, values.reshape(10, 100).mean(axis=1))
    np.testing.assert_array_equal(steps, means)
    assert len(thinned(values[:7])[0]) == 7
    values[:150] = np.nan
    np.testing.assert_array_equal(thinned(values, points=10)[1][:2], [np.nan, 174.5])


def sometimes(settings):
    return mtl_jax.every(mtl_jax.mgda(), 4)


def test_picture_of_conflicts(comparison):
    assert conflict_figure(comparison) is None  # nothing was measured
    weightings = named_weightings(["adaptive", "mgda", "graddrop"]) | {"sometimes": sometimes}
    measured = compare(make_problem(**IN_PARTS), weightings, seeds=[0, 1], alone=False)
    figure = conflict_figure(measured)
    places = ["at the representation"] * 2 + ["over the shared parameters"] * 2
    assert [axis.get_title() for axis in figure.axes] == places
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
    assert [axis.get_title() for axis in figure.axes] == ["equal", "adaptive", "mgda", "sometimes"]


def test_folder_of_results(tmp_path, capsys):
    weightings = named_weightings(["adaptive", "graddrop"]) | {"bad": nothing_finite}
    for folder in ("first", "second"):
        compare_and_report([make_problem()], weightings, tmp_path / folder, seeds=[0, 1])
    printed = capsys.readouterr().out
    assert "each task alone" in printed
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == [
        "checkpoints",
        "results.json",
        "timing.json",
        "toy.md",
        "toy_conflict.png",
        "toy_metrics.png",
        "toy_weights.png",
    ]
    # Everything in results.json is the same when it is run again.
    first, second = (tmp_path / run / "results.json" for run in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    found = json.loads(first.read_text())["toy"]
    assert found["settings"]["examples"] == {"train": 200, "validation": 50, "test": 70}
    assert found["weightings"]["bad"][0]["failure"] == "no finite update in epoch 1"
    assert found["weightings"]["bad"][0]["weights"]["line"] == [None] * 6
    weights = found["weightings"]["adaptive"][0]["weights"]
    np.testing.assert_allclose(np.add(weights["line"], weights["square"]), 2, rtol=1e-5)
    assert found["weightings"]["adaptive"][0]["conflict"] == {"measured_at": None}
    aggregated = found["weightings"]["graddrop"][0]
    assert aggregated["weights"] == {}
    assert aggregated["conflict"]["measured_at"] == "parameters"
    assert aggregated["conflict"]["step"] == list(range(18))
    assert set(aggregated["conflict"]["share"]) <= {0, 1}
    assert all(-1 <= cosine <= 1 for cosine in aggregated["conflict"]["cosine"])
    timing = json.loads((tmp_path / "first" / "timing.json").read_text())
    assert timing["problems"]["toy"]["step_time_relative_to_equal"]["equal"] == 1
    assert timing["versions"]["jax"]
    for picture in ("toy_conflict.png", "toy_metrics.png", "toy_weights.png"):
        image = np.asarray(PIL.Image.open(tmp_path / "first" / picture).convert("L"))
        assert image.shape[1] > 600
        assert (image < 128).mean() > 0.001
