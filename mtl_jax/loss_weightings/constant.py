"""Constant weights, chosen by hand or by a search."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Weighting
from mtl_jax._checks import check_numbers, leaf_name
from mtl_jax._lift import vector_weighting
from mtl_jax._typing import PyTree


class ConstantState(NamedTuple):
    """The weights, so that they are saved, and can be vmapped over, with the state."""

    weights: Float[Array, "tasks"]


def constant(weights: PyTree) -> Weighting:
    r"""Constant weights, used as they are given.

    .. math:: w_k = c_k

    The weights keep the scale they are given in; for learning rates that carry over from
    :func:`mtl_jax.equal`, let them sum to the number of tasks. The losses are not read: they may be
    0 or negative.

    Args:
      weights: a pytree like the losses, of finite numbers that are not negative.

    Returns:
      The weighting.

    Raises:
      ValueError: if there are no weights, or one is negative or not finite; in ``init``, if the
        losses have other tasks than the weights.
      TypeError: if a weight is not a number.

    References:
      Xin et al., `Do Current Multi-Task Optimization Methods in Deep Learning Even Help?
      <https://arxiv.org/abs/2209.11379>`_, 2022, on tuned constant weights as the baseline.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.constant({"depth": 0.2, "normals": 1.8})
      >>> losses = {"depth": 0.5, "normals": 1.5}
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> round(float(weights["normals"]), 6)
      1.8
    """
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    if not leaves or (
        jax.tree.structure(weights) == jax.tree.structure(0) and not jnp.ndim(weights)
    ):
        raise ValueError(
            f"constant: expected a pytree with one weight for each task, got {weights!r}."
        )
    for path, leaf in leaves:
        name = f"the weight {leaf_name(path)!r}" if path else "a weight"
        check_numbers(leaf, f"constant: {name}", "[0, inf)")

    def update(losses, state, present, steps):
        return state.weights, state

    def init(tasks, key):
        return ConstantState(tasks.vector(weights, "constant: the weights"))

    return vector_weighting(update, init, reads_losses=False)
