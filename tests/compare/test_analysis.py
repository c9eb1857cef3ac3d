import dataclasses
import math
import pathlib
import re
import sys
import textwrap
import types

import numpy as np
import pytest
import scipy.stats
from made_runs import ACCURACY, EQUAL, ERROR, made_results, made_run, made_tuning, shifted

from mtl_jax.compare import MetricInfo, Results
from mtl_jax.compare.analysis import ALONE, Analysis, over_problems
from mtl_jax.compare.tables import (
    Entry,
    Table,
    _detectable,
    against_equal_table,
    answer,
    by_metric_table,
    cost_table,
    main_table,
    main_text,
    over_problems_table,
    sections,
    trade_offs_table,
    tuning_table,
    verdicts,
    verdicts_text,
)
from mtl_jax.evaluation import delta_m, holm

ROOT = pathlib.Path(__file__).parents[2]
GAIN = {"topic": [0.100, 0.110, 0.090, 0.105], "depth": [0.1, -0.1, 0.2, -0.3]}
LOSS = {"topic": [0.01, -0.02, 0.00, 0.02], "depth": [0.30, 0.31, 0.29, 0.305]}
ROWS = {"equal": EQUAL, "gains": shifted(GAIN), "loses": shifted(LOSS)}
SINGLE = {"topic": [0.6] * 4, "depth": [0.8, 0.9, 0.7, 0.9]}
SEVERAL = {
    "segmentation": {"mIoU": MetricInfo(True, "%"), "pixels": MetricInfo(True, "%")},
    "depth": {"error": MetricInfo(False, "m")},
}


@pytest.fixture(scope="module")
def found():
    return Analysis(made_results(ROWS, alone=SINGLE), "made")


def texts(table):
    return [[f"{e.text} {e.verdict}".strip() for e in row] for row in table.rows]


def without_run(name, seed, failure=None):
    """The results without a run, or with that run failed."""
    results = made_results(ROWS, alone=SINGLE)
    (run,) = [run for run in results.runs if (run.weighting, run.seed) == (name, seed)]
    if failure:
        run.failure = failure
    else:
        results.runs.remove(run)
    return Analysis(results, "made")


def test_verdicts_are_paired_and_corrected_over_the_whole_table(found):
    rows = {"gains": GAIN, "loses": LOSS}
    rows[ALONE] = {task: np.subtract(SINGLE[task], EQUAL[task]) for task in EQUAL}
    plain = {
        (name, number): scipy.stats.ttest_1samp(differences, 0).pvalue
        for name, row in rows.items()
        for number, differences in enumerate(row.values())
    }
    order = sorted(plain, key=plain.get)
    corrected, so_far = {}, 0.0
    for rank, cell in enumerate(order):  # Holm's definition
        so_far = max(so_far, (len(order) - rank) * plain[cell])
        corrected[cell] = min(1.0, so_far)
    cells = {row.name: row.cells for row in found.rows}
    assert all(cell.against_equal is None for cell in cells["equal"])
    for (name, number), p_value in corrected.items():
        compared = cells[name][number].against_equal
        assert compared.corrected_p_value == pytest.approx(p_value)
        assert compared.difference == pytest.approx(np.mean(list(rows[name].values())[number]))
    assert [cell.against_equal.verdict for cell in cells["gains"]] == ["better", "undecided"]
    assert cells["loses"][1].against_equal.verdict == "worse"  # lower is better


def test_tables_say_it_in_words(found):
    table = main_table(found)
    assert table.headers == [
        "weighting",
        "topic accuracy, % ↑",
        "depth error ↓",
        "Δm vs equal, %",
        "Δm vs alone, %",
        "worst task vs alone, %",
        "mean rank",
        "step time",
    ]
    rows = {row[0].text: row for row in table.rows}
    assert list(rows) == ["equal", "gains", "loses", ALONE]
    assert rows["gains"][1].text.startswith("62.38 ± ")
    assert rows["gains"][1].verdict == "better"
    assert rows["loses"][2].verdict == "worse"
    assert rows["gains"][1].value == pytest.approx(62.375)
    assert {e.verdict for e in (rows["gains"][2], rows["loses"][1], *rows["equal"])} == {""}
    assert "undecided" in verdicts_text(found)
    against = against_equal_table(found)
    assert [entry.text for entry in against.rows[0][:3]] == ["gains", "topic", "+10.12"]
    low, high = found.against_equal["gains"][0].interval
    assert against.rows[0][3].text == f"{100 * low:+.2f} to {100 * high:+.2f}"
    assert [row[-1] for row in texts(against)][:2] == ["better", "undecided"]
    assert re.search(r"\| +62\.38 ± \d\.\d\d better \|", table.markdown())


