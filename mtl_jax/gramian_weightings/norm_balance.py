"""Weights that bring the gradients to one norm, averaged over time."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax._base import Signal, Weighting
from mtl_jax._checks import check_option, check_task_name, read_number
from mtl_jax._lift import vector_weighting
from mtl_jax.gramian_weightings._spectral import gradient_norms


class NormBalanceState(NamedTuple):
    """State of the method.

    Attributes:
      weights: the average weights.
      reference: which task is the reference; ``None`` where it is the mean.
    """

    weights: Float[Array, "tasks"]
    reference: Bool[Array, "tasks"] | None


def norm_balance(
    momentum: float = 0.9,
    norm_of: Literal["loss", "root_loss"] = "loss",
    reference: str | None = None,
) -> Weighting:
    r"""Weights inverse to the gradients' norms, so that all weighted gradients are equally long.

    .. math::

       w_k \leftarrow m\, w_k + (1 - m)\, \frac{\bar n}{n_k}, \qquad
       n_k = \lVert \nabla L_k \rVert \quad \text{or} \quad
             \lVert \nabla \sqrt{L_k} \rVert = \frac{\lVert \nabla L_k \rVert}{2 \sqrt{L_k}}, \qquad
       \bar n = \frac{1}{K} \sum_j n_j \quad \text{or} \quad n_{\text{reference}},

    from weights of 1. The average is taken where the norms are measured: with
    ``every(norm_balance(), 1000)`` it is that of the measurements. Nothing is learned here, and no
    task is to be faster than another: for these, that is for the GradNorm of Chen et al., see
    :func:`mtl_jax.gradnorm`. For two tasks and m = 0 the direction is that of
    :func:`mtl_jax.conflict_free`. It is published under several names:

    - ``every(norm_balance(), 1000)``: ``grad_norm`` of jaxpi and ``GradNorm`` of PaddleScience.
      (jaxpi adds 1e-5 of the mean norm to each, which bounds its weights by 1e5, as ``clipped``
      would; and it measures after a step, for the next.)
    - ``every(norm_balance(0.0, "root_loss"), 1000)``: the NTK weights of PhysicsNeMo, with the sum
      of the norms in the place of their mean: K times these weights. jaxpi's ``ntk`` is another:
      it divides by the mean squared gradient of the single residuals.
    - ``clipped(norm_balance(0.0, reference="reconstruction"), 0.0, 1e4)``, with ``shared`` for the
      decoder's last layer: the adaptive weight of VQGAN's adversarial loss. (VQGAN adds 1e-4 to
      its norm, and multiplies at the end, as ``with_preference`` does.) The codebook loss belongs
      to the reconstruction: it has no gradient in that layer.

    A task whose gradient is 0 keeps its weight; so do all while the reference's is 0 or it is
    absent. The mean is that over the present tasks. The losses are read with ``"root_loss"`` alone:
    those that are not positive, but for a task without a gradient, are then outside the domain, the
    weights are NaN, and the state stays as it was.

    Args:
      momentum: m, in [0, 1); with 0 the weights are those of the step. The default is jaxpi's.
      norm_of: of which gradient the norm is taken: that of the loss, or of its square root.
      reference: the name of the task that keeps the weight 1, for the others to have gradients of
        its length: the path of its loss, such as ``"reconstruction"`` or ``"heads/0"``. By default
        the mean.

    Returns:
      The weighting; its state holds the weights as ``state.inner.weights``.

    Raises:
      ValueError: if ``momentum`` is not in [0, 1), or ``norm_of`` unknown; in ``init``, if no task
        is called ``reference``.
      TypeError: if ``momentum`` is not a number, or ``reference`` not a text.

    References:
      Wang, Yu and Perdikaris, `When and why PINNs fail to train: A neural tangent kernel
      perspective <https://arxiv.org/abs/2007.14527>`_, 2020

      Wang et al., `An Expert's Guide to Training Physics-informed Neural Networks
      <https://arxiv.org/abs/2308.08468>`_, 2023

      Esser, Rombach and Ommer, `Taming Transformers for High-Resolution Image Synthesis
      <https://arxiv.org/abs/2012.09841>`_, CVPR 2021

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.norm_balance(momentum=0.0)
      >>> state = weighting.init((1.0, 1.0))
      >>> gramian = jnp.diag(jnp.array([1.0, 9.0]))  # two orthogonal gradients, of norms 1 and 3
      >>> weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [round(float(weight), 3) for weight in weights]
      [2.0, 0.667]
    """
    momentum = read_number(momentum, "norm_balance: `momentum`", "[0, 1)")
    check_option(norm_of, ("loss", "root_loss"), "norm_balance: `norm_of`")
    check_task_name(reference, "norm_balance: `reference`")

    def init(tasks, key):
        if reference is None:
            return NormBalanceState(tasks.full(1), None)
        position = tasks.position(reference, "norm_balance: `reference`")
        return NormBalanceState(tasks.full(1), jnp.arange(tasks.number) == position)

    def update(losses, state, present, steps, gramian):
        norms = gradient_norms(gramian)
        if norm_of == "root_loss":
            roots = jnp.sqrt(jnp.where(losses > 0, losses, jnp.nan))
            norms = jnp.where(norms > 0, norms / (2 * roots), 0)
        those = present if state.reference is None else present & state.reference
        level = jnp.sum(norms, where=those) / jnp.maximum(jnp.sum(those, dtype=norms.dtype), 1)
        kept = (norms == 0) | (level == 0)
        target = level / jnp.where(kept, 1, norms)
        weights = momentum * state.weights + (1 - momentum) * target
        weights = jnp.where(kept, state.weights, weights)
        return weights, NormBalanceState(weights, state.reference)

    return vector_weighting(
        update,
        init,
        needs=Signal.GRAMIAN,
        reads_losses=norm_of == "root_loss",
        positive_losses=norm_of == "root_loss",
    )
