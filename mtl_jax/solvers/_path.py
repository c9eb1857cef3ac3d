"""The path that the solutions of three problems lie on.

Of the points that satisfy <g_k, d> >= nu for all k, the nearest to
a given g0 is d = g0 + J' u, where u >= 0 is piecewise linear in nu. Followed upwards from u = 0,

- at nu = 0, d is the projection of g0 on the dual cone;
- where d has come to a given distance from g0, d is the solution of CAGrad;
- far out, u has the direction of the point of least norm in the convex hull of the gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from mtl_jax.solvers._cosines import Rows, product, safe_divide


class Segment(NamedTuple):
    """A point of the path, and how it goes on from there."""

    y: Float[Array, "tasks"]  # lengths * u
    ray: Float[Array, "tasks"]  # dy / dtau
    nu: Float[Array, ""]
    slope: Float[Array, ""]  # dnu / dtau; 0 where nu cannot be increased
    sure: Bool[Array, ""]  # whether the slope is more than rounding


class _Path(NamedTuple):
    """The state of :func:`follow`."""

    segment: Segment
    tau: Float[Array, ""]
    tableau: Float[Array, "tasks tasks"]
    inside: Bool[Array, "tasks"]
    done: Bool[Array, ""]
    pivots: Int32[Array, ""]


def follow(
    rows: Rows,
    t: Float[Array, "tasks"],
    a: Float[Array, "tasks"],
    until: Callable[[Segment], Float[Array, ""] | float],
) -> Segment:
    r"""Follow the path of y(nu) >= 0, z = C y + q - nu a >= 0, y'z = 0 upwards from y = 0.

    C are the cosines, q = C t, and a > 0. The parameter is tau = nu + a'y, so that

        z = M y + q - tau a,  M = C + a a'.

    It can grow without bound where nu cannot, and q and a are in the range of M; so the path never
    ends, and each of its corners is one principal pivot (Cottle's parametric method): the task
    whose y_k or z_k meets zero enters or leaves the set of tasks with y_k > 0. Of tasks that tie,
    the first is taken (Murty's rule), which cannot cycle. The tableau, M swept on that set, only
    preconditions the solves, which are refined on M itself: errors do not add up along the path.

    Args:
      rows: the tasks.
      t: as above, the weights of g0 with respect to gradients of length 1.
      a: as above, 0 where a task is not usable.
      until: how much further tau may grow on a segment until the wanted point is reached.

    Returns:
      The wanted point, or the last corner if it is not on the path.
    """
    C, usable = rows.cosines, rows.usable
    q = product(C, t)
    K, eps = q.size, jnp.finfo(q.dtype).eps
    M = C + a[:, None] * a[None, :]
    # The path begins where the first of the z_k, still with y = 0, meets zero.
    start = jnp.min(jnp.where(usable, q / jnp.where(usable, a, 1), jnp.inf), initial=jnp.inf)
    start = jnp.where(jnp.any(usable), start, 0)

    def pivot(path: _Path) -> _Path:
        # 1. Solve for the segment: y of the tasks inside, and where it goes as tau grows. In a
        # principally pivoted tableau the block of the tasks inside is minus the inverse of M's.
        T, inside, tau = path.tableau, path.inside, path.tau
        inverse = jnp.where(inside[:, None] & inside[None, :], -T, 0)

        def refine(_, x):
            return x + product(inverse, jnp.where(inside[:, None], wanted - product(M, x), 0))

        # y does not jump where the set changes: from where it was, there is little to correct.
        wanted = jnp.stack([tau * a - q, a], axis=1)
        guess = jnp.stack([jnp.where(inside, path.segment.y, 0), jnp.zeros_like(a)], axis=1)
        y, ray = jnp.unstack(lax.fori_loop(0, 3, refine, guess), axis=1)
        # 2. How fast nu grows with tau: not at all where the gradients inside are dependent.
        size = jnp.sum(jnp.abs(ray))
        gain, curvature = jnp.sum(a * ray), jnp.sum(ray * product(C, ray))
        # Curvature that may be the rounding of the Gramian's entries is none, but for one thing:
        # below nu = 0 nu does grow, since d = 0 has <g_k, d> >= 0 for all k.
        noise, rounding = 4 * K * rows.eps * size**2, 4 * K * eps
        scale = jnp.abs(start) + jnp.sum(jnp.abs(t)) + jnp.sum(path.segment.y)
        below = path.segment.nu < -rounding * scale
        growth = jnp.where(curvature > rounding * size**2, curvature, noise)
        sure = curvature > noise
        slope = jnp.where(sure, curvature, jnp.where(below, growth, 0))
        slope = safe_divide(slope, gain)
        slope, sure = jnp.where(jnp.any(inside), slope, 1), sure | ~jnp.any(inside)
        y = jnp.where(slope > 0, y, path.segment.y)  # else it would pick up noise along the ray

        # 3. Find the task that meets zero first: y_k of one inside, z_k of one outside.
        # On a segment where nu stays, C ray = 0, so that no task can enter.
        independent = jnp.diagonal(T) > 4 * K * eps
        movable = inside | (usable & independent & (slope > 0))
        rate = jnp.where(inside, ray, product(M, ray) - a)
        value = jnp.where(inside, y, product(M, y) + q - tau * a)
        # Where nu stays, so does d: a task leaves only if its y surely falls, not by rounding, for
        # which the step would be a huge one.
        least = jnp.where(slope > 0, 8 * K * eps * (a + size), eps**0.5 * size)
        meets = movable & (rate < -least)
        steps = jnp.where(meets, safe_divide(jnp.maximum(value, 0), -rate), jnp.inf)
        k = jnp.argmin(steps)
        # 4. Go to that corner, or to the wanted point if it comes first.
        end = until(Segment(y, ray, tau - jnp.sum(a * y), slope, sure))
        step = jnp.minimum(steps[k], end)
        done = (end <= steps[k]) | jnp.isinf(step)
        step = jnp.where(jnp.isinf(step), 0, step)
        tau, y = tau + step, jnp.maximum(y + step * ray, 0)
        segment = Segment(y, jnp.maximum(ray, 0), tau - jnp.sum(a * y), slope, sure)

        # 5. Pivot on the task's diagonal entry: it changes sides, and the tableau with it.
        this = jnp.arange(K) == k
        row = T[k]
        line = jnp.where(inside[k], -row, row) / row[k]
        T = T - row[:, None] * (row / row[k])[None, :]
        T = jnp.where(this[:, None], line[None, :], jnp.where(this[None, :], line[:, None], T))
        T = jnp.where(this[:, None] & this[None, :], -1 / row[k], T)
        return _Path(segment, tau, T, inside ^ this, done, path.pivots + 1)

    zeros = jnp.zeros_like(q)
    path = _Path(
        segment=Segment(zeros, zeros, start, jnp.ones_like(start), jnp.asarray(True)),
        tau=start,
        tableau=M,
        inside=jnp.zeros(K, bool),
        done=jnp.asarray(False),
        pivots=jnp.int32(0),
    )
    path = lax.while_loop(lambda path: ~path.done & (path.pivots < 8 * K + 8), pivot, path)
    return path.segment
