"""Weightings that decide the weights at some steps only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from mtl_jax.base import Signal, Weighting
from mtl_jax.checks import check_weighting, positive_steps
from mtl_jax.state import all_finite, tree_where
from mtl_jax.tasks import stack_tasks
from mtl_jax.wrappers.state import WrapperState, finish, initial, read, read_state


def every(weighting: Weighting, steps: int) -> Weighting:
    """Decide the weights at every k-th step only, and hold them in between.

    For a weighting that reads the Gramian the K backward passes are really left out in between:
    the transforms ask ``due``. Such steps cost as much as plain training. A weighting that reads
    the losses only sees those of the steps at which it decides.

    Args:
      weighting: the weighting. ``every`` goes innermost: it may have no ``due`` of its own.
      steps: k, in steps; the first step is one of those at which the weights are decided.

    Returns:
      The weighting. A task that was absent whenever the weights were decided has weight 0.

    Raises:
      ValueError: if ``steps`` is not a positive integer or ``weighting`` has ``due`` already.
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`.

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_,
      ICML 2022, who decide the weights of Nash-MTL every few steps

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.every(mtl_jax.adaptive(), 2)
      >>> state = weighting.init((1.0, 3.0))
      >>> for losses in [(1.0, 3.0), (3.0, 1.0), (3.0, 1.0)]:
      ...     weights, state = weighting.update(losses, state)
      ...     print([round(float(weight), 3) for weight in weights])
      [0.5, 1.5]
      [0.5, 1.5]
      [1.5, 0.5]
    """
    check_weighting(weighting)
    positive_steps(steps, "steps", "every")
    if weighting.due is not None:
        raise ValueError(
            "This weighting already says when its signal is due: put `every` innermost."
        )
    return _in_turns(weighting, lambda total: total % steps == 0, before=0, hold=True)


def after_warmup(weighting: Weighting, steps: int) -> Weighting:
    """Equal weights, 1 for each task, for the first steps; then those of the weighting.

    In the warm-up the weighting sees nothing and its signal is not measured. It starts with the
    first step after.

    Args:
      weighting: the weighting.
      steps: the length of the warm-up, in steps.

    Returns:
      The weighting.

    Raises:
      ValueError: if ``steps`` is not a positive integer.
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.after_warmup(mtl_jax.adaptive(), 1)
      >>> state = weighting.init((1.0, 3.0))
      >>> for _ in range(2):
      ...     weights, state = weighting.update((1.0, 3.0), state)
      ...     print([round(float(weight), 3) for weight in weights])
      [1.0, 1.0]
      [0.5, 1.5]
    """
    check_weighting(weighting)
    positive_steps(steps, "steps", "after_warmup")
    return _in_turns(weighting, lambda total: total >= steps, before=1, hold=False)


def any_due(due: Bool[Array, ""]) -> Bool[Array, ""]:
    """The identity; under ``vmap`` whether any of the batch is due, as one boolean.

    A ``cond`` on it remains a branch under ``vmap``, where one on a batched boolean would become a
    ``select`` that computes both sides.
    """

    @jax.custom_batching.custom_vmap
    def identity(due):
        return due

    @identity.def_vmap
    def any_of_batch(axis_size, in_batched, due):
        return jnp.any(due), False

    return identity(due)


def _in_turns(
    weighting: Weighting, active: Callable[[Array], Array], *, before: float, hold: bool
) -> Weighting:
    """The weighting at the steps at which ``active``; at others its last weights, or ``before``."""

    def due(state: WrapperState) -> Bool[Array, ""]:
        state = read_state(state)
        now = active(state.total)
        return now if weighting.due is None else now & weighting.due(state.inner)

    def update(losses, state, *, mask=None, gramian=None):
        state = read_state(state, losses)
        now = active(state.total)
        if weighting.needs is Signal.GRAMIAN and weighting.due is None and gramian is None:
            # Not measured, so it must not be the weighting's turn; if it is, that is an error.
            tasks, present, vector = read(losses, losses, mask)
            kept, inner = jnp.where(now, jnp.nan, state.weights), state.inner
        else:
            weights, inner = weighting.update(losses, state.inner, mask=mask, gramian=gramian)
            tasks, present, vector = read(losses, weights, mask)
            kept = jnp.where(now, jnp.where(present, vector, state.weights), state.weights)
            inner = tree_where(now, inner, state.inner)
        finite = all_finite([jnp.where(present, stack_tasks(losses, tasks), 0)])
        kept = jnp.where(finite, kept, jnp.nan)
        return finish(kept, kept if hold else state.weights, inner, state, tasks, present)

    def observe(losses, state, *, mask=None):
        assert weighting.observe is not None
        state = read_state(state, losses)
        inner = weighting.observe(losses, state.inner, mask=mask)
        # The step has been counted already.
        return state._replace(inner=tree_where(active(state.total - 1), inner, state.inner))

    return weighting._replace(
        init=initial(weighting, before),
        update=update,
        observe=observe if weighting.observe is not None else None,
        due=due,
    )
