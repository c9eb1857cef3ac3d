"""The protocols: what a weighting, and an aggregator of task gradients, are."""

import enum
from typing import NamedTuple, Protocol

from jaxtyping import Array, Bool, Float

from mtl_jax.pytree import PyTree
from mtl_jax.tasks import Losses, Weights


class Signal(enum.Enum):
    """What a weighting reads at every step, and so what a step costs.

    Attributes:
      LOSSES: the task losses: one forward and one backward pass, as plain training.
      GRAMIAN: the K x K inner products of the task gradients, too. Taken at a representation they
        cost about as much as plain training; over the parameters, one forward and K backward
        passes.
    """

    LOSSES = "losses"
    GRAMIAN = "gramian"


class InitFn(Protocol):
    """``init(losses, *, key=None) -> state``."""

    def __call__(self, losses: Losses, *, key: Array | None = None) -> PyTree:
        """Return the state before the first step."""
        ...


class UpdateFn(Protocol):
    """``update(losses, state, *, mask=None, gramian=None) -> (weights, state)``."""

    def __call__(
        self,
        losses: Losses,
        state: PyTree,
        *,
        mask: PyTree | None = None,
        gramian: Float[Array, "tasks tasks"] | None = None,
    ) -> tuple[Weights, PyTree]:
        """Return the weights and the next state."""
        ...


class ObserveFn(Protocol):
    """``observe(losses_after_the_step, state, *, mask=None) -> state``."""

    def __call__(self, losses: Losses, state: PyTree, *, mask: PyTree | None = None) -> PyTree:
        """Return the next state."""
        ...


class DueFn(Protocol):
    """``due(state) -> bool``."""

    def __call__(self, state: PyTree) -> Bool[Array, ""]:
        """Return whether the signal must be measured at this step."""
        ...


class Weighting(NamedTuple):
    """A loss weighting: pure functions from what it reads to one weight for each task.

    The training gradient of a step is that of ``sum_k weights_k * losses_k``, the weights held
    constant. A weighting holds functions, so close over it or make it a static argument of ``jit``.

    Attributes:
      init: ``init(losses, *, key=None) -> state``. Reads only the structure and the dtypes of the
        losses, which may be arrays or ``jax.ShapeDtypeStruct``. ``key`` is a ``jax.random.key``,
        needed by the methods that draw random numbers. Every leaf of the state is a fresh buffer,
        so a state can be donated.
      update: ``update(losses, state, *, mask=None, gramian=None) -> (weights, state)``. ``mask`` is
        a pytree of booleans with the structure of the losses: ``False`` for a task without labels
        in this batch, which then has weight 0 and leaves its statistics as they were. ``gramian``
        holds the inner products of the task gradients, ``float[K, K]`` in the order of the leaves
        of the losses; it must be given if ``needs`` asks for it. A loss or a Gramian that is not
        finite, or for which the method has no finite answer, leaves the whole state as it was and
        gives NaN for the weights of all present tasks, so that the step can be recognised and
        skipped (:func:`mtl_jax.make_train_step` does).
      needs: the signal that ``update`` reads.
      observe: ``observe(losses, state, *, mask=None) -> state``, to be called with the losses of
        the same batch after the parameters were updated; ``None`` where a method does not ask.
      due: ``due(state) -> bool``, for a weighting that reads its signal only now and then: whether
        it must be measured at this step. Where it need not, ``update`` may be called without.
        ``None``: always.

    Raises:
      ValueError: by its functions, when they are traced: if there are no losses or one is not a
        scalar, the state is of other tasks or another weighting, the mask has another structure
        than the losses, the Gramian is missing or not ``float[K, K]``, or the key is missing.
      TypeError: by its functions: if a loss is not a real floating-point number, a leaf of the mask
        not one boolean, the state none that ``init`` returned, or the key no ``jax.random.key``.

    Example:
      >>> import mtl_jax
      >>> losses = {"depth": 0.5, "normals": 1.5}
      >>> weighting = mtl_jax.adaptive()
      >>> state = weighting.init(losses)
      >>> weights, state = weighting.update(losses, state)
      >>> {task: round(float(weight), 3) for task, weight in weights.items()}
      {'depth': 0.5, 'normals': 1.5}
    """

    init: InitFn
    update: UpdateFn
    needs: Signal = Signal.LOSSES
    observe: ObserveFn | None = None
    due: DueFn | None = None


class AggregatorInitFn(Protocol):
    """``init(params, losses, *, key=None) -> state``."""

    def __call__(self, params: PyTree, losses: Losses, *, key: Array | None = None) -> PyTree:
        """Return the state before the first step."""
        ...


class AggregatorUpdateFn(Protocol):
    """``update(task_gradients, state, *, losses=None, mask=None) -> (gradient, state)``."""

    def __call__(
        self,
        task_gradients: PyTree,
        state: PyTree,
        *,
        losses: Losses | None = None,
        mask: PyTree | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Return the gradient to train with and the next state."""
        ...


class Aggregator(NamedTuple):
    """A combination of the task gradients coordinate by coordinate: not expressible by weights.

    Like a :class:`Weighting` it holds functions, so close over it or make it a static argument.

    Attributes:
      init: ``init(params, losses, *, key=None) -> state``. Reads only shapes, dtypes and the
        structure of the losses. ``params`` are the parameters that the tasks share: those whose
        gradients ``update`` will be given.
      update: ``update(task_gradients, state, *, losses=None, mask=None) -> (gradient, state)``.
        ``task_gradients`` is a pytree like ``params``, each leaf with the tasks as an additional
        leading axis, in the order of the leaves of the losses. ``losses`` must be given where the
        method reads them. ``mask`` is a pytree of booleans with the structure of the losses: an
        absent task's gradient is not looked at. If something is not finite, the state is returned
        as it was and the gradient is NaN.

    Raises:
      ValueError: by its functions, when they are traced: as by those of a :class:`Weighting`, and
        if the losses are missing where the method reads them, or the leaves of the task gradients
        have not as many tasks as there are losses, or other shapes than the parameters.
      TypeError: by its functions: as by those of a :class:`Weighting`, and if a parameter or a
        gradient is not of real floating-point numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> aggregator = mtl_jax.trimmed_mean(1)
      >>> task_gradients = jnp.array([[1.0, -9.0], [2.0, 1.0], [90.0, 2.0]])
      >>> state = aggregator.init(task_gradients[0], losses=(0.0, 0.0, 0.0))
      >>> gradient, state = aggregator.update(task_gradients, state)
      >>> gradient.tolist()
      [2.0, 1.0]
    """

    init: AggregatorInitFn
    update: AggregatorUpdateFn