def test_a_sentence_for_every_weighting(found):
    sentences = verdicts(found)
    assert sentences[0].startswith("gains: better in topic by 10, undecided in depth; mean +")
    assert sentences[1].startswith("loses: worse in depth by 0.30, undecided in topic; mean -")
    assert sentences[2].startswith(f"{ALONE}: better in topic by 7.7 and depth by 0.23; mean +")
    failed = without_run("gains", 2, "it did")
    assert verdicts(failed)[0].startswith("gains: 1 of 4 runs failed, undecided everywhere; mean +")
    tasks = {f"task {number}": ACCURACY for number in range(12)}
    equal = {task: [0.5, 0.51, 0.49, 0.5] for task in tasks}
    gains = {task: np.add([0.1, 0.11, 0.09, 0.1], values) for task, values in equal.items()}
    gains["task 3"] = equal["task 3"]
    many = Analysis(made_results({"equal": equal, "gains": gains}, tasks=tasks), "made")
    (sentence,) = verdicts(many)
    (row,) = main_table(many).rows[1:]
    change = next(entry.text for entry in row if entry.text.startswith("+18.3"))
    assert sentence == (f"gains: better in 11 of 12, undecided in task 3; mean {change} %, better.")


def test_the_answer_is_one_sentence(found):
    alone = 100 * np.mean(found.mean_change(ALONE, "equal").values)
    nothing = "Beyond noise, no weighting is better than equal weights in the mean over the tasks."
    why = f" Each task alone is better by {alone:.1f} %: the tasks disturb each other."
    assert answer(found) == nothing + why
    only = made_results({"equal": EQUAL}, alone=shifted({"topic": 0.2, "depth": -0.2}))
    assert answer(Analysis(only, "made")).startswith("Each task alone is better by ")
    # The test is that of the change alone, corrected for all rows.
    rows = ("gains", "loses", ALONE)
    changes = [found.mean_change(name, "equal").values for name in rows]
    p_values = [scipy.stats.ttest_1samp(values, 0).pvalue for values in changes]
    for name, p_value in zip(rows, holm(p_values), strict=True):
        assert found.mean_against_equal[name].corrected_p_value == pytest.approx(p_value)
    steady = {"topic": [0.100, 0.110, 0.090, 0.105], "depth": [-0.1, -0.11, -0.09, -0.1]}
    rows = {"equal": EQUAL, "some": shifted(steady)}
    rows |= {f"more{i}": shifted({t: 2 * np.array(v) for t, v in steady.items()}) for i in range(4)}
    better = answer(Analysis(made_results(rows), "made"))
    change = 100 * np.mean(
        Analysis(made_results(rows), "made").mean_change("more0", "equal").values
    )
    assert better.startswith(
        "Beyond noise, better than equal weights in the mean over the tasks: "
        f"more0 by {change:.1f} %, more1 by"
    )
    assert better.endswith(" and 1 more.")
    two = {name: {task: values[:2] for task, values in row.items()} for name, row in ROWS.items()}
    assert answer(Analysis(made_results(two), "made")) == ""


@pytest.mark.parametrize(("seeds", "comparisons"), [(3, 12), (5, 1), (10, 30), (20, 30)])
def test_what_the_seeds_can_find(seeds, comparisons):
    """Of differences of the size that is said, four in five are found."""
    size = _detectable(seeds, comparisons)
    differences = np.random.default_rng(0).normal(size, 1, (20_000, seeds))
    p_values = scipy.stats.ttest_1samp(differences, 0, axis=1).pvalue
    assert np.mean(p_values * comparisons < 0.05) == pytest.approx(0.8, abs=0.01)


