"""What the comparisons on all problems say together: the pages of results, from kept records.

``python -m experiments.evidence runs/burgers_mean runs/burgers_worst`` puts the small records of
finished comparisons into docs/results, and makes all tables and pictures anew from what is there.
Without a folder it does only the latter.
"""

import dataclasses
import functools
import json
import math
import pathlib
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import matplotlib
import matplotlib.figure
import matplotlib.lines
import numpy as np
import tyro

from mtl_jax.compare import Results
from mtl_jax.compare.analysis import ALONE, Analysis, Estimate, over_problems
from mtl_jax.compare.report import settings_text
from mtl_jax.compare.results import (
    BASELINE,
    MetricInfo,
    ProblemInfo,
    Run,
    Trial,
    Tuning,
    replace_file,
    write_text,
)
from mtl_jax.compare.tables import (
    answer,
    by_metric_table,
    main_table,
    main_text,
    tuning_table,
    tuning_text,
    verdicts,
    verdicts_text,
)
from mtl_jax.evaluation import PairedComparison, delta_m

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
    """The folder with results.md, results/ and pictures/."""
    readme: pathlib.Path = DOCS.parent / "README.md"
    """The page with the results in small."""


def main(arguments: list[str] | None = None) -> None:
    """Keep records and make the pages; exits with status 2 after a message if it cannot."""
    config = tyro.cli(Config, prog="python -m experiments.evidence", args=arguments)
    try:
        for folder in config.folders:
            keep(Results.read(folder), config.docs / "results")
        kept: dict[Select, Tuned] = {
            of: Tuned(read_kept(config.docs / "results", of), of) for of in SELECTIONS
        }
        if not kept["mean"].analyses:
            raise ValueError(f"{config.docs / 'results'} holds no records; name a comparison.")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for problem in kept["mean"].analyses:
        write_text(config.docs / "results" / f"{problem}.md", problem_page(kept, problem))
    tables = {
        "mean": changes_table(kept["mean"]),
        "errors": changes_table(Tuned(of_errors(kept["mean"].results), "mean")),
        "worst": changes_table(kept["worst"]),
        "emphasis": emphasis_table(kept),
        "learning rate": learning_rate_table(kept["mean"]),
        "properties": properties_table(kept["mean"]),
        "published": published_table(kept["mean"]),
        "in small": small_table(kept),
    }
    for page in (config.docs / "results.md", config.readme):
        text = page.read_text(encoding="utf-8")
        write_text(page, filled(text, tables))
    with matplotlib.rc_context({"svg.hashsalt": "mtl_jax", "svg.fonttype": "none"}):
        pictures = {"evidence": changes_figure(kept), "predictors": predictors_figure(kept["mean"])}
        for name, figure in pictures.items():
            path = config.docs / "pictures" / f"{name}.svg"
            replace_file(path, lambda file, f=figure: f.savefig(file, metadata={"Date": None}))


# The records

SELECTIONS: dict[Select, str] = {
    "mean": "the mean over the tasks",
    "worst": "the worst task",
}


