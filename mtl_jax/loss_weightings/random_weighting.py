"""Random loss weights."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from mtl_jax._base import Weighting
from mtl_jax._checks import check_option, require_key
from mtl_jax._lift import vector_weighting


class RandomWeightingState(NamedTuple):
    """The key from which the next weights are drawn."""

    key: Key[Array, ""]


def random_weighting(distribution: Literal["normal", "dirichlet"] = "normal") -> Weighting:
    r"""Random loss weighting (RLW): weights drawn anew at every step.

    .. math:: w = \mathrm{softmax}(z), \; z \sim \mathcal N(0, I) \quad \text{(normal)}, \qquad
              w \sim \mathrm{Dirichlet}(1, \dots, 1) \quad \text{(dirichlet)}.

    The weights sum to 1, as in the paper, so its steps are K times smaller than those of
    :func:`mtl_jax.equal` at the same learning rate. The losses are not read: they may be 0 or
    negative.

    Args:
      distribution: ``"normal"``, the default of the paper's code, or ``"dirichlet"``, uniform on
        the simplex.

    Returns:
      The weighting. Its ``init`` needs ``key``.

    Raises:
      ValueError: if ``distribution`` is unknown; in ``init``, if the key is missing.
      TypeError: in ``init``, if ``key`` is not a key.

    References:
      Lin et al., `Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
      Learning <https://arxiv.org/abs/2111.10603>`_, TMLR 2022

    Example:
      >>> import jax
      >>> import mtl_jax
      >>> weighting = mtl_jax.random_weighting()
      >>> state = weighting.init((0.5, 1.5), key=jax.random.key(0))
      >>> weights, state = weighting.update((0.5, 1.5), state)
      >>> round(float(sum(weights)), 5)
      1.0
    """
    check_option(distribution, ("normal", "dirichlet"), "random_weighting: `distribution`")

    def init(tasks, key):
        return RandomWeightingState(require_key(key, "random_weighting"))

    def update(losses, state, present, steps):
        next_key, key = jax.random.split(state.key)
        if distribution == "normal":
            scores = jax.random.normal(key, losses.shape, losses.dtype)
        else:  # exponential variables, divided by their sum
            scores = jnp.log(jax.random.exponential(key, losses.shape, losses.dtype))
        return jax.nn.softmax(scores, where=present), RandomWeightingState(next_key)

    return vector_weighting(update, init, reads_losses=False)