def test_what_can_be_found_is_said_in_per_cent(found):
    changes = [found.mean_change(name, "equal").values for name in ("gains", "loses", ALONE)]
    spread = np.median(np.std(changes, axis=1, ddof=1))
    text = f"With 4 seeds a change of the mean by {100 * _detectable(4, 3) * spread:.2g} % is found"
    assert text in verdicts_text(found)
    wide = {"topic": [0.1, 0.9, 0.2], "depth": [9.0, 1.0, 30.0]}  # hundreds of per cent
    assert "e+" not in verdicts_text(Analysis(made_results({"equal": wide, "x": EQUAL}), "made"))
    assert verdicts_text(found).endswith("the same learning rate here: --tune gives each its own.")
    tuned = made_results(ROWS, tuning=made_tuning(*ROWS))
    assert "--tune" not in verdicts_text(Analysis(tuned, "made"))


def test_weights_that_hardly_differ_are_named():
    def sentence(weights):
        results = made_results({"equal": EQUAL, "some": EQUAL})
        for run in results.of("made")["some"]:
            run.weights = {task: np.array(values) for task, values in weights.items()}
        (found,) = verdicts(Analysis(results, "made"))
        return found

    # Means of 2 and 2.01, apart by 0.01 in 2.005; a task may be absent from steps, or from all.
    absent = {"other": [np.nan, np.nan, np.nan]}
    close = sentence({"topic": [1.0, 3.0, np.nan], "depth": [1.0, 3.0, 2.03]} | absent)
    assert close.endswith("; its mean weights were at most 0.5 % apart.")
    same = sentence({"topic": [1.0, 3.0], "depth": [3.0, 1.0]})
    assert same.endswith("; its mean weights were equal.")
    assert "weights" not in sentence({"topic": [1.0, 3.0], "depth": [1.0, 3.1]})
    assert "weights" not in sentence({"topic": [-1.0], "depth": [-1.0]})
    assert "weights" not in sentence({})  # an aggregator


def test_equal_means_are_equal_whatever_they_were_added_from():
    rows = {"equal": {"topic": [0.1, 0.2, 0.3]}, "other": {"topic": [0.3, 0.2, 0.1]}}
    found = Analysis(made_results(rows, {"topic": ACCURACY}), "made")
    sums = [values.mean() for values in found.values.values()]
    assert sums[0] != sums[1]  # by rounding
    assert [row.rank for row in found.rows] == [1.5, 1.5]


def test_changes_and_ranks(found):
    topic, depth = 0.1 / 0.5, -0.1 / 1.0  # with the first seed
    rows = {row.name: row for row in found.rows}
    assert rows["gains"].against_equal.values[0] == pytest.approx((topic + depth) / 2)
    against_alone = ((0.60 - 0.6) / 0.6 + (0.8 - 1.1) / 0.8) / 2
    assert rows["gains"].against_alone.values[0] == pytest.approx(against_alone)
    assert rows["equal"].against_equal is None
    assert rows[ALONE].against_alone is None
    # topic: gains, loses, equal; depth: gains, equal, loses.
    assert {n: row.rank for n, row in rows.items()} == {
        "equal": 2.5, "gains": 1.0, "loses": 2.5, ALONE: None,
    }  # fmt: skip
    assert [rows[name].on_front for name in ("equal", "gains", "loses")] == [False, True, False]
    assert [row[6] for row in texts(main_table(found))] == ["2.50", "1.00", "2.50", ""]


def test_the_worst_task_is_the_one_that_loses_most_against_being_alone(found):
    depth = [(a - e) / a for a, e in zip(SINGLE["depth"], EQUAL["depth"], strict=True)]
    topic = [(e - 0.6) / 0.6 for e in EQUAL["topic"]]
    equal = found.rows[0]
    assert np.mean(depth) < np.mean(topic)
    assert equal.worst_task == "depth"
    np.testing.assert_allclose(equal.worst.values, depth)
    text = texts(main_table(found))[0][5]
    assert text == f"{100 * np.mean(depth):+.2f} ± {100 * equal.worst.half_width:.2f} (depth)"
    without = Analysis(made_results(ROWS), "made")
    assert "worst task vs equal, %" in main_table(without).headers
    assert without.rows[2].worst_task == "depth"
    assert without.rows[0].worst is None


