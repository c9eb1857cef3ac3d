"""Optimizers of optax, and what those of them are given that ask for more than the gradient."""

import inspect
import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import optax
from jaxtyping import Array

from mtl_jax._typing import PyTree


def check_optimizer(optimizer: Any, where: str) -> None:
    """Raise a ``TypeError`` for what is not an optax optimizer."""
    if isinstance(optimizer, optax.GradientTransformation) and all(map(callable, optimizer)):
        return
    hint = " Did you mean to call it?" if callable(optimizer) else ""
    if isinstance(optimizer, optax.MultiSteps):
        hint = " Pass its `.gradient_transformation()`."
    raise TypeError(
        f"{where}: `optimizer` must be an optax optimizer, such as optax.adam(1e-3), got "
        f"{optimizer!r}.{hint}"
    )


def optimizer_update(
    optimizer: optax.GradientTransformation,
    gradient: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    value: Array,
    value_fn: Callable[[PyTree], Array],
) -> tuple[PyTree, PyTree]:
    """The updates of an optimizer and its next state; it is given the extra arguments it takes.

    Args:
      optimizer: the optimizer.
      gradient: the gradient.
      state: the optimizer's state.
      params: the parameters.
      value: what is minimised, at these parameters.
      value_fn: what is minimised, as a function of the parameters.

    Raises:
      TypeError: if the optimizer needs an argument that cannot be given.
    """

    # A line search hands on to the function what it does not know itself.
    def called(params: PyTree, *, grad_fn: Any = None, obj_fn: Any = None) -> Array:
        return value_fn(params)

    given = {
        "value": value,
        "grad": gradient,
        "value_fn": called,
        "grad_fn": lambda params, *_: jax.grad(called)(params),
        "obj_fn": called,
    }
    taken = _extra_arguments(optimizer)
    extra = {name: one for name, one in given.items() if taken is None or name in taken}
    try:
        return optimizer.update(gradient, state, params, **extra)
    except TypeError as error:
        # A part of a chain may need what the signature of the chain does not name.
        missing = re.search(r"missing \d+ required .*arguments?: (.*)", str(error))
        if missing is None:
            raise
        raise TypeError(
            f"The optimizer's `update` needs the argument {missing[1]}, which is unknown here: it "
            f"can be given {', '.join(given)}, which are what is minimised, its gradient, and "
            "both as functions of the parameters."
        ) from error


def _extra_arguments(optimizer: optax.GradientTransformation) -> Collection[str] | None:
    """The names of the arguments that an optimizer takes; ``None`` if it takes all."""
    if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return ()
    parameters = inspect.signature(optimizer.update).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return None if takes_all else parameters
