"""Compare weightings on the problems here: ``python -m experiments.compare --help``."""

import dataclasses
import sys
from typing import Annotated

import tyro

from experiments.problems import PROBLEMS, build_problem
from mtl_jax.compare.command_line import Options, run

_HELP = (
    f"The problems to run on: any of {', '.join(PROBLEMS)}, or your own as package.module:name, "
    "the name of a Problem or of a function that returns one."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Train one network with each of several weightings, beside each task trained alone.

    Prints tables for each problem and leaves in RUNS_DIR/NAME tables, pictures and numbers, all on
    one page in report.html, and what is needed to continue with --resume.
    """

    problem: Annotated[tuple[str, ...], tyro.conf.arg(help=_HELP)] = (
        "multimnist",
        "utterances",
        "helmholtz_small",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, as :func:`mtl_jax.compare.command_line.run` does."""
    words = ["python", "-m", "experiments.compare"]
    config = tyro.cli(Config, prog=" ".join(words), args=arguments)
    given = sys.argv[1:] if arguments is None else arguments
    run(config, config.problem, build_problem, [*words, *given])


if __name__ == "__main__":
    main()