def test_a_task_counts_once_however_many_metrics_it_has():
    equal = {"segmentation": {"mIoU": [0.5, 0.4], "pixels": [0.8, 0.9]}, "depth": [2.0, 1.0]}
    other = {"segmentation": {"mIoU": [0.6, 0.3], "pixels": [0.7, 0.9]}, "depth": [1.0, 1.5]}
    made = made_results({"equal": equal, "other": other}, tasks=SEVERAL)
    analysis = Analysis(made, "made")
    up = {"segmentation": {"mIoU": True, "pixels": True}, "depth": {"error": False}}

    def at(row, seed):
        metrics = {metric: values[seed] for metric, values in row["segmentation"].items()}
        return {"segmentation": metrics, "depth": {"error": row["depth"][seed]}}

    expected = [delta_m(at(other, seed), at(equal, seed), up) for seed in (0, 1)]
    np.testing.assert_allclose(analysis.rows[1].against_equal.values, expected)
    assert main_table(analysis).headers[1:4] == [
        *("segmentation mIoU, % ↑", "segmentation pixels, % ↑", "depth error, m ↓")
    ]
    names = ["segmentation mIoU", "segmentation pixels", "depth"]
    assert [column.name for column in analysis.columns] == names
    assert "metrics of a task first, and then over the tasks" in main_text(analysis)


def test_a_metric_that_is_never_defined_is_left_out():
    rows = {
        "equal": {"segmentation": {"mIoU": [0.5] * 3, "pixels": [math.nan] * 3}, "depth": [2.0] * 3}
    }
    analysis = Analysis(made_results(rows, tasks=SEVERAL), "made")
    assert [column.metric for column in analysis.columns] == ["mIoU", "error"]
    assert "left out: segmentation pixels." in main_text(analysis)


def test_decimals_follow_the_size_of_a_metric():
    tasks = {"tiny": ERROR, "huge": ERROR}
    rows = {"equal": {"tiny": [0.00123], "huge": [12345.6]}}
    analysis = Analysis(made_results(rows, tasks), "made")
    assert texts(main_table(analysis))[0][1:3] == ["0.001230", "12346"]


def test_hypervolume_is_a_share_of_the_box_of_all_runs():
    rows = {
        "equal": {"topic": [0.5], "depth": [1.0]},
        "a": {"topic": [0.6], "depth": [2.0]},
        "b": {"topic": [0.7], "depth": [3.0]},
        "c": {"topic": [0.55], "depth": [1.5]},
    }
    analysis = Analysis(made_results(rows), "made")
    volumes = {"equal": 0, "a": 0.5 * 0.5, "b": 0, "c": 0.25 * 0.75}
    assert {row.name: row.hypervolume for row in analysis.rows} == pytest.approx(volumes)
    table = trade_offs_table(analysis)
    assert table.headers == ["weighting", "on the Pareto front", "hypervolume"]
    assert texts(table)[1] == ["a", "yes", "0.250"]
    seven = {f"task {number}": ACCURACY for number in range(7)}
    many = made_results({"equal": {task: [0.5, 0.6] for task in seven}}, tasks=seven)
    table = trade_offs_table(Analysis(many, "made"))
    assert table.headers == ["weighting", "on the Pareto front"]
    one = Analysis(made_results({"equal": {"topic": [0.5]}}, tasks={"topic": ACCURACY}), "made")
    assert "Trade-offs" not in [section.title for section in sections(one)]


