"""The methods as a table: what each costs, its parameters, its source."""

import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
import rich.box
import rich.table

import mtl_jax
from mtl_jax._base import Aggregator, Signal, Weighting
from mtl_jax.compare.weightings import WEIGHTINGS, RunSettings

_PRICES = {
    "the losses": "1 forward, 1 backward",
    "the losses after the step, too": "2 forward, 1 backward",
    "the Gramian": "1 forward, 1 backward at the representation; else 1 forward, K backward",
    "the task gradients": "1 forward, K backward; K gradients held",
}
_REFERENCE = re.compile(r"References:\s+(.+?), `(.+?)\s*<(\S+)>`_", re.DOTALL)


class Method(NamedTuple):
    """A method.

    Attributes:
      name: its name in ``mtl_jax``.
      reads: what it reads.
      price: what a step costs, K being the number of tasks.
      parameters: its parameters with their defaults.
      authors: the authors of its source; empty for one without.
      title: the title of its source.
      link: the address of its source.
    """

    name: str
    reads: str
    price: str
    parameters: str
    authors: str
    title: str
    link: str


def methods() -> list[Method]:
    """All methods, by what they read, from the cheapest to the dearest.

    Example:
      >>> from mtl_jax.compare.listing import methods
      >>> dwa = next(method for method in methods() if method.name == "dwa")
      >>> dwa.parameters, dwa.price, dwa.link
      ('window, temperature=2.0', '1 forward, 1 backward', 'https://arxiv.org/abs/1803.10704')
    """
    settings = RunSettings(steps_per_epoch=1, epochs=1, optimizer=optax.sgd(1.0))
    found = [
        _describe(name, getattr(mtl_jax, name), _reads(make(settings)))
        for name, make in WEIGHTINGS.items()
        if name in mtl_jax.__all__  # and not a variant
    ]
    return sorted(found, key=lambda method: list(_PRICES).index(method.reads))


def methods_table() -> rich.table.Table:
    """The methods as a table for a terminal."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("method", "parameters", "source"):
        table.add_column(column, overflow="fold")
    for reads, of_price in itertools.groupby(methods(), lambda method: method.reads):
        table.add_section()
        table.add_row(f"[bold]reads {reads}[/bold]", f"[bold]{_PRICES[reads]}[/bold]", "")
        for method in of_price:
            address = method.link.replace("https://arxiv.org/abs/", "arXiv ")
            source = f"{method.authors}, {address}" if address else "this library"
            table.add_row(method.name, method.parameters, source)
    return table


def _reads(weighting: Weighting | Aggregator) -> str:
    if isinstance(weighting, Aggregator):
        return "the task gradients"
    if weighting.needs is Signal.GRAMIAN:
        return "the Gramian"
    return "the losses" if weighting.observe is None else "the losses after the step, too"


def _describe(name: str, function: Callable[..., Any], reads: str) -> Method:
    parameters = inspect.signature(function).parameters.values()
    source = _REFERENCE.search(inspect.getdoc(function) or "")
    authors, title, link = source.groups() if source else ("", "", "")
    return Method(
        name,
        reads,
        _PRICES[reads],
        ", ".join(map(_with_default, parameters)),
        " ".join(authors.split()),
        " ".join(title.split()),
        link,
    )


def _with_default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    default = "<function>" if callable(parameter.default) else repr(parameter.default)
    return f"{parameter.name}={default}"
