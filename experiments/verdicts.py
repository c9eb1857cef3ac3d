r"""Is one weighting better than the others, over all problems? ``python -m experiments.verdicts``.

Reads the folders that ``experiments.compare`` left, and prints a table for results.md::

    python -m experiments.verdicts runs/utterances runs/multimnist
"""

import dataclasses
import json
import pathlib
import sys
from typing import Annotated, Any

import tabulate
import tyro

from mtl_jax.evaluation import compare_table, delta_m


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare one weighting with others on every problem of some comparisons, over their seeds."""

    folders: Annotated[
        tuple[pathlib.Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(help="Folders with a results.json.", metavar="FOLDER"),
    ]
    weighting: str = "adaptive"
    """The weighting that is looked at."""
    others: tuple[str, ...] = ("equal", "constant", "uncertainty", "dwa")
    """The weightings that it is compared with."""


def differences(problem: dict[str, Any], weighting: str, other: str) -> list[float]:
    r"""The :math:`\Delta_m` of a weighting against another, for each seed; NaN if one failed."""
    directions = {task: about["higher_is_better"] for task, about in problem["tasks"].items()}
    found = []
    for ours, theirs in zip(
        problem["weightings"][weighting], problem["weightings"][other], strict=True
    ):
        if ours["failure"] or theirs["failure"]:
            found.append(float("nan"))
            continue
        metrics, baseline = (
            {task: values[-1] for task, values in run["test"].items()} for run in (ours, theirs)
        )
        found.append(delta_m(metrics, baseline, directions))
    return found


def verdict_table(problems: dict[str, dict[str, Any]], weighting: str, others: list[str]) -> str:
    """A row for each problem: the mean change against each other weighting, interval, verdict.

    Holm's correction is for all comparisons of the table.

    Args:
      problems: what ``results.json`` holds of each problem.
      weighting: the weighting that is looked at.
      others: those that it is compared with; an empty cell where a problem has not run one.
    """
    changes = {
        f"{name}, {other}": differences(problem, weighting, other)
        for name, problem in problems.items()
        for other in others
        if other in problem["weightings"]
    }
    nothing = {cell: [0.0] * len(values) for cell, values in changes.items()}
    compared = compare_table(
        {weighting: changes, "no change": nothing},
        dict.fromkeys(changes, True),
        baseline="no change",
    )
    texts = {}
    for cell, found in compared[weighting].items():
        low, high = found.interval
        interval = f"{100 * found.difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        texts[cell] = f"{interval} {found.verdict}"
    rows = [
        [
            name,
            "yes" if "tuning" in problem else "no",
            len(problem["settings"]["seeds"]),
            *(texts.get(f"{name}, {other}", "") for other in others),
        ]
        for name, problem in problems.items()
    ]
    headers = ["problem", "tuned", "seeds", *(f"{weighting} against {other}" for other in others)]
    return tabulate.tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with status 2 after a message if there is nothing to read."""
    config = tyro.cli(Config, prog="python -m experiments.verdicts", args=arguments)
    problems: dict[str, dict[str, Any]] = {}
    try:
        if not config.folders:
            raise ValueError("Name at least one folder.")
        for folder in config.folders:
            problems |= json.loads((folder / "results.json").read_text(encoding="utf-8"))
        for name, problem in problems.items():
            if config.weighting not in problem["weightings"]:
                raise ValueError(f"{config.weighting!r} did not run on {name!r}.")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(verdict_table(problems, config.weighting, list(config.others)))


if __name__ == "__main__":
    main()
