"""Writes what the results of a comparison say: Markdown, pictures, and all of it on one page."""

import base64
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

import jinja2
import matplotlib
import numpy as np
import rich.console
import rich.markup
import rich.text
import tyro

from mtl_jax.compare.analysis import Analysis, made_with
from mtl_jax.compare.figures import CAPTIONS, figures
from mtl_jax.compare.results import Results, Run, file_name, replace_file, write_text
from mtl_jax.compare.tables import (
    Entry,
    Section,
    Table,
    answer,
    by_metric_table,
    cost_table,
    main_table,
    over_problems_table,
    parameters_text,
    sections,
    verdicts,
    verdicts_text,
)

FORMATS = ("png", "pdf", "svg")
"""Of the pictures. The page holds the first."""

RISEN = 1.5
"""A training loss that is so many times the first epoch's at the end makes a warning."""

_STYLE: Any = {"svg.hashsalt": "mtl_jax", "pdf.fonttype": 42}
"""The same picture is the same file; letters are letters, as publishers want it."""
_METADATA = {"png": None, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


def write_report(
    results: Results,
    folder: str | os.PathLike[str],
    *,
    pictures: Collection[str] | None = None,
    weighting: str | None = None,
) -> None:
    """Write the results, and all that is said of them, into a folder.

    It receives ``results.json`` and ``timing.json``; ``report.html``, everything on one page; for
    each problem ``<problem>.md``, the verdicts and the tables, and pictures,
    ``<problem>_<picture>``, as PNG, PDF and SVG: ``changes`` (of every task), ``metrics``,
    ``losses``, ``weights``, ``difficulty`` (against weight), ``front`` (of two metrics) and, if the
    task gradients were measured, ``conflict``; of several problems also ``verdicts.md``. Every file
    is replaced as a whole.

    Args:
      results: the results.
      folder: the folder; made if it does not exist.
      pictures: the problems whose pictures are drawn; all by default. The page shows those of
        others if they are there, unless that problem is not finished.
      weighting: a weighting to compare with every other one over all problems.

    Raises:
      ValueError: if that weighting has no runs.

    Example:
      What two comparisons found, on one page::

          results = compare([molecules, images], ["adaptive", "dwa"])
          write_report(results, "runs/both", weighting="adaptive")
    """
    results.write(folder)
    # What is drawn is what the files hold, so that it is the same whenever it is drawn again.
    draw_report(Results.read(folder), folder, pictures=pictures, weighting=weighting)


def draw_report(
    results: Results,
    folder: str | os.PathLike[str],
    *,
    pictures: Collection[str] | None = None,
    weighting: str | None = None,
) -> None:
    """Write what is said of the results into a folder, as :func:`write_report`, but not them."""
    folder = pathlib.Path(folder)
    over = over_problems_sections(results, weighting)
    if over:
        write_text(folder / "verdicts.md", _markdown(over, "# Verdicts", results.command))
    problems = []
    for name in results.problems:
        analysis = Analysis(results, name)
        path = folder / f"{file_name(name)}.md"
        write_text(path, markdown_report(analysis))
        drawn = pictures is None or name in pictures
        if drawn:
            draw_pictures(analysis, folder)
        shown = drawn or not results.unfinished(name)
        problems.append(_problem(analysis, folder if shown else None))
    write_text(folder / "report.html", _page(problems, over, results))


def draw_pictures(analysis: Analysis, folder: pathlib.Path) -> None:
    """Draw the pictures of a problem into a folder; those of an older report are removed."""
    with matplotlib.rc_context(_STYLE):
        made = figures(analysis)
        for kind in CAPTIONS:
            for extension in FORMATS:
                path = folder / f"{file_name(analysis.problem)}_{kind}.{extension}"
                if kind not in made:
                    path.unlink(missing_ok=True)
                    continue
                options: Any = {"dpi": 120, "metadata": _METADATA[extension]}
                figure = made[kind]
                replace_file(path, lambda file, f=figure, o=options: f.savefig(file, **o))
                figure.set_layout_engine(None)  # the first drawing has laid it out


def markdown_report(analysis: Analysis) -> str:
    """The verdicts and the tables of a problem, as a Markdown document."""
    lines = [f"# {analysis.problem}", "", analysis.info.description, "", settings_text(analysis)]
    for warning in warnings_of(analysis):
        lines += ["", f"**{warning}**"]
    if sentences := verdicts(analysis):
        lines += ["", "## Verdicts", ""]
        if whole := answer(analysis):
            lines += [f"**{whole}**", ""]
        lines += [verdicts_text(analysis), ""]
        lines += [f"- {sentence}" for sentence in sentences]
    return _markdown(sections(analysis), "\n".join(lines), analysis.results.command)


def _markdown(shown: Collection[Section], start: str, command: str) -> str:
    lines = [start, ""]
    for title, text, table in shown:
        lines += [f"## {title}", "", text, "", table.markdown(), ""]
    if command:
        lines += ["Made by", "", *(f"    {line}" for line in command.splitlines()), ""]
    return "\n".join(lines)


def print_tables(results: Results, problem: str, console: rich.console.Console) -> None:
    """Print the verdicts on a problem, what was reached, and what it cost."""
    analysis = Analysis(results, problem)
    console.print(
        f"\n[bold]{rich.markup.escape(problem)}[/bold]: test metrics after the last epoch"
    )
    for warning in warnings_of(analysis):
        console.print(rich.text.Text(warning, "bold red"))
    if whole := answer(analysis):
        console.print(rich.text.Text(whole, "bold"))
    for text in (*verdicts(analysis), verdicts_text(analysis)):
        console.print(rich.text.Text(text))
    table = main_table(analysis)
    natural = console.measure(table.terminal(), options=console.options.update(width=10_000))
    if natural.maximum > 1.25 * console.width:  # more than wrapped headers can make up for
        _print(by_metric_table(analysis), console)
        table = main_table(analysis, metrics=False)
    _print(table, console)
    _print(cost_table(analysis), console)


def _print(table: Table, console: rich.console.Console) -> None:
    if len(table.headers) > 1 and table.rows:
        console.print(table.terminal())


def settings_text(analysis: Analysis) -> str:
    """The settings of the runs, in a sentence."""
    info = analysis.info
    sizes = ", ".join(
        f"{numbers_text(numbers)} {split}" for split, numbers in info.examples.items()
    )
    number = len(analysis.planned_seeds)
    return (
        f"{sizes} examples; {info.epochs} epochs, batch {numbers_text(info.batch_size)}, learning "
        f"rate {_learning_rate(analysis)}; {number} seed{'s' * (number != 1)}."
    )


def warnings_of(analysis: Analysis) -> list[str]:
    """What the reader of the results must know: missing and failed runs, different machines."""
    found = []
    missing = len(analysis.results.unfinished(analysis.problem))
    if missing:
        found.append(f"Interrupted: {missing} run{'s' * (missing != 1)} not finished.")
    found += [
        f"Failed: {run.weighting}, seed {run.seed}: {run.failure}."
        for run in analysis.all_runs
        if run.failure
    ]
    for name, runs in analysis.results.of(analysis.problem).items():
        rising = [
            f"{task} (from {start:.2g} to {end:.2g})"
            for task in analysis.info.tasks
            for start, end in [_mean_losses(runs, task)]
            if end > RISEN * max(start, 0)
        ]
        if rising:
            found.append(
                f"Diverged? With {name} the mean training loss rose from the first to the last "
                f"epoch: {', '.join(rising)}."
            )
    differing = "; ".join(
        f"{what} {_counted(by_value)}" for what, by_value in analysis.provenance.items()
    )
    if differing:
        found.append(
            f"Runs were not all made with the same: {differing}. Do not compare their times; and a "
            "difference of their metrics may come from that alone."
        )
    begun = sum("begun with" in run.provenance for run in analysis.all_runs)
    if begun:
        found.append(f"Begun with other versions or on another device than ended: {begun} runs.")
    return found


def _mean_losses(runs: Sequence[Run], task: str) -> tuple[float, float]:
    """The task's training loss in the first and in the last epoch, the mean over the runs."""
    losses = [
        (run.train_losses[task][0], run.train_losses[task][-1])
        for run in runs
        if run.failure is None and run.train_losses.get(task) and run.task in (None, task)
    ]
    if not losses:
        return math.nan, math.nan
    first, last = np.mean(losses, axis=0)
    return float(first), float(last)


def numbers_text(numbers: Mapping[str, int]) -> str:
    """``"5,000"``, or ``"5,000 (news) + 300 (reviews)"``."""
    return " + ".join(
        f"{number:,}" + f" ({dataset})" * bool(dataset) for dataset, number in numbers.items()
    )


def over_problems_sections(results: Results, weighting: str | None = None) -> list[Section]:
    """The verdicts over all problems; none for one problem unless a weighting is named."""
    if weighting is None and len(results.problems) < 2:
        return []
    test = (
        "in %, with its 95 % interval, and the verdict of the paired t-test at 5 % after Holm's "
        "correction for all comparisons of the table."
    )
    mean = f"The mean over the tasks of the relative change of their metrics (Δm), {test}"
    worst = (
        "The change of the task that gains least or loses most against being trained alone "
        f"(against equal weights where that was not done), {test} It need not be the same task in "
        "both rows."
    )
    found = [
        Section("Over all problems", mean, over_problems_table(results, weighting)),
        Section(
            "The worst task over all problems",
            worst,
            over_problems_table(results, weighting, of="worst"),
        ),
    ]
    return [section for section in found if len(section.table.headers) > 1]


def _learning_rate(analysis: Analysis) -> str:
    default = f"{analysis.info.learning_rate:g}"
    return default if analysis.tuning is None else f"as tuned (default: {default})"


def _counted(by_value: Mapping[str, int]) -> str:
    if len(by_value) == 1:
        return next(iter(by_value))
    return ", ".join(f"{v} ({n} run{'s' * (n != 1)})" for v, n in by_value.items())


def template(name: str) -> jinja2.Template:
    """A template of this folder; what is put into HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mtl_jax", "compare"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _page(problems: list[dict[str, Any]], over: list[Section], results: Results) -> str:
    made = {what: _counted(by_value) for what, by_value in made_with(results.runs).items()}
    return template("page.html").render(
        problems=problems,
        over_problems=over,
        command=results.command,
        made_with=_settings(made),
    )


def _problem(analysis: Analysis, folder: pathlib.Path | None) -> dict[str, Any]:
    """What the page shows of a problem, with the pictures that are in the folder."""
    name = analysis.problem
    found = {kind: folder / f"{file_name(name)}_{kind}.{FORMATS[0]}" for kind in CAPTIONS if folder}
    return {
        "name": name,
        "description": analysis.info.description,
        "settings": settings_text(analysis),
        "warnings": warnings_of(analysis),
        "answer": answer(analysis),
        "verdicts": verdicts(analysis),
        "verdicts_text": verdicts_text(analysis),
        "sections": sections(analysis),
        "pictures": [
            {
                "caption": CAPTIONS[kind],
                "alt": f"{name}: {kind}",
                "data": base64.b64encode(path.read_bytes()).decode(),
            }
            for kind, path in found.items()
            if path.exists()
        ],
        "configuration": _configuration(analysis),
    }


def _configuration(analysis: Analysis) -> Table:
    info, runs = analysis.info, analysis.weightings.items()
    measured = [f"{name} ({r[0].measured_at})" for name, r in runs if r[0].measured_at]
    given = [f"{name} ({text})" for name, r in runs if (text := parameters_text(r[0].parameters))]
    metrics = [
        f"{task} ({metric}, {'higher' if about.higher_is_better else 'lower'} is better)"
        for task, by_name in info.tasks.items()
        for metric, about in by_name.items()
    ]
    metrics += [f"{task} (no metric)" for task, by_name in info.tasks.items() if not by_name]
    rows = {
        "tasks": ", ".join(metrics),
        "weightings": ", ".join(analysis.weightings),
        "parameters": ", ".join(given) or "the defaults",
        "each task alone": "yes" if analysis.alone else "no",
        "gradients measured for": ", ".join(measured) or "none",
        "seeds": ", ".join(map(str, analysis.planned_seeds)),
        "epochs": str(info.epochs),
        "steps an epoch": str(info.steps_per_epoch),
        "batch size": numbers_text(info.batch_size),
        "learning rate": _learning_rate(analysis),
    }
    rows |= {f"{split} examples": numbers_text(sizes) for split, sizes in info.examples.items()}
    return _settings(rows | {"digest of the data": info.data})


def _settings(rows: Mapping[str, str]) -> Table:
    return Table(["what", "which"], [[Entry(name), Entry(value)] for name, value in rows.items()])


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw tables, pictures and page of finished comparisons again, without training.

    Of several folders together, with the verdicts over all their problems.
    """

    folders: Annotated[
        tuple[pathlib.Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FOLDER", help="The folders of comparisons (RUNS_DIR/NAME)."),
    ]
    out: pathlib.Path | None = None
    """The folder that is written into; the first one if not given."""
    weighting: str | None = None
    """A weighting to compare with every other one, over all problems."""


def report_main(config: Report) -> None:
    """Run ``mtl-jax report``; exits with status 2 after a message if it cannot."""
    try:
        if not config.folders:
            raise ValueError("Name at least one folder of a comparison.")
        results = Results.combine([Results.read(folder) for folder in config.folders])
        folder = config.folders[0] if config.out is None else config.out
        over_problems = over_problems_sections(results, config.weighting)
        if folder.resolve() not in [given.resolve() for given in config.folders]:
            # What a comparison goes on from is never replaced.
            if any((folder / kept).exists() for kept in ("records", "tuning", "checkpoints")):
                raise ValueError(
                    f"{folder} holds another comparison; name another folder as --out."
                )
            results.write(folder)
        draw_report(results, folder, weighting=config.weighting)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    console = terminal()
    for problem in results.problems:
        print_tables(results, problem, console)
    for over in over_problems:
        console.print(f"\n[bold]{over.title}[/bold]: change in %")
        _print(over.table, console)
    print_place(folder, console)


def print_place(folder: pathlib.Path, console: rich.console.Console) -> None:
    """Say where everything is."""
    where = f"Everything on one page: {folder / 'report.html'}"
    console.print(where, markup=False, soft_wrap=True)


def terminal() -> rich.console.Console:
    """The terminal; a file or a pipe does not limit the width of tables."""
    console = rich.console.Console(highlight=False)
    return console if console.is_terminal else rich.console.Console(width=180, highlight=False)
