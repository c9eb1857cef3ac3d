"""Arguments: each error names the argument and says what it must be."""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from mtl_jax._typing import PyTree

P = ParamSpec("P")
R = TypeVar("R")


# Parameters, known when a method is made


def read_number(value: Any, what: str, interval: str = "(-inf, inf)") -> Any:
    """A parameter that is one real number, as a ``float``.

    A number that JAX is tracing is returned as it is: whether it lies in the interval is not known
    yet. So one program can serve several values of a parameter.

    Args:
      value: the parameter.
      what: its name in the error messages.
      interval: where it must lie, such as ``"[0, 1)"``; infinity is allowed at a closed end only.

    Raises:
      TypeError: if it is something else.
      ValueError: if it is outside.
    """
    if is_traced(value) and not value.shape and jnp.issubdtype(value.dtype, jnp.floating):
        return value
    try:
        array = np.asarray(value)
        real = any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer))
        number = float(array) if real and not array.ndim else None
    except (TypeError, ValueError):  # no array at all, ragged lists, or traced by JAX
        number = None
    if number is None:
        raise TypeError(f"{what} must be a number, got {value!r}.")
    low, high = map(float, interval[1:-1].split(","))
    above = low <= number if interval[0] == "[" else low < number
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"{what} must be in {interval}, got {value!r}.")
    return number


def is_traced(value: Any) -> bool:
    """Whether JAX is tracing a value, so that no branch of Python can depend on it."""
    return isinstance(value, Tracer)


def check_numbers(values: PyTree, what: str, interval: str) -> None:
    """Raise an error for a leaf that is no number of the interval, nor a vector of such."""
    for leaf in jax.tree.leaves(values):
        numbers = [leaf]
        if isinstance(leaf, np.ndarray | jax.Array) and leaf.ndim == 1:
            numbers = list(leaf) if is_traced(leaf) or is_key(leaf) else leaf.tolist()
        for number in numbers:
            read_number(number, what, interval)


def read_integer(value: Any, what: str, least: int = 1, most: int = 2**31 - 1) -> int:
    """A parameter that is an integer between two bounds, such as a number of steps."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or not least <= value <= most:
        bounds = f"of at least {least}" if most == 2**31 - 1 else f"from {least} to {most}"
        raise ValueError(f"{what} must be an integer {bounds}, got {value!r}.")
    return int(value)


def check_option(value: Any, options: Sequence[str | None], what: str) -> None:
    """Raise a ``ValueError`` for what is none of the options."""
    if (value is None or isinstance(value, str)) and value in options:
        return
    *some, last = map(repr, options)
    raise ValueError(f"{what} must be {', '.join(some)} or {last}, got {value!r}.")


def check_task_name(name: Any, what: str) -> None:
    """Raise a ``TypeError`` for what is neither a task's name nor ``None``."""
    if not (name is None or isinstance(name, str)):
        raise TypeError(f"{what} must be a task's name, such as 'boundary', got {name!r}.")


def check_flags(where: str, **flags: Any) -> None:
    """Raise a ``TypeError`` for what is neither ``True`` nor ``False``."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{where}: `{name}` must be True or False, got {value!r}.")


def check_functions(where: str, **functions: Any) -> None:
    """Raise a ``TypeError`` for what cannot be called."""
    for name, value in functions.items():
        if not callable(value):
            raise TypeError(f"{where}: `{name}` must be a function, got {value!r}.")


# Keys


def is_key(value: Any) -> bool:
    """Whether a value is a ``jax.random.key``, or an array of such."""
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def read_key(key: Array | None) -> Array | None:
    """The key as a new-style one; an error for what is no key."""
    if key is None:
        return None
    found = key
    if isinstance(key, jax.Array) and key.dtype == jnp.uint32:
        # The data of a key, as jax.random.PRNGKey returns it; or an array of another shape.
        with contextlib.suppress(TypeError, ValueError):
            found = jax.random.wrap_key_data(key)
    if not isinstance(found, jax.Array) or not is_key(found) or found.shape:
        raise TypeError(f"`key` must be one jax.random.key, got {key!r}.")
    return found


def require_key(key: Array | None, method: str) -> Array:
    """The key, or an error that says where it is to be given."""
    if key is None:
        raise ValueError(
            f"{method} draws random numbers: call its `init` with key=jax.random.key(seed)."
        )
    return key


# Arrays


def leaf_name(path: Any) -> str:
    """The path of a leaf, such as ``heads/0``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def read_array(value: Any, what: str) -> Array:
    """An argument that is an array, or becomes one.

    Raises:
      TypeError: if it does not, ``what`` being its name in the message.
    """
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{what} must be an array, got {value!r}.") from None


