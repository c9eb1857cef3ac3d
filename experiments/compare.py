"""Compare weightings on the problems here: ``python -m experiments.compare --help``."""

import dataclasses
import inspect
import sys
from typing import Annotated

import tyro

from experiments.problems import PROBLEMS, build_problem
from mtl_jax.compare.command_line import Compare, Options, run

_HELP = (
    f"The problems to run on: any of {', '.join(PROBLEMS)}, or your own as package.module:name, "
    "the name of a Problem or of a function that returns one."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """The options of ``mtl-jax compare``, with the problems here by their names."""

    problem: Annotated[tuple[str, ...], tyro.conf.arg(help=_HELP)] = (
        "multimnist",
        "utterances",
        "helmholtz_small",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, as :func:`mtl_jax.compare.command_line.run` does."""
    words = ["python", "-m", "experiments.compare"]
    config = tyro.cli(
        Config, prog=" ".join(words), description=inspect.getdoc(Compare), args=arguments
    )
    given = sys.argv[1:] if arguments is None else arguments
    run(config, config.problem, build_problem, [*words, *given])


if __name__ == "__main__":
    main()
