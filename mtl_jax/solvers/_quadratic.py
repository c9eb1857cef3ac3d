"""Problems that lie on one path: minimum norm, projection on the dual cone, maximin in a ball."""

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from mtl_jax._checks import compiled
from mtl_jax.solvers._cosines import (
    Rows,
    Solution,
    check_at_least_zero,
    complementarity,
    inverse_lengths,
    mean_of,
    product,
    read_gramian,
    read_vector,
    root,
    safe_divide,
)
from mtl_jax.solvers._path import Segment, follow
from mtl_jax.solvers._precision import in_float64


@compiled
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

    The path of the solutions that ``mtl_jax.solvers._path`` follows ends at the point. In float32
    that can be short of it with many more tasks than parameters; then tasks exchange weight in
    pairs, at most 16 K times.

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
    return in_float64(_minimum_norm_point, gramian, present)


def _minimum_norm_point(gramian: Array, present: Array | None, *, eps: float) -> Solution:
    rows = read_gramian(gramian, present, eps)
    return shortest_combination(rows, inverse_lengths(rows))


def shortest_combination(rows: Rows, a: Float[Array, "tasks"]) -> Solution:
    """The point of least norm for gradients that have other lengths than those of the rows.

    Args:
      rows: the tasks.
      a: the inverse lengths, the largest of them being 1; 0 where a task is not usable.
    """
    path = follow(rows, rows.usable.astype(a.dtype), a, lambda _: jnp.inf)
    y, residual = _exchange(rows, a, safe_divide(path.ray, jnp.sum(a * path.ray)))
    any_zero = jnp.any(rows.zero)
    x = jnp.where(any_zero, mean_of(rows.zero, a.dtype), safe_divide(a * y, jnp.sum(a * y)))
    return Solution(x, jnp.where(any_zero, 0, residual))


def _exchange(
    rows: Rows, a: Float[Array, "tasks"], y: Float[Array, "tasks"]
) -> tuple[Float[Array, "tasks"], Float[Array, ""]]:
    r"""Improve a point of min y'Cy, y >= 0, a'y = 1, until it violates nothing beyond rounding.

    While the conditions of optimality are violated, y_i grows and y_j falls: i is the task that
    they want to grow most, j of those with y_j > 0 the one that they want to fall most (sequential
    minimal optimization). The path ends at such a point already, but where there are many more
    tasks than parameters and 0 is in the hull: float32 cannot tell there which task comes next.

    Returns:
      The point, and by how much it violates the conditions.
    """
    C, eps = rows.cosines, jnp.finfo(a.dtype).eps

    def reduced(y):
        z = product(C, y)
        return z - jnp.sum(y * z) * a

    def violated(state):
        y, r, count = state
        return (complementarity(y, r) > 8 * eps * jnp.sum(y)) & (count < 16 * a.size)

    def exchange(state):
        y, r, count = state
        i = jnp.argmin(jnp.where(rows.usable, r, jnp.inf))
        j = jnp.argmax(jnp.where(y > 0, r, -jnp.inf))
        (a_i, r_i), (a_j, r_j, y_j) = jnp.stack([a, r])[:, i], jnp.stack([a, r, y])[:, j]
        curvature = a_i**2 + a_j**2 - 2 * a_i * a_j * C[i, j]
        wanted = safe_divide(a_i * r_j - a_j * r_i, curvature, jnp.inf)
        most = safe_divide(y_j, a_i, jnp.inf)
        task = jnp.arange(y.size)
        y = y + jnp.where(task == i, jnp.minimum(wanted, most) * a_j, 0)
        y = jnp.where(task == j, jnp.where(wanted < most, y_j - wanted * a_i, 0), y)
        return y, reduced(y), count + 1

    y, r, _ = lax.while_loop(violated, exchange, (y, reduced(y), jnp.int32(0)))
    return y, complementarity(y, r)


@compiled
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
    return in_float64(_dual_cone_projection, gramian, target, present)


def _dual_cone_projection(
    gramian: Array, target: Array, present: Array | None, *, eps: float
) -> Solution:
    rows = read_gramian(gramian, present, eps)
    a = rows.usable.astype(rows.cosines.dtype)
    target = read_vector(target, "target", rows)
    t = jnp.where(rows.usable, rows.lengths * target, 0)
    size = jnp.max(jnp.abs(t), initial=0)
    t = safe_divide(t, size)
    q = product(rows.cosines, t)

    def until(at: Segment):
        # Where nu stays, it is 0: the gradients inside are dependent, and so are their z.
        return jnp.where(at.nu < 0, safe_divide(-at.nu, at.slope), 0)

    y = follow(rows, t, a, until).y
    residual = complementarity(y, q + product(rows.cosines, y))
    residual = safe_divide(residual, root(jnp.sum(t * q)))
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
    :math:`u \ge 0`. Where the gradients' convex hull contains 0, no direction serves all tasks, and
    the best that can be done is to harm none: then d is the direction nearest to the mean that
    does so, if it lies in the ball. If the mean is zero, x = 1/K.

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
    check_at_least_zero(radius, "radius")
    return _compiled_maximin(gramian, radius, present)


@compiled
def _compiled_maximin(gramian: Array, radius: ArrayLike, present: Array | None) -> Solution:
    return in_float64(_maximin_in_ball, gramian, radius, present)


def _maximin_in_ball(
    gramian: Array, radius: ArrayLike, present: Array | None, *, eps: float
) -> Solution:
    rows = read_gramian(gramian, present, eps)
    a = inverse_lengths(rows)
    mean = mean_of(rows.present, a.dtype)
    t = jnp.where(rows.usable, rows.lengths * mean, 0)
    q = product(rows.cosines, t)
    distance = jnp.asarray(radius, a.dtype) * root(jnp.sum(t * q))
    any_zero = jnp.any(rows.zero)

    def until(at: Segment):
        # The smallest s >= 0 with ||y + s ray|| = distance, all in the geometry of the cosines.
        quadratic = at.slope * jnp.sum(a * at.ray)
        linear = at.slope * jnp.sum(a * at.y)
        left = distance**2 - jnp.sum(at.y * product(rows.cosines, at.y))
        s = safe_divide(left, linear + root(linear**2 + quadratic * left), jnp.inf)
        s = jnp.where(left > 0, s, 0)
        # A zero gradient is a task that nothing serves better than 0; and where nu grows by no more
        # than rounding, 0 is in the hull.
        to_zero = jnp.where(at.nu < 0, safe_divide(-at.nu, at.slope, jnp.inf), 0)
        ends = any_zero | ((at.slope > 0) & ~at.sure)
        return jnp.where(ends, jnp.minimum(s, to_zero), s)

    path = follow(rows, t, a, until)
    Cy = product(rows.cosines, path.y)
    off_sphere = jnp.abs(root(jnp.sum(path.y * Cy)) - distance)
    ends = any_zero | ~path.sure
    off_sphere = jnp.minimum(off_sphere, jnp.where(ends, jnp.maximum(-path.nu, 0), jnp.inf))
    residual = jnp.maximum(
        complementarity(path.y, q + Cy - path.nu * a), jnp.where(path.slope > 0, off_sphere, 0)
    )
    residual = safe_divide(residual, root(jnp.sum(t * q)))
    return Solution(mean + jnp.where(rows.usable, path.y / rows.lengths, 0), residual)
