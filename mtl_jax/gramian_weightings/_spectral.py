"""Spectra of Gramians, accurate for the shortest task gradients as for the longest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.solvers._cosines import product


class Spectrum(NamedTuple):
    """The eigendecomposition of a Gramian.

    Attributes:
      values: the eigenvalues, in no particular order, in units of ``unit`` squared; 1 where not
        ``kept``.
      vectors: the eigenvectors, one in each row.
      unit: the geometric mean of the largest and the smallest norm of a gradient.
      kept: which eigenvalues are positive beyond rounding.
    """

    values: Float[Array, "eigenvalues"]
    vectors: Float[Array, "eigenvalues tasks"]
    kept: Bool[Array, "eigenvalues"]
    unit: Float[Array, ""]

    def apply(
        self, values: Float[Array, "eigenvalues"], vector: Float[Array, "tasks"]
    ) -> Float[Array, "tasks"]:
        """The product with a vector of the matrix that has ``values``, or 0 where not kept."""
        parts = jnp.where(self.kept, values * product(self.vectors, vector), 0)
        return product(self.vectors.T, parts)


def gradient_norms(gramian: Float[Array, "tasks tasks"]) -> Float[Array, "tasks"]:
    """The norms of the task gradients."""
    return jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))


def cosines(gramian: Float[Array, "tasks tasks"]) -> Float[Array, "tasks tasks"]:
    """The cosines between the task gradients; 0 for a gradient that is zero."""
    norms = gradient_norms(gramian)
    scale = jnp.where(norms > 0, norms, jnp.inf)
    return jnp.clip(gramian / scale[:, None] / scale[None, :], -1, 1)


def rounding(gramian: Float[Array, "tasks tasks"], eps: float | None = None) -> float:
    """What a sum over the tasks may be off by, relative to the sum of its terms' sizes.

    Args:
      gramian: the Gramian.
      eps: the rounding unit of the terms; by default that of the Gramian's dtype.
    """
    eps = float(jnp.finfo(gramian.dtype).eps) if eps is None else eps
    return 10 * gramian.shape[0] * eps


def spectrum(gramian: Float[Array, "tasks tasks"], eps: float) -> Spectrum:
    r"""Eigenvalues and eigenvectors of a Gramian by Jacobi's method.

    With D the diagonal matrix of the gradients' norms and :math:`G = D C D`, the relative error
    of every eigenvalue is some roundings times the condition of C, however different the norms
    are; ``jnp.linalg.eigh`` makes G tridiagonal first, which costs small eigenvalues their digits.

    An eigenvalue is kept where its unit eigenvector v has :math:`v^\top G v` beyond rounding of
    :math:`v^\top D^2 v`: a question of the angles between the gradients, not of their norms. The
    Gramian may be singular, and indefinite up to rounding.

    Args:
      gramian: the Gramian.
      eps: the rounding unit of its entries.

    References:
      Demmel and Veselić, `Jacobi's Method is More Accurate than QR
      <https://doi.org/10.1137/0613074>`_, SIAM Journal on Matrix Analysis and Applications, 1992
    """
    number = gramian.shape[0]
    size = number + number % 2
    half = size // 2
    norms = gradient_norms(gramian)
    nonzero = norms > 0
    largest = jnp.max(norms, initial=0)
    smallest = jnp.min(jnp.where(nonzero, norms, largest), initial=jnp.inf)
    unit = jnp.where(largest > 0, jnp.sqrt(largest) * jnp.sqrt(smallest), 1)
    norms = norms / unit
    gramian = jnp.where(nonzero[:, None] & nonzero[None, :], gramian / unit / unit, 0)
    squares = jnp.pad(norms**2, (0, size - number))
    # A round rotates the pairs (i, i + half). Then all but the first move on by one place, as
    # round a table, so that after size - 1 rounds every two have met once.
    places = [0, half, *range(1, half - 1), *range(half + 1, size), half - 1]
    places = jnp.array(places if half > 1 else [0, 1])

    def rotate(matrix, cosine, sine):
        upper, lower = matrix[:half], matrix[half:]
        return jnp.concatenate([cosine * upper - sine * lower, sine * upper + cosine * lower])

    def rotate_pairs(_, carry):
        matrix, vectors = carry
        diagonal, product = jnp.diagonal(matrix), jnp.diagonal(matrix, half)
        apart = jnp.abs(product) >= float(jnp.finfo(matrix.dtype).tiny)
        slope = (diagonal[half:] - diagonal[:half]) / (2 * jnp.where(apart, product, 1))
        tangent = jnp.where(slope < 0, -1.0, 1.0) / (jnp.abs(slope) + jnp.hypot(slope, 1.0))
        tangent = jnp.where(apart, tangent, 0)[:, None]
        cosine = 1 / jnp.hypot(tangent, 1.0)
        sine = tangent * cosine
        matrix = rotate(rotate(matrix, cosine, sine).T, cosine, sine)
        return matrix[places][:, places], rotate(vectors, cosine, sine)[places]

    def sweep(carry):
        matrix, vectors, sweeps = carry
        matrix, vectors = jax.lax.fori_loop(0, size - 1, rotate_pairs, (matrix, vectors))
        return matrix, vectors, sweeps + 1

    def unfinished(carry):
        matrix, vectors, sweeps = carry
        noise = jnp.sqrt(product(vectors**2, squares))
        noise = number * float(jnp.finfo(matrix.dtype).eps) * noise[:, None] * noise[None, :]
        coupled = (jnp.abs(matrix) > noise) & ~jnp.eye(size, dtype=bool)
        # Convergence is quadratic; six or seven sweeps are usual.
        return jnp.any(coupled) & (sweeps < 15)

    start = (jnp.pad(gramian, (0, size - number)), jnp.eye(size, dtype=gramian.dtype), 0)
    matrix, vectors, _ = jax.lax.while_loop(unfinished, sweep, start)
    values = jnp.diagonal(matrix)
    kept = values > rounding(gramian, eps) * product(vectors**2, squares)
    return Spectrum(jnp.where(kept, values, 1), vectors[:, :number], kept, unit)