@pytest.mark.parametrize("number", [1, 2])
def test_too_few_seeds_are_said_plainly(number):
    rows = {n: {t: values[:number] for t, values in row.items()} for n, row in ROWS.items()}
    analysis = Analysis(made_results(rows), "made")
    assert "too few to tell a difference from noise" in verdicts_text(analysis)
    sentence = f"gains: undecided, with {number} seed{'s' * (number > 1)}; mean +"
    assert verdicts(analysis)[0].startswith(sentence)
    against = texts(against_equal_table(analysis))
    assert {row[-1] for row in against} == {"undecided: too few seeds"}
    assert against[0][2] != ""
    assert {entry.verdict for row in main_table(analysis).rows for entry in row} == {""}


def test_a_failed_run_is_never_better_and_last_in_rank():
    failed = without_run("gains", 2, "no finite update in epoch 1")
    row = failed.rows[1]
    assert row.cells[0].against_equal.verdict == "undecided: missing seeds"
    assert (row.rank, row.on_front) == (3, False)
    assert math.isnan(row.against_equal.values[2])
    table = main_table(failed)
    assert table.headers[-1] == "failed runs"
    assert [row[-1] for row in texts(table)] == ["0", "1", "0", "0"]
    results = made_results(ROWS)
    for run in results.runs:
        if run.weighting == "gains":
            run.failure = "no finite update in epoch 1"
    everything = Analysis(results, "made")
    assert texts(main_table(everything))[1][1:3] == ["failed", "failed"]
    assert everything.costs[1].until_equal == (None,) * 4
    assert verdicts(everything)[0] == "gains: 4 of 4 runs failed."
    for run in results.runs:
        run.failure = "it did" if run.weighting == "equal" else None
    assert verdicts(Analysis(results, "made"))[0] == "gains: nothing to compare with."
    for run in results.runs:
        run.failure = "it did"
    assert texts(main_table(Analysis(results, "made")))[0][1] == "failed"


def test_a_seed_that_equal_weights_lose_is_nobodys_failure():
    """The verdicts are those of the other seeds, in the mean and over problems, too."""
    gain = {"topic": GAIN["topic"], "depth": np.negative(LOSS["depth"])}
    rows = {"equal": EQUAL, "gains": shifted(gain)}
    for of, alone in (("mean", None), ("worst", EQUAL)):
        results = made_results(rows, alone=alone)
        whole = over_problems(results, of=of)["made"]["gains"]
        assert (whole.verdict, whole.seeds, whole.failed) == ("better", 4, 0)
        (lost,) = (run for run in results.runs if (run.weighting, run.seed) == ("equal", 3))
        lost.failure = "no finite update in epoch 1"
        found = over_problems(results, of=of)["made"]["gains"]
        assert (found.verdict, found.seeds, found.failed) == ("better", 3, 0)
        change = getattr(Analysis(results, "made"), f"{of}_change")("gains", "equal")
        assert found.difference == pytest.approx(np.mean(change.values[:3]))
    analysis = Analysis(results, "made")
    assert analysis.mean_against_equal["gains"].verdict == "better"
    assert answer(analysis).startswith("Beyond noise, better than equal weights")
    # Where nobody has a change, nothing is said of it.
    nothing = {"topic": [0.0] * 4, "depth": [0.0] * 4}
    assert answer(Analysis(made_results({"equal": nothing, "gains": EQUAL}), "made")) == ""


def test_an_interrupted_comparison_is_of_the_seeds_that_all_have():
    analysis = without_run("loses", 3)
    assert analysis.seeds == [0, 1, 2]
    assert analysis.against_equal["gains"][0].seeds == 3
    assert analysis.against_equal["gains"][0].failed == 0
    results = made_results(ROWS)
    del results.runs[1:]
    first = Analysis(results, "made")
    assert [row.name for row in first.rows] == ["equal"]
    assert main_table(first).rows[0][1].text == "50.00"
    results.runs.clear()
    assert Analysis(results, "made").rows == []
    assert sections(Analysis(results, "made")) == []
    results = made_results(ROWS, alone=SINGLE)  # of which only the tasks alone are there
    results.runs = [run for run in results.runs if run.task is not None]
    assert [row.name for row in Analysis(results, "made").rows] == [ALONE]


