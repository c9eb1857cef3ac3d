"""How the tasks' gradients lie to each other, from their Gramian."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax._checks import compiled, read_array
from mtl_jax._tasks import at_least_float32


class Diagnostics(NamedTuple):
    """What a Gramian tells of the task gradients, in the order of the leaves of the losses.

    Attributes:
      norms: the norm of each task's gradient; 0 for an absent task.
      cosines: the cosine of the angle between each two gradients; 0 where one of them is zero or
        absent.
      magnitude_similarity: for each two gradients ``2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2)``: 1 if
        they are equally long, near 0 if one dwarfs the other; 0 where one is zero or absent.
      conflicting: the share of the pairs of present tasks whose gradients point away from each
        other, that is with a negative cosine; 0 if there is no pair.
    """

    norms: Float[Array, "tasks"]
    cosines: Float[Array, "tasks tasks"]
    magnitude_similarity: Float[Array, "tasks tasks"]
    conflicting: Float[Array, ""]


@compiled
def diagnostics(
    gramian: Float[Array, "tasks tasks"], present: Bool[Array, "tasks"] | None = None
) -> Diagnostics:
    r"""Cosines, magnitude similarity and share of conflicting pairs of the task gradients.

    .. math:: \cos_{ij} = \frac{G_{ij}}{\sqrt{G_{ii} G_{jj}}}, \qquad
              \phi_{ij} = \frac{2 \sqrt{G_{ii} G_{jj}}}{G_{ii} + G_{jj}}.

    Args:
      gramian: G, the inner products of the task gradients, as in
        :class:`mtl_jax.MultiTaskValue`.
      present: which tasks count; all of them by default.

    Returns:
      The :class:`Diagnostics`. They are NaN where the Gramian is, and all 0 where it is: also at
      the steps of :func:`mtl_jax.every` and :func:`mtl_jax.after_warmup` at which it was not
      measured (``value.measured``).

    Raises:
      ValueError: if the Gramian is not a square matrix, or ``present`` has another shape than its
        rows.
      TypeError: if the Gramian is not of real floating-point numbers, or ``present`` not boolean.

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning <https://arxiv.org/abs/2001.06782>`_,
      NeurIPS 2020, Definitions 1 and 2

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> found = mtl_jax.diagnostics(jnp.array([[4.0, -1.0], [-1.0, 1.0]]))
      >>> [round(float(x), 3) for x in (found.cosines[0, 1], found.magnitude_similarity[0, 1])]
      [-0.5, 0.8]
      >>> float(found.conflicting)
      1.0
    """
    gramian = read_array(gramian, "The Gramian")
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1]:
        raise ValueError(f"A Gramian is a square matrix, got shape {gramian.shape}.")
    if not jnp.issubdtype(gramian.dtype, jnp.floating):
        raise TypeError(f"The Gramian must hold real floating-point numbers, got {gramian.dtype}.")
    gramian = gramian.astype(at_least_float32(gramian.dtype))
    shape = gramian.shape[:1]
    present = jnp.ones(shape, bool) if present is None else read_array(present, "`present`")
    if present.dtype != jnp.bool_:
        raise TypeError(f"`present` must be boolean, got {present.dtype}.")
    if present.shape != shape:
        raise ValueError(f"`present` must have shape {shape} as the tasks, got {present.shape}.")
    norms = jnp.sqrt(jnp.where(present, jnp.maximum(jnp.diagonal(gramian), 0), 0))
    there = (norms != 0) & present
    both = there[:, None] & there[None, :]
    scale = jnp.where(there, norms, 1)
    cosines = gramian / scale[:, None] / scale[None, :]
    ratio = scale[:, None] / scale[None, :]
    similarity = 2 / (ratio + 1 / ratio)
    pairs = jnp.triu(present[:, None] & present[None, :], 1)
    conflicts = jnp.sum(jnp.where(pairs & both, cosines < 0, False), dtype=gramian.dtype)
    measured = jnp.where(jnp.all(jnp.isfinite(jnp.where(both, gramian, 0))), 0, jnp.nan)
    count = jnp.maximum(jnp.sum(pairs, dtype=gramian.dtype), 1)
    return Diagnostics(
        norms=norms,
        cosines=jnp.where(both, jnp.clip(cosines, -1, 1), 0),
        magnitude_similarity=jnp.where(both, similarity, 0),
        conflicting=conflicts / count + measured.astype(gramian.dtype),
    )
