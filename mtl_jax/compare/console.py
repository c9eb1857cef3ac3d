"""The subcommands of ``mtl-jax``."""

import dataclasses
import sys
from typing import Annotated

import rich.console
import tyro

from mtl_jax.compare import command_line
from mtl_jax.compare.listing import methods_table


@dataclasses.dataclass(frozen=True)
class List:
    """Show all methods: what a step costs, the parameters, the source."""


Command = (
    Annotated[command_line.Config, tyro.conf.subcommand("compare")]
    | Annotated[List, tyro.conf.subcommand("list")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand."""
    given = sys.argv[1:] if arguments is None else arguments
    config = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]  (a union of types is one for tyro)
        prog="mtl-jax",
        description="Balance the losses of several tasks: compare weightings, list the methods.",
        args=given,
    )
    if isinstance(config, List):
        rich.console.Console().print(methods_table())
    else:
        command_line.main(config, given[1:])
