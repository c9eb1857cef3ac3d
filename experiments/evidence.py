"""What the comparisons on all problems say together: the pages of results, from kept records.

``python -m experiments.evidence runs/burgers_mean runs/burgers_worst`` puts the small records of
finished comparisons into docs/results, and makes all tables and pictures anew from what is there.
Without a folder it does only the latter.
"""

import dataclasses
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import matplotlib
import matplotlib.figure
import numpy as np
import tyro

from mtl_jax.compare import Results
from mtl_jax.compare.analysis import ALONE, Analysis, Estimate, over_problems
from mtl_jax.compare.report import settings_text
from mtl_jax.compare.results import BASELINE, Run, Trial, replace_file, write_text
from mtl_jax.compare.tables import (
    by_metric_table,
    main_table,
    main_text,
    tuning_table,
    tuning_text,
    verdicts,
    verdicts_text,
)
from mtl_jax.evaluation import PairedComparison

DOCS = pathlib.Path(__file__).parents[1] / "docs"
EMPHASIS = ("adaptive", "adaptive_softmax", "adaptive_alone", "group_dro", "achievement")
"""The weightings that give more weight to tasks that are harder or behind."""

CLAIMED = ("equal", "dwa", "uncertainty")
"""What the origin of ``adaptive`` says that it is better than."""

DIGITS = 5
"""Significant digits of the numbers in a kept record."""

MARK = "made by python -m experiments.evidence"
MARKS = {"better": " ▲", "worse": " ▼"}

