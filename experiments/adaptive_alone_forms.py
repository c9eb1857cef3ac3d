"""Which form of ``adaptive_alone``? Its emphasis, its reference and its rule beside each other.

Each task is trained alone; then with weights that grow with how far its loss is above the one that
it reached alone: at the end of that training or at the same epoch of it (``curve``), in proportion
or by a softmax, to the power of the emphasis or times it. Leaves what every comparison leaves, with
a row for each form. The table of docs/results.md is made of these commands, whose learning rates
are those tuned for equal weights::

    python -m experiments.adaptive_alone_forms --problem qm9 --learning-rate 0.00423761 --seeds 5
    python -m experiments.adaptive_alone_forms --problem utterances --learning-rate 0.0562341
"""

import dataclasses
import functools
import itertools
import pathlib

import tyro

from experiments.problems import build_problem
from mtl_jax.compare import WEIGHTINGS, compare
from mtl_jax.compare.command_line import fail

EMPHASES = {"proportional": (0.5, 1.0, 2.0, 4.0), "softmax": (0.5, 1.0, 2.0)}
FORMS = {
    f"{reference}, {rule}, {emphasis:g}": functools.partial(
        WEIGHTINGS["adaptive_alone"], reference=reference, rule=rule, emphasis=emphasis
    )
    for reference, (rule, emphases) in itertools.product(("end", "curve"), EMPHASES.items())
    for emphasis in emphases
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare the forms of adaptive_alone on a problem.

    Attributes:
      problem: The problem, by its name or as package.module:name.
      learning_rate: Peak learning rate; the problem's own if not given.
      epochs: Passes over the training data; the problem's own number if not given.
      seeds: Number of seeds.
      data_dir: Folder with the data, for the problems that read it from one.
      runs_dir: Folder that holds the results; these are in the folder forms_PROBLEM.
    """

    problem: str
    learning_rate: float | None = None
    epochs: int | None = None
    seeds: int = 10
    data_dir: str | None = None
    runs_dir: pathlib.Path = pathlib.Path("runs")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what is finished is not run again. Exits with 2 if it cannot."""
    config = tyro.cli(Config, args=arguments)
    try:
        problem = build_problem(config.problem, config.data_dir).with_settings(
            learning_rate=config.learning_rate, epochs=config.epochs
        )
        folder = config.runs_dir / f"forms_{problem.name}"
        compare(problem, FORMS, folder, seeds=range(config.seeds), resume=True)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
