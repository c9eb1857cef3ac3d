"""What the parts of a step are: a weighting, an aggregator, a gradient, and what a step found."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool

from mtl_jax._checks import check_flags, check_functions
from mtl_jax._diagnostics import Diagnostics
from mtl_jax._typing import Gramian, Losses, Products, PyTree, Weights


class Signal(enum.Enum):
    """What a weighting reads at every step, and so what a step costs.

    Attributes:
      LOSSES: the task losses: one forward and one backward pass, as plain training.
      GRAMIAN: the K x K inner products of the task gradients, too. Taken at a representation they
        cost about as much as plain training; over the parameters, one forward and K backward
        passes.
      TASK_GRADIENTS: the task gradients themselves: one forward and K backward passes, with K
        gradients held.
      SECOND_BATCH: the inner products of the task gradients with gradients on a second batch, as
        many of these as the weighting asks for: one forward pass on that batch, and for each a
        backward pass there and a forward derivative on the first batch.
    """

    LOSSES = "losses"
    GRAMIAN = "gramian"
    TASK_GRADIENTS = "task_gradients"
    SECOND_BATCH = "second_batch"


class InitFn(Protocol):
    """``init(losses, *, key=None, params=None) -> state``."""

    def __call__(
        self, losses: Losses, *, key: Array | None = None, params: PyTree | None = None
    ) -> PyTree:
        """Return the state before the first step."""
        ...


class UpdateFn(Protocol):
    """``update(losses, state, *, mask=None, gramian=None, ...) -> (weights, state)``."""

    def __call__(
        self,
        losses: Losses,
        state: PyTree,
        *,
        mask: PyTree | None = None,
        gramian: Gramian | None = None,
        task_gradients: PyTree | None = None,
        products: Products | None = None,
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


class VectorMethod(NamedTuple):
    """A weighting on the vector of the losses, as wrappers and transforms use it.

    Attributes:
      init: ``init(tasks, key, params) -> state``, ``params`` being ``None`` where ``needs`` is not
        ``Signal.TASK_GRADIENTS``.
      update: ``update(losses, state, present, signal) -> (weights, state)``: weights of 0 for
        absent tasks; NaN and the state as it was, if something is not finite.
      observe: ``observe(losses, state, present) -> state``, or ``None``.
      due: ``due(state) -> bool``, or ``None``.
      needs: the signal that ``update`` reads.
      reads_losses: whether ``update`` reads the losses, too.
      positive_losses: whether a loss of exactly 0 has no answer, or teaches what is not meant: the
        transforms then leave its task out of the step.
      directions: ``directions(state, present) -> (combinations, step)``, where ``needs`` is
        ``Signal.SECOND_BATCH``: which gradients are taken on the second batch; else ``None``.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    observe: Callable[..., Any] | None
    due: Callable[..., Any] | None
    needs: Signal
    reads_losses: bool
    positive_losses: bool
    directions: Callable[..., Any] | None


