"""A comparison on one page that needs nothing else: tables that sort, pictures, configuration."""

import base64
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from mtl_jax.compare.numbers import machine, versions
from mtl_jax.compare.referee import Comparison
from mtl_jax.compare.sections import interruption_text, learning_rate_text, sections, settings_text
from mtl_jax.compare.sources import numbers_text
from mtl_jax.compare.tables import Table

CAPTIONS = {
    "metrics": "The test metric of each task after every epoch.",
    "losses": "The mean training loss of each task in every epoch.",
    "weights": "The weight of each task over the training steps.",
    "difficulty": (
        "Does a weighting give harder tasks more weight? To the right are the tasks of which more "
        "of the first epoch's training loss is left in the last one. In parentheses: the rank "
        "correlation of the two."
    ),
    "front": "What one task gains and the other one loses.",
    "conflict": "How the tasks' gradients lie to each other over the training steps.",
}
"""What each picture shows, in the order of the page."""


def page(comparisons: Sequence[Comparison], folder: pathlib.Path, *, command: str = "") -> str:
    """The page of some comparisons, as HTML.

    Args:
      comparisons: the comparisons, each on a problem.
      folder: where the pictures are, ``<problem>_<picture>.png``, which are made a part of the
        page. Those of a comparison that is not finished would be old, and are left out.
      command: the command that makes these results.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mtl_jax.compare", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        problems=[_problem(comparison, folder) for comparison in comparisons],
        command=command,
        made_with=_made_with(),
        verdict=_verdict,
    )


def _problem(comparison: Comparison, folder: pathlib.Path) -> dict[str, Any]:
    problem = comparison.problem
    paths = {kind: folder / f"{problem.name}_{kind}.png" for kind in CAPTIONS}
    runs = [run for of in (comparison.runs, comparison.alone) for rs in of.values() for run in rs]
    return {
        "name": problem.name,
        "description": problem.description,
        "settings": settings_text(comparison),
        "interruption": interruption_text(comparison),
        "failures": [
            f"{run.weighting}, seed {run.seed}: {run.failure}" for run in runs if run.failure
        ],
        "sections": sections(comparison),
        "pictures": [
            {
                "caption": CAPTIONS[kind],
                "alt": f"{problem.name}: {kind}",
                "data": base64.b64encode(path.read_bytes()).decode(),
            }
            for kind, path in paths.items()
            if path.exists() and not comparison.unfinished
        ],
        "configuration": _configuration(comparison),
    }


def _configuration(comparison: Comparison) -> Table:
    problem = comparison.problem
    places = {name: runs[0].measured_at for name, runs in comparison.runs.items()}
    measured = ", ".join(f"{name} ({place})" for name, place in places.items() if place)
    tasks = [
        f"{name} ({task.metric}, {'higher' if task.higher_is_better else 'lower'} is better)"
        for name, task in problem.tasks.items()
    ]
    rows = {
        "tasks": ", ".join(tasks),
        "weightings": ", ".join(comparison.runs),
        "each task alone": "yes" if comparison.alone else "no",
        "gradients measured for": measured or "none",
        "seeds": ", ".join(map(str, comparison.seeds)),
        "epochs": str(problem.epochs),
        "batch size": numbers_text(problem.batch_sizes()),
        "learning rate": learning_rate_text(comparison),
    } | {
        f"{part} examples": numbers_text(problem.sizes(part))
        for part in ("train", "validation", "test")
    }
    return Table(["setting", "value"], [[name, value] for name, value in rows.items()])


def _made_with() -> Table:
    of = machine()
    rows = {
        **versions(),
        "platform": of["platform"],
        "processor": f"{of['processor']}, {of['cores']} cores",
        "devices": ", ".join(of["devices"]),
    }
    return Table(["what", "which"], [[name, value] for name, value in rows.items()])


def _verdict(cell: str) -> str:
    """The word of a cell that says how it compares to equal weights; empty without one."""
    last = cell.rsplit(" ", 1)[-1]
    return last if last in ("better", "worse") else ""
