"""The tables of a comparison, and its verdicts in sentences, made of what the analysis found."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import rich.table
import rich.text
import scipy.optimize
import scipy.stats
import tabulate

from mtl_jax.compare.analysis import ALONE, Analysis, Cell, Column, Estimate, Row, over_problems
from mtl_jax.compare.results import BASELINE, PRUNED, Results, Trial
from mtl_jax.evaluation import PairedComparison
from mtl_jax.evaluation._paired import FEWEST_SEEDS

MOST_COLUMNS = 9
"""With more metrics a table that is a row a weighting has no column for each of them."""

MOST_NAMES = 4
"""A sentence that would name more metrics says how many they are."""

ALIKE = 0.01
"""A weighting says so if its mean weights are at most this share of them apart."""

SHORT_STEP = 1e-3
"""The seconds below which the relative time of a step says little."""

COLORS = {"better": "green", "worse": "red"}
"""Of the terminal."""


class Entry(NamedTuple):
    """An entry of a table.

    Attributes:
      text: what is shown.
      verdict: how it compares with equal weights, where that is decided.
      value: the number that rows are sorted by.
    """

    text: str = ""
    verdict: Literal["", "better", "worse"] = ""
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      headers: the header of each column; the first column is the rows' names.
      rows: the entries.
    """

    headers: list[str]
    rows: list[list[Entry]]

    @staticmethod
    def from_columns(columns: Sequence[tuple[str, Sequence[Entry]]]) -> "Table":
        """The table of these columns, without those that are empty."""
        filled = [column for column in columns if any(entry.text for entry in column[1])]
        rows = [list(row) for row in zip(*(entries for _, entries in filled), strict=True)]
        return Table([header for header, _ in filled], rows)

    def markdown(self) -> str:
        """The table in Markdown."""
        rows = [[f"{entry.text} {entry.verdict}".strip() for entry in row] for row in self.rows]
        rows, headers = [list(map(_plain, row)) for row in rows], list(map(_plain, self.headers))
        return tabulate.tabulate(
            rows, headers, tablefmt="github", disable_numparse=True, stralign="right"
        )

    def terminal(self) -> rich.table.Table:
        """The table for a terminal."""
        table = rich.table.Table(header_style="bold")
        for number, header in enumerate(self.headers):
            table.add_column(rich.text.Text(header), justify="right" if number else "left")
        for row in self.rows:
            table.add_row(
                *(
                    rich.text.Text(f"{e.text} {e.verdict}".strip(), COLORS.get(e.verdict, ""))
                    for e in row
                )
            )
        return table


class Section(NamedTuple):
    """A table under a title, with what one must know to read it."""

    title: str
    text: str
    table: Table


def sections(analysis: Analysis) -> list[Section]:
    """The tables of a problem, the most important first, without those that would be empty."""
    best = analysis.at_best
    found = [Section("After the last epoch", main_text(analysis), main_table(analysis))]
    if len(analysis.columns) > MOST_COLUMNS:
        text = "After the last epoch."
        found.append(Section("Metric by metric", text, by_metric_table(analysis)))
    found += [
        Section("Against equal weights", AGAINST_EQUAL, against_equal_table(analysis)),
        Section("Trade-offs", trade_offs_text(analysis), trade_offs_table(analysis)),
        Section("Cost beside quality", cost_text(analysis), cost_table(analysis)),
    ]
    if any(best.best_epoch(run) != run.epochs for run in analysis.all_runs if not run.failure):
        title = "At the epoch that is best on the validation split"
        text = (
            "What stopping early would reach: each run's metrics after the epoch with the best "
            "validation metrics, in the mean of their relative changes. The verdicts above are "
            "about the last epoch; here every run may stop at another one."
        )
        found.append(Section(title, text, main_table(best, timing=False)))
    if analysis.tuning is not None:
        text = tuning_text(analysis)
        found.append(Section("Chosen by tuning", text, tuning_table(analysis)))
    return [section for section in found if len(section.table.headers) > 1 and section.table.rows]


