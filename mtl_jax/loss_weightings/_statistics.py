"""Statistics that several methods keep of the losses, each task counted on its own."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from mtl_jax._checks import is_traced
from mtl_jax._tasks import Tasks
from mtl_jax._typing import Mask, Vector


class WindowMeans(NamedTuple):
    """Means of each loss over the latest complete windows of a fixed number of steps.

    Attributes:
      total: the sum over the window that is being filled.
      means: the means over the latest complete windows, the oldest first.
    """

    total: Float[Array, "tasks"]
    means: Float[Array, "tasks windows"]

    @classmethod
    def zeros(cls, tasks: Tasks, windows: int) -> "WindowMeans":
        """No loss seen yet."""
        return cls(total=tasks.full(0), means=jnp.zeros((tasks.number, windows), tasks.dtype))

    def add(
        self, losses: Float[Array, "tasks"], steps: Int32[Array, "tasks"], window: int
    ) -> "WindowMeans":
        """Take in the losses of a step, ``steps`` steps after the first."""
        total = self.total + losses / window
        complete = (steps + 1) % window == 0
        shifted = jnp.concatenate([self.means[:, 1:], total[:, None]], axis=1)
        return WindowMeans(
            total=jnp.where(complete, 0, total),
            means=jnp.where(complete[:, None], shifted, self.means),
        )


def ema_rate(
    decay: float | Float[Array, ""], steps: Int32[Array, "tasks"], dtype: Any
) -> Float[Array, "tasks"]:
    r"""The rate :math:`(1 - d) / (1 - d^{t})` of an exponential moving average's step t.

    ``(1 - rate) * average + rate * new`` is then the average with weights :math:`d^{t-s}`,
    corrected for its start: the first step replaces it.

    Args:
      decay: d, in [0, 1).
      steps: the steps taken before this one, t - 1.
      dtype: the dtype of the rate.
    """
    # A Python number keeps its double precision. For d = 0 the logarithm is -inf and the rate 1.
    log = jnp.log if is_traced(decay) else lambda d: math.log(d) if d > 0 else -math.inf
    later = (1 - decay) / -jnp.expm1((steps + 1).astype(dtype) * log(decay))
    return jnp.where(steps == 0, 1, later)


def among_themselves(log_shares: Vector, old: Vector, present: Mask) -> Vector:
    """New shares of the present tasks, scaled to what these had together before; logarithms.

    They are kept from underflowing, so that no task is lost for good.
    """
    together = jax.nn.logsumexp(jnp.where(present, old, -jnp.inf))
    return jnp.maximum(log_shares + together, jnp.log(jnp.finfo(old.dtype).tiny))
