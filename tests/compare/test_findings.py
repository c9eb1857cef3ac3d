import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
from made_runs import EQUAL, TASKS, made_comparison, made_run, shifted

from mtl_jax.compare import Task
from mtl_jax.compare.findings import ALONE, Findings, time_to_reach_equal
from mtl_jax.compare.sections import sections
from mtl_jax.compare.tables import (
    against_equal_table,
    by_task_table,
    cost_table,
    main_table,
    seeds_note,
    trade_offs_table,
)

GAIN = {"topic": [0.100, 0.110, 0.090, 0.105], "depth": [0.1, -0.1, 0.2, -0.3]}
LOSS = {"topic": [0.01, -0.02, 0.00, 0.02], "depth": [0.30, 0.31, 0.29, 0.305]}
ROWS = {"equal": EQUAL, "gains": shifted(GAIN), "loses": shifted(LOSS)}
LONE = {"topic": [0.6] * 4, "depth": [0.8, 0.9, 0.7, 0.9]}


@pytest.fixture(scope="module")
def comparison():
    return made_comparison(ROWS, alone=LONE)


@pytest.fixture(scope="module")
def found(comparison):
    return Findings(comparison)


def without_run(comparison, name, seed, failure=None):
    """The comparison without a run, or with that run failed."""
    runs = [run for run in comparison.runs[name] if run.seed != seed or failure]
    if failure:
        runs[seed] = dataclasses.replace(runs[seed], failure=failure)
    unfinished = 0 if failure else 1
    return dataclasses.replace(
        comparison, runs={**comparison.runs, name: runs}, unfinished=unfinished
    )


def test_verdicts_are_paired_and_corrected_over_the_whole_table(found):
    rows = {"gains": GAIN, "loses": LOSS}
    rows[ALONE] = {task: np.subtract(LONE[task], EQUAL[task]) for task in EQUAL}
    plain = {
        (name, task): scipy.stats.ttest_1samp(differences, 0).pvalue
        for name, row in rows.items()
        for task, differences in row.items()
    }
    order = sorted(plain, key=plain.get)
    corrected, so_far = {}, 0.0
    for rank, cell in enumerate(order):  # Holm's definition
        so_far = max(so_far, (len(order) - rank) * plain[cell])
        corrected[cell] = min(1.0, so_far)
    assert {(n, t) for n, row in found.against_equal.items() for t in row} == set(plain)
    for (name, task), p_value in corrected.items():
        cell = found.against_equal[name][task]
        assert cell.corrected_p_value == pytest.approx(p_value)
        assert cell.difference == pytest.approx(np.mean(rows[name][task]))
    assert found.against_equal["gains"]["topic"].verdict == "better"
    assert found.against_equal["gains"]["depth"].verdict == "undecided"
    assert found.against_equal["loses"]["depth"].verdict == "worse"  # lower is better


def test_tables_say_it_in_words(found):
    table = main_table(found)
    assert table.headers == [
        "weighting",
        "topic accuracy, %",
        "depth error (lower is better)",
        "Δm vs equal, %",
        "Δm vs alone, %",
        "mean rank",
        "step time",
    ]
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == ["equal", "gains", "loses", ALONE]
    assert rows["gains"][1].startswith("62.38 ± ")
    assert rows["gains"][1].endswith(" better")
    assert rows["loses"][2].endswith(" worse")
    for cell in (rows["gains"][2], rows["loses"][1], *rows["equal"]):
        assert "better" not in cell
        assert "worse" not in cell
    assert "undecided" in seeds_note(found)
    against = against_equal_table(found)
    verdicts = {tuple(row[:2]): row[-1] for row in against.rows}
    assert verdicts["gains", "topic"] == "better"
    assert verdicts["loses", "topic"] == "undecided"
    assert against.rows[0][:3] == ["gains", "topic", "+10.12"]
    low, high = found.against_equal["gains"]["topic"].interval
    assert against.rows[0][3] == f"{100 * low:+.2f} to {100 * high:+.2f}"


def test_changes_and_ranks(found):
    topic = 0.1 / 0.5  # with the first seed
    depth = -0.1 / 1.0
    assert found.changes("gains", "equal")[0] == pytest.approx((topic + depth) / 2)
    against_alone = ((0.60 - 0.6) / 0.6 + (0.8 - 1.1) / 0.8) / 2
    assert found.changes("gains", ALONE)[0] == pytest.approx(against_alone)
    # topic: gains, loses, equal; depth: gains, equal, loses.
    assert found.ranks == {"equal": 2.5, "gains": 1.0, "loses": 2.5}
    assert found.front == {"equal": False, "gains": True, "loses": False}
    (equal, gains, loses, alone) = main_table(found).rows
    assert equal[3] == ""
    assert gains[3].startswith(f"{100 * found.changes('gains', 'equal').mean():+.2f} ± ")
    assert [row[5] for row in (equal, gains, loses, alone)] == ["2.50", "1.00", "2.50", ""]


def test_hypervolume_is_a_share_of_the_box_of_all_runs():
    rows = {
        "equal": {"topic": [0.5], "depth": [1.0]},
        "a": {"topic": [0.6], "depth": [2.0]},
        "b": {"topic": [0.7], "depth": [3.0]},
        "c": {"topic": [0.55], "depth": [1.5]},
    }
    found = Findings(made_comparison(rows))
    volumes = {"equal": 0, "a": 0.5 * 0.5, "b": 0, "c": 0.25 * 0.75}
    assert found.hypervolumes == pytest.approx(volumes)
    table = trade_offs_table(found)
    assert table.headers == ["weighting", "on the Pareto front", "hypervolume"]
    assert table.rows[1] == ["a", "yes", "0.250"]
    seven = {f"task {number}": Task() for number in range(7)}
    many = made_comparison({"equal": {task: [0.5, 0.6] for task in seven}}, tasks=seven)
    assert Findings(many).hypervolumes == {}
    assert trade_offs_table(Findings(many)).headers == ["weighting", "on the Pareto front"]
    one = made_comparison({"equal": {"topic": [0.5]}}, tasks={"topic": Task()})
    assert trade_offs_table(Findings(one)) is None