def main_table(analysis: Analysis, *, metrics: bool = True, timing: bool = True) -> Table:
    """What was reached: a row a weighting, then the row of each task trained alone.

    Metrics are means over the seeds with 95 % intervals, percentages where the metric is a share,
    and ``better`` or ``worse`` where they differ from equal weights' beyond noise. With many
    metrics their mean (if all are alike) and the number of verdicts stand for them.

    Args:
      analysis: what the results say.
      metrics: whether to show the metrics, or only what they come to.
      timing: whether to show the time of a step relative to equal weights.
    """
    rows, columns, means = analysis.rows, analysis.columns, analysis.mean_against_equal
    table: list[tuple[str, list[Entry]]] = [("weighting", [Entry(row.name) for row in rows])]
    if metrics and len(columns) <= MOST_COLUMNS:
        for number, column in enumerate(columns):
            entries = [_metric(column, row.cells[number]) for row in rows]
            table.append((column.title, entries))
    elif columns:
        first = columns[0]
        mean = f"mean {first.title.removeprefix(first.task).strip()}"
        table += [
            (mean, [_estimate(row.mean, first.scale, first.digits) for row in rows]),
            ("better, worse", [_counts(row) for row in rows]),
        ]
    reference = "alone" if ALONE in analysis.values else BASELINE
    several = len({column.task for column in columns}) > 1
    table += [
        ("Δm vs equal, %", [_mean_change(row, means.get(row.name)) for row in rows]),
        ("Δm vs alone, %", [_change(row.against_alone) for row in rows]),
        (f"worst task vs {reference}, %", [_worst(row) if several else Entry() for row in rows]),
        ("mean rank", [_number(row.rank) for row in rows]),
        ("step time", [_number(row.step_time) if timing else Entry() for row in rows]),
        ("failed runs", _if_any(rows, lambda row: row.failed)),
        ("skipped steps", _if_any(rows, lambda row: row.skipped)),
    ]
    return Table.from_columns(table)


def by_metric_table(analysis: Analysis) -> Table:
    """What was reached in every metric: a row a metric and a column a weighting."""
    columns = [("metric", [Entry(column.title) for column in analysis.columns])]
    for row in analysis.rows:
        pairs = zip(analysis.columns, row.cells, strict=True)
        columns.append((row.name, [_metric(column, cell) for column, cell in pairs]))
    return Table.from_columns(columns)


def against_equal_table(analysis: Analysis) -> Table:
    """Every weighting's difference from equal weights in every metric, and what follows of it."""
    rows = []
    for name, compared in analysis.against_equal.items():
        for column, found in zip(analysis.columns, compared, strict=True):
            low, high = (column.scale * bound for bound in found.interval)
            interval = f"{low:+.{column.digits}f} to {high:+.{column.digits}f}"
            p_value = found.corrected_p_value
            rows.append(
                [
                    Entry(name),
                    Entry(column.name),
                    _number(column.scale * found.difference, column.digits, "+"),
                    Entry("" if math.isnan(low) else interval, value=low),
                    Entry("" if math.isnan(p_value) else f"{p_value:.2g}", value=p_value),
                    _verdict(found),
                ]
            )
    headers = ["weighting", "metric", "difference", "95 % interval", "p, corrected", "verdict"]
    return Table(headers, rows)


def trade_offs_table(analysis: Analysis) -> Table:
    """Which weightings are on the Pareto front of their mean metrics, and their hypervolumes."""
    rows = [row for row in analysis.rows if row.name != ALONE]
    words = {True: "yes", False: "no", None: ""}
    return Table.from_columns(
        [
            ("weighting", [Entry(row.name) for row in rows]),
            ("on the Pareto front", [Entry(words[row.on_front]) for row in rows]),
            ("hypervolume", [_number(row.hypervolume, 3) for row in rows]),
        ]
    )