def keep(results: Results, folder: pathlib.Path) -> None:
    """Write the small record of tuned comparisons: ``<problem>_<mean or worst>/results.json``.

    It holds what tables and verdicts are made of: of every run the test metrics at its end, of
    every trial its setting and score. Of what was tuned for the mean besides: each weighting's mean
    weights and conflicts, metrics and losses of equal weights in every epoch, and the validation
    metrics of the first and of the chosen trials. Times and versions are left out.

    Raises:
      ValueError: if a comparison is not finished or was not tuned.
    """
    for problem in results.problems:
        if problem not in results.tunings or results.unfinished(problem):
            raise ValueError(f"The comparison on {problem!r} is not finished, or was not tuned.")
        tuning = results.tunings[problem]
        small = Results(
            {problem: results.problems[problem]},
            [
                shortened(run, tuning.select)
                for runs in results.of(problem).values()
                for run in runs
            ],
            {
                problem: dataclasses.replace(
                    tuning,
                    trials={
                        name: [shortened_trial(trial, name, tuning) for trial in trials]
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
    return "\n".join(shlex.join(_anywhere(shlex.split(line))) for line in command.splitlines())


def _anywhere(words: Iterable[str]) -> Iterator[str]:
    option = ""
    for word in words:
        folder = word
        if word.startswith("--"):
            option, _, folder = word.partition("=")
            option = option.replace("_", "-")
            if option in ("--data-dir", "--reuse"):
                yield option
        if option not in ("--runs-dir", "--data-dir", "--reuse"):
            yield word
        elif folder and option == "--reuse":
            yield f"runs/{pathlib.PurePath(folder).name}"
        elif folder:
            if option == "--data-dir":
                yield "DIR"
            option = ""  # it has one


def shortened(run: Run, select: Select) -> Run:
    """A run without what no table needs."""
    curves = run.weighting == BASELINE and select == "mean"
    steps = run.task is None and select == "mean"

    def values(course: list[float]) -> list[float]:
        return course if curves else course[-1:]

    return dataclasses.replace(
        run.thinned(1) if steps else dataclasses.replace(run, weights={}, conflict={}),
        train_losses=run.train_losses if curves else {},
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


def shortened_trial(trial: Trial, name: str, tuning: Tuning) -> Trial:
    """A trial without what no table needs."""
    needed = tuning.select == "mean" and trial in (tuning.trials[name][0], tuning.chosen(name))
    validation = {
        task: {metric: course[-1:] for metric, course in metrics.items()}
        for task, metrics in (trial.validation if needed else {}).items()
    }
    return Trial(trial.learning_rate, trial.parameters, validation, trial.score, trial.failure)


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


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was tuned for the same, on all problems.

    Attributes:
      results: the results.
      of: what they were tuned for.
    """

    results: Results
    of: Select

    @functools.cached_property
    def analyses(self) -> dict[str, Analysis]:
        """What the results on each problem say."""
        return {problem: Analysis(self.results, problem) for problem in self.results.problems}

    @functools.cached_property
    def names(self) -> list[str]:
        """All weightings but equal weights, and each task alone."""
        found = dict.fromkeys(name for one in self.analyses.values() for name in one.weightings)
        return [*(name for name in found if name != BASELINE), ALONE]

    @functools.cached_property
    def compared(self) -> dict[str, dict[str, PairedComparison]]:
        """All weightings against equal weights on all problems, corrected together."""
        return over_problems(self.results, of=self.of, others=self.names)

    def change(self, problem: str, name: str, reference: str = BASELINE) -> Estimate | None:
        """The change of a row against another one."""
        analysis = self.analyses[problem]
        change = analysis.mean_change if self.of == "mean" else analysis.worst_change
        return change(name, reference)

    def entry(self, problem: str, name: str) -> str:
        """The change against equal weights, with its verdict."""
        found = self.compared.get(problem, {}).get(name)
        return "" if found is None else changed(found, self.change(problem, name))


def changes_table(tuned: Tuned) -> str:
    """Every weighting against equal weights on every problem."""
    rows = [
        [named(name), *(tuned.entry(problem, name) for problem in tuned.analyses)]
        for name in tuned.names
    ]
    return markdown(["", *map(linked, tuned.analyses)], rows)


def emphasis_table(kept: Mapping[Select, Tuned]) -> str:
    """Each form of emphasis against what it is said to be better than."""
    problems = list(kept["mean"].analyses)
    rows = []
    for of, tuned in kept.items():
        for form in (form for form in EMPHASIS if form in tuned.names):
            compared = over_problems(tuned.results, form, of=of, others=CLAIMED)
            for other in CLAIMED:
                first = other == CLAIMED[0]
                row = [of if first and form == EMPHASIS[0] else "", named(form) if first else ""]
                for problem in problems:
                    found = compared.get(problem, {}).get(other)
                    estimate = found and tuned.change(problem, form, other)
                    row.append(changed(found, estimate) if found else "")
                rows.append([*row[:2], other, *row[2:]])
    return markdown(["", "form", "against", *map(linked, problems)], rows)


def learning_rate_table(tuned: Tuned) -> str:
    """What the learning rate is worth, and what is left of a gain at the default after tuning."""
    rows = []
    for problem, analysis in tuned.analyses.items():
        tuning = tuned.results.tunings[problem]

        def score(trial: Trial) -> float:
            return -math.inf if trial.score is None else trial.score

        at_default = {
            name: score(tuning.trials[name][0])
            for name in analysis.weightings
            if name not in (BASELINE, "constant")
        }
        best = max(at_default, key=lambda name: at_default[name])
        equal = score(tuning.chosen(BASELINE))
        left = change_of(tuning.chosen(best), tuning.chosen(BASELINE), analysis.info)
        rows.append(
            [
                linked(problem),
                f"{100 * equal:+.1f}",
                f"{best} {100 * at_default[best]:+.1f}",
                f"{100 * left:+.1f}",
                tuned.entry(problem, best),
            ]
        )
    header = [
        "problem",
        "equal weights: tuned against default",
        "best weighting at the defaults",
        "the same, both tuned",
        "the same on the test split",
    ]
    return markdown(header, rows)


def change_of(trial: Trial, base: Trial, info: ProblemInfo) -> float:
    """The mean over the tasks of the relative change of a trial's validation metrics."""
    ours, theirs = (
        {
            task: {metric: course[-1] for metric, course in metrics.items()}
            for task, metrics in one.validation.items()
            if metrics
        }
        for one in (trial, base)
    )
    higher = {
        task: {metric: about.higher_is_better for metric, about in info.tasks[task].items()}
        for task in ours
    }
    return delta_m(ours, theirs, higher)


def of_errors(results: Results) -> Results:
    """The results on the problems whose metrics are all shares, with what they lack to 100 %."""
    chosen = {
        problem: info
        for problem, info in results.problems.items()
        if all(
            metric.unit == "%" and metric.higher_is_better
            for metrics in info.tasks.values()
            for metric in metrics.values()
        )
    }
    return Results(
        {
            problem: dataclasses.replace(
                info,
                tasks={
                    task: dict.fromkeys(metrics, MetricInfo(higher_is_better=False, unit="%"))
                    for task, metrics in info.tasks.items()
                },
            )
            for problem, info in chosen.items()
        },
        [
            dataclasses.replace(
                run,
                metrics={
                    split: {
                        task: {
                            metric: [1 - value for value in course]
                            for metric, course in metrics.items()
                        }
                        for task, metrics in tasks.items()
                    }
                    for split, tasks in run.metrics.items()
                },
            )
            for run in results.runs
            if run.problem in chosen
        ],
        planned={problem: results.planned[problem] for problem in chosen},
    )


@dataclasses.dataclass(frozen=True)
class Properties:
    """What may tell where a weighting helps, of equal weights, in the mean over the seeds.

    Attributes:
      first: each task's training loss in the first epoch.
      last: in the last epoch.
      alone: the mean over the tasks of the change from each task alone; ``None`` if not trained.
      worst: the change of the task that loses most; NaN if not trained alone.
      best: the weighting with the best mean change from equal weights.
    """

    first: dict[str, float]
    last: dict[str, float]
    alone: Estimate | None
    worst: float
    best: str

    @property
    def spread(self) -> float:
        """The largest loss of the last epoch in units of the smallest."""
        return max(self.last.values()) / min(self.last.values())


def finished_equal(analysis: Analysis) -> list[Run]:
    """The runs of equal weights that did not fail."""
    return [run for run in analysis.weightings[BASELINE] if run.failure is None]


def properties(tuned: Tuned, problem: str) -> Properties:
    """The properties of a problem."""
    analysis = tuned.analyses[problem]
    equal = finished_equal(analysis)
    first, last = (
        {
            task: float(np.mean([run.train_losses[task][epoch] for run in equal]))
            for task in analysis.info.tasks
        }
        for epoch in (0, -1)
    )
    changes = analysis.task_changes(BASELINE, ALONE)
    gains = {
        name: estimate.mean
        for name in tuned.names[:-1]
        if (estimate := tuned.change(problem, name)) is not None and math.isfinite(estimate.mean)
    }
    return Properties(
        first=first,
        last=last,
        alone=analysis.mean_change(BASELINE, ALONE),
        worst=min((float(np.nanmean(values)) for values in changes.values()), default=math.nan),
        best=max(gains, key=lambda name: gains[name], default=""),
    )


def properties_table(tuned: Tuned) -> str:
    """Properties of the problems that may tell where a weighting helps."""
    rows = []
    for problem, analysis in tuned.analyses.items():
        found = properties(tuned, problem)
        fallen = [100 * (1 - found.last[task] / found.first[task]) for task in found.first]
        conflicts = [
            (float(run.conflict["share"][0]), float(run.conflict["cosine"][0]))
            for runs in analysis.weightings.values()
            for run in runs
            if run.conflict
        ]
        share, cosine = np.mean(conflicts, axis=0) if conflicts else (math.nan, math.nan)
        alone = found.alone
        rows.append(
            [
                linked(problem),
                str(len(analysis.info.tasks)),
                f"{max(found.first.values()) / min(found.first.values()):.3g}",
                f"{found.spread:.3g}",
                f"{min(fallen):.0f} to {max(fallen):.0f} %",
                f"{100 * share:.0f} %, {cosine:.2f}" if conflicts else "",
                f"{round(100 * unfinished(analysis), 1) + 0.0:.1f} %",  # never "-0.0"
                "" if alone is None else f"{100 * alone.mean:+.1f}, {100 * found.worst:+.1f}",
                f"{tuned.entry(problem, found.best)} {found.best}",
            ]
        )
    header = [
        "problem",
        "tasks",
        "largest loss to smallest, first epoch",
        "last epoch",
        "the losses fell by",
        "conflicting pairs, mean cosine",
        "gain in the last tenth of training, or its last epoch",
        "equal against alone, %: mean, worst task",
        "best weighting against equal, %",
    ]
    return markdown(header, rows)


def unfinished(analysis: Analysis) -> float:
    """How much the test metrics of equal weights still gain in the last tenth of training."""
    changes = []
    for run in finished_equal(analysis):
        for column in analysis.columns:
            course = run.metrics["test"][column.task][column.metric]
            then = course[-1 - max(1, round(len(course) / 10))] if len(course) > 1 else math.nan
            sign = 1 if column.info.higher_is_better else -1
            changes.append(sign * (course[-1] - then) / abs(then) if then else math.nan)
    return float(np.nanmean(changes))


PUBLISHED: dict[str, dict[str, float]] = {
    # Navon et al. 2022 (arXiv 2202.01017), Table 3, where a loss is positive.
    "qm9": {"equal": -177.6, "uncertainty": -108.0, "nash_mtl": -62.0},
    # Of the metrics of segmentation and depth in their Table 2, averaged as ours.
    "nyuv2": {"equal": 10.6, "dwa": 10.2, "uncertainty": 8.4, "nash_mtl": 13.0},
}
"""Published mean changes from each task alone in %, a gain being positive."""


def published_table(tuned: Tuned) -> str:
    """What was published, beside ours: the change from each task alone."""
    rows = []
    for problem, published in PUBLISHED.items():
        if problem not in tuned.analyses:
            continue
        for name, value in published.items():
            ours = tuned.analyses[problem].mean_change(name, ALONE)
            text = "" if ours is None else f"{100 * ours.mean:+.1f} ± {100 * ours.half_width:.1f}"
            rows.append([linked(problem), f"`{name}`", f"{value:+.1f}", text])
    return markdown(["problem", "weighting", "published", "here"], rows)


def small_table(kept: Mapping[Select, Tuned]) -> str:
    """The README's: the mean and the worst task, of the weightings that the project is about."""
    others = "best other"
    rows = []
    for name in (*EMPHASIS[:3], *CLAIMED[1:], others, ALONE):
        row = [named(name)]
        for problem in kept["mean"].analyses:
            entries = []
            for tuned in (tuned for tuned in kept.values() if problem in tuned.analyses):
                found = name
                if name == others:
                    rest = {
                        other: estimate.mean
                        for other in tuned.names
                        if other not in (*EMPHASIS, *CLAIMED, ALONE)
                        and (estimate := tuned.change(problem, other)) is not None
                        and math.isfinite(estimate.mean)
                    }
                    found = max(rest, key=lambda other: rest[other], default="")
                entry = tuned.entry(problem, found)
                entries.append(f"{entry} `{found}`" if found != name else entry)
            row.append(" / ".join(filter(None, entries)))
        rows.append(row)
    return markdown(["", *kept["mean"].analyses], rows)


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
            page = f"{before}{start}{table}{end}{rest.split(end, maxsplit=1)[1]}"
    return page


def problem_page(kept: Mapping[Select, Tuned], problem: str) -> str:
    """The page of a problem: verdicts, what was reached, what tuning chose."""
    first = kept["mean"].analyses[problem]
    lines = [f"# {problem}", "", first.info.description, "", settings_text(first), ""]
    lines += [f"Made from records by `{MARK.removeprefix('made by ')}`.", ""]
    for select, tuned in kept.items():
        if problem not in tuned.analyses:
            continue
        analysis = tuned.analyses[problem]
        lines += [f"## Tuned for {SELECTIONS[select]}", "", f"**{answer(analysis)}**", ""]
        lines += [verdicts_text(analysis), ""]
        lines += [*(f"- {sentence}" for sentence in verdicts(analysis)), ""]
        lines += [main_text(analysis), "", main_table(analysis, timing=False).markdown(), ""]
        if "better, worse" in main_table(analysis).headers:
            lines += [by_metric_table(analysis).markdown(), ""]
        lines += [tuning_text(analysis), "", tuning_table(analysis).markdown(), ""]
        commands = analysis.results.command.splitlines()
        own = [line for line in commands if f"--problem {problem} " in f"{line} "]
        lines += [f"    {line}" for line in own or commands]
        lines += [""]
    return "\n".join(lines)


# The pictures


def predictors_figure(tuned: Tuned) -> matplotlib.figure.Figure:
    """What the best weighting gains, against what one can know before: a point a problem."""
    figure = matplotlib.figure.Figure((8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    known = {problem: properties(tuned, problem) for problem in tuned.analyses}
    spreads = {problem: found.spread for problem, found in known.items()}
    lost = {problem: -100 * found.worst for problem, found in known.items()}
    left.set_yscale("symlog", linthresh=1)  # of the right, too
    for axes, values in ((left, spreads), (right, lost)):
        for number, (problem, x) in enumerate(values.items()):
            gain = tuned.change(problem, known[problem].best)
            assert gain is not None
            axes.errorbar(
                x,
                100 * gain.mean,
                yerr=100 * gain.half_width,
                fmt="os^Dv"[number // 10 % 5],
                color=f"C{number % 10}",
                label=f"{problem}: {known[problem].best}",
            )
    left.set_xscale("log")
    left.set_xlim(1, 2 * max(spreads.values()))
    right.set_xscale("symlog", linthresh=1)
    shown = [0.5, *(value for value in lost.values() if not math.isnan(value))]
    right.set_xlim(2 * min(0, *shown), 2 * max(shown))
    left.set_xlabel("largest loss to smallest, at the end")
    left.set_ylabel("best weighting against equal, %")
    right.set_xlabel("what the worst task loses to being alone, %")
    for axes in (left, right):
        axes.axhline(0, color="0.6", linewidth=1)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return figure


def changes_figure(kept: Mapping[Select, Tuned]) -> matplotlib.figure.Figure:
    """For every problem the change from equal weights of all weightings, mean and worst task."""
    problems, names = list(kept["mean"].analyses), kept["mean"].names
    columns = min(3, len(problems))
    rows = math.ceil(len(problems) / columns)
    figure = matplotlib.figure.Figure((2.6 * columns + 1.2, 3.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes, problem in zip(panels, problems, strict=False):
        for tuned in kept.values():
            draw_changes(axes, tuned, problem, names)
        axes.axvline(0, color="0.6", linewidth=1)
        if max(map(abs, axes.get_xlim())) > 200:
            axes.set_xscale("symlog", linthresh=10)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(problem, fontsize=10)
        axes.set_yticks(range(0, -len(names), -1), names, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
    for axes in panels[len(problems) :]:
        axes.remove()
    shown = {f"tuned for {SELECTIONS[of]}": color for of, (_, color) in DRAWN.items()}
    handles = [
        matplotlib.lines.Line2D([], [], color=c, marker="o", label=n) for n, c in shown.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel("change from equal weights, %", fontsize=10)
    return figure


DRAWN: dict[Select, tuple[float, str]] = {
    "mean": (0.15, "tab:blue"),
    "worst": (-0.15, "tab:orange"),
}
"""Where in its row a change is drawn, and in which color."""


def draw_changes(axes: Any, tuned: Tuned, problem: str, names: Sequence[str]) -> None:
    """Points with intervals, those of the mean above those of the worst task."""
    if problem not in tuned.analyses:
        return
    offset, color = DRAWN[tuned.of]
    found = {
        place: estimate
        for place, name in enumerate(names)
        if (estimate := tuned.change(problem, name)) is not None and not math.isnan(estimate.mean)
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