def test_best_epoch():
    results = made_results({"equal": EQUAL})
    run = results.runs[0]
    run.metrics["validation"] = {
        "topic": {"accuracy": [0.4, 0.5, 0.5]},
        "depth": {"error": [1.0, 0.9, 1.0]},
    }
    run.metrics["test"]["topic"]["accuracy"] = [0.1, 0.2, 0.3]
    best = Analysis(results, "made", best=True)
    assert best.best_epoch(run) == 2
    assert best.rows[0].cells[0].estimate.values[0] == 0.2
    run.metrics["validation"]["depth"]["error"][-1] = 0.0  # no change is relative to that
    assert best.best_epoch(run) == 2
    run.metrics["validation"]["topic"]["accuracy"][-1] = math.nan
    assert best.best_epoch(run) == 3
    title = "At the epoch that is best on the validation split"
    rising = {"equal": {"topic": [0.4, 0.5]}}
    rising = made_results(rising, tasks={"topic": ACCURACY})
    assert title not in [section.title for section in sections(Analysis(rising, "made"))]
    rising.runs[1].metrics["validation"] = {"topic": {"accuracy": [0.4, 0.5, 0.45]}}
    assert title in [section.title for section in sections(Analysis(rising, "made"))]


def test_time_until_as_good_as_equal():
    results = made_results({"equal": {"topic": [0.4], "depth": [1.0]}})
    info = results.problems["made"]

    def run_of(name, course, seconds):
        made = made_run(info, name, 0, {"topic": course, "depth": [1.0] * 3})
        return dataclasses.replace(made, epoch_seconds=[seconds] * 3)

    results.runs = [
        run_of("equal", [0.2, 0.4, 0.4], 2.0),
        run_of("fast", [0.4, 0.3, 0.5], 3.0),
        run_of("slow", [0.1, 0.2, 0.39], 1.0),
        dataclasses.replace(run_of("fell", [0.4, 0.4, 0.4], 1.0), failure="it did"),
    ]
    results.planned = {"made": [(run.weighting, 0) for run in results.runs]}
    analysis = Analysis(results, "made")
    assert [cost.until_equal for cost in analysis.costs] == [
        *(((2, 4.0),), ((1, 3.0),), (None,), (None,))
    ]
    table = cost_table(analysis)
    assert table.headers[-3:] == ["memory, MB", "compiling, s", "until as good as equal"]
    until = [row[-1] for row in texts(table)]
    assert until == ["", "3 s (epoch 1)", "not reached", "not reached"]
    assert texts(table)[1][1] == "1.50"
    assert texts(table)[0][2:4] == ["333", "12.3"]
    # One task may have lost what the other one gained.
    results.runs[1] = made_run(
        info, "fast", 0, {"topic": [0.4, 0.5, 0.2], "depth": [1.2, 1.2, 1.2]}
    )
    assert Analysis(results, "made").costs[1].until_equal == ((2, 4.0),)
    # There is no relative change from 0.
    results.runs[0] = run_of("equal", [0.2, 0.4, 0.0], 2.0)
    assert Analysis(results, "made").costs[1].until_equal == ()
    for run in results.runs:
        run.memory_bytes, run.epoch_seconds, run.compile_seconds = None, [], 0.0
    titles = [section.title for section in sections(Analysis(results, "made"))]
    assert "Cost beside quality" not in titles  # nothing is known of it


def test_many_metrics_are_summed_up():
    tasks = {f"task {number}": ACCURACY for number in range(20)}
    noise = np.random.default_rng(0).normal(0, 0.0001, (2, 20, 4))
    equal = {task: 0.5 + number / 100 + noise[0, number] for number, task in enumerate(tasks)}
    other = {task: 0.6 + noise[1, number] for number, task in enumerate(tasks)}
    analysis = Analysis(made_results({"equal": equal, "other": other}, tasks=tasks), "made")
    table = main_table(analysis)
    assert table.headers[1:5] == [
        "mean accuracy, % ↑",
        "better, worse",
        "Δm vs equal, %",
        "worst task vs equal, %",
    ]
    mean = 100 * np.mean(list(equal.values()))
    assert table.rows[0][1].text.startswith(f"{mean:.2f} ± ")
    assert table.rows[1][2].text == "10, 9 of 20"  # and one about the same
    assert table.rows[1][4].text.endswith("(task 19)")
    by_metric = by_metric_table(analysis)
    assert by_metric.headers == ["metric", "equal", "other"]
    assert [row[0].text for row in by_metric.rows] == [f"{task} accuracy, % ↑" for task in tasks]
    assert "Metric by metric" in [section.title for section in sections(analysis)]
    # With different metrics there is no mean of them.
    mixed = made_results({"equal": equal, "other": other}, tasks=tasks | {"task 3": ERROR})
    assert main_table(Analysis(mixed, "made")).headers[1] == "better, worse"


