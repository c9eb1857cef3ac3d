"""The methods as a table for a terminal: what each costs, its parameters, its source."""

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import rich.box
import rich.table

from mtl_jax.methods import METHODS

_PRICES: Mapping[str, str] = {
    "the losses": "1 forward, 1 backward",
    "the losses after the step, too": "2 forward, 1 backward",
    "the Gramian": "1 forward, 1 backward at the representation; else 1 forward, K backward",
    "the task gradients": "1 forward, K backward; K gradients held",
    "a second batch": "2 forward, 2 or 3 backward, 1 forward derivative; for sdmgrad K + 1 and K",
}


def methods_table() -> rich.table.Table:
    """The methods as a table for a terminal, by what they read, the cheapest first."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("method", "parameters", "source"):
        table.add_column(column, overflow="fold")
    for reads, methods in itertools.groupby(METHODS.values(), lambda method: method.reads):
        table.add_section()
        table.add_row(f"[bold]reads {reads}[/bold]", f"[bold]{_PRICES[reads]}[/bold]", "")
        for method in methods:
            sources = (
                f"{label}, {address.replace('https://arxiv.org/abs/', 'arXiv ')}"
                for label, address in method.sources
            )
            source = "; ".join(sources) or "this project"
            table.add_row(method.name, parameters(method.factory), source)
    return table


def parameters(function: Callable[..., Any]) -> str:
    """A function's parameters with their defaults.

    Example:
      >>> import mtl_jax
      >>> from mtl_jax.compare.listing import parameters
      >>> parameters(mtl_jax.dwa)
      'window, temperature=2.0'
    """
    return ", ".join(map(_with_default, inspect.signature(function).parameters.values()))


def _with_default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    default = "<function>" if callable(parameter.default) else repr(parameter.default)
    return f"{parameter.name}={default}"
