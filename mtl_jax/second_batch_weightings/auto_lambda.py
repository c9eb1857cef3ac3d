"""Weights learned by their effect on primary tasks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from mtl_jax._base import Signal, Weighting
from mtl_jax._checks import check_numbers, read_number
from mtl_jax._learned import check_learner, per_task, step_per_task
from mtl_jax._lift import vector_weighting
from mtl_jax._tasks import square_limit
from mtl_jax._typing import PyTree


class AutoLambdaState(NamedTuple):
    """State of the method.

    Attributes:
      weights: the learned weights.
      primary: how much each task counts in what they are learned for.
      opt_state: the optimizer's state, each leaf with the task as its leading axis.
      total: the steps, whoever was present; skipped ones are not counted.
    """

    weights: Float[Array, "tasks"]
    primary: Float[Array, "tasks"]
    opt_state: PyTree
    total: Int32[Array, ""]


def auto_lambda(
    optimizer: optax.GradientTransformation,
    learning_rate: float | Callable[[Array], Array],
    primary: PyTree | None = None,
    initial: PyTree = 0.1,
) -> Weighting:
    r"""Auto-Lambda: weights that descend on the primary tasks' losses after the next step.

    .. math::

       \theta' = \theta - \alpha \sum_k w_k \nabla L_k(\theta), \qquad
       \frac{\partial}{\partial w_k} \sum_j p_j L'_j(\theta') =
           -\alpha \left\langle \nabla L_k(\theta), \nabla \sum_j p_j L'_j(\theta') \right\rangle,

    L being the losses of the training batch and L' those of a second one; p is 1 for a primary task
    and 0 for one that is only there to help. ``optimizer`` takes a step on this gradient, and the
    network is trained with the weights after it; the gradient is cut off where its square would
    overflow (in float32, above 1.8e15). So a task gets more weight if a step on it lowers
    the primary losses. The weights do not sum to anything and may become negative;
    :func:`mtl_jax.clipped` prevents it for those that are used.

    All K inner products are one forward derivative of the losses, and exact; the published code
    takes differences of the losses instead. A step takes two forward passes, three backward passes
    and that derivative, whatever K is. As in the paper :math:`\theta'` is a plain gradient step,
    also where the network's optimizer takes another one; the published code adds its momentum and
    weight decay. There the second batch is from the training data in another order. The paper takes
    the gradients over all parameters: leave ``shared`` out.

    Args:
      optimizer: the optax optimizer of the weights; it is applied to each task's weight on its own.
        The paper uses ``optax.adam(1e-4)``.
      learning_rate: :math:`\alpha`, the network's learning rate: a number, or a schedule from the
        number of steps, such as is given to an optimizer.
      primary: p, a pytree like the losses of booleans, or of numbers that are not negative; by
        default all tasks are primary.
      initial: the weights at the start, one number or a pytree like the losses. The default is the
        paper's.

    Returns:
      The weighting. It reads a second batch, ``Signal.SECOND_BATCH``: pass it as ``second``.

    Raises:
      ValueError: if a number is outside its range; in ``init``, if ``primary`` or ``initial`` has
        another structure than the losses.
      TypeError: if ``optimizer`` is not an optax optimizer, or cannot be applied to one number; or
        if something else is not a number.

    References:
      Liu et al., `Auto-Lambda: Disentangling Dynamic Task Relationships
      <https://arxiv.org/abs/2202.03091>`_, TMLR 2022

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import mtl_jax
      >>> def losses_fn(params, x):  # "helps" has its minimum near that of "main", "harms" has not
      ...     minima = {"main": x, "helps": 0.9 * x, "harms": -x}
      ...     return {task: jnp.mean((params - at) ** 2) for task, at in minima.items()}
      >>> primary = {"main": True, "helps": False, "harms": False}
      >>> weighting = mtl_jax.auto_lambda(optax.adam(0.01), 0.1, primary)
      >>> gradient = mtl_jax.value_and_grad(losses_fn, weighting)
      >>> params, x, another = jnp.array(0.0), jnp.array([1.0, 1.2]), jnp.array([0.9, 1.1])
      >>> state = gradient.init(params, x)
      >>> value, found, state = gradient(params, state, x, second=(another,))
      >>> {task: round(float(weight), 3) for task, weight in value.weights.items()}
      {'harms': 0.09, 'helps': 0.11, 'main': 0.11}
    """
    check_learner(optimizer, "auto_lambda")
    if not callable(learning_rate):
        learning_rate = read_number(learning_rate, "auto_lambda: `learning_rate`", "[0, inf)")
    primary = 1.0 if primary is None else jax.tree.map(_as_number, primary)
    check_numbers(primary, "auto_lambda: `primary`", "[0, inf)")
    check_numbers(initial, "auto_lambda: an initial weight", "(-inf, inf)")

    def rate(state: AutoLambdaState) -> Array:
        value = learning_rate(state.total) if callable(learning_rate) else learning_rate
        return jnp.asarray(value, state.weights.dtype)

    def init(tasks, key):
        weights = tasks.vector(initial, "auto_lambda: `initial`")
        return AutoLambdaState(
            weights=weights,
            primary=tasks.vector(primary, "auto_lambda: `primary`"),
            opt_state=per_task(optimizer).init(weights),
            total=jnp.zeros((), jnp.int32),
        )

    def directions(state, present):
        return state.primary[None], rate(state) * state.weights

    def objective(weight, slope):
        return slope * weight

    def update(losses, state, present, steps, products):
        slopes = -rate(state) * products[:, 0]
        weights, opt_state = step_per_task(
            optimizer,
            objective,
            state.weights,
            state.opt_state,
            slopes,
            largest=square_limit(losses.dtype),
        )
        total = jnp.asarray(optax.safe_increment(state.total))
        return weights, AutoLambdaState(weights, state.primary, opt_state, total)

    return vector_weighting(
        update, init, needs=Signal.SECOND_BATCH, reads_losses=False, directions=directions
    )


def _as_number(value: Any) -> Any:
    """Numbers for booleans, so that both may be given."""
    boolean = isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_
    return np.asarray(value, np.float32) if boolean else value