def cost_table(analysis: Analysis) -> Table:
    """What a weighting costs: time of a step, memory, compiling, time to be as good as equal."""
    costs = analysis.costs
    relative = {row.name: row.step_time for row in analysis.rows}

    def entry(value: float | None) -> Entry:
        known = value is not None and math.isfinite(value) and value > 0
        return Entry(f"{value:.3g}" if known else "", value=value)

    memory = [cost.memory_bytes for cost in costs]
    return Table.from_columns(
        [
            ("weighting", [Entry(cost.name) for cost in costs]),
            ("step time", [_number(relative[cost.name]) for cost in costs]),
            ("ms a step", [entry(1000 * cost.step_seconds) for cost in costs]),
            ("memory, MB", [entry(None if m is None else m / 1e6) for m in memory]),
            ("compiling, s", [entry(cost.compile_seconds) for cost in costs]),
            (
                "until as good as equal",
                [Entry() if c.name == BASELINE else _until(c.until_equal) for c in costs],
            ),
        ]
    )


def tuning_table(analysis: Analysis) -> Table:
    """What tuning chose for each weighting and each task alone, and the budget it spent."""
    tuning = analysis.tuning
    if tuning is None:
        return Table([], [])
    rows = []
    for name, trials in tuning.trials.items():
        chosen = tuning.chosen(name)
        # Records that are kept in the small hold neither times nor whole courses.
        seconds = sum(trial.seconds for trial in trials)
        epochs = sum(trial.epochs for trial in trials) if seconds else None
        compiling = sum(trial.compile_seconds for trial in trials)
        rows.append(
            [
                Entry(name),
                Entry(f"{chosen.learning_rate:.3g}", value=chosen.learning_rate),
                Entry(parameters_text(chosen.parameters)),
                _score(chosen),
                _score(trials[0]),
                _trials(trials),
                _number(epochs, 0),
                _number(seconds or None, 0),
                _number(compiling or None, 0),
            ]
        )
    headers = ["weighting", "learning rate", "parameters", "validation change, %"]
    headers += ["at the default, %", "trials", "epochs", "seconds", "compiling, s"]
    return Table.from_columns(list(zip(headers, zip(*rows, strict=True), strict=True)))


def over_problems_table(
    results: Results,
    weighting: str | None = None,
    *,
    of: Literal["mean", "worst"] = "mean",
) -> Table:
    """The verdicts over several problems, of every weighting or of one (see ``over_problems``)."""
    compared = over_problems(results, weighting, of=of)
    names = list(dict.fromkeys(name for row in compared.values() for name in row))
    first = "against equal" if weighting is None else f"{weighting} against"
    columns = [(first, [Entry(name) for name in names])]
    for problem, row in compared.items():
        analysis = Analysis(results, problem)
        tuned = ", tuned" if analysis.tuning else ""
        title = f"{problem} ({len(analysis.seeds)} seeds{tuned})"
        columns.append((title, [_compared(row.get(name)) for name in names]))
    return Table.from_columns(columns)


def _plain(text: str) -> str:
    """The text so that Markdown finds nothing in it, as in the name of a task."""
    return re.sub(r"[\\|<*`]", r"\\\g<0>", text)


def answer(analysis: Analysis) -> str:
    """Which weightings are better than equal weights, in a sentence; empty with too few seeds."""
    found = analysis.mean_against_equal
    if max((one.seeds for one in found.values()), default=0) < FEWEST_SEEDS:
        return ""
    where = " in the mean over the tasks" if len(analysis.info.tasks) > 1 else ""
    better = [name for name in found if name != ALONE and found[name].verdict == "better"]
    better.sort(key=lambda name: -found[name].difference)
    named = [f"{name} by {100 * found[name].difference:.1f} %" for name in better[:MOST_NAMES]]
    if len(better) > MOST_NAMES:
        named.append(f"{len(better) - MOST_NAMES} more")
    sentences = []
    if named:
        sentences.append(f"Beyond noise, better than equal weights{where}: {_joined(named)}.")
    elif set(found) - {ALONE}:
        sentences.append(f"Beyond noise, no weighting is better than equal weights{where}.")
    if ALONE in found and found[ALONE].verdict in ("better", "worse"):
        change = 100 * found[ALONE].difference
        why = "the tasks disturb each other" if change > 0 else "the tasks help each other"
        verdict = found[ALONE].verdict
        sentences.append(f"Each task alone is {verdict} by {abs(change):.1f} %: {why}.")
    return " ".join(sentences)


