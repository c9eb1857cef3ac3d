"""The methods whose steps are timed, and every form in which each can be had."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import optax

import mtl_jax
from benchmarks.speed.records import LEARNING_RATE, Network
from mtl_jax._base import Aggregator, Signal, Weighting
from mtl_jax._jacobian import RowsMode
from mtl_jax.compare import look_up
from mtl_jax.methods import MAKES, RunSettings

OPTIMIZER = optax.sgd(LEARNING_RATE)
PLAIN = "plain"
EVERY = 10
"""The steps between two Gramians of ``every``."""
HELD = f"nash_mtl_every_{EVERY}"
METHODS = (*(name for name in MAKES if name != "constant"), HELD)  # its step is equal's
ROWS_METHOD = "mgda"
"""The method with which every way to compute the rows is timed."""
ROWS_WAYS: tuple[RowsMode, ...] = ("unrolled", "map", 5, "vmap", "low_memory")
OWN_STEP = "own step"
SECOND = "second batch"
OWN_STEP_METHODS = ("adaptive", "dwa", "uncertainty")
"""The methods that are timed in a step written by hand, too, around ``value_and_grad``."""


class Variant(NamedTuple):
    """A method in one form.

    Attributes:
      method: its name.
      form: "plain"; "losses"; "own step", by hand around the gradient; "representation"; "encoder
        rows", the Gramian over the shared parameters with one pass through the heads; "rows" or
        "rows=<way>", without encoder and heads being told apart; "second batch", as large as the
        first.
      weighting: the weighting or the aggregator; ``None`` for the plain step.
    """

    method: str
    form: str
    weighting: Weighting | Aggregator | None

    @property
    def label(self) -> str:
        """A name that no other variant of a network has."""
        return f"{self.method}, {self.form}"


def check_methods(names: Sequence[str]) -> None:
    """Raise a ``ValueError`` for an unknown name; the message lists the known ones."""
    for name in names:
        look_up(name, dict.fromkeys(METHODS), "method")


def variants(methods: Sequence[str] = ()) -> Iterator[Variant]:
    """The plain step, and these methods (all by default) in all their forms."""
    settings = RunSettings(steps_per_epoch=10, epochs=10, optimizer=OPTIMIZER)
    yield Variant(PLAIN, PLAIN, None)
    for name in methods or METHODS:
        if name == HELD:
            yield Variant(name, "rows", mtl_jax.every(mtl_jax.nash_mtl(), EVERY))
            continue
        weighting = MAKES[name](settings)
        for form in _forms(name, weighting):
            yield Variant(name, form, weighting)


def _forms(name: str, weighting: Weighting | Aggregator) -> Iterator[str]:
    if isinstance(weighting, Aggregator) or weighting.needs is Signal.TASK_GRADIENTS:
        yield "rows"
    elif weighting.needs is Signal.SECOND_BATCH:
        yield SECOND
    elif weighting.needs is Signal.LOSSES:
        yield "losses"
        if name in OWN_STEP_METHODS:
            yield OWN_STEP
    else:
        yield from ("representation", "encoder rows", "rows")
        if name == ROWS_METHOD:
            yield from (f"rows={way}" for way in ROWS_WAYS)


def least_tasks(method: str) -> int:
    """How many tasks a method needs."""
    return mtl_jax.METHODS[method].least_tasks if method in mtl_jax.METHODS else 1


def why_not(variant: Variant, network: Network) -> str | None:
    """Why a variant cannot be had on this network; ``None`` if it can."""
    least = least_tasks(variant.method)
    if network.tasks < least:
        return f"needs {least} tasks"
    if variant.form == "rows=low_memory" and network.channels:
        return "the convolution that is fast on CPU has no forward derivative"
    return None
