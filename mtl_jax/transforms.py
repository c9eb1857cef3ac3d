"""From the losses of several tasks to one gradient: the weights are the cotangent."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.base import Weighting, all_finite, tree_where
from mtl_jax.tasks import Losses, Weights, at_least_float32, leaf_name, read_tasks


class MultiTaskValue(NamedTuple):
    """What a step found out.

    Attributes:
      losses: the losses, as ``losses_fn`` returned them.
      weights: the weight that each task had in the gradient; the gradient is that of the sum of
        ``weights * losses``.
      aux: the auxiliary output of ``losses_fn``, or ``None``.
    """

    losses: Losses
    weights: Weights
    aux: Any = None


class GradientFn(Protocol):
    """``fn(params, state, *args, mask=None) -> (value, gradient, state)``."""

    def __call__(
        self, params: PyTree, state: PyTree, *args: Any, mask: PyTree | None = None
    ) -> tuple[MultiTaskValue, PyTree, PyTree]:
        """Return the value, the gradient and the weighting's next state."""
        ...


def value_and_grad(
    losses_fn: Callable[..., Any], weighting: Weighting, *, has_aux: bool = False
) -> GradientFn:
    r"""Differentiate the weighted sum of the task losses, the weights decided on the way.

    .. math:: g = \sum_k w_k \nabla_\theta L_k(\theta), \qquad w = \text{weighting}(L(\theta))

    The losses are one vector-valued function of the parameters, evaluated once; the weights are
    the cotangent that is pulled back through it. So a step costs one forward and one backward
    pass, for any number of tasks, and no gradient flows through the weights.

    Args:
      losses_fn: ``losses_fn(params, *args)`` returns the losses, a pytree of scalars, or
        ``(losses, aux)`` with ``has_aux``.
      weighting: decides the weights.
      has_aux: whether ``losses_fn`` returns auxiliary output.

    Returns:
      ``fn(params, state, *args, mask=None) -> (value, gradient, state)``: a
      :class:`MultiTaskValue`, the gradient (a pytree like ``params``) and the weighting's new
      state. ``mask`` tells which tasks have labels in this batch (see :class:`Weighting`). If a
      loss or the squared norm of the gradient is not finite, the state is returned as it was.

    Raises:
      ValueError: if a loss is not a scalar, or the tasks are not those of the state.
      TypeError: if ``weighting`` is not a :class:`Weighting`, or a loss or a parameter is not
        floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> def losses_fn(params, x):
      ...     return {"a": jnp.mean((params - x) ** 2), "b": jnp.mean(jnp.abs(params + x))}
      >>> weighting = mtl_jax.equal()
      >>> gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting)
      >>> params, x = jnp.array(3.0), jnp.array([1.0, 2.0])
      >>> state = weighting.init(losses_fn(params, x))
      >>> value, gradient, state = gradient_fn(params, state, x)
      >>> float(gradient)
      4.0
    """
    check_weighting(weighting)

    def fn(
        params: PyTree, state: PyTree, *args: Any, mask: PyTree | None = None
    ) -> tuple[MultiTaskValue, PyTree, PyTree]:
        def with_aux(params: PyTree) -> tuple[Losses, Any]:
            output = losses_fn(params, *args)
            losses, aux = _split_aux(output) if has_aux else (output, None)
            read_tasks(losses)  # before the backward pass, for its error messages
            return jax.tree.map(jnp.asarray, losses), aux

        _check_params(params)
        losses, pullback, aux = jax.vjp(with_aux, params, has_aux=True)
        weights, new_state = weighting.update(losses, state, mask=mask)
        cotangent = jax.tree.map(lambda weight, loss: weight.astype(loss.dtype), weights, losses)
        (gradient,) = pullback(cotangent)
        new_state = tree_where(usable(gradient, weights), new_state, state)
        return MultiTaskValue(losses, weights, aux), gradient, new_state

    return fn


def usable(gradient: PyTree, weights: Weights) -> Bool[Array, ""]:
    """Whether a step can be taken: finite weights, and gradients whose squared norms are finite.

    The squared norms, since an optimizer squares the gradient too: where that overflows (in float32
    at a norm of 1.8e19), its state is lost although the gradient itself is finite.
    """

    def squared_norm(leaf: Array) -> Float[Array, ""]:
        size = jnp.abs(leaf)
        return jnp.sum(jnp.square(size.astype(at_least_float32(size.dtype))))

    return all_finite((jax.tree.map(squared_norm, gradient), weights))


def check_weighting(weighting: Any) -> None:
    """Raise a ``TypeError`` for what is not a weighting."""
    if not isinstance(weighting, Weighting):
        hint = " Did you mean to call it?" if callable(weighting) else ""
        raise TypeError(f"Expected a Weighting, such as mtl_jax.equal(), got {weighting!r}.{hint}")


def _check_params(params: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"The parameter {leaf_name(path)!r} has dtype {jnp.result_type(leaf)}, by which "
                "nothing can be differentiated. Pass it to `losses_fn` as another argument."
            )


def _split_aux(output: Any) -> tuple[Losses, Any]:
    if not isinstance(output, tuple) or len(output) != 2:
        raise TypeError(
            "With has_aux=True `losses_fn` must return a pair (losses, aux), got "
            f"{type(output).__name__}."
        )
    return output