def verdicts(analysis: Analysis) -> list[str]:
    """A sentence for every weighting: better in what, worse in what, and by how much."""
    rows = [row for row in analysis.rows if row.name in analysis.against_equal]
    means = analysis.mean_against_equal
    return [_sentence(row, analysis, means.get(row.name)) for row in rows]


def _sentence(row: Row, analysis: Analysis, mean: PairedComparison | None) -> str:
    columns = analysis.columns
    parts = []
    if row.failed:
        parts.append(f"{row.failed} of {row.runs} runs failed")
    found: dict[str, list[str]] = {}
    for column, cell in zip(columns, row.cells, strict=True):
        if cell.against_equal is not None:
            kind, text = _verdict(cell.against_equal).verdict, column.name
            if kind:
                text += f" by {_size(column, cell.against_equal.difference)}"
            found.setdefault(kind or "undecided", []).append(text)
    seeds = max((cell.against_equal.seeds for cell in row.cells if cell.against_equal), default=0)
    if seeds >= FEWEST_SEEDS:
        for kind in ("better", "worse", "undecided"):
            names = found.get(kind, [])
            if len(names) == len(columns) > 1 and kind == "undecided":
                parts.append("undecided everywhere")
            elif len(names) > MOST_NAMES:
                parts.append(f"{kind} in {len(names)} of {len(columns)}")
            elif names:
                parts.append(f"{kind} in {_joined(names)}")
    elif seeds:
        parts.append(f"undecided, with {seeds} seed{'s' * (seeds != 1)}")
    sentence = ", ".join(parts) or "nothing to compare with"
    change = _mean_change(row, mean)
    if change.text:
        sentence += f"; mean {change.text} %" + f", {change.verdict}" * bool(change.verdict)
    apart = None if row.name == ALONE else analysis.weights_apart(row.name)
    if apart is not None and apart <= ALIKE:
        how = f"were at most {max(100 * apart, 0.1):.1g} % apart" if apart else "were equal"
        sentence += f"; its mean weights {how}"
    return f"{row.name}: {sentence}."


def _size(column: Column, difference: float) -> str:
    """The size of a difference, with its unit."""
    unit = f" {column.info.unit}" if column.info.unit not in ("", "%") else ""
    return f"{_two_digits(abs(column.scale * difference))}{unit}"


def _two_digits(size: float) -> str:
    """A number that is not negative with two significant digits, or all before the point."""
    digits = max(0, 1 - math.floor(math.log10(size))) if size else 0
    return f"{size:.{digits}f}"


