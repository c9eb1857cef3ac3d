"""The table of a comparison."""

import math
from collections.abc import Mapping, Sequence

import tabulate

from mtl_jax.compare.problem import Problem
from mtl_jax.compare.referee import BASELINE, Comparison
from mtl_jax.compare.run import Run
from mtl_jax.compare.sources import Source
from mtl_jax.evaluation import mean_interval


def markdown_table(comparison: Comparison, *, best: bool = False, timing: bool = True) -> str:
    """A Markdown table: a row a weighting, then the row of each task trained alone.

    Metrics are means over the seeds with 95 % intervals (Student's t), percentages where the
    metric is a share. Skipped steps are summed over the seeds, and shown if there are any.

    Args:
      comparison: the comparison.
      best: whether to show the epoch with the best validation metrics instead of the last one.
      timing: whether to show the time of a step relative to equal weights.
    """
    problem = comparison.problem
    headers = ["weighting"] + [_header(problem, task) for task in problem.tasks]
    if comparison.alone:
        headers.append("change from alone, %")
    if timing:
        headers.append("step time")
    everything = [
        run for runs in (*comparison.runs.values(), *comparison.alone.values()) for run in runs
    ]
    skips = any(run.skipped for run in everything)
    if skips:
        headers.append("skipped steps")

    rows = []
    for name, runs in comparison.runs.items():
        row = [name] + [_metric(comparison, runs, task, best) for task in problem.tasks]
        if comparison.alone:
            changes = [comparison.change_from_alone(run, best=best) for run in _finished(runs)]
            if comparison.unfinished:
                changes = [change for change in changes if not math.isnan(change)]
            row.append(_interval([100 * change for change in changes], digits=2, sign="+"))
        if timing:
            row.append(f"{comparison.step_seconds(name) / comparison.step_seconds(BASELINE):.2f}")
        if skips:
            row.append(_skipped(runs))
        rows.append(row)
    if comparison.alone:
        lone = [run for runs in comparison.alone.values() for run in runs]
        row = ["each task alone"]
        row += [
            _metric(comparison, comparison.alone.get(task, ()), task, best)
            for task in problem.tasks
        ]
        row += [""] * (1 + timing) + ([_skipped(lone)] if skips else [])
        rows.append(row)
    return tabulate.tabulate(
        rows, headers, tablefmt="github", disable_numparse=True, stralign="right"
    )


def markdown_report(comparison: Comparison, *, command: str = "") -> str:
    """The tables of a comparison with what they were measured on, as a Markdown document."""
    problem = comparison.problem
    parts = ("train", "validation", "test")
    sizes = ", ".join(f"{_by_source(problem.sizes(part))} {part}" for part in parts)
    number = len(comparison.seeds)
    missing = comparison.unfinished
    lines = [
        f"# {problem.name}",
        "",
        problem.description,
        "",
        f"{sizes} examples; {problem.epochs} epochs, batch {_by_source(problem.batch_sizes())}, "
        f"learning rate {problem.learning_rate:g}; {number} seed{'s' * (number != 1)}. Test "
        "metrics, mean ± 95 % "
        "interval over seeds. Step times: fastest epoch, relative to equal weights.",
        "",
        *(
            [f"**Interrupted: {missing} run{'s' * (missing != 1)} not finished.**", ""]
            * (missing > 0)
        ),
        "## After the last epoch",
        "",
        markdown_table(comparison),
        "",
        "## At the epoch that is best on the validation split",
        "",
        markdown_table(comparison, best=True, timing=False),
        "",
    ]
    if command:
        lines += ["Made by", "", f"    {command}", ""]
    return "\n".join(lines)


def _header(problem: Problem, task: str) -> str:
    description = problem.tasks[task]
    unit = ", %" if description.percent else ""
    arrow = "" if description.higher_is_better else " (lower is better)"
    return f"{task} {description.metric}{unit}{arrow}"


def _finished(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.failure is None]


def _metric(comparison: Comparison, runs: Sequence[Run], task: str, best: bool) -> str:
    finished = _finished(runs)
    scale = 100 if comparison.problem.tasks[task].percent else 1
    values = [
        scale * run.test[task][comparison.best_epoch(run) if best else -1] for run in finished
    ]
    text = _interval(values, digits=2 if scale == 100 else 4)
    failed = len(runs) - len(finished)
    return f"{text} failed ({failed} of {len(runs)} seeds)".strip() if failed else text


def _interval(values: Sequence[float], digits: int, sign: str = "") -> str:
    if not values:
        return ""
    mean, half_width = mean_interval(values)
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(half_width) else f"{text} ± {half_width:.{digits}f}"


def _skipped(runs: Sequence[Run]) -> str:
    return str(sum(run.skipped for run in runs))


def _by_source(numbers: Mapping[Source, int]) -> str:
    """``"5,000"``, or ``"5,000 (news) + 300 (reviews)"``."""
    return " + ".join(
        f"{number:,}" if source is None else f"{number:,} ({source})"
        for source, number in numbers.items()
    )