class Weighting(NamedTuple):
    """A loss weighting: pure functions from what it reads to one weight for each task.

    The training gradient of a step is that of ``sum_k weights_k * losses_k``, the weights held
    constant. A weighting holds functions, so close over it or make it a static argument of ``jit``.
    :func:`mtl_jax.vector_weighting` makes one.

    Attributes:
      init: ``init(losses, *, key=None, params=None) -> state``. Reads only the structure and the
        dtypes of the losses, which may be arrays or ``jax.ShapeDtypeStruct``. ``key`` is a
        ``jax.random.key``, needed by the methods that draw random numbers; ``params``, the
        parameters that the tasks share or their shapes, is needed where ``needs`` is
        ``Signal.TASK_GRADIENTS``. Every leaf of the state is a fresh buffer, so a state can be
        donated.
      update: ``update(losses, state, *, mask=None, gramian=None, task_gradients=None,
        products=None) -> (weights, state)``. ``mask`` is a pytree of booleans with the structure of
        the losses: ``False`` for a task without labels in this batch, which then has weight 0 and
        leaves its statistics as they were. The signal that ``needs`` asks for must be given:
        ``gramian`` holds the inner products of the task gradients, ``float[K, K]`` in the order of
        the leaves of the losses; ``task_gradients`` is a pytree like the shared parameters, each
        leaf with the tasks as an additional leading axis; ``products`` holds the inner products of
        the task gradients with the gradients on a second batch that the weighting asks for,
        ``float[K, m]``. A loss or a signal that is not finite, or for which the method
        has no finite answer, leaves the whole state as it was and gives NaN for the weights of all
        present tasks, so that the step can be recognised and skipped
        (:func:`mtl_jax.make_train_step` does). Outside ``jit`` it is compiled at the first call
        for the structure and the dtypes of the losses.
      needs: the signal that ``update`` reads.
      observe: ``observe(losses, state, *, mask=None) -> state``, to be called with the losses of
        the same batch after the parameters were updated; ``None`` where a method does not ask.
      due: ``due(state) -> bool``, for a weighting that reads its signal only now and then: whether
        it must be measured at this step. Where it need not, ``update`` may be called without.
        ``None``: always.
      method: the same on vectors.

    Raises:
      ValueError: by its functions, when they are traced: if there are no losses or one has
        two axes or more, the state is of other tasks or another weighting, the mask has another
        structure than the losses, the signal is missing or of another shape, or the key is missing.
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
    needs: Signal
    observe: ObserveFn | None
    due: DueFn | None
    method: VectorMethod


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
      one_at_a_time: whether a step is for one task alone: the present one that has had the fewest
        steps. :func:`mtl_jax.value_and_grad` then takes its gradient only, in one backward pass.

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
    one_at_a_time: bool = False


class MultiTaskValue(NamedTuple):
    """What a step found out.

    With ``groups`` of parameters (:func:`mtl_jax.value_and_grad`) the weights, the present tasks,
    the Gramian and the diagnostics are dictionaries, by the name of the group.

    Attributes:
      losses: the losses, as ``losses_fn`` returned them.
      weights: the weight that each task had in the gradient; the gradient is that of the sum of
        ``weights * losses``. ``None`` with an aggregator, which has no weights.
      present: for each task whether the step was decided on it: not if it has no labels (``mask``),
        or nothing to say (``leave_out_zero``). It is the ``mask`` for ``observe``.
      finite: whether the step can be taken: the weights are finite, and so is the squared norm of
        the gradient; from a train step, that of the update, too: whether it was taken.
      aux: the auxiliary output of ``losses_fn``, or ``None``.
      gramian: the inner products of the task gradients, in the order of the leaves of the losses:
        ``float[K, K]``, 0 in a step that did not measure them; ``None`` if no step does.
      measured: whether this step measured them; ``None`` if no step does.
      diagnostics: norms, cosines and conflicts of the task gradients, if asked for.
    """

    losses: Losses
    weights: Weights
    present: PyTree
    finite: Bool[Array, ""]
    aux: Any = None
    gramian: Gramian | None = None
    measured: Bool[Array, ""] | None = None
    diagnostics: Diagnostics | None = None


class GradientUpdateFn(Protocol):
    """``gradient(params, state, *args, mask=None, second=None) -> (value, gradient, state)``."""

    def __call__(
        self,
        params: PyTree,
        state: PyTree,
        *args: Any,
        mask: PyTree | None = None,
        second: tuple[Any, ...] | None = None,
    ) -> tuple[MultiTaskValue, PyTree, PyTree]:
        """Return the value, the gradient and the weighting's next state."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class MultiTaskGradient:
    """The gradient of weighted task losses: pure functions that know their weighting.

    :func:`mtl_jax.value_and_grad` and :func:`mtl_jax.representation_value_and_grad` make it,
    :func:`mtl_jax.make_train_step` takes it. Calling it is calling ``update``. (A named tuple,
    as a weighting is one, cannot be given to ``jax.jit``.)

    Attributes:
      init: ``init(params, *args, key=None) -> state``: the weighting's state before the first step.
        The tasks are read off the losses of these arguments, which are traced, not computed; so
        arrays and ``jax.ShapeDtypeStruct`` will do. ``key`` is for a weighting that draws random
        numbers.
      update: ``update(params, state, *args, mask=None, second=None) -> (value, gradient, state)``:
        a :class:`MultiTaskValue`, the gradient, a pytree like ``params``, and the weighting's new
        state. ``second`` holds the arguments of a second batch, as a tuple, for a weighting that
        reads one (``Signal.SECOND_BATCH``), and for no other; ``mask`` then tells which tasks have
        labels in both batches. With ``groups`` of parameters the state is a dictionary, by the name
        of the group.
      losses: ``losses(params, *args) -> losses``: the losses alone.
      observe: ``observe(params, state, *args, mask=None) -> state``, to be called with the updated
        parameters, the arguments of the step and ``mask=value.present``, for a weighting that reads
        the losses after the step, too (:func:`mtl_jax.famo`); ``None`` for all others.
    """

    init: Callable[..., PyTree]
    update: GradientUpdateFn
    losses: Callable[..., Losses]
    observe: Callable[..., PyTree] | None

    def __call__(
        self,
        params: PyTree,
        state: PyTree,
        *args: Any,
        mask: PyTree | None = None,
        second: tuple[Any, ...] | None = None,
    ) -> tuple[MultiTaskValue, PyTree, PyTree]:
        """Return the value, the gradient and the weighting's next state."""
        return self.update(params, state, *args, mask=mask, second=second)


def reads_second_batch(weighting: Weighting | Aggregator) -> bool:
    """Whether it has to be given a second batch."""
    return isinstance(weighting, Weighting) and weighting.needs is Signal.SECOND_BATCH


OF_METHOD = "_of_method"
"""The attribute of a weighting's function that says which method it was made of."""


def check_weighting(weighting: Any) -> None:
    """Raise a ``TypeError`` for what is not a weighting, or is one with a changed field."""
    if isinstance(weighting, Weighting):
        check_functions("The weighting", init=weighting.init, update=weighting.update)
        method = weighting.method
        if isinstance(method, VectorMethod) and isinstance(method.needs, Signal):
            optional = {
                "observe": method.observe,
                "due": method.due,
                "directions": method.directions,
            }
            given = {name: function for name, function in optional.items() if function is not None}
            check_functions("The weighting", init=method.init, update=method.update, **given)
            check_flags(
                "The weighting",
                reads_losses=method.reads_losses,
                positive_losses=method.positive_losses,
            )
            fields = (weighting.init, weighting.update, weighting.observe, weighting.due)
            if any(f is not None and getattr(f, OF_METHOD, None) is not method for f in fields):
                raise TypeError(
                    "A field of the weighting was replaced, which would not be read: its functions "
                    "are those of `method`. Make your own with mtl_jax.vector_weighting."
                )
            return
    if isinstance(weighting, Aggregator):
        raise TypeError(
            "Expected a Weighting, got an Aggregator: it combines the task gradients coordinate "
            "by coordinate and has no weights. mtl_jax.value_and_grad takes it."
        )
    hint = " Did you mean to call it?" if callable(weighting) else ""
    raise TypeError(f"Expected a Weighting, such as mtl_jax.equal(), got {weighting!r}.{hint}")