def _joined(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def verdicts_text(analysis: Analysis) -> str:
    """What the verdicts are about, and what the number of seeds allows to say."""
    number = len(analysis.seeds)
    if number < FEWEST_SEEDS:
        return (
            f"{number} seed{'s' * (number != 1)}: too few to tell a difference from noise, so "
            f"nothing is called better or worse. That takes at least {FEWEST_SEEDS}, and 5 or more "
            "to find any but large differences."
        )
    text = (
        "Better and worse: than equal weights with the same seeds, beyond noise (paired t-test, "
        "Holm's correction for all comparisons, 5 %); undecided is not to say that it is the "
        "same. The mean is Δm against equal weights, with a test of its own. The noise is that of "
        "the seeds: initial parameters and order of batches, not which examples were there. "
        "Intervals are not corrected, and may leave out 0 where nothing is decided. "
    )
    means = [analysis.mean_change(name, BASELINE) for name in analysis.mean_against_equal]
    spreads = [np.std(mean.values, ddof=1) for mean in means if mean is not None]
    spreads = [spread for spread in spreads if 0 < spread < math.inf]
    if spreads:
        size = _detectable(number, len(means))
        text += (
            f"With {number} seeds a change of the mean by "
            f"{_two_digits(100 * size * float(np.median(spreads)))} % is found four times in five, "
            "a smaller one less often. "
        )
    text += "More seeds and fewer weightings find more"
    if analysis.tuning is None:
        text += ", and all had the same learning rate here: --tune gives each its own"
    return text + "."


def _detectable(seeds: int, comparisons: int) -> float:
    """The standardised mean difference that the corrected test finds in four of five cases."""
    freedom = seeds - 1
    critical = scipy.stats.t.isf(0.025 / max(comparisons, 1), freedom)

    def power(difference: float) -> float:
        return float(scipy.stats.nct.sf(critical, freedom, difference * math.sqrt(seeds)))

    found: Any = scipy.optimize.brentq(lambda size: power(size) - 0.8, 0, 5 * critical)
    return float(found)


def main_text(analysis: Analysis) -> str:
    """How the first table is read."""
    text = (
        "Test metrics, mean ± 95 % interval (Student's) over the seeds; ↑ higher, ↓ lower is "
        "better. Δm: the relative change of the metrics, seed by seed, a gain being positive (as "
        "LibMTL and DB-MTL print it; CAGrad, Nash-MTL and FAMO print the negative)"
    )
    if any(len(metrics) > 1 for metrics in analysis.info.tasks.values()):
        text += ", averaged over the metrics of a task first, and then over the tasks. "
    else:
        text += ", averaged over the tasks. "
    text += "Worst task: the one with the smallest such change, and that change. "
    left_out = [
        f"{task} {metric}"
        for task, metrics in analysis.info.tasks.items()
        for metric in metrics
        if (task, metric) not in {(column.task, column.metric) for column in analysis.columns}
    ]
    if left_out:
        text += f"Undefined in every run and left out: {', '.join(left_out)}. "
    return text + "Mean rank: of the weightings over all metrics, 1 being the best in every one."


AGAINST_EQUAL = (
    "The mean difference from equal weights with the same seeds, its 95 % interval (Student's; "
    "from 5 seeds on the bootstrap's, which need not be symmetric), the p-value of the paired "
    "t-test after Holm's correction for all rows of this table, and what follows at 5 %."
)


def trade_offs_text(analysis: Analysis) -> str:
    """How the table of trade-offs is read."""
    text = (
        "On the Pareto front: no other weighting is, in the mean over the seeds, at least as good "
        "in every metric and better in one."
    )
    if any(row.hypervolume is not None for row in analysis.rows):
        text += (
            " Hypervolume: what the weighting's seeds dominate together, as a share of the box from"
            " the worst to the best metrics of all runs; larger is better, and it compares only "
            "within this table."
        )
    return text


def cost_text(analysis: Analysis) -> str:
    """How the table of costs is read."""
    calls = sorted({run.steps_per_call for run in analysis.all_runs})
    number = " or ".join(map(str, calls))
    text = (
        "Step time: fastest epoch of all seeds, relative to equal weights"
        f"; a call of the compiled program makes {number} step{'s' * (calls != [1])}. "
        "Memory: of the compiled training step, with the data on the device. Compiling: of all "
        "runs together. Until as good as equal: training up to the first epoch after which the "
        "mean relative change of the test metrics from equal weights' last ones, with the same "
        "seed, is not negative; mean over the seeds that reach it."
    )
    quickest = min((cost.step_seconds for cost in analysis.costs), default=math.nan)
    if quickest < SHORT_STEP:
        text += (
            " Steps of less than a millisecond are mostly overhead, whose differences vanish in a "
            "larger network."
        )
    return text


def tuning_text(analysis: Analysis) -> str:
    """How the settings were chosen."""
    tuning = analysis.tuning
    assert tuning is not None
    of_tasks = {
        "mean": "mean over the tasks of their relative change from equal weights at the default "
        "learning rate",
        "worst": "worst task's relative change from what it reached alone",
    }
    return (
        "The settings of the runs: of all trials those with the best validation metrics after the "
        f"last epoch, by the {of_tasks[tuning.select]}; a task alone is measured against its own "
        "default setting. Parameters that are not given have their defaults. All trials have the "
        f"seed {tuning.seed}, which no run has."
    )


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """The parameters of a weighting, in one line."""
    return ", ".join(f"{key}={_parameter(value)}" for key, value in parameters.items())


def _parameter(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_parameter(entry)}" for key, entry in value.items()) + "}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _metric(column: Column, cell: Cell) -> Entry:
    entry = _estimate(cell.estimate, column.scale, column.digits)
    if cell.runs and cell.failed == cell.runs:
        return Entry("failed")
    verdict = _verdict(cell.against_equal).verdict if cell.against_equal else ""
    return entry._replace(verdict=verdict)


