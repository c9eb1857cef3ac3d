"""The tables of a comparison: what was reached, against equal weights, at which cost."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tabulate

from mtl_jax.compare.findings import ALONE, Findings, time_to_reach_equal
from mtl_jax.compare.problem import Task
from mtl_jax.compare.referee import BASELINE, Comparison
from mtl_jax.evaluation import mean_interval
from mtl_jax.evaluation._paired import FEWEST_SEEDS

MOST_TASKS = 6
"""With more tasks a table that is a row a weighting has no column for each of them."""


class Table(NamedTuple):
    """A table, to be shown as Markdown or on a page.

    Attributes:
      headers: the header of each column; the first column is the rows' names.
      rows: the cells.
    """

    headers: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        return tabulate.tabulate(
            self.rows, self.headers, tablefmt="github", disable_numparse=True, stralign="right"
        )


def main_table(findings: Findings, *, timing: bool = True) -> Table:
    """What was reached: a row a weighting, then the row of each task trained alone.

    Metrics are means over the seeds with 95 % intervals (Student's t), percentages where the
    metric is a share, and the word ``better`` or ``worse`` where they differ from equal weights'
    beyond noise. Skipped steps are summed over the seeds, and shown if there are any. With more
    than six tasks there are, instead of a column a task, their mean (if they have one metric), the
    worst and the best task, and the number of tasks that are better and worse than with equal
    weights.

    Args:
      findings: what the runs of the comparison say.
      timing: whether to show the time of a step relative to equal weights.
    """
    comparison = findings.comparison
    tasks = comparison.problem.tasks
    columns = _task_columns if len(tasks) <= MOST_TASKS else _summary_columns
    headers = ["weighting", *columns(findings, None)]
    changes = [f"Δm vs {reference}, %" for reference in ("equal", "alone")]
    others = (BASELINE, ALONE) if comparison.alone else (BASELINE,)
    headers += [*changes[: len(others)], "mean rank"]
    if timing:
        headers.append("step time")
    lone = [run for runs in comparison.alone.values() for run in runs]
    skips = any(run.skipped for runs in (*comparison.runs.values(), lone) for run in runs)
    if skips:
        headers.append("skipped steps")

    rows = []
    for name, runs in ({**comparison.runs} | ({ALONE: lone} if lone else {})).items():
        row = [name, *columns(findings, name)]
        for other in others:
            known = name in findings.values and other in findings.values and name != other
            row.append(_interval(100 * findings.changes(name, other), sign="+") if known else "")
        row.append(f"{findings.ranks[name]:.2f}" if name in findings.ranks else "")
        if timing:
            row.append(_step_time(comparison, name) if name != ALONE else "")
        if skips:
            row.append(str(sum(run.skipped for run in runs)))
        rows.append(row)
    return Table(headers, rows)


def against_equal_table(findings: Findings) -> Table:
    """Every weighting's difference from equal weights in every task, and what follows of it."""
    rows = []
    for name, row in findings.against_equal.items():
        for task, found in row.items():
            of = findings.comparison.problem.tasks[task]
            low, high = found.interval
            interval = f"{_number(of, low, '+')} to {_number(of, high, '+')}"
            rows.append(
                [
                    name,
                    task,
                    _number(of, found.difference, "+"),
                    "" if math.isnan(low) else interval,
                    "" if math.isnan(found.corrected_p_value) else f"{found.corrected_p_value:.2g}",
                    found.verdict,
                ]
            )
    return Table(["weighting", "task", "difference", "95 % interval", "p", "verdict"], rows)


def by_task_table(findings: Findings) -> Table:
    """What was reached in every task: a row a task and a column a weighting."""
    tasks = findings.comparison.problem.tasks
    names = list(findings.comparison.runs) + ([ALONE] if findings.comparison.alone else [])
    columns = {name: _task_columns(findings, name) for name in names}
    rows = [
        [header, *(columns[name][number] for name in names)]
        for number, header in enumerate(_header(task, of) for task, of in tasks.items())
    ]
    return Table(["task", *names], rows)


def trade_offs_table(findings: Findings) -> Table | None:
    """Which weightings are on the Pareto front of their mean metrics, and their hypervolumes.

    ``None`` for one task, where there is nothing to trade.
    """
    if len(findings.directions) < 2:
        return None
    volumes = findings.hypervolumes
    rows = []
    for name in findings.comparison.runs:
        row = [name, {True: "yes", False: "no", None: ""}[findings.front.get(name)]]
        rows.append(row + ([f"{volumes[name]:.3f}"] if volumes else []))
    return Table(["weighting", "on the Pareto front"] + ["hypervolume"] * bool(volumes), rows)


def cost_table(comparison: Comparison) -> Table:
    """What a weighting costs: time of a step, memory, time to equal weights' last metrics."""
    headers = ["weighting", "step time", "ms a step", "memory, MB", "until as good as equal"]
    rows = []
    for name, runs in comparison.runs.items():
        memory = runs[0].memory_bytes
        rows.append(
            [
                name,
                _step_time(comparison, name),
                f"{1000 * comparison.step_seconds(name):.3g}",
                "" if memory is None else f"{memory / 1e6:.3g}",
                _until(comparison, name),
            ]
        )
    if not any(row[3] for row in rows):  # the backend does not say
        return Table(headers[:3] + headers[4:], [row[:3] + row[4:] for row in rows])
    return Table(headers, rows)


def seeds_note(findings: Findings) -> str:
    """What the number of seeds allows to say."""
    number = findings.seeds
    if number < FEWEST_SEEDS:
        return (
            f"{number} seed{'s' * (number != 1)}: too few to tell a difference from noise, so "
            f"nothing is called better or worse. That takes at least {FEWEST_SEEDS}, and 5 or more "
            "to find any but large differences."
        )
    return (
        "Better and worse: than equal weights with the same seeds, beyond noise (paired t-test, "
        "Holm's correction for all comparisons of the table, 5 %). No word: undecided, which is "
        "not to say that it is the same."
    )


def _task_columns(findings: Findings, name: str | None) -> list[str]:
    """A cell for each task; the headers, without a name."""
    comparison = findings.comparison
    if name is None:
        return [_header(task, of) for task, of in comparison.problem.tasks.items()]
    cells = []
    for task, of in comparison.problem.tasks.items():
        runs = comparison.alone.get(task, ()) if name == ALONE else comparison.runs[name]
        finished = [run for run in runs if run.failure is None]
        values = _scale(of) * np.array([findings.metric(run, task) for run in finished])
        text = _interval(values, digits=_digits(of))
        if len(finished) < len(runs):
            text = f"{text} failed ({len(runs) - len(finished)} of {len(runs)} seeds)"
        verdict = findings.against_equal.get(name, {}).get(task)
        if verdict is not None and verdict.verdict in ("better", "worse"):
            text = f"{text} {verdict.verdict}"
        cells.append(text.strip())
    return cells


def _summary_columns(findings: Findings, name: str | None) -> list[str]:
    """Mean, worst and best task, and how many are better and worse; the headers, without a name."""
    tasks = findings.comparison.problem.tasks
    metrics = {(of.metric, of.percent, of.higher_is_better) for of in tasks.values()}
    first = next(iter(tasks.values()))
    alike = len(metrics) == 1
    if name is None:
        unit = _header("", first).strip() if alike else "change, %"
        mean = [f"mean {unit}"] if alike else []
        return [*mean, f"worst task, {unit}", f"best task, {unit}", "tasks better, worse"]
    if name not in findings.values:
        return [""] * (3 + alike)
    row = findings.values[name]
    shown = {task: float(values.mean()) for task, values in row.items()} if findings.seeds else {}
    cells = []
    if alike:
        values = _scale(first) * np.mean(list(row.values()), axis=0)
        cells = [_interval(values, digits=_digits(first))]
    elif shown:
        shown = findings.task_changes(name)
    known = {task: value for task, value in shown.items() if math.isfinite(value)}
    order = sorted(known, key=lambda task: known[task])
    if alike and not first.higher_is_better:
        order.reverse()
    for task in (order[0], order[-1]) if order else ("", ""):
        value = _number(first, known[task]) if alike and task else ""
        if task and not alike:
            value = f"{100 * known[task]:+.2f}"
        cells.append(f"{value} ({task})" if task else "failed" if findings.seeds else "")
    verdicts = [found.verdict for found in findings.against_equal.get(name, {}).values()]
    number = [verdicts.count(word) for word in ("better", "worse")]
    cells.append(f"{number[0]}, {number[1]} of {len(tasks)}" if verdicts else "")
    return cells


def _until(comparison: Comparison, name: str) -> str:
    found = time_to_reach_equal(comparison, name)
    reached = [of_run for of_run in found if of_run is not None]
    if not reached:
        return "not reached" if found else ""
    epochs, seconds = np.mean(reached, axis=0)
    of_all = "" if len(reached) == len(found) else f", {len(reached)} of {len(found)} seeds"
    return f"{seconds:.3g} s (epoch {epochs:.3g}{of_all})"


def _step_time(comparison: Comparison, name: str) -> str:
    return f"{comparison.step_seconds(name) / comparison.step_seconds(BASELINE):.2f}"


def _header(task: str, of: Task) -> str:
    unit = ", %" if of.percent else ""
    arrow = "" if of.higher_is_better else " (lower is better)"
    return f"{task} {of.metric}{unit}{arrow}"


def _scale(task: Task) -> int:
    return 100 if task.percent else 1


def _digits(task: Task) -> int:
    return 2 if task.percent else 4


def _number(task: Task, value: float, sign: str = "") -> str:
    if math.isnan(value):
        return ""
    return f"{_scale(task) * value:{sign}.{_digits(task)}f}"


def _interval(values: Sequence[float] | np.ndarray, digits: int = 2, sign: str = "") -> str:
    """The mean and its interval, of those that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    mean, half_width = mean_interval(known)
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(half_width) else f"{text} ± {half_width:.{digits}f}"
