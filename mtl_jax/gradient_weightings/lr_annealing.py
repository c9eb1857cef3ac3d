"""Learning rate annealing: the size of each task's gradient against that of a reference task."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax._base import Signal, Weighting
from mtl_jax._checks import check_option, check_task_name, read_number
from mtl_jax._lift import vector_weighting
from mtl_jax._typing import PyTree


class LRAnnealingState(NamedTuple):
    """State of the method.

    Attributes:
      weights: the average weights.
      reference: which task is the reference; ``None`` for the first one.
    """

    weights: Float[Array, "tasks"]
    reference: Bool[Array, "tasks"] | None


def lr_annealing(
    reference: str | None, alpha: float = 0.1, statistic: Literal["max", "mean"] = "max"
) -> Weighting:
    r"""Learning rate annealing: gradients as large as the largest entry of the reference's.

    .. math::

       w_k \leftarrow (1 - \alpha)\, w_k + \alpha\,
       \frac{\max_i \lvert \partial L_{\text{reference}} / \partial \theta_i \rvert}
            {\operatorname{mean}_i \lvert \partial L_k / \partial \theta_i \rvert},
       \qquad w_{\text{reference}} = 1,

    from weights of 1; the gradients are those of the losses without weights. In a physics-informed
    network the reference is the residual of the equation, and the others are the boundary, the
    initial values and the data. The authors' code decides the weights at every 10th step:
    ``every(lr_annealing("equation"), 10)``. Published codes differ from the paper:

    - the authors' own divides by the mean of the *weighted* gradient, so that a weight comes to
      rest at the root of the ratio; its mean is that of the layers' means, without the biases;
    - that of PINNacle, for DeepXDE, divides by the mean of the weighted gradient, too;
    - PhysicsNeMo has the mean of the reference's gradient for its maximum, which is ``statistic``
      here, and :math:`\alpha = 0.01`;
    - jinns takes the absolute value of each leaf's mean, not the mean of the absolute values, and
      gives the new ratio 0.9 of the average.

    A task whose gradient is 0 keeps its weight; so do all while the reference's is 0 or it is
    absent. The losses are not read: they may be 0 or negative.

    Args:
      reference: the name of the reference task: the path of its loss, such as ``"equation"`` or
        ``"residuals/0"``. ``None`` is the first in the order of the leaves, in which a dictionary
        has its keys sorted.
      alpha: :math:`\alpha`, the share of the new ratio in the average, in (0, 1]. The default is
        that of the authors' code.
      statistic: what is taken of the absolute values of the reference's gradient: ``"max"``, as in
        the paper, or ``"mean"``.

    Returns:
      The weighting. It reads the task gradients: ``needs`` is ``Signal.TASK_GRADIENTS``. Its state
      holds the weights as ``state.inner.weights``.

    Raises:
      ValueError: if ``alpha`` is not in (0, 1], or ``statistic`` unknown; in ``init``, if no task
        is called ``reference``.
      TypeError: if ``alpha`` is not a number, or ``reference`` not a text.

    References:
      Wang, Teng and Perdikaris, `Understanding and mitigating gradient pathologies in
      physics-informed neural networks <https://arxiv.org/abs/2001.04536>`_, 2020

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.lr_annealing("equation", alpha=1.0)
      >>> losses = {"boundary": 1.0, "equation": 1.0}
      >>> state = weighting.init(losses, params=jnp.zeros(2))
      >>> task_gradients = jnp.array([[0.5, -1.5], [-4.0, 3.0]])
      >>> weights, state = weighting.update(losses, state, task_gradients=task_gradients)
      >>> {task: float(weight) for task, weight in weights.items()}
      {'boundary': 4.0, 'equation': 1.0}
    """
    check_task_name(reference, "lr_annealing: `reference`")
    alpha = read_number(alpha, "lr_annealing: `alpha`", "(0, 1]")
    check_option(statistic, ("max", "mean"), "lr_annealing: `statistic`")

    def init(tasks, key, params):
        if reference is None:
            return LRAnnealingState(tasks.full(1), None)
        position = tasks.position(reference, "lr_annealing: `reference`")
        return LRAnnealingState(tasks.full(1), jnp.arange(tasks.number) == position)

    def update(losses, state, present, steps, rows):
        means = _mean_sizes(rows).astype(state.weights.dtype)
        sizes = means if statistic == "mean" else _largest_sizes(rows).astype(means.dtype)
        first = jnp.arange(losses.size) == 0
        those = first if state.reference is None else state.reference
        size = jnp.sum(sizes, where=present & those)
        kept = those | (means == 0) | (size == 0)
        ratio = size / jnp.where(kept, 1, means)
        weights = (1 - alpha) * state.weights + alpha * ratio
        weights = jnp.where(kept, state.weights, weights)
        return weights, LRAnnealingState(weights, state.reference)

    return vector_weighting(update, init, needs=Signal.TASK_GRADIENTS, reads_losses=False)


def _by_task(rows: PyTree, reduce: Callable[[Array], Array], join: Callable[..., Array]) -> Array:
    """A number for each task: that of each leaf, joined."""
    return functools.reduce(join, [reduce(jnp.abs(leaf)) for leaf in jax.tree.leaves(rows)])


def _largest_sizes(rows: PyTree) -> Float[Array, "tasks"]:
    """The largest absolute value of each task's gradient."""

    def largest(leaf):
        return jnp.max(leaf, axis=tuple(range(1, leaf.ndim)), initial=0)

    return _by_task(rows, largest, jnp.maximum)


def _mean_sizes(rows: PyTree) -> Float[Array, "tasks"]:
    """The mean absolute value of each task's gradient."""
    number = sum(leaf[0].size for leaf in jax.tree.leaves(rows))

    def share(leaf):
        # Divided before it is added up, so that nothing overflows; a contraction, as in excess_mtl:
        # on CPU several times faster than a sum.
        return jnp.tensordot(
            leaf, jnp.full_like(leaf[0], 1 / number), leaf.ndim - 1, precision="highest"
        )

    return _by_task(rows, share, jnp.add)