def _verdict(found: PairedComparison) -> Entry:
    decided = found.verdict if found.verdict in ("better", "worse") else ""
    return Entry("" if decided else found.verdict, decided)


def _compared(found: PairedComparison | None) -> Entry:
    """A mean relative change in per cent with its interval and its verdict."""
    if found is None or math.isnan(found.difference):
        return Entry()
    low, high = (100 * bound for bound in found.interval)
    interval = "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
    verdict = _verdict(found)
    text = f"{100 * found.difference:+.2f}{interval} {verdict.text}".strip()
    return Entry(text, verdict.verdict, found.difference)


def _estimate(found: Estimate | None, scale: int, digits: int, sign: str = "") -> Entry:
    if found is None or math.isnan(found.mean):
        return Entry()
    text = f"{scale * found.mean:{sign}.{digits}f}"
    if not math.isnan(found.half_width):
        text += f" ± {scale * found.half_width:.{digits}f}"
    return Entry(text, value=scale * found.mean)


def _change(found: Estimate | None) -> Entry:
    return _estimate(found, 100, 2, "+")


def _mean_change(row: Row, found: PairedComparison | None) -> Entry:
    """The mean change from equal weights, and its verdict."""
    verdict = _verdict(found).verdict if found is not None else ""
    return _change(row.against_equal)._replace(verdict=verdict)


def _worst(row: Row) -> Entry:
    entry = _change(row.worst)
    return entry._replace(text=f"{entry.text} ({row.worst_task})" if entry.text else "")


def _number(value: float | None, digits: int = 2, sign: str = "") -> Entry:
    if value is None or math.isnan(value):
        return Entry()
    return Entry(f"{value:{sign}.{digits}f}", value=value)


def _counts(row: Row) -> Entry:
    if not row.verdicts:
        return Entry()
    better, worse = (row.verdicts.count(word) for word in ("better", "worse"))
    return Entry(f"{better}, {worse} of {len(row.verdicts)}", value=better - worse)


def _if_any(rows: Sequence[Row], count: Callable[[Row], int]) -> list[Entry]:
    """A column of counts, which is empty if all are 0."""
    some = any(map(count, rows))
    return [_number(count(row), 0) if some else Entry() for row in rows]


def _until(found: Sequence[tuple[int, float] | None]) -> Entry:
    reached = [end for end in found if end is not None]
    if not reached:
        return Entry("not reached" if found else "")
    epochs, seconds = np.mean(reached, axis=0)
    of_all = "" if len(reached) == len(found) else f", {len(reached)} of {len(found)} seeds"
    return Entry(f"{seconds:.3g} s (epoch {epochs:.3g}{of_all})", value=float(seconds))


def _score(trial: Trial) -> Entry:
    if trial.score is None:
        return Entry("failed")
    return _number(100 * trial.score, sign="+")


def _trials(trials: Sequence[Trial]) -> Entry:
    pruned = sum(trial.failure == PRUNED for trial in trials)
    failed = sum(trial.failure is not None for trial in trials) - pruned
    kinds = [f"{n} {word}" for n, word in ((failed, "failed"), (pruned, PRUNED)) if n]
    text = f"{len(trials)} ({', '.join(kinds)})" if kinds else str(len(trials))
    return Entry(text, value=len(trials))