@pytest.mark.parametrize("number", [1, 2])
def test_too_few_seeds_are_said_plainly(number):
    rows = {n: {t: values[:number] for t, values in row.items()} for n, row in ROWS.items()}
    comparison = made_comparison(rows)
    found = Findings(comparison)
    assert f"{number} seed" in seeds_note(found)
    assert "too few to tell a difference from noise" in sections(comparison)[0].text
    assert {row[-1] for row in against_equal_table(found).rows} == {"undecided: too few seeds"}
    assert against_equal_table(found).rows[0][2] != ""
    assert not any(cell.endswith("better") for row in main_table(found).rows for cell in row)


def test_a_failed_run_is_never_better_and_last_in_rank(comparison):
    failed = Findings(without_run(comparison, "gains", 2, "no finite update in epoch 1"))
    assert failed.against_equal["gains"]["topic"].verdict == "undecided: failed seeds"
    assert failed.ranks["gains"] == 3
    assert not failed.front["gains"]
    assert math.isnan(failed.changes("gains", "equal")[2])
    row = main_table(failed).rows[1]
    assert row[1].endswith("failed (1 of 4 seeds)")
    everything = made_comparison(ROWS)
    for seed in range(4):
        everything = without_run(everything, "gains", seed, "no finite update in epoch 1")
    assert main_table(Findings(everything)).rows[1][1] == "failed (4 of 4 seeds)"
    assert time_to_reach_equal(everything, "gains") == [None] * 4


def test_an_interrupted_comparison_is_of_the_seeds_that_all_have(comparison):
    found = Findings(without_run(comparison, "loses", 3))
    assert found.seeds == 3
    assert found.against_equal["gains"]["topic"].seeds == 3
    assert found.against_equal["gains"]["topic"].failed == 0
    nothing = Findings(
        dataclasses.replace(comparison, runs={"equal": comparison.runs["equal"][:0]})
    )
    assert nothing.ranks == {}


def test_time_until_as_good_as_equal(comparison):
    def run(name, course, seconds):
        return made_run(name, 0, {"topic": course, "depth": [1.0] * 3}, seconds=seconds)

    runs = {
        "equal": [run("equal", [0.2, 0.4, 0.4], 2.0)],
        "fast": [run("fast", [0.4, 0.3, 0.5], 3.0)],
        "slow": [run("slow", [0.1, 0.2, 0.39], 1.0)],
        "fell": [dataclasses.replace(run("fell", [0.4, 0.4, 0.4], 1.0), failure="it did")],
    }
    made = dataclasses.replace(comparison, seeds=(0,), runs=runs, alone={})
    assert time_to_reach_equal(made, "equal") == [(2, 4.0)]
    assert time_to_reach_equal(made, "fast") == [(1, 3.0)]
    assert time_to_reach_equal(made, "slow") == [None]
    table = cost_table(made)
    assert table.headers[-2:] == ["memory, MB", "until as good as equal"]
    until = [row[-1] for row in table.rows]
    assert until == ["4 s (epoch 2)", "3 s (epoch 1)", "not reached", "not reached"]
    assert table.rows[1][1] == "1.50"
    assert table.rows[0][3] == "12.3"
    # One task may have lost what the other one gained.
    runs["fast"] = [made_run("fast", 0, {"topic": [0.4, 0.5, 0.2], "depth": [1.2, 1.2, 1.2]})]
    assert time_to_reach_equal(made, "fast") == [(2, 4.0)]
    for of in runs.values():
        of[0].memory_bytes = None
    assert "memory, MB" not in cost_table(made).headers


def test_many_tasks_are_summed_up():
    tasks = {f"task {number}": Task() for number in range(20)}
    noise = np.random.default_rng(0).normal(0, 0.0001, (2, 20, 4))
    equal = {task: 0.5 + number / 100 + noise[0, number] for number, task in enumerate(tasks)}
    other = {task: 0.6 + noise[1, number] for number, task in enumerate(tasks)}
    found = Findings(made_comparison({"equal": equal, "other": other}, tasks=tasks))
    table = main_table(found)
    assert table.headers[1:5] == [
        "mean accuracy, %",
        "worst task, accuracy, %",
        "best task, accuracy, %",
        "tasks better, worse",
    ]
    mean = 100 * np.mean(list(equal.values()))
    assert table.rows[0][1].startswith(f"{mean:.2f} ± ")
    assert table.rows[0][2] == f"{100 * equal['task 0'].mean():.2f} (task 0)"
    assert table.rows[0][3] == f"{100 * equal['task 19'].mean():.2f} (task 19)"
    assert table.rows[1][4] == "10, 9 of 20"  # and one about the same
    by_task = by_task_table(found)
    assert by_task.headers == ["task", "equal", "other"]
    assert [row[0] for row in by_task.rows] == [f"{task} accuracy, %" for task in tasks]
    titles = [section.title for section in sections(found.comparison)]
    assert "Task by task" in titles

    # With different metrics there is no mean; worst and best are those of the change.
    mixed = tasks | {"task 3": TASKS["depth"]}
    table = main_table(Findings(made_comparison({"equal": equal, "other": other}, tasks=mixed)))
    assert table.headers[1:3] == ["worst task, change, %", "best task, change, %"]
    change = 100 * (other["task 0"].mean() / equal["task 0"].mean() - 1)
    assert table.rows[1][2] == f"{change:+.2f} (task 0)"
