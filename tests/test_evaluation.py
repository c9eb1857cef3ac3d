import json
import math
import pathlib

import numpy as np
import pytest
import scipy.stats

from mtl_jax.evaluation import delta_m, mean_interval, mean_rank

# Published tables of NYUv2; each names its source.
PUBLISHED = json.loads(
    (pathlib.Path(__file__).parent / "data" / "published_metrics.json").read_text(encoding="utf-8")
)
COLUMNS = [tuple(column) for column in PUBLISHED["columns"]]
FAMO, REP_MTL = (PUBLISHED["tables"][name]["rows"] for name in ("famo", "rep_mtl"))


def by_task(values):
    tasks = {}
    for (task, metric), value in zip(COLUMNS, values, strict=True):
        tasks.setdefault(task, {})[metric] = value
    return tasks


DIRECTIONS = by_task(PUBLISHED["higher_is_better"])


def change(rows, name, **conventions):
    metrics, alone = (by_task(rows[row]["metrics"]) for row in (name, "STL"))
    return 100 * delta_m(metrics, alone, DIRECTIONS, **conventions)


def test_delta_m_on_hand_computed_cases():
    directions = {"up": True, "down": False}
    assert delta_m({"up": 1.1, "down": 2.0}, {"up": 1.0, "down": 2.0}, directions) == (
        pytest.approx(0.05)
    )
    assert delta_m({"up": 1.0, "down": 1.0}, {"up": 1.0, "down": 2.0}, directions) == 0.25
    # A negative baseline, such as a log-likelihood: larger is still better.
    assert delta_m({"up": -1.0}, {"up": -2.0}, {"up": True}) == 0.5


def test_delta_m_averages_and_signs_by_hand():
    # One task gains 30, 0 and 0 per cent, the other loses 10.
    metrics = {"three": {"a": 1.3, "b": 2.0, "c": 1.0}, "one": 1.1}
    baseline = {"three": {"c": 1.0, "b": 2.0, "a": 1.0}, "one": 1.0}
    directions = {"one": False, "three": {"a": True, "b": False, "c": True}}
    arguments = (metrics, baseline, directions)
    assert delta_m(*arguments) == pytest.approx(0.0)
    assert delta_m(*arguments, average="metrics") == pytest.approx(0.05)
    assert delta_m(*arguments, average="metrics", better="negative") == pytest.approx(-0.05)


# The printed metrics are rounded too, which moves the change by up to 0.015.
@pytest.mark.parametrize("name", [name for name in REP_MTL if name != "STL"])
def test_delta_m_of_published_rows_over_tasks_and_over_metrics(name):
    over_tasks, over_metrics = (REP_MTL[name][f"gain over {what}"] for what in ("tasks", "metrics"))
    assert change(REP_MTL, name) == pytest.approx(over_tasks, abs=0.015)
    assert change(REP_MTL, name, average="metrics") == pytest.approx(over_metrics, abs=0.015)


@pytest.mark.parametrize("name", [name for name in FAMO if name != "STL"])
def test_delta_m_of_published_rows_in_the_convention_of_nash_mtl_and_famo(name):
    # Of IMTL-G -0.76 is printed, in both papers; the metrics beside it give -0.60.
    printed = -0.60 if name == "IMTL-G" else FAMO[name]["drop"]
    drop = change(FAMO, name, better="negative", average="metrics")
    assert drop == pytest.approx(printed, abs=0.015)


def test_the_average_decides_whether_a_published_row_is_a_gain():
    assert change(FAMO, "LS", average="metrics") == pytest.approx(-5.59, abs=0.015)
    assert change(FAMO, "LS", average="tasks") == pytest.approx(0.88, abs=0.015)


def test_delta_m_errors():
    with pytest.raises(ValueError, match="same tasks"):
        delta_m({"a": 1.0}, {"b": 1.0}, {"a": True})
    with pytest.raises(ValueError, match=r"same metrics.*\['a/x'\], \['a/y'\]"):
        delta_m({"a": {"x": 1.0}}, {"a": {"y": 1.0}}, {"a": {"x": True}})
    with pytest.raises(ValueError, match="at least one"):
        delta_m({}, {}, {})
    with pytest.raises(ValueError, match="baseline of a is 0"):
        delta_m({"a": 1.0}, {"a": 0.0}, {"a": True})
    with pytest.raises(ValueError, match="better must be 'positive' or 'negative', got 'up'"):
        delta_m({"a": 1.0}, {"a": 1.0}, {"a": True}, better="up")
    with pytest.raises(ValueError, match="average must be 'tasks' or 'metrics', got 'all'"):
        delta_m({"a": 1.0}, {"a": 1.0}, {"a": True}, average="all")


def test_mean_rank_of_a_published_table():
    directions = dict(zip(COLUMNS, PUBLISHED["higher_is_better"], strict=True))
    rows = {name: row for name, row in FAMO.items() if name != "STL"}
    table = {name: dict(zip(COLUMNS, row["metrics"], strict=True)) for name, row in rows.items()}
    ranks = mean_rank(table, directions)
    assert {name: round(rank, 2) for name, rank in ranks.items()} == (
        {name: row["mean rank"] for name, row in rows.items()}
    )


def test_mean_rank_with_ties_and_failures():
    table = {
        "a": {"up": 0.5, "down": 1.0},
        "b": {"up": 0.5, "down": 2.0},
        "failed": {"up": 0.1, "down": math.nan},
    }
    assert mean_rank(table, {"up": True, "down": False}) == {"a": 1.25, "b": 1.75, "failed": 3.0}
    assert mean_rank({}, {"up": True}) == {}


def test_mean_rank_errors():
    with pytest.raises(ValueError, match=r"a has the columns \['x'\], the directions \['y'\]"):
        mean_rank({"a": {"x": 1.0}}, {"y": True})
    with pytest.raises(ValueError, match="at least one"):
        mean_rank({"a": {}}, {})


@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_mean_interval_is_that_of_a_t_test(confidence):
    values = np.random.default_rng(0).normal(3, 2, 7)
    mean, half_width = mean_interval(values, confidence)
    interval = scipy.stats.ttest_1samp(values, 0).confidence_interval(confidence)
    np.testing.assert_allclose([mean - half_width, mean + half_width], interval)


def test_mean_interval_of_one_or_no_value():
    mean, half_width = mean_interval([2.0])
    assert mean == 2.0
    assert math.isnan(half_width)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        mean_interval([1.0, 2.0], 95)