def test_what_tuning_chose():
    table = tuning_table(Analysis(made_results(ROWS, tuning=made_tuning("equal", "dwa")), "made"))
    assert table.headers == [
        *("weighting", "learning rate", "parameters", "validation change, %", "at the default, %"),
        *("trials", "epochs", "seconds"),
    ]
    assert table.rows[1][1].value == 0.03
    assert texts(table)[1] == [
        *("dwa", "0.03", "beta=0.25, form=half", "+2.15", "+0.00", "3 (1 failed)", "2", "6")
    ]


def test_what_runs_were_made_with():
    results = made_results(ROWS)
    assert Analysis(results, "made").provenance == {}
    for run in results.runs[:2]:
        run.provenance = {"versions": {"jax": "0.9.0", "numpy": "2.3.1"}, "device": "gpu"}
    results.runs[3].provenance = results.runs[3].provenance | {"begun with": {"jax": "0.9.0"}}
    assert Analysis(results, "made").provenance == {
        "jax": {"0.9.0": 2, "0.10.0": 10},
        "device": {"gpu": 2, "1 x cpu (cpu)": 10},
    }


def test_verdicts_over_problems_are_corrected_for_all_of_them():
    """p is 0.042: below 0.05 for one comparison, and above it for two."""
    base = {"topic": [0.50, 0.51, 0.53], "depth": [1.0] * 3}
    near = {"topic": np.add(base["topic"], [0.018, 0.03, 0.04]), "depth": [1.0] * 3}
    same = {"topic": [0.51, 0.51, 0.52], "depth": [1.0] * 3}
    one = made_results({"equal": base, "near": near})
    both = made_results({"equal": base, "near": near, "same": same}, name="b/c")
    assert over_problems(one)["made"]["near"].verdict == "better"
    found = over_problems(Results.combine([one, both]))
    assert {name: list(row) for name, row in found.items()} == {
        "made": ["near"],
        "b/c": ["near", "same"],
    }
    assert {cell.verdict for row in found.values() for cell in row.values()} == {"undecided"}
    gain = np.mean((near["topic"] - base["topic"]) / base["topic"]) / 2
    assert found["made"]["near"].difference == pytest.approx(gain)
    # One weighting against all others.
    reverse = over_problems(one, "near")["made"]
    loss = np.mean((near["topic"] - base["topic"]) / base["topic"]) / 2
    assert list(reverse) == ["equal"]
    assert reverse["equal"].difference == pytest.approx(loss)
    with pytest.raises(ValueError, match="'famo' .* did not run on 'made'"):
        over_problems(one, "famo")
    table = over_problems_table(Results.combine([one, both]))
    assert table.headers == ["against equal", "made (3 seeds)", "b/c (3 seeds)"]
    assert [row[0] for row in texts(table)] == ["near", "same"]
    assert texts(table)[0][1].startswith(f"{100 * gain:+.2f} [+")
    assert texts(table)[1][1] == ""
    assert over_problems_table(one, "near").headers[0] == "near against"


