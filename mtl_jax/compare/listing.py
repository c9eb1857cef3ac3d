"""The methods as a table: what each costs, its parameters, its source."""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import rich.box
import rich.table

import mtl_jax

_PRICES = {
    "loss_weightings": "1 forward, 1 backward",
    "gramian_weightings": "1 forward, 1 backward at the representation; else 1 forward, K backward",
    "gradient_aggregators": "1 forward, K backward; K gradients held",
}
_PRICE_OF_FAMO = "2 forward, 1 backward"
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
    found = []
    for folder, price in _PRICES.items():
        for name in mtl_jax.__all__:
            function = getattr(mtl_jax, name)
            if getattr(function, "__module__", "").split(".")[1:2] == [folder]:
                found.append(_describe(name, function, folder.replace("_", " "), price))
    return found


def methods_table() -> rich.table.Table:
    """The methods as a table for a terminal."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("method", "parameters", "source"):
        table.add_column(column, overflow="fold")
    price = ""
    for method in methods():
        if method.price != price and method.name != "famo":
            price = method.price
            table.add_section()
            table.add_row(f"[bold]{method.reads}[/bold]", f"[bold]{price}[/bold]", "")
        note = f" ({_PRICE_OF_FAMO})" if method.name == "famo" else ""
        address = method.link.replace("https://arxiv.org/abs/", "arXiv ")
        source = f"{method.authors}, {address}" if address else "this library"
        table.add_row(method.name + note, method.parameters, source)
    return table


def _describe(name: str, function: Callable[..., Any], reads: str, price: str) -> Method:
    parameters = inspect.signature(function).parameters.values()
    source = _REFERENCE.search(inspect.getdoc(function) or "")
    authors, title, link = source.groups() if source else ("", "", "")
    return Method(
        name,
        reads,
        _PRICE_OF_FAMO if name == "famo" else price,
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