Select = Literal["mean", "worst"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Make the tables and pictures of the results from the records in docs/results."""

    folders: Annotated[
        tuple[pathlib.Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FOLDER", help="Finished comparisons to put there first."),
    ] = ()
    docs: pathlib.Path = DOCS
    """The folder with results.md, choosing.md, results/ and pictures/."""
    readme: pathlib.Path = DOCS.parent / "README.md"
    """The page with the results in small."""


def main(arguments: list[str] | None = None) -> None:
    """Keep records and make the pages; exits with status 2 after a message if it cannot."""
    config = tyro.cli(Config, prog="python -m experiments.evidence", args=arguments)
    try:
        for folder in config.folders:
            keep(Results.read(folder), config.docs / "results")
        kept: dict[Select, Results] = {
            select: read_kept(config.docs / "results", select) for select in SELECTIONS
        }
        if not kept["mean"].problems:
            raise ValueError(f"{config.docs / 'results'} holds no records; name a comparison.")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for problem in kept["mean"].problems:
        write_text(config.docs / "results" / f"{problem}.md", problem_page(kept, problem))
    tables = {
        "mean": changes_table(kept["mean"], "mean"),
        "worst": changes_table(kept["worst"], "worst"),
        "emphasis": emphasis_table(kept),
        "learning rate": learning_rate_table(kept["mean"]),
        "properties": properties_table(kept["mean"]),
        "in small": small_table(kept),
    }
    for page in (config.docs / "results.md", config.docs / "choosing.md", config.readme):
        text = page.read_text(encoding="utf-8")
        write_text(page, filled(text, tables))
    with matplotlib.rc_context({"svg.hashsalt": "mtl_jax", "svg.fonttype": "none"}):
        figure = changes_figure(kept)
        path = config.docs / "pictures" / "evidence.svg"
        replace_file(path, lambda file: figure.savefig(file, metadata={"Date": None}))


# The records

SELECTIONS: dict[Select, str] = {
    "mean": "the mean over the tasks",
    "worst": "the worst task",
}


def keep(results: Results, folder: pathlib.Path) -> None:
    """Write the small record of tuned comparisons: ``<problem>_<mean or worst>/results.json``.

    It holds what tables and verdicts are made of: of every run the metrics, losses and mean weights
    at its end, of equal weights those of every epoch, of every trial its setting and score. Times
    and versions are left out.

    Raises:
      ValueError: if a comparison is not finished or was not tuned.
    """
    for problem in results.problems:
        if problem not in results.tunings or results.unfinished(problem):
            raise ValueError(f"The comparison on {problem!r} is not finished, or was not tuned.")
        tuning = results.tunings[problem]
        small = Results(
            {problem: results.problems[problem]},
            [shortened(run) for runs in results.of(problem).values() for run in runs],
            {
                problem: dataclasses.replace(
                    tuning,
                    trials={
                        name: [shortened_trial(trial) for trial in trials]
                        for name, trials in tuning.trials.items()
                    },
                )
            },
            {problem: results.planned[problem]},
            anywhere(results.command),
        )
        place = folder / f"{problem}_{tuning.select}"
        small.write(place)
        (place / "timing.json").unlink()
        path = place / "results.json"
        content = rounded(json.loads(path.read_text(encoding="utf-8")))
        write_text(path, json.dumps(content, separators=(",", ":")) + "\n")


def anywhere(command: str) -> str:
    """The command without the folders of the machine that it ran on."""
    command = re.sub(r" --runs-dir \S+", "", command)
    command = re.sub(r"(--data-dir) \S+", r"\1 DIR", command)
    return re.sub(r"(--reuse) \S*?([^\s/]+)(?= |$)", r"\1 runs/\2", command)


def shortened(run: Run) -> Run:
    """A run without what no table needs."""
    curves = run.weighting == BASELINE

    def values(course: list[float]) -> list[float]:
        return course if curves else course[-1:]

    return dataclasses.replace(
        run.thinned(1),
        train_losses={task: values(course) for task, course in run.train_losses.items()},
        metrics={
            split: {
                task: {metric: values(course) for metric, course in metrics.items()}
                for task, metrics in tasks.items()
            }
            for split, tasks in run.metrics.items()
            if split == "test"
        },
        epoch_seconds=[],
        compile_seconds=0.0,
        compilations=0,
        memory_bytes=None,
        provenance={},
    )


def shortened_trial(trial: Trial) -> Trial:
    """A trial without what no table needs."""
    return Trial(trial.learning_rate, trial.parameters, {}, trial.score, trial.failure)


def rounded(value: Any) -> Any:
    """The same with fewer digits."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def read_kept(folder: pathlib.Path, select: Select) -> Results:
    """All kept records that were tuned for this."""
    found = sorted(folder.glob(f"*_{select}/results.json"))
    return Results.combine([Results.read(path.parent) for path in found])


# The tables


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, the first column to the left."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def changed(found: PairedComparison | None, estimate: Estimate | None) -> str:
    """A change in per cent with its interval and its verdict."""
    if found is None or estimate is None or math.isnan(estimate.mean):
        return ""
    mean, half = 100 * estimate.mean, 100 * estimate.half_width
    digits = 0 if abs(mean) >= 20 else 1
    return f"{mean:+.{digits}f} ± {half:.{digits}f}{MARKS.get(found.verdict, '')}"


def names_of(results: Results) -> list[str]:
    """All weightings but equal weights, and each task alone."""
    found = dict.fromkeys(
        name for problem in results.problems for name in Analysis(results, problem).weightings
    )
    return [*(name for name in found if name != BASELINE), ALONE]


def changes_table(results: Results, of: Select) -> str:
    """Every weighting against equal weights on every problem."""
    names = names_of(results)
    compared = over_problems(results, of=of, others=names)
    analyses = {problem: Analysis(results, problem) for problem in results.problems}

    def entry(name: str, problem: str) -> str:
        analysis = analyses[problem]
        change = analysis.mean_change if of == "mean" else analysis.worst_change
        found = compared.get(problem, {}).get(name)
        return "" if found is None else changed(found, change(name, BASELINE))

    rows = [[named(name), *(entry(name, problem) for problem in analyses)] for name in names]
    return markdown(["", *map(linked, analyses)], rows)


def emphasis_table(kept: Mapping[Select, Results]) -> str:
    """Each form of emphasis against what it is said to be better than."""
    problems = list(kept["mean"].problems)
    rows = []
    for of, results in kept.items():
        for form in EMPHASIS:
            if not any(form in Analysis(results, name).weightings for name in results.problems):
                continue
            compared = over_problems(results, form, of=of, others=CLAIMED)
            for other in CLAIMED:
                row = [of if form == EMPHASIS[0] and other == CLAIMED[0] else ""]
                row += [named(form) if other == CLAIMED[0] else "", other]
                for problem in problems:
                    found = compared.get(problem, {}).get(other)
                    if found is None:
                        row.append("")
                        continue
                    analysis = Analysis(results, problem)
                    change = analysis.mean_change if of == "mean" else analysis.worst_change
                    row.append(changed(found, change(form, other)))
                rows.append(row)
    return markdown(["", "form", "against", *map(linked, problems)], rows)


def learning_rate_table(results: Results) -> str:
    """What the learning rate is worth, and what is left of a gain at the default after tuning."""
    rows = []
    for problem in results.problems:
        analysis, tuning = Analysis(results, problem), results.tunings[problem]

        def score(trial: Trial) -> float:
            return -math.inf if trial.score is None else trial.score

        at_default = {
            name: score(tuning.trials[name][0])
            for name in analysis.weightings
            if name not in (BASELINE, "constant")
        }
        best = max(at_default, key=lambda name: at_default[name])
        equal = score(tuning.chosen(BASELINE))
        left = score(tuning.chosen(best)) - equal
        compared = over_problems(results, others=[best])[problem][best]
        rows.append(
            [
                linked(problem),
                f"{100 * equal:+.1f}",
                f"{best} {100 * at_default[best]:+.1f}",
                f"{100 * left:+.1f}",
                changed(compared, analysis.mean_change(best, BASELINE)),
            ]
        )
    header = [
        "problem",
        "equal weights: tuned against default",
        "best weighting at the defaults",
        "the same, both tuned",
        "the same on the test split, 10 seeds",
    ]
    return markdown(header, rows)


def properties_table(results: Results) -> str:
    """Properties of the problems that may tell where a weighting helps."""
    rows = []
    for problem in results.problems:
        analysis = Analysis(results, problem)
        equal = analysis.weightings[BASELINE]
        first, last = (
            {
                task: float(np.mean([run.train_losses[task][epoch] for run in equal]))
                for task in analysis.info.tasks
            }
            for epoch in (0, -1)
        )
        fallen = {task: 100 * (1 - last[task] / first[task]) for task in first}
        alone = analysis.mean_change(BASELINE, ALONE)
        changes = analysis.task_changes(BASELINE, ALONE)
        worst = min((float(np.mean(values)) for values in changes.values()), default=math.nan)
        shares = [
            float(run.conflict["share"][0])
            for runs in analysis.weightings.values()
            for run in runs
            if run.conflict
        ]
        compared = over_problems(results, others=names_of(results)[:-1])[problem]
        gains = {
            name: estimate.mean
            for name in compared
            if (estimate := analysis.mean_change(name, BASELINE)) is not None
        }
        best = max(gains, key=lambda name: gains[name])
        rows.append(
            [
                linked(problem),
                str(len(analysis.info.tasks)),
                f"{max(first.values()) / min(first.values()):.3g}",
                f"{max(last.values()) / min(last.values()):.3g}",
                f"{min(fallen.values()):.0f} to {max(fallen.values()):.0f} %",
                f"{100 * np.mean(shares):.0f} %" if shares else "",
                f"{round(100 * unfinished(analysis), 1) + 0.0:.1f} %",  # never "-0.0"
                "" if alone is None else f"{100 * alone.mean:+.1f}, {100 * worst:+.1f}",
                changed(compared[best], analysis.mean_change(best, BASELINE)) + f" {best}",
            ]
        )
    header = [
        "problem",
        "tasks",
        "largest loss to smallest, first epoch",
        "last epoch",
        "the losses fell by",
        "conflicting pairs",
        "gain in the last tenth of training",
        "equal against alone, %: mean, worst task",
        "best weighting against equal, %",
    ]
    return markdown(header, rows)


def unfinished(analysis: Analysis) -> float:
    """How much the test metrics of equal weights still gain in the last tenth of training."""
    changes = []
    for run in analysis.weightings[BASELINE]:
        for column in analysis.columns:
            course = run.metrics["test"][column.task][column.metric]
            then = course[-1 - max(1, round(len(course) / 10))] if len(course) > 1 else math.nan
            sign = 1 if column.info.higher_is_better else -1
            changes.append(sign * (course[-1] - then) / abs(then) if then else math.nan)
    return float(np.nanmean(changes))


def small_table(kept: Mapping[Select, Results]) -> str:
    """The README's: the mean and the worst task, of the weightings that the project is about."""
    rows = []
    for name in (*EMPHASIS[:3], *CLAIMED[1:], "best other", ALONE):
        row = [named(name)]
        for problem in kept["mean"].problems:
            of_name, entries = name, []
            for of, results in kept.items():
                if problem not in results.problems:
                    continue
                analysis = Analysis(results, problem)
                compared = over_problems(results, of=of, others=names_of(results))[problem]
                change = analysis.mean_change if of == "mean" else analysis.worst_change
                if name == "best other":
                    rest = {
                        other: estimate.mean
                        for other in compared
                        if other not in (*EMPHASIS, *CLAIMED, ALONE)
                        and (estimate := change(other, BASELINE)) is not None
                    }
                    of_name = max(rest, key=lambda other: rest[other])
                if of_name in compared:
                    entry = changed(compared[of_name], change(of_name, BASELINE))
                    entries.append(entry.replace(" ± ", " ± "))
            row.append(" / ".join(entries))
        rows.append(row)
    return markdown(["", *kept["mean"].problems], rows)


def linked(problem: str) -> str:
    """The problem's name, as a link to its page."""
    return f"[{problem}](results/{problem}.md)"


def named(name: str) -> str:
    """A weighting's name as code, what is none as it is."""
    return name if " " in name else f"`{name}`"


def filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with what is between the marks of each table made anew."""
    for name, table in tables.items():
        start, end = f"<!-- {name}: {MARK} -->\n", f"<!-- end of {name} -->"
        if start in page:
            before, rest = page.split(start)
            page = f"{before}{start}\n{table}\n{end}{rest.split(end, maxsplit=1)[1]}"
    return page


def problem_page(kept: Mapping[Select, Results], problem: str) -> str:
    """The page of a problem: verdicts, what was reached, what tuning chose."""
    first = Analysis(kept["mean"], problem)
    lines = [f"# {problem}", "", first.info.description, "", settings_text(first), ""]
    lines += [f"Made from records by `{MARK.removeprefix('made by ')}`.", ""]
    for select, results in kept.items():
        if problem not in results.problems:
            continue
        analysis = Analysis(results, problem)
        lines += [f"## Tuned for {SELECTIONS[select]}", "", verdicts_text(analysis), ""]
        lines += [*(f"- {sentence}" for sentence in verdicts(analysis)), ""]
        lines += [main_text(analysis), "", main_table(analysis, timing=False).markdown(), ""]
        if "better, worse" in main_table(analysis).headers:
            lines += [by_metric_table(analysis).markdown(), ""]
        lines += [tuning_text(analysis), "", tuning_table(analysis).markdown(), ""]
        lines += ["    " + line for line in analysis.results.command.splitlines()]
        lines += [""]
    return "\n".join(lines)


# The picture


def changes_figure(kept: Mapping[Select, Results]) -> matplotlib.figure.Figure:
    """For every problem the change from equal weights of all weightings, mean and worst task."""
    problems, names = list(kept["mean"].problems), names_of(kept["mean"])
    columns = min(4, len(problems))
    rows = math.ceil(len(problems) / columns)
    figure = matplotlib.figure.Figure((2.6 * columns + 1.2, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for axes, problem in zip(panels, problems, strict=False):
        for of, results in kept.items():
            draw_changes(axes, results, problem, of, names)
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set_title(problem, fontsize=10)
        axes.set_yticks(range(0, -len(names), -1), names, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
    for axes in list(panels):
        axes.set_visible(False)
    figure.supxlabel("change from equal weights, %: the mean over the tasks, the worst task")
    return figure


def draw_changes(
    axes: Any,
    results: Results,
    problem: str,
    of: Select,
    names: Sequence[str],
) -> None:
    """Points with intervals, those of the mean above those of the worst task."""
    if problem not in results.problems:
        return
    offset, color = {"mean": (0.15, "tab:blue"), "worst": (-0.15, "tab:orange")}[of]
    analysis = Analysis(results, problem)
    change: Callable[[str, str], Estimate | None] = (
        analysis.mean_change if of == "mean" else analysis.worst_change
    )
    found = {
        place: estimate
        for place, name in enumerate(names)
        if (estimate := change(name, BASELINE)) is not None and not math.isnan(estimate.mean)
    }
    axes.errorbar(
        [100 * one.mean for one in found.values()],
        [offset - place for place in found],
        xerr=[100 * one.half_width for one in found.values()],
        fmt="o",
        markersize=3,
        linewidth=1,
        color=color,
    )


if __name__ == "__main__":
    main()
