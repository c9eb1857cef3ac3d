"""Stochastic direction-oriented multi-objective gradient descent."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Signal, Weighting
from mtl_jax._checks import read_integer, read_number
from mtl_jax._lift import vector_weighting
from mtl_jax._preference import among_present, check_preference, preference_vector
from mtl_jax._typing import PyTree
from mtl_jax.second_batch_weightings._simplex import nearest_shares, shares


class SDMGradState(NamedTuple):
    r"""State of the method.

    Attributes:
      shares: the point of the simplex that the weights are made of, :math:`\omega`; over all tasks.
      preference: how much each task counts in the preferred direction.
    """

    shares: Float[Array, "tasks"]
    preference: Float[Array, "tasks"]


def sdmgrad(
    regularization: float = 0.3,
    learning_rate: float = 10.0,
    momentum: float = 0.5,
    iterations: int = 20,
    preference: PyTree | None = None,
    eps: float = 1e-8,
) -> Weighting:
    r"""SDMGrad: the shortest direction near the mean gradient, unbiased by a second batch.

    .. math:: \omega \leftarrow \Pi \Big( \omega - \eta\, v \Big), \qquad
              v \leftarrow \mu\, v + A\, (\omega + \lambda p), \qquad
              A = \frac{J_1 J_2^\top}{s^2 + \epsilon}, \qquad
              w = \frac{\omega + \lambda p}{1 + \lambda},

    the first two repeated so many times in each step of training, from where the last step ended
    (equal at first) and from v = 0. :math:`\Pi` is the projection onto the simplex, p the
    preference, :math:`1/K` by default, and s the mean of the roots of A's diagonal, negative
    entries being 0. The rows of :math:`J_1` and :math:`J_2` are the task gradients on two batches
    that are drawn independently, so that the noise of one is not that of the other; A is then not
    symmetric. Without noise it is descent on :math:`\tfrac12 \lVert J^\top (\omega + \lambda p)
    \rVert^2`: :math:`\lambda = 0` is the problem of :func:`mtl_jax.mgda`, and a large one the
    preferred direction. The weights sum to 1.

    A step takes two forward passes, K + 1 backward passes and K forward derivatives, about twice
    what the Gramian costs. The published code means to draw three batches, of which one is for the
    gradient that trains the network, but puts one into the place of all three; the ports to LibMTL
    and TorchJD do not, and are what this agrees with. Here the network is trained on the first of
    two. With the published step size of 10, or LibMTL's 5, the inner iterations do not converge:
    they leap between corners of the simplex, and a rounding error can decide between them; with 0.1
    they do. The paper draws new batches for each of them.

    When tasks are absent, the present ones share their sum among themselves. The losses are not
    read: they may be 0 or negative.

    Args:
      regularization: :math:`\lambda`, at least 0. The default is that of the paper's experiments.
      learning_rate: :math:`\eta`, above 0. This default and the following are the authors'.
      momentum: :math:`\mu`, in [0, 1).
      iterations: the inner iterations of a step.
      preference: p, a pytree like the losses of numbers that are not negative; by default 1/K for
        K present tasks, the paper's.
      eps: :math:`\epsilon`, at least 0. With 0 the method does not depend on the gradients' scale,
        and has no answer where A's diagonal is nowhere positive: the weights are then NaN and the
        state stays as it was.

    Returns:
      The weighting. It reads a second batch, ``Signal.SECOND_BATCH``: pass it as ``second``.

    Raises:
      ValueError: if a parameter is outside its range; in ``init``, if ``preference`` has another
        structure than the losses.
      TypeError: if a parameter is not a number.

    References:
      Xiao et al., `Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
      Algorithms <https://arxiv.org/abs/2305.18409>`_, NeurIPS 2023

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> def losses_fn(params, x):
      ...     return {"a": jnp.mean((params - x) ** 2), "b": jnp.mean((params + 3 * x) ** 2)}
      >>> weighting = mtl_jax.sdmgrad(learning_rate=0.1)
      >>> gradient = mtl_jax.value_and_grad(losses_fn, weighting)
      >>> params, x, another = jnp.array(2.0), jnp.array([0.0, 1.0]), jnp.array([0.5, 0.0])
      >>> state = gradient.init(params, x)
      >>> value, found, state = gradient(params, state, x, second=(another,))
      >>> {task: round(float(weight), 3) for task, weight in value.weights.items()}
      {'a': 0.885, 'b': 0.115}
    """
    regularization = read_number(regularization, "sdmgrad: `regularization`", "[0, inf)")
    learning_rate = read_number(learning_rate, "sdmgrad: `learning_rate`", "(0, inf)")
    momentum = read_number(momentum, "sdmgrad: `momentum`", "[0, 1)")
    iterations = read_integer(iterations, "sdmgrad: `iterations`")
    check_preference(preference, "sdmgrad")
    eps = read_number(eps, "sdmgrad: `eps`", "[0, inf)")

    def init(tasks, key):
        vector = preference_vector(preference, tasks, "sdmgrad")
        return SDMGradState(tasks.full(1 / tasks.number), vector)

    def directions(state, present):
        return jnp.diag(jnp.ones_like(state.shares)), None

    def update(losses, state, present, steps, products):
        number = jnp.maximum(jnp.sum(present, dtype=losses.dtype), 1)
        preferred = among_present(state.preference, preference, present)
        roots = jnp.sqrt(jnp.maximum(jnp.diagonal(products), 0))
        scale = jnp.sum(roots, where=present) / number
        # Divided twice, so that no square overflows or vanishes.
        root = jnp.hypot(scale, eps**0.5)
        products = products / root / root

        def iterate(number, carried):
            point, velocity = carried
            both = point + regularization * preferred
            slope = jnp.matmul(products, both, precision=jax.lax.Precision.HIGHEST)
            velocity = momentum * velocity + slope
            return nearest_shares(point - learning_rate * velocity, present), velocity

        point, total = shares(state.shares, present)
        carried = point, jnp.zeros_like(point)
        point, _ = jax.lax.fori_loop(0, iterations, iterate, carried)
        weights = (point + regularization * preferred) / (1 + regularization)
        return weights, state._replace(shares=total * point)

    return vector_weighting(
        update, init, needs=Signal.SECOND_BATCH, reads_losses=False, directions=directions
    )
