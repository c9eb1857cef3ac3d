"""What is written of a comparison, for a Markdown document and for a page."""

from typing import NamedTuple

from mtl_jax.compare.findings import Findings
from mtl_jax.compare.referee import Comparison
from mtl_jax.compare.settings import Tuning
from mtl_jax.compare.sources import numbers_text
from mtl_jax.compare.tables import (
    MOST_TASKS,
    Table,
    against_equal_table,
    by_task_table,
    cost_table,
    main_table,
    seeds_note,
    trade_offs_table,
)
from mtl_jax.compare.tuning_table import tuning_table

RANKS_AND_CHANGES = (
    "Test metrics, mean ± 95 % interval over the seeds. Δm: mean relative change of the tasks' "
    "metrics, seed by seed, a gain being positive (as LibMTL and DB-MTL print it; CAGrad, Nash-MTL "
    "and FAMO print the negative). Mean rank: of the weightings, 1 being the best in "
    "every task."
)
AGAINST_EQUAL = (
    "The mean difference from equal weights with the same seeds, its 95 % interval, the p-value of "
    "the paired t-test after Holm's correction for all rows of this table, and what follows at 5 %."
)
TRADE_OFFS = (
    "On the Pareto front: no other weighting is, in the mean over the seeds, at least as good in "
    "every task and better in one."
)
HYPERVOLUME = (
    "Hypervolume: what the weighting's seeds dominate together, as a share of the box from the "
    "worst to the best metric of each task over all runs; larger is better, and it compares only "
    "within this table."
)
COST = (
    "Step time: fastest epoch of all seeds, relative to equal weights. Memory: of the compiled "
    "training of an epoch, with the training data. Until as good as equal: training up to the "
    "first epoch after which the mean relative change of the test metrics from equal weights' last "
    "ones, with the same seed, is not negative; mean over the seeds that reach it."
)


class Section(NamedTuple):
    """A table under a title, with what one must know to read it."""

    title: str
    text: str
    table: Table


def sections(comparison: Comparison) -> list[Section]:
    """The tables of a comparison, the most important first."""
    last, best = Findings(comparison), Findings(comparison, best=True)
    found = [
        Section("After the last epoch", f"{RANKS_AND_CHANGES} {seeds_note(last)}", main_table(last))
    ]
    many = len(comparison.problem.tasks) > MOST_TASKS
    if many:
        found.append(Section("Task by task", "After the last epoch.", by_task_table(last)))
    against = against_equal_table(last)
    if against.rows:
        found.append(Section("Against equal weights", AGAINST_EQUAL, against))
    trade_offs = trade_offs_table(last)
    if trade_offs is not None:
        text = f"{TRADE_OFFS} {HYPERVOLUME}" if last.hypervolumes else TRADE_OFFS
        found.append(Section("Trade-offs", text, trade_offs))
    found.append(Section("Cost beside quality", COST, cost_table(comparison)))
    found.append(
        Section(
            "At the epoch that is best on the validation split",
            "Each run's own epoch; else as the first table.",
            main_table(best, timing=False),
        )
    )
    if comparison.tuning is not None:
        text = tuning_text(comparison.tuning)
        found.append(Section("Chosen by tuning", text, tuning_table(comparison.tuning)))
    return found


def tuning_text(tuning: Tuning) -> str:
    """How the settings were chosen."""
    return (
        "The settings of the runs: of all trials those with the best validation metrics after the "
        "last epoch, by their mean relative change from equal weights as shipped. Parameters that "
        f"are not given have their defaults. All trials have the seed {tuning.seed}, which no run "
        "has."
    )


def settings_text(comparison: Comparison) -> str:
    """The settings of the runs, in a sentence."""
    problem = comparison.problem
    parts = ("train", "validation", "test")
    sizes = ", ".join(f"{numbers_text(problem.sizes(part))} {part}" for part in parts)
    number = len(comparison.seeds)
    return (
        f"{sizes} examples; {problem.epochs} epochs, "
        f"batch {numbers_text(problem.batch_sizes())}, learning rate "
        f"{learning_rate_text(comparison)}; {number} seed{'s' * (number != 1)}."
    )


def learning_rate_text(comparison: Comparison) -> str:
    """The learning rate of the runs."""
    shipped = f"{comparison.problem.learning_rate:g}"
    return shipped if comparison.tuning is None else f"as tuned (shipped: {shipped})"


def interruption_text(comparison: Comparison) -> str:
    """How many runs are missing; empty if none is."""
    missing = comparison.unfinished
    return f"Interrupted: {missing} run{'s' * (missing != 1)} not finished." if missing else ""


def markdown_report(comparison: Comparison, *, command: str = "") -> str:
    """The tables of a comparison with what they were measured on, as a Markdown document."""
    problem = comparison.problem
    lines = [f"# {problem.name}", "", problem.description, "", settings_text(comparison), ""]
    if comparison.unfinished:
        lines += [f"**{interruption_text(comparison)}**", ""]
    for title, text, table in sections(comparison):
        lines += [f"## {title}", "", text, "", table.markdown(), ""]
    if command:
        lines += ["Made by", "", f"    {command}", ""]
    return "\n".join(lines)
