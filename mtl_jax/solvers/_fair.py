"""The alpha-fair direction."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from mtl_jax._checks import compiled
from mtl_jax.solvers._cosines import (
    Solution,
    check_at_least_zero,
    inverse_lengths,
    product,
    read_gramian,
    safe_divide,
)
from mtl_jax.solvers._precision import in_float64
from mtl_jax.solvers._quadratic import shortest_combination


def fair_point(
    gramian: Float[Array, "tasks tasks"],
    alpha: float | Float[Array, ""] = 1.0,
    present: Bool[Array, "tasks"] | None = None,
) -> Solution:
    r"""The weights of the alpha-fair direction, Nash's bargaining solution for alpha = 1.

    .. math::

       G x = x^{-1 / \alpha}, \quad x > 0, \quad \text{elementwise}

    A solution exists, and is unique up to the null space of :math:`J^\top`, unless the gradients'
    convex hull contains 0. There, and where this cannot be told from rounding, the weights are
    those of :func:`minimum_norm_point`, which sum to 1 and give a direction near 0, and the
    residual is 1. Otherwise, with :math:`r_k = x_k^{-1 / \alpha} / \|g_k\|`, the residual is
    :math:`\max_k |(G x)_k / \|g_k\| - r_k| / \max_k r_k`.

    Args:
      gramian: the inner products of the task gradients.
      alpha: how the tasks' gains are traded, more than 0: 1 for proportional fairness; the larger,
        the more for the worst-served task.
      present: the tasks that count; ``None`` for all. If none does, the weights are 0.

    Returns:
      The weights x and the residual.

    Raises:
      TypeError: if an argument has a dtype of the wrong kind.
      ValueError: if an argument has the wrong shape, or alpha is not positive.

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_,
      2022; Ban and Ji, `Fair Resource Allocation in Multi-Task Learning
      <https://arxiv.org/abs/2402.15638>`_, 2024.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.solvers import fair_point
      >>> weights, residual = fair_point(jnp.array([[1.0, 0.0], [0.0, 16.0]]))
      >>> [round(float(weight), 4) for weight in weights]
      [1.0, 0.25]
    """
    check_at_least_zero(alpha, "alpha", strictly=True)
    return _compiled_fair_point(gramian, alpha, present)


@compiled
def _compiled_fair_point(gramian: Array, alpha: ArrayLike, present: Array | None) -> Solution:
    return in_float64(_fair_point, gramian, alpha, present)


def _fair_point(gramian: Array, alpha: ArrayLike, present: Array | None, *, eps: float) -> Solution:
    rows = read_gramian(gramian, present, eps)
    dtype, K = rows.cosines.dtype, rows.lengths.size
    p = 1 / jnp.asarray(alpha, dtype)

    # With y = length * x, G x = x^-p is C y = m y^-p, m = length^(p - 1). Scaled to max(m) = 1.
    log_m = jnp.where(rows.usable, (p - 1) * jnp.log(rows.lengths), 0)
    log_top = jnp.max(jnp.where(rows.usable, log_m, -jnp.inf), initial=-jnp.inf)
    log_top = jnp.where(jnp.any(rows.usable), log_top, 0)
    # In units of s, the solution for orthogonal gradients, m y^-p is s (y / s)^-p, whose terms keep
    # within the range of the dtype where m leaves it: m = s^(1 + p).
    s = jnp.where(rows.usable, jnp.exp((log_m - log_top) / (1 + p)), 1)
    identity = jnp.eye(K, dtype=dtype)
    C = jnp.where(rows.usable[:, None] & rows.usable[None, :], rows.cosines, identity)

    def newton(state):
        # A primal-dual step to z = C y, z y^p = m from y, z > 0. The added diagonal is below the
        # rounding error of C: it keeps the matrix positive definite and does not move the solution.
        y, z, change, _, count = state
        slack = s * (y / s) ** -p - z
        slope = p * z / y
        H = C + identity * (slope + 4 * K * eps)[:, None]
        factor = jax.scipy.linalg.cho_factor(H)
        dy = jax.scipy.linalg.cho_solve(factor, slack + z - product(C, y))
        dz = slack - slope * dy
        # At most 0.9 of the way to where a y or z would become 0.
        size = 0.9 / jnp.maximum(jnp.max(jnp.maximum(-dy / y, -dz / z), initial=0), 0.9)
        # Newton's steps shrink quadratically near the solution, until rounding stops them.
        now = jnp.max(jnp.abs(dy / y), initial=0)
        converged = (now < 0.01) & (now > change / 2)
        return y + size * dy, z + size * dz, now, converged, count + 1

    state = (s, s, jnp.asarray(jnp.inf, dtype), jnp.asarray(False), jnp.int32(0))
    y, z, *_ = lax.while_loop(lambda state: ~state[3] & (state[4] < 60), newton, state)

    # Where 0 is in the hull, y diverges, and C y becomes smaller than its rounding error.
    gains = product(C, y)
    noise = 2 * math.sqrt(K) * eps
    balanced = jnp.abs(z / s * (y / s) ** p - 1) < 0.5
    solved = balanced & (jnp.abs(gains - z) < noise * jnp.sum(y))
    solved = jnp.all(solved) & ~jnp.any(rows.zero)
    certain = solved & jnp.all(gains > noise * jnp.sum(y))
    scale = jnp.exp((log_top - 2 * jnp.log(rows.unit)) / (1 + p))
    x = jnp.where(rows.usable, scale * y / rows.lengths, 0)
    wanted = jnp.where(rows.usable, s * (y / s) ** -p, 0)
    residual = jnp.max(jnp.where(rows.usable, jnp.abs(gains - wanted), 0), initial=0)
    residual = safe_divide(residual, jnp.max(wanted, initial=0))

    def other() -> Solution:
        # The gain of a long gradient can be that small, too; but then 0 is not near the hull.
        nearest = shortest_combination(rows, inverse_lengths(rows)).x
        share = rows.lengths * nearest
        apart = jnp.sum(share * product(C, share)) > noise * jnp.sum(share) ** 2
        found = solved & apart
        return Solution(jnp.where(found, x, nearest), jnp.where(found, residual, 1))

    return lax.cond(certain, lambda: Solution(x, residual), other)