def check_no_statistics(params: PyTree) -> None:
    """Raise a ``TypeError`` for batch statistics of Flax, which would be trained as parameters."""
    linen = isinstance(params, Mapping) and {"params", "batch_stats"} <= set(params)
    found = "batch_stats" if linen else None
    nnx = sys.modules.get("flax.nnx")  # if it is not imported there is nothing of it
    if nnx is not None:
        kinds = (nnx.BatchStat, nnx.Cache, nnx.Intermediate)
        nodes = jax.tree_util.tree_leaves_with_path(
            params, is_leaf=lambda node: isinstance(node, nnx.Variable)
        )
        names = (leaf_name(path) for path, node in nodes if isinstance(node, kinds))
        found = next(names, found)
    if found is not None:
        raise TypeError(
            f"{found!r} is none of the parameters, but a state of the network, and would be "
            "trained as one. Take the parameters alone, in Flax NNX by nnx.split(model, nnx.Param, "
            '...), in Linen variables["params"], and give the rest to the losses as another '
            "argument, such as the model state of a train step."
        )


def leaf_type(leaf: Any, what: str, *, abstract: bool = False) -> tuple[tuple[int, ...], Any]:
    """The shape and the dtype of a leaf of a pytree.

    Args:
      leaf: the leaf.
      what: its name in the error message.
      abstract: whether a ``jax.ShapeDtypeStruct`` will do.

    Raises:
      TypeError: if it is neither an array nor a number.
    """
    if isinstance(leaf, jax.Array):  # the usual case, and the quickest
        return leaf.shape, leaf.dtype
    try:
        shapes_alone = isinstance(leaf, jax.ShapeDtypeStruct)
        if jax.tree_util.all_leaves([leaf]) and (abstract or not shapes_alone):
            dtype = jnp.result_type(leaf)  # which complains where `shape` may not
            if isinstance(leaf, int):
                np.array(leaf, dtype)  # which complains where it does not fit
            return jnp.shape(leaf), dtype
    except (TypeError, ValueError, OverflowError):
        pass
    raise TypeError(f"{what} is {leaf!r}, which is neither an array nor a number.")


def leaf_types(
    tree: PyTree, what: str, kind: Any = jnp.generic, hint: str = "", *, abstract: bool = False
) -> list[tuple[tuple[int, ...], Any]]:
    """The shapes and dtypes of the leaves.

    Args:
      tree: the pytree.
      what: what a leaf is called in the error messages, before its path.
      kind: the kind of numbers that they must be, such as ``jnp.floating``.
      hint: how the error message goes on after the dtype.
      abstract: whether a ``jax.ShapeDtypeStruct`` will do.

    Raises:
      TypeError: if a leaf is neither an array nor a number, or of another kind.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = f"{what} {leaf_name(path)!r}"
        found.append(leaf_type(leaf, name, abstract=abstract))
        if kind is not jnp.generic and not jnp.issubdtype(found[-1][1], kind):
            raise TypeError(f"{name} has dtype {found[-1][1]}{hint}")
    return found


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of arrays, once for each of their structures, shapes and dtypes.

    Called outside ``jit`` it is a program of its own, compiled at the first call; inside, it
    becomes part of what is compiled around it. Arguments that JAX cannot take are named.
    """
    program = jax.jit(function, inline=True)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = signature.bind(*args, **kwargs).arguments
        for name, value in arguments.items():
            for leaf in jax.tree.leaves(value):
                if not isinstance(leaf, jax.Array):
                    leaf_types(value, f"In `{name}`, the leaf")
                    break
        return program(*args, **kwargs)

    return call