def test_rows_are_paired_by_their_seeds_whichever_folder_comes_first():
    rows = {"equal": EQUAL, "gains": shifted(GAIN)}
    whole = made_results(rows | {"dwa": shifted(GAIN)})
    late = dataclasses.replace(
        whole,
        runs=[run for run in whole.runs if run.weighting != "dwa" and run.seed >= 2],
        planned={"made": [key for key in whole.planned["made"] if key[0] != "dwa" and key[1] >= 2]},
    )
    for parts, seeds in (([late, whole], [2, 3, 0, 1]), ([whole, late], [0, 1, 2, 3])):
        found = Analysis(Results.combine(parts), "made")
        assert found.seeds == seeds
        expected = Analysis(whole, "made").values["dwa"][:, seeds]
        np.testing.assert_array_equal(found.values["dwa"], expected)
        assert found.against_equal["dwa"] == found.against_equal["gains"]


def test_the_worst_task_over_problems():
    """The worst task of each row, seed by seed, against what it reaches alone."""
    noise = np.array([0.0, 0.001, 0.003])
    equal = {"topic": 0.5 + noise, "depth": 1.0 + noise}
    other = {"topic": 0.6 + noise, "depth": 1.2 + noise}  # an error: the depth is worse
    tasks_alone = {"topic": 0.55 + noise, "depth": 0.9 + noise}
    results = made_results({"equal": equal, "other": other}, alone=tasks_alone)
    changes = {
        name: np.minimum(
            row["topic"] / tasks_alone["topic"] - 1, 1 - row["depth"] / tasks_alone["depth"]
        )
        for name, row in (("equal", equal), ("other", other))
    }
    expected = changes["other"] - changes["equal"]
    analysis = Analysis(results, "made")
    assert analysis.worst_change("other", "equal").values == pytest.approx(expected)
    assert analysis.worst_change("equal", "other").values == pytest.approx(-expected)
    assert analysis.worst_change("equal", "equal") is None
    assert analysis.worst_change(ALONE, "equal").values == pytest.approx(-changes["equal"])
    found = over_problems(results, of="worst", others=["other", ALONE])["made"]
    assert found["other"].difference == pytest.approx(expected.mean())
    assert [found["other"].verdict, found[ALONE].verdict] == ["worse", "better"]
    # Without each task alone the change is from equal weights, where it is 0.
    without = Analysis(made_results({"equal": equal, "other": other}), "made")
    loss = 1 - other["depth"] / equal["depth"]
    assert without.worst_change("other", "equal").values == pytest.approx(loss)
    assert without.worst_change("equal", "other").values == pytest.approx(-loss)


def test_tables_have_no_empty_columns():
    columns = [("name", [Entry("a"), Entry("b")]), ("empty", [Entry()] * 2)]
    table = Table.from_columns([*columns, ("x", [Entry("1"), Entry("2", "worse")])])
    assert table.headers == ["name", "x"]
    assert texts(table) == [["a", "1"], ["b", "2 worse"]]


def test_the_column_of_the_contributing_page_works(monkeypatch):
    """Its edits are made in copies of the two modules."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (page,) = re.findall(r"^## Add a column.*", page, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"   ```python\n(.*?)   ```", page, re.DOTALL)
    field, value, column, test = map(textwrap.dedent, blocks)

    def edited(name, *edits):
        text = (ROOT / f"mtl_jax/compare/{name}.py").read_text(encoding="utf-8")
        for anchor, indent, lines in edits:
            assert text.count(anchor) == 1, anchor
            text = text.replace(anchor, anchor + textwrap.indent(lines, " " * indent))
        module = types.ModuleType(f"{name}_with_a_column")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(text, module.__dict__)
        return module

    changed = edited(
        "analysis",
        ("    worst: Estimate | None\n", 4, field),
        ("            task, worst = self._worst(name)\n", 12, value),
        ("                    worst=worst,\n", 20, "best=best,\n"),
    )
    anchor = "_change(row.against_alone) for row in rows]),\n"
    tables = edited("tables", (anchor, 8, column.rstrip() + ",\n"))
    found = changed.Analysis(made_results(ROWS, alone=SINGLE), "made")
    table = tables.main_table(found)
    assert table.headers[5:7] == ["best task vs alone, %", "worst task vs alone, %"]
    names = {"np": np, "SINGLE": SINGLE, "EQUAL": EQUAL}
    exec(test, names)
    names["test_the_best_task_is_the_one_that_gains_most"](found)
