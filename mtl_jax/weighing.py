"""What the transforms share: from what was measured to the weights, and to the gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.arguments import leaf_type, read_array
from mtl_jax.base import Signal, Weighting
from mtl_jax.diagnostics import Diagnostics, diagnostics
from mtl_jax.pytree import PyTree
from mtl_jax.sharding import check_whole, sum_over_devices, varying_axes
from mtl_jax.state import all_finite, tree_where
from mtl_jax.tasks import Losses, Weights, at_least_float32, leaf_name, read_mask, read_tasks
from mtl_jax.wrappers.turns import any_due


class MultiTaskValue(NamedTuple):
    """What a step found out.

    Attributes:
      losses: the losses, as ``losses_fn`` returned them.
      weights: the weight that each task had in the gradient; the gradient is that of the sum of
        ``weights * losses``. ``None`` with an aggregator, which has no weights.
      aux: the auxiliary output of ``losses_fn``, or ``None``.
      gramian: the inner products of the task gradients, in the order of the leaves of the losses:
        ``float[K, K]``, NaN in a step that did not measure them; ``None`` if no step does.
      diagnostics: norms, cosines and conflicts of the task gradients, if asked for.
    """

    losses: Losses
    weights: Weights
    aux: Any = None
    gramian: Float[Array, "tasks tasks"] | None = None
    diagnostics: Diagnostics | None = None


class GradientFn(Protocol):
    """``fn(params, state, *args, mask=None) -> (value, gradient, state)``."""

    def __call__(
        self, params: PyTree, state: PyTree, *args: Any, mask: PyTree | None = None
    ) -> tuple[MultiTaskValue, PyTree, PyTree]:
        """Return the value, the gradient and the weighting's next state."""
        ...


def weigh(
    weighting: Weighting,
    losses: Losses,
    aux: Any,
    state: PyTree,
    mask: PyTree | None,
    *,
    pull_back: Callable[[Weights], PyTree],
    measure: Callable[[], tuple[Float[Array, "tasks tasks"], Any]],
    combine: Callable[[Weights, Any], PyTree],
    diagnose: bool,
) -> tuple[MultiTaskValue, PyTree, PyTree]:
    """Decide the weights and take the gradient, measuring the Gramian only if it is needed.

    Args:
      weighting: the weighting.
      losses: the losses.
      aux: the auxiliary output.
      state: the weighting's state.
      mask: the mask, or ``None``.
      pull_back: from the weights to the gradient, in one backward pass.
      measure: returns the Gramian, and what was found on the way: the task gradients.
      combine: from the weights and the task gradients to the gradient.
      diagnose: whether diagnostics are wanted.

    Returns:
      The value, the gradient, and the state: the next one if the gradient is usable.
    """

    def measure_whole() -> tuple[Float[Array, "tasks tasks"], Any]:
        gramian, found = measure()
        check_whole(gramian, losses, "The Gramian", "Pass that axis as `axis_name`.")
        return gramian, found

    if weighting.needs is not Signal.GRAMIAN and not diagnose:
        weights, new_state = weighting.update(losses, state, mask=mask)
        gradient, gramian = pull_back(weights), None
    elif weighting.due is None:
        gramian, task_gradients = measure_whole()
        weights, new_state = weighting.update(losses, state, mask=mask, gramian=gramian)
        gradient = combine(weights, task_gradients)
    else:
        unmeasured = jax.tree.map(
            lambda shape: jnp.full(shape.shape, jnp.nan, shape.dtype),
            jax.eval_shape(lambda: measure_whole()[0]),
        )

        def measured() -> tuple[Weights, PyTree, Array]:
            gramian, _ = measure_whole()
            return *weighting.update(losses, state, mask=mask, gramian=gramian), gramian

        def held() -> tuple[Weights, PyTree, Array]:
            return *weighting.update(losses, state, mask=mask), unmeasured

        due = any_due(weighting.due(state))
        weights, new_state, gramian = jax.lax.cond(due, measured, held)
        gradient = pull_back(weights)
    new_state = tree_where(usable(gradient, weights, losses), new_state, state)
    value = MultiTaskValue(losses, weights, aux, gramian)
    if diagnose:
        value = with_diagnostics(value, mask)
    return value, gradient, new_state


def with_diagnostics(value: MultiTaskValue, mask: PyTree | None) -> MultiTaskValue:
    """The value with the diagnostics of its Gramian."""
    assert value.gramian is not None
    present = read_mask(mask, read_tasks(value.losses))
    return value._replace(diagnostics=diagnostics(value.gramian, present))


def cotangent(weights: Weights, losses: Losses) -> Losses:
    """The weights in the dtypes of the losses."""
    return jax.tree.map(lambda weight, loss: weight.astype(loss.dtype), weights, losses)


def usable(gradient: PyTree, weights: Weights, losses: Losses) -> Bool[Array, ""]:
    """Whether a step can be taken: finite weights, and gradients whose squared norms are finite.

    The squared norms, since an optimizer squares the gradient too: where that overflows (in float32
    at a norm of 1.8e19), its state is lost although the gradient itself is finite. Devices of a
    ``shard_map`` that share the losses agree on it.
    """
    axes = varying_axes(gradient) - varying_axes(losses)

    def squared_norm(leaf: Array) -> Float[Array, ""]:
        size = jnp.abs(leaf)
        total = jnp.sum(jnp.square(size.astype(at_least_float32(size.dtype))))
        return sum_over_devices(total, axes)

    return all_finite((jax.tree.map(squared_norm, gradient), weights))


def check_params(params: PyTree) -> None:
    """Raise an error for no parameters, or for one that is not floating-point."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("There are no parameters: expected a pytree with at least one array.")
    for path, leaf in leaves:
        _, dtype = leaf_type(leaf, f"The parameter {leaf_name(path)!r}")
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"The parameter {leaf_name(path)!r} has dtype {dtype}, by which nothing can be "
                "differentiated. Pass it to `losses_fn` as another argument."
            )


def read_output(output: Any, has_aux: bool, name: str) -> tuple[Losses, Any]:
    """The losses, checked, as arrays, and the auxiliary output of the function of that name."""
    losses, aux = split_aux(output, name, "losses") if has_aux else (output, None)
    tasks = read_tasks(losses)  # before the backward pass, for its error messages
    named = zip(tasks.names, jax.tree.leaves(losses), strict=True)
    leaves = [read_array(leaf, f"The loss {name!r}") for name, leaf in named]
    return jax.tree.unflatten(tasks.structure, leaves), aux


def split_aux(output: Any, name: str, what: str) -> tuple[Any, Any]:
    """The two parts of what a function with has_aux=True returned."""
    if not isinstance(output, tuple) or len(output) != 2:
        raise TypeError(
            f"With has_aux=True {name} must return a pair ({what}, aux), got "
            f"{type(output).__name__}."
        )
    return output
