"""Aligned-MTL."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Signal, Weighting
from mtl_jax._checks import check_option
from mtl_jax._lift import vector_weighting
from mtl_jax._preference import among_present, check_preference, preference_vector
from mtl_jax._typing import PyTree
from mtl_jax.gramian_weightings._spectral import spectrum
from mtl_jax.solvers._precision import in_float64


class AlignedMTLState(NamedTuple):
    """State of the method.

    Attributes:
      preference: how much each task counts.
    """

    preference: Float[Array, "tasks"]


def aligned_mtl(
    scale: Literal["min", "median", "rmse"] = "min", preference: PyTree | None = None
) -> Weighting:
    r"""Aligned-MTL: the mean of the task gradients after they are made orthogonal, equally long.

    With the eigenvalues :math:`\lambda` and eigenvectors V of the Gramian,

    .. math:: w = \sqrt{\sigma}\; V \operatorname{diag}(\lambda^{-1/2})\, V^\top p,
              \qquad \sigma = \min_k \lambda_k, \qquad p_k = \tfrac1K,

    over the eigenvalues that are not zero. The rows of :math:`\sqrt\sigma\, G^{-1/2} J` are the
    orthogonal system nearest to the task gradients, the rows of J, up to its length. The weights
    keep this scale, do not sum to a constant, and may be negative. Published code takes the sum of
    the aligned gradients, K times this mean. If all gradients are zero, so are the weights.

    The rank is decided on the gradients divided by their norms, so that a short gradient is never
    taken for a dependent one; published code compares the eigenvalues with the largest. The losses
    are not read: they may be 0 or negative.

    Args:
      scale: the length of the aligned gradients is the square root of: ``"min"``, the paper's
        choice, the smallest eigenvalue; ``"median"`` the median one, of an even number the lower of
        the middle two; ``"rmse"`` the mean of the eigenvalues.
      preference: p, a pytree like the losses of numbers that are not negative; by default 1/K for
        K present tasks, the paper's.

    Returns:
      The weighting.

    Raises:
      ValueError: if ``scale`` is unknown, or a preference negative or not finite; in ``init``, if
        ``preference`` has another structure than the losses.
      TypeError: if a preference is not a number.

    References:
      Senushkin et al., `Independent Component Alignment for Multi-Task Learning
      <https://arxiv.org/abs/2305.19000>`_, CVPR 2023

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.aligned_mtl()
      >>> state = weighting.init((1.0, 1.0))
      >>> gramian = jnp.diag(jnp.array([1.0, 9.0]))  # two orthogonal gradients, of norms 1 and 3
      >>> weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [round(float(weight), 3) for weight in weights]
      [0.5, 0.167]
    """
    check_option(scale, ("min", "median", "rmse"), "aligned_mtl: `scale`")
    check_preference(preference, "aligned_mtl")

    def init(tasks, key):
        return AlignedMTLState(preference_vector(preference, tasks, "aligned_mtl"))

    def weights(gramian, chosen, *, eps):
        eigen = spectrum(gramian, eps)
        rank = jnp.sum(eigen.kept)
        if scale == "rmse":
            level = jnp.mean(eigen.values, where=eigen.kept | (rank == 0))
        else:
            middle = 0 if scale == "min" else (jnp.maximum(rank, 1) - 1) // 2
            level = jnp.sort(jnp.where(eigen.kept | (rank == 0), eigen.values, jnp.inf))[middle]
        return jnp.sqrt(level) * eigen.apply(1 / jnp.sqrt(eigen.values), chosen)

    def update(losses, state, present, steps, gramian):
        chosen = among_present(state.preference, preference, present)
        return in_float64(weights, gramian, chosen), state

    return vector_weighting(update, init, needs=Signal.GRAMIAN, reads_losses=False)
