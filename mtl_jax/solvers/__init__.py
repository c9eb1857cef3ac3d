"""Exact solvers for the small problems that Gramian weightings pose.

Each problem asks for one weight per task and is stated on the K x K Gramian G = J J', the rows of J
being the task gradients g_k. Gradients are first divided by their lengths and no constant is
compared with a gradient, so that nothing depends on their scale. The Gramian may be singular, or
indefinite by its rounding error, and gradients may be zero. All solvers are pure functions for
``jit`` and ``vmap``, with a number of iterations that is bounded by a multiple of K.
"""

from mtl_jax.solvers._cosines import Solution
from mtl_jax.solvers._fair import fair_point
from mtl_jax.solvers._quadratic import dual_cone_projection, maximin_in_ball, minimum_norm_point

__all__ = [
    "Solution",
    "dual_cone_projection",
    "fair_point",
    "maximin_in_ball",
    "minimum_norm_point",
]
