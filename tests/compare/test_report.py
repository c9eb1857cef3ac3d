import json

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from toy_problem import make_problem

import mtl_jax
from mtl_jax.compare import Comparison, Task, compare, compare_and_report, named_weightings
from mtl_jax.compare.findings import Findings
from mtl_jax.compare.numbers import results
from mtl_jax.compare.sections import markdown_report
from mtl_jax.compare.tables import main_table
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


def table_of(comparison, **options):
    table = main_table(Findings(comparison), **options)
    return [table.headers, *table.rows]


def test_table_holds_means_and_intervals(comparison):
    header, *rows = table_of(comparison)
    assert header[0] == "weighting"
    assert header[1].startswith("line squared error")
    assert "lower is better" in header[1]
    assert [row[0] for row in rows] == ["equal", "adaptive", "bad", "each task alone"]
    mean, half_width = mean_interval([run.test["line"][-1] for run in comparison.runs["adaptive"]])
    assert rows[1][1] == f"{mean:.4f} ± {half_width:.4f}"
    changes = [100 * comparison.change_from_alone(run) for run in comparison.runs["adaptive"]]
    mean, half_width = mean_interval(changes)
    assert header[4] == "Δm vs alone, %"
    assert rows[1][4] == f"{mean:+.2f} ± {half_width:.2f}"
    assert header[6] == "step time"
    assert rows[0][6] == "1.00"
    assert rows[2][1] == "failed (2 of 2 seeds)"
    assert rows[2][-1] == "12"
    alone = mean_interval([run.test["square"][-1] for run in comparison.alone["square"]])
    assert rows[3][2] == f"{alone[0]:.4f} ± {alone[1]:.4f}"


def test_table_at_the_best_epoch(comparison):
    found = main_table(Findings(comparison, best=True), timing=False)
    values = [run.test["line"][comparison.best_epoch(run)] for run in comparison.runs["equal"]]
    assert found.rows[0][1].startswith(f"{np.mean(values):.4f} ±")
    assert "step time" not in found.headers
    text = markdown_report(comparison)
    assert text.index("## After the last epoch") < text.index("## At the epoch that is best")
    assert "|           equal |" in text


def test_tables_of_an_interrupted_comparison(stages):
    for number, stage in enumerate(stages, start=1):
        assert stage.unfinished == 10 - number
        assert ("Interrupted" in markdown_report(stage)) == (number < 10)
        assert results(stage).get("unfinished_runs", 0) == 10 - number
        json.dumps(results(stage), allow_nan=False)
    assert "**Interrupted: 1 run not finished.**" in markdown_report(stages[8])
    assert [row[0] for row in table_of(stages[0])[1:]] == ["equal"]
    # After three weightings and one task alone; after both tasks; with a second seed of equal.
    tables = [table_of(stages[number - 1]) for number in (4, 5, 6)]
    for table in tables:
        assert table[0][4] == "Δm vs alone, %"
        assert table[3][:2] == ["bad", "failed (1 of 1 seeds)"]
        assert table[4][1]
    runs = stages[4].runs["equal"]
    change = f"{100 * stages[4].change_from_alone(runs[0]):+.2f}"
    assert [table[1][4] for table in tables] == ["", change, change]
    assert [table[4][2] == "" for table in tables] == [True, False, False]
    assert "±" in tables[2][1][1]
    assert np.isnan(stages[5].change_from_alone(stages[5].runs["equal"][1]))


def test_one_seed_has_no_interval_and_shares_are_percentages(comparison):
    tasks = {"line": Task(), "square": Task("error", higher_is_better=False, percent=False)}
    (run, *_), problem = comparison.runs["equal"], make_problem(tasks=tasks)
    comparison = Comparison(problem=problem, seeds=(0,), runs={"equal": [run]}, alone={})
    header, row = table_of(comparison)
    assert header[1] == "line accuracy, %"
    assert row[1:3] == [f"{100 * run.test['line'][-1]:.2f}", f"{run.test['square'][-1]:.4f}"]
    assert not any("alone" in cell for cell in header)
    assert "skipped steps" not in header
    report = markdown_report(comparison, command="python -m experiments.compare")
    assert "1 seed;" in report or "1 seed." in report
    assert "    python -m experiments.compare" in report


def test_folder_of_results(tmp_path, capsys, monkeypatch):
    weightings = named_weightings(["adaptive", "graddrop"]) | {"bad": nothing_finite}
    compare_and_report([make_problem()], weightings, tmp_path / "first", seeds=[0, 1])
    printed = capsys.readouterr().out
    assert "each task alone" in printed
    assert "Everything on one page" in printed
    assert "not reached" in printed
    assert "2 seeds: too few to tell" in printed
    pictures = {
        f"toy_{name}.png"
        for name in ("conflict", "difficulty", "front", "losses", "metrics", "weights")
    }
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names - pictures == {
        "checkpoints",
        "report.html",
        "results.json",
        "timing.json",
        "toy.md",
    }
    assert pictures < names
    # Everything in results.json is the same when it is run again.
    with monkeypatch.context() as patch:
        patch.setattr("mtl_jax.compare.report.figures", lambda comparison: {})
        compare_and_report([make_problem()], weightings, tmp_path / "second", seeds=[0, 1])
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
    against = found["against_equal"]["adaptive"]["line"]
    values = [
        [run["test"]["line"][-1] for run in found["weightings"][name]]
        for name in ("adaptive", "equal")
    ]
    assert against["difference"] == pytest.approx(np.subtract(*values).mean(), rel=1e-4)
    assert against["verdict"] == "undecided: too few seeds"
    timing = json.loads((tmp_path / "first" / "timing.json").read_text())
    assert timing["problems"]["toy"]["step_time_relative_to_equal"]["equal"] == 1
    assert timing["versions"]["jax"]
    ends = timing["problems"]["toy"]["time_to_reach_equal"]["equal"]
    assert all(1 <= end["epoch"] <= 3 and end["seconds"] > 0 for end in ends)
    data = sum(values.nbytes for values in make_problem().train.values())
    for run in timing["problems"]["toy"]["runs"]:
        assert data < run["memory_bytes"] < 100 * data
    page = (tmp_path / "first" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    for picture in pictures:
        image = np.asarray(PIL.Image.open(tmp_path / "first" / picture).convert("L"))
        assert image.shape[1] > 600
        assert (image < 128).mean() > 0.001


def test_what_cannot_be_logged_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'tensorboard' or None, got 'wandb'"):
        compare_and_report([make_problem()], {}, tmp_path, log="wandb")
    assert not any(tmp_path.iterdir())
