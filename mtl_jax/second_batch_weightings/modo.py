"""Multi-objective gradients with double sampling."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Signal, Weighting
from mtl_jax._checks import read_number
from mtl_jax._lift import vector_weighting
from mtl_jax.second_batch_weightings._simplex import nearest_shares, shares


class MoDoState(NamedTuple):
    """State of the method.

    Attributes:
      weights: the weights, which sum to 1 over all tasks.
    """

    weights: Float[Array, "tasks"]


def modo(gamma: float = 0.001, rho: float = 0.1) -> Weighting:
    r"""MoDo: weights that step towards the shortest direction, unbiased by a second batch.

    .. math:: w \leftarrow \Pi \Big( w - \gamma \big( J_1 J_2^\top w + \rho\, w \big) \Big)

    from equal weights, :math:`\Pi` being the projection onto the simplex. The rows of :math:`J_1`
    and :math:`J_2` are the task gradients on two batches that are drawn independently, so that the
    noise of one is not that of the other. It is one step of gradient descent on
    :math:`\tfrac12 \lVert J^\top w \rVert^2 + \tfrac\rho2 \lVert w \rVert^2`, the problem of
    :func:`mtl_jax.mgda`, in each step of training. The weights sum to 1. They follow the scale of
    the gradients: with gradients 10 times as long a :math:`\gamma` 100 times smaller does the same.

    :math:`J_2^\top w` is the gradient of one weighted sum of losses and :math:`J_1` times it one
    forward derivative, so a step takes two forward and two backward passes and that derivative,
    *whatever K is*; the published implementations compute 2 K gradients. The paper draws a third
    batch, on which the gradient is taken that trains the network; here that is the first one. So
    the weights depend on the batch that they weigh, by a step of :math:`\gamma`.

    When tasks are absent, the present ones share their sum among themselves. The losses are not
    read: they may be 0 or negative.

    Args:
      gamma: the step size :math:`\gamma`, at least 0. The default is that of the authors' LibMTL
        port; TorchJD's is 0.1.
      rho: the regularisation :math:`\rho` towards equal weights, at least 0. The default is that of
        both.

    Returns:
      The weighting. It reads a second batch, ``Signal.SECOND_BATCH``: pass it as ``second``.

    Raises:
      ValueError: if a parameter is outside its range.
      TypeError: if it is not a number.

    References:
      Chen et al., `Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization
      and Conflict-Avoidance <https://arxiv.org/abs/2305.20057>`_, NeurIPS 2023

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> def losses_fn(params, x):
      ...     return {"a": jnp.mean((params - x) ** 2), "b": jnp.mean((params + 3 * x) ** 2)}
      >>> gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.modo(gamma=0.1))
      >>> params, x, another = jnp.array(2.0), jnp.array([0.0, 1.0]), jnp.array([0.5, 0.0])
      >>> state = gradient.init(params, x)
      >>> value, found, state = gradient(params, state, x, second=(another,))
      >>> {task: round(float(weight), 3) for task, weight in value.weights.items()}
      {'a': 1.0, 'b': 0.0}
    """
    gamma = read_number(gamma, "modo: `gamma`", "[0, inf)")
    rho = read_number(rho, "modo: `rho`", "[0, inf)")

    def init(tasks, key):
        return MoDoState(tasks.full(1 / tasks.number))

    def directions(state, present):
        return state.weights[None], None

    def update(losses, state, present, steps, products):
        weights, total = shares(state.weights, present)
        slope = products[:, 0] / jnp.where(total > 0, total, 1)  # of the shares, not the weights
        weights = nearest_shares(weights - gamma * (slope + rho * weights), present)
        return weights, MoDoState(total * weights)

    return vector_weighting(
        update, init, needs=Signal.SECOND_BATCH, reads_losses=False, directions=directions
    )
