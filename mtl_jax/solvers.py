"""Exact solvers for the small problems that Gramian weightings pose.

Each problem asks for one weight per task and is stated on the K x K Gramian G = J J', the rows of J
being the task gradients g_k. Gradients are first divided by their lengths and no constant is
compared with a gradient, so that nothing depends on their scale. The Gramian may be singular, or
indefinite by its rounding error, and gradients may be zero. All solvers are pure functions for
``jit`` and ``vmap``, with a number of iterations that is bounded by a multiple of K.

The first three follow one path. Of the points that satisfy <g_k, d> >= nu for all k, the nearest to
a given g0 is d = g0 + J' u, where u >= 0 is piecewise linear in nu. Followed upwards from u = 0,

- at nu = 0, d is the projection of g0 on the dual cone;
- where d has come to a given distance from g0, d is the solution of CAGrad;
- far out, u has the direction of the point of least norm in the convex hull of the gradients.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32


class Solution(NamedTuple):
    """What a solver found.

    Attributes:
      x: one weight for each task; 0 for an absent task.
      residual: by how much ``x`` violates the conditions of optimality, whatever the scale of the
        gradients: about the rounding error of the dtype where the problem is solved.
    """

    x: Float[Array, "tasks"]
    residual: Float[Array, ""]


def minimum_norm_point(
    gramian: Float[Array, "tasks tasks"], present: Bool[Array, "tasks"] | None = None
) -> Solution:
    r"""The convex combination of the task gradients that has the least norm.

    .. math::

       \min_w \| J^\top w \|^2 = w^\top G w \quad \text{s.t.} \quad w \ge 0, \; \sum_k w_k = 1

    This is the problem of MGDA. Where several combinations have the least norm, one of them is
    returned; if gradients are zero, their mean.

    With :math:`\|g_{\min}\|` the smallest gradient's norm and :math:`g = J^\top w`, the residual is
    the largest over the tasks of :math:`|\min(w_k \|g_k\|,\, \langle g_k, g \rangle / \|g_k\| -
    \|g\|^2 / \|g_k\|)| / \|g_{\min}\|`.

    Args:
      gramian: the inner products of the task gradients.
      present: the tasks that count; ``None`` for all. If none does, the weights are 0.

    Returns:
      The weights w and the residual.

    Raises:
      TypeError: if an argument has a dtype of the wrong kind.
      ValueError: if an argument has the wrong shape.

    References:
      Wolfe, `Finding the nearest point in a polytope
      <https://doi.org/10.1007/BF01580381>`_, 1976; Désidéri, `Multiple-gradient descent algorithm
      <https://doi.org/10.1016/j.crma.2012.03.014>`_, 2012; Sener and Koltun, `Multi-Task Learning
      as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_, 2018.

    Example:
      Two orthogonal gradients, the second twice as long as the first:

      >>> import jax.numpy as jnp
      >>> from mtl_jax.solvers import minimum_norm_point
      >>> weights, residual = minimum_norm_point(jnp.array([[1.0, 0.0], [0.0, 4.0]]))
      >>> [round(float(weight), 4) for weight in weights]
      [0.8, 0.2]
    """
    rows = _read(gramian, present)
    a = _inverse_lengths(rows)
    path = _follow(rows, _product(rows.cosines, _as(rows.usable, a)), a, lambda _: jnp.inf)
    y = _safe_divide(path.ray, jnp.sum(a * path.ray))
    z = _product(rows.cosines, y)
    residual = _complementarity(y, z - jnp.sum(y * z) * a)
    any_zero = jnp.any(rows.zero)
    x = jnp.where(any_zero, _mean(rows.zero, a.dtype), _safe_divide(a * y, jnp.sum(a * y)))
    return Solution(x, jnp.where(any_zero, 0, residual))


def dual_cone_projection(
    gramian: Float[Array, "tasks tasks"],
    target: Float[Array, "tasks"],
    present: Bool[Array, "tasks"] | None = None,
) -> Solution:
    r"""The direction nearest to a combination of the gradients that conflicts with none of them.

    With target weights t, the projection of :math:`J^\top t` on the dual cone
    :math:`\{d : J d \ge 0\}` is :math:`J^\top v` with

    .. math::

       \min_v \| J^\top v \|^2 = v^\top G v \quad \text{s.t.} \quad v \ge t

    DualProj projects the mean; UPGrad projects every gradient, which is a ``vmap`` over the rows of
    the identity as targets. Where several v give the projection, one of them is returned. A task
    whose gradient is zero keeps its target.

    With :math:`d = J^\top v`, the residual is the largest over the tasks of
    :math:`|\min((v_k - t_k) \|g_k\|,\, \langle g_k, d \rangle / \|g_k\|)| / \|J^\top t\|`.

    Args:
      gramian: the inner products of the task gradients.
      target: the weights t.
      present: the tasks that count; ``None`` for all. If none does, the weights are 0.

    Returns:
      The weights v and the residual.

    Raises:
      TypeError: if an argument has a dtype of the wrong kind.
      ValueError: if an argument has the wrong shape.

    References:
      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024; for DualProj: Lopez-Paz and Ranzato, `Gradient
      Episodic Memory for Continual Learning <https://arxiv.org/abs/1706.08840>`_, 2017.

    Example:
      Of two conflicting gradients, the first is projected:

      >>> import jax.numpy as jnp
      >>> from mtl_jax.solvers import dual_cone_projection
      >>> gramian = jnp.array([[2.0, -1.0], [-1.0, 1.0]])
      >>> weights, residual = dual_cone_projection(gramian, jnp.array([1.0, 0.0]))
      >>> [round(float(weight), 4) for weight in weights]
      [1.0, 1.0]
    """
    rows = _read(gramian, present)
    a = _as(rows.usable, rows.cosines)
    target = _vector(target, "target", rows)
    t = jnp.where(rows.usable, rows.lengths * target, 0)
    size = jnp.max(jnp.abs(t), initial=0)
    t = _safe_divide(t, size)
    q = _product(rows.cosines, t)

    def until(at: _Segment):
        # Where nu stays, it is 0: the gradients inside are dependent, and so are their z.
        return jnp.where(at.nu < 0, _safe_divide(-at.nu, at.slope), 0)

    y = _follow(rows, q, a, until).y
    residual = _complementarity(y, q + _product(rows.cosines, y))
    residual = _safe_divide(residual, _root(jnp.sum(t * q)))
    return Solution(target + size * y / rows.lengths, residual)


def maximin_in_ball(
    gramian: Float[Array, "tasks tasks"],
    radius: float | Float[Array, ""],
    present: Bool[Array, "tasks"] | None = None,
) -> Solution:
    r"""The direction near the mean gradient that serves the worst-served task best.

    With :math:`g_0` the mean gradient of the K present tasks and c the radius,

    .. math::

       \max_d \min_k \langle g_k, d \rangle
       \quad \text{s.t.} \quad \| d - g_0 \| \le c \, \| g_0 \|

    This is the problem of CAGrad; its solution is :math:`d = J^\top x` with :math:`x = 1/K + u`,
    :math:`u \ge 0`. Where the gradients' convex hull contains 0, no direction serves all tasks:
    if it lies in the ball, the projection of the mean on the dual cone is returned, which is best
    for :math:`c \ge 1` and for smaller radii. If the mean is zero, x = 1/K.

    With :math:`\nu = \min_k \langle g_k, d \rangle`, the residual is the larger of
    :math:`\max_k |\min(u_k \|g_k\|,\, (\langle g_k, d \rangle - \nu) / \|g_k\|)| / \|g_0\|` and
    :math:`|\, \|d - g_0\| / \|g_0\| - c \,|`, the latter only where :math:`\nu` could be increased.

    Args:
      gramian: the inner products of the task gradients.
      radius: the radius c of the ball, at least 0, relative to the norm of the mean gradient.
      present: the tasks that count; ``None`` for all. If none does, the weights are 0.

    Returns:
      The weights x and the residual.

    Raises:
      TypeError: if an argument has a dtype of the wrong kind.
      ValueError: if an argument has the wrong shape, or the radius is negative.

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, 2021.

    Example:
      The shorter of two orthogonal gradients gets what the ball allows:

      >>> import jax.numpy as jnp
      >>> from mtl_jax.solvers import maximin_in_ball
      >>> weights, residual = maximin_in_ball(jnp.array([[1.0, 0.0], [0.0, 16.0]]), radius=0.5)
      >>> [round(float(weight), 4) for weight in weights]
      [1.5308, 0.5]
    """
    rows = _read(gramian, present)
    a = _inverse_lengths(rows)
    _check_at_least_zero(radius, "radius")
    mean = _mean(rows.present, a.dtype)
    t = jnp.where(rows.usable, rows.lengths * mean, 0)
    q = _product(rows.cosines, t)
    distance = jnp.asarray(radius, a.dtype) * _root(jnp.sum(t * q))
    any_zero = jnp.any(rows.zero)

    def until(at: _Segment):
        # The smallest s >= 0 with ||y + s ray|| = distance, all in the geometry of the cosines.
        quadratic = at.slope * jnp.sum(a * at.ray)
        linear = at.slope * jnp.sum(a * at.y)
        left = distance**2 - jnp.sum(at.y * _product(rows.cosines, at.y))
        s = _safe_divide(left, linear + _root(linear**2 + quadratic * left), jnp.inf)
        s = jnp.where(left > 0, s, 0)
        # A zero gradient is a task that nothing serves better than 0.
        to_zero = jnp.where(at.nu < 0, _safe_divide(-at.nu, at.slope, jnp.inf), 0)
        return jnp.where(any_zero, jnp.minimum(s, to_zero), s)

    path = _follow(rows, q, a, until)
    Cy = _product(rows.cosines, path.y)
    off_sphere = jnp.abs(_root(jnp.sum(path.y * Cy)) - distance)
    off_sphere = jnp.minimum(off_sphere, jnp.where(any_zero, jnp.maximum(-path.nu, 0), jnp.inf))
    residual = jnp.maximum(
        _complementarity(path.y, q + Cy - path.nu * a), jnp.where(path.slope > 0, off_sphere, 0)
    )
    residual = _safe_divide(residual, _root(jnp.sum(t * q)))
    return Solution(mean + jnp.where(rows.usable, path.y / rows.lengths, 0), residual)


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
    rows = _read(gramian, present)
    dtype, K = rows.cosines.dtype, rows.lengths.size
    eps = jnp.finfo(dtype).eps
    _check_at_least_zero(alpha, "alpha", strictly=True)
    p = 1 / jnp.asarray(alpha, dtype)

    # With y = length * x, G x = x^-p is C y = m y^-p, m = length^(p - 1). Scaled to max(m) = 1.
    log_m = jnp.where(rows.usable, (p - 1) * jnp.log(rows.lengths), 0)
    log_top = jnp.max(jnp.where(rows.usable, log_m, -jnp.inf), initial=-jnp.inf)
    log_top = jnp.where(jnp.any(rows.usable), log_top, 0)
    m = jnp.where(rows.usable, jnp.exp(log_m - log_top), 1)
    identity = jnp.eye(K, dtype=dtype)
    C = jnp.where(rows.usable[:, None] & rows.usable[None, :], rows.cosines, identity)

    def newton(state):
        # A primal-dual step to z = C y, z y^p = m from y, z > 0. The added diagonal is below the
        # rounding error of C: it keeps the matrix positive definite and does not move the solution.
        y, z, change, _, count = state
        slack = m * y**-p - z
        slope = p * z / y
        H = C + identity * (slope + 4 * K * eps)[:, None]
        factor = jax.scipy.linalg.cho_factor(H)
        dy = jax.scipy.linalg.cho_solve(factor, slack + z - _product(C, y))
        dz = slack - slope * dy
        size = 0.9 / jnp.maximum(jnp.max(jnp.maximum(-dy / y, -dz / z), initial=0), 0.9)
        now = jnp.max(jnp.abs(dy / y), initial=0)
        converged = (now < 0.01) & (now > change / 2)
        return y + size * dy, z + size * dz, now, converged, count + 1

    y = m ** (1 / (1 + p))
    state = (y, m * y**-p, jnp.asarray(jnp.inf, dtype), jnp.asarray(False), jnp.int32(0))
    y, *_ = lax.while_loop(lambda state: ~state[3] & (state[4] < 60), newton, state)

    # Where 0 is in the hull, y diverges, and C y becomes smaller than its rounding error.
    z = _product(C, y)
    noise = 2 * math.sqrt(K) * eps * jnp.sum(y)
    solved = jnp.all((z > noise) & (jnp.abs(z * y**p / m - 1) < 0.5)) & ~jnp.any(rows.zero)
    scale = jnp.exp((log_top - 2 * jnp.log(rows.unit)) / (1 + p))
    x = jnp.where(rows.usable, scale * y / rows.lengths, 0)
    wanted = jnp.where(rows.usable, m * y**-p, 0)
    residual = jnp.max(jnp.where(rows.usable, jnp.abs(z - wanted), 0), initial=0)
    residual = _safe_divide(residual, jnp.max(wanted, initial=0))
    return lax.cond(
        solved,
        lambda: Solution(x, residual),
        lambda: Solution(minimum_norm_point(gramian, present).x, jnp.ones_like(residual)),
    )


class _Rows(NamedTuple):
    """A Gramian taken apart into lengths and cosines, 0 where a task does not count."""

    present: Bool[Array, "tasks"]
    usable: Bool[Array, "tasks"]  # present, with a length
    zero: Bool[Array, "tasks"]  # present, without
    unit: Float[Array, ""]  # the largest length, in which the lengths are measured
    lengths: Float[Array, "tasks"]  # 1 where not usable
    cosines: Float[Array, "tasks tasks"]


def _read(gramian: Float[Array, "tasks tasks"], present: Bool[Array, "tasks"] | None) -> _Rows:
    gramian = jnp.asarray(gramian)
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1]:
        raise ValueError(f"A Gramian is tasks x tasks, got an array of shape {gramian.shape}.")
    if not jnp.issubdtype(gramian.dtype, jnp.floating):
        raise TypeError(f"The Gramian must hold real floating-point numbers, got {gramian.dtype}.")
    gramian = gramian.astype(jnp.float32) if gramian.dtype.itemsize < 4 else gramian
    K = gramian.shape[0]
    present = jnp.ones((K,), bool) if present is None else jnp.asarray(present)
    if present.shape != (K,):
        raise ValueError(f"`present` must have shape ({K},) as the tasks, got {present.shape}.")
    if present.dtype != jnp.bool_:
        raise TypeError(f"`present` must be boolean, got {present.dtype}.")
    squares = jnp.where(present, jnp.diagonal(gramian), 0)
    usable = ~(squares <= 0)
    lengths = jnp.where(usable, jnp.sqrt(jnp.where(usable, squares, 1)), 1)
    cosines = gramian / lengths[:, None] / lengths[None, :]
    cosines = jnp.where(usable[:, None] & usable[None, :], cosines, 0)
    unit = jnp.max(jnp.where(usable, lengths, 0), initial=0)
    unit = jnp.where(unit > 0, unit, 1)
    lengths = jnp.where(usable, lengths / unit, 1)
    return _Rows(present, usable, present & ~usable, unit, lengths, cosines)


class _Segment(NamedTuple):
    """A point of the path, and how it goes on from there."""

    y: Float[Array, "tasks"]  # lengths * u
    ray: Float[Array, "tasks"]  # dy / dtau
    nu: Float[Array, ""]
    slope: Float[Array, ""]  # dnu / dtau; 0 where nu cannot be increased


class _Path(NamedTuple):
    """The state of :func:`_follow`."""

    segment: _Segment
    tau: Float[Array, ""]
    tableau: Float[Array, "tasks tasks"]
    inside: Bool[Array, "tasks"]
    done: Bool[Array, ""]
    pivots: Int32[Array, ""]


def _follow(
    rows: _Rows,
    q: Float[Array, "tasks"],
    a: Float[Array, "tasks"],
    until: Callable[[_Segment], Float[Array, ""] | float],
) -> _Segment:
    r"""Follow the path of y(nu) >= 0, z = C y + q - nu a >= 0, y'z = 0 upwards from y = 0.

    C are the cosines, q is in the range of C, and a > 0. The parameter is tau = nu + a'y, so that

        z = M y + q - tau a,  M = C + a a'.

    It can grow without bound where nu cannot, and q and a are in the range of M; so the path never
    ends, and each of its corners is one principal pivot (Cottle's parametric method): the task
    whose y_k or z_k meets zero enters or leaves the set of tasks with y_k > 0. Of tasks that tie,
    the first is taken (Murty's rule), which cannot cycle. The tableau, M swept on that set, only
    preconditions the solves, which are refined on M itself: errors do not add up along the path.

    Args:
      rows: the tasks.
      q: as above.
      a: as above, 0 where a task is not usable.
      until: how much further tau may grow on a segment until the wanted point is reached.

    Returns:
      The wanted point, or the last corner if it is not on the path.
    """
    C, usable = rows.cosines, rows.usable
    K, eps = q.size, jnp.finfo(q.dtype).eps
    M = C + a[:, None] * a[None, :]

    def pivot(path: _Path) -> _Path:
        T, inside, tau = path.tableau, path.inside, path.tau
        inverse = jnp.where(inside[:, None] & inside[None, :], -T, 0)

        def solve(b, x):
            for _ in range(3):
                x = x + _product(inverse, jnp.where(inside, b - _product(M, x), 0))
            return x

        # y does not jump where the set changes: from where it was, there is little to correct.
        y = solve(tau * a - q, jnp.where(inside, path.segment.y, 0))
        ray = solve(a, jnp.zeros_like(a))
        size = jnp.sum(jnp.abs(ray))
        gain, curvature = jnp.sum(a * ray), jnp.sum(ray * _product(C, ray))
        slope = jnp.where(curvature > 4 * eps * size**2, _safe_divide(curvature, gain), 0)
        slope = jnp.where(jnp.any(inside), slope, 1)
        y = jnp.where(slope > 0, y, path.segment.y)  # else it would pick up noise along the ray

        # On a segment where nu stays, C ray = 0, so that no task can enter.
        independent = jnp.diagonal(T) > 4 * K * eps
        movable = inside | (usable & independent & (slope > 0))
        rate = jnp.where(inside, ray, _product(M, ray) - a)
        value = jnp.where(inside, y, _product(M, y) + q - tau * a)
        meets = movable & (rate < -4 * eps * (a + size))
        steps = jnp.where(meets, _safe_divide(jnp.maximum(value, 0), -rate), jnp.inf)
        k = jnp.argmin(steps)
        end = until(_Segment(y, ray, tau - jnp.sum(a * y), slope))
        step = jnp.minimum(steps[k], end)
        done = (end <= steps[k]) | jnp.isinf(step)
        step = jnp.where(jnp.isinf(step), 0, step)
        tau, y = tau + step, jnp.maximum(y + step * ray, 0)
        segment = _Segment(y, jnp.maximum(ray, 0), tau - jnp.sum(a * y), slope)

        this = jnp.arange(K) == k
        row = T[k]
        line = jnp.where(inside[k], -row, row) / row[k]
        T = T - row[:, None] * (row / row[k])[None, :]
        T = jnp.where(this[:, None], line[None, :], jnp.where(this[None, :], line[:, None], T))
        T = jnp.where(this[:, None] & this[None, :], -1 / row[k], T)
        return _Path(segment, tau, T, inside ^ this, done, path.pivots + 1)

    start = jnp.min(jnp.where(usable, q / jnp.where(usable, a, 1), jnp.inf), initial=jnp.inf)
    start = jnp.where(jnp.any(usable), start, 0)
    zeros = jnp.zeros_like(q)
    path = _Path(
        segment=_Segment(zeros, zeros, start, jnp.ones_like(start)),
        tau=start,
        tableau=M,
        inside=jnp.zeros(K, bool),
        done=jnp.asarray(False),
        pivots=jnp.int32(0),
    )
    path = lax.while_loop(lambda path: ~path.done & (path.pivots < 8 * K + 8), pivot, path)
    return path.segment


def _product(matrix: Float[Array, "m n"], vector: Float[Array, "n"]) -> Float[Array, "m"]:
    return jnp.matmul(matrix, vector, precision=lax.Precision.HIGHEST)


def _complementarity(y: Float[Array, "tasks"], z: Float[Array, "tasks"]) -> Float[Array, ""]:
    """By how much y >= 0, z >= 0, y'z = 0 are violated."""
    return jnp.max(jnp.abs(jnp.minimum(y, z)), initial=0)


def _inverse_lengths(rows: _Rows) -> Float[Array, "tasks"]:
    """The inverse lengths, the largest of them being 1; 0 where a task is not usable."""
    least = jnp.min(jnp.where(rows.usable, rows.lengths, jnp.inf), initial=jnp.inf)
    return jnp.where(rows.usable, least / rows.lengths, 0)


def _mean(chosen: Bool[Array, "tasks"], dtype) -> Float[Array, "tasks"]:
    """The weights of the mean over the chosen tasks; 0 if there are none."""
    return chosen.astype(dtype) / jnp.maximum(jnp.sum(chosen, dtype=dtype), 1)


def _safe_divide(top: Array, bottom: Array, otherwise: float = 0) -> Array:
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1), otherwise)


def _root(square: Array) -> Array:
    """The square root of what only rounding can have made negative."""
    return jnp.sqrt(jnp.maximum(square, 0))


def _as(condition: Bool[Array, "tasks"], like: Array) -> Float[Array, "tasks"]:
    return condition.astype(like.dtype)


def _vector(value: Float[Array, "tasks"], name: str, rows: _Rows) -> Float[Array, "tasks"]:
    value = jnp.asarray(value)
    if value.shape != rows.lengths.shape:
        raise ValueError(
            f"`{name}` must have shape {rows.lengths.shape} as the tasks, got {value.shape}."
        )
    return jnp.where(rows.present, value.astype(rows.lengths.dtype), 0)


def _check_at_least_zero(
    value: float | Float[Array, ""], name: str, *, strictly: bool = False
) -> None:
    if jnp.ndim(value):
        raise ValueError(f"`{name}` must be a scalar, got an array of shape {jnp.shape(value)}.")
    if isinstance(value, int | float) and not (value > 0 if strictly else value >= 0):
        bound = "more than 0" if strictly else "at least 0"
        raise ValueError(f"`{name}` must be {bound}, got {value!r}.")
