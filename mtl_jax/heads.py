"""What must hold of heads, of the representation that they read and of their losses."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.arguments import check_flag, check_function, leaf_type
from mtl_jax.pytree import PyTree
from mtl_jax.tasks import Losses, leaf_name
from mtl_jax.weighing import read_output

Heads = Callable[..., Any]


def check_heads(
    heads: Heads, params: PyTree, z: PyTree, *args: Any, tasks: Sequence[str], has_aux: bool = False
) -> None:
    """Check that each task's loss depends on its own copy of the representation only.

    For a test of one's own heads, on values at which no derivative happens to vanish.

    Args:
      heads: as for :func:`mtl_jax.representation_value_and_grad`.
      params: the parameters.
      z: a representation, as the encoder returns it.
      *args: the further arguments of ``heads``.
      tasks: the tasks' names.
      has_aux: whether ``heads`` returns auxiliary output.

    Raises:
      ValueError: if the loss of a task changes with another one's copy; the message names both.
        And as :func:`mtl_jax.representation_value_and_grad`, for ``heads``, ``z``, ``tasks`` and
        losses that it cannot take.
      TypeError: as :func:`mtl_jax.representation_value_and_grad`.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> def heads(params, zs):
      ...     return {"a": jnp.sum(zs["a"] ** 2), "b": jnp.sum(zs["a"] * zs["b"])}
      >>> mtl_jax.check_heads(heads, {}, jnp.ones(3), tasks=("a", "b"))
      Traceback (most recent call last):
      ...
      ValueError: The loss of 'b' depends on the representation of 'a'; each task must use its own.
    """
    check_function(heads, "check_heads: `heads`")
    check_flag(has_aux, "check_heads: `has_aux`")
    tasks = read_names(tasks)
    check_representation(z)

    def losses_fn(zs: dict[str, PyTree]) -> Losses:
        return read_output(heads(params, zs, *args), has_aux, "`heads`")[0]

    losses, pullback = jax.vjp(losses_fn, dict.fromkeys(tasks, z))
    check_tasks(losses, tasks)
    for task in tasks:
        unit = {name: jnp.full_like(loss, name == task) for name, loss in losses.items()}
        (gradients,) = pullback(unit)
        for other in tasks:
            changes = any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradients[other]))
            if other != task and changes:
                raise ValueError(
                    f"The loss of {task!r} depends on the representation of {other!r}; each task "
                    "must use its own."
                )


def read_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks' names, checked."""
    array = hasattr(tasks, "dtype")  # whose iterator may refuse to iterate
    if isinstance(tasks, str) or not isinstance(tasks, Iterable) or array:
        raise TypeError(f"`tasks` must be a sequence of names, got {tasks!r}.")
    tasks = tuple(tasks)
    for name in tasks:
        if not isinstance(name, str):
            raise TypeError(f"`tasks` must hold names, strings; got {name!r}.")
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"`tasks` must name at least one task, and none twice; got {tasks}.")
    return tasks


def check_representation(z: PyTree) -> None:
    """Whether it is a pytree by which one can differentiate."""
    leaves = jax.tree_util.tree_leaves_with_path(z)
    if not leaves:
        raise ValueError("The representation is empty: expected a pytree with at least one array.")
    for path, leaf in leaves:
        name = f"The representation's leaf {leaf_name(path)!r}"
        _, dtype = leaf_type(leaf, name)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{name} has dtype {dtype}, by which nothing can be differentiated. Let the heads "
                "compute it from their own arguments."
            )


def check_tasks(losses: Losses, tasks: tuple[str, ...]) -> None:
    """Whether the losses are those of the tasks."""
    if not isinstance(losses, dict) or set(losses) != set(tasks):
        got = sorted(losses, key=str) if isinstance(losses, dict) else type(losses).__name__
        raise ValueError(
            f"`heads` must return a dictionary with the losses of the tasks {sorted(tasks)}, got "
            f"{got}."
        )
