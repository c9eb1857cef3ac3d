"""What the referee must know of a multi-task problem."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from mtl_jax.jacobian import Shared
from mtl_jax.pytree import PyTree

Batch = Mapping[str, Array]
"""A mapping from field to array, the examples along the leading axis."""

Split = Mapping[str, np.ndarray]
"""A part of the data: a mapping from field to array, the examples along the leading axis."""


LossesFn = Callable[[PyTree, PyTree, Array, Batch], tuple[dict[str, Float[Array, ""]], PyTree]]
EncoderFn = Callable[[PyTree, PyTree, Array, Batch], tuple[PyTree, PyTree]]
HeadsFn = Callable[[PyTree, dict[str, PyTree], Batch], dict[str, Float[Array, ""]]]


@dataclasses.dataclass(frozen=True)
class _Composed:
    """The losses of heads on an encoder, every task given the one representation."""

    encoder: EncoderFn
    heads: HeadsFn
    tasks: tuple[str, ...]

    def __call__(
        self, params: PyTree, model_state: PyTree, key: Array, batch: Batch
    ) -> tuple[dict[str, Float[Array, ""]], PyTree]:
        z, model_state = self.encoder(params, model_state, key, batch)
        return self.heads(params, dict.fromkeys(self.tasks, z), batch), model_state


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: the name of its metric, and which direction is better.

    Attributes:
      metric: the metric's name, for tables and pictures.
      higher_is_better: whether a larger metric is a better one.
      percent: whether the metric is a share, shown as a percentage.
    """

    metric: str = "accuracy"
    higher_is_better: bool = True
    percent: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A multi-task problem: data, network, losses, metrics and the settings to train with.

    All functions are pure and are traced by JAX. A batch is a mapping from field to array with
    the fields of the splits.

    The losses are given whole, by ``losses``, or in two parts, by ``encoder`` and ``heads``. From
    the parts a weighting that reads the Gramian has it at the representation, for about the price
    of plain training; else it is taken over the ``shared`` parameters.

    Attributes:
      name: the problem's name.
      tasks: the tasks by name. Losses, scores and labels use these names.
      train: the training examples.
      validation: the examples that choose the best epoch; never used for anything else.
      test: the examples that the results are reported on.
      init: ``init(key) -> (params, model_state)``. The model state holds batch statistics and the
        like; it is ``{}`` for a network that has none.
      losses: ``losses(params, model_state, key, batch) -> (losses, model_state)``: for each task
        the mean loss over the batch's examples that have its label, taken with
        :func:`mtl_jax.masked_mean` where labels can be missing. ``key`` is for dropout,
        augmentation and the like. Where ``encoder`` and ``heads`` are given it is left out, and
        made of them.
      encoder: ``encoder(params, model_state, key, batch) -> (z, model_state)``: the representation
        that all tasks share, a pytree of arrays. What is random or has a state belongs here.
      heads: ``heads(params, zs, batch) -> losses``, with ``zs = {task: z}`` and the losses as
        above, each task's from its own copy of the representation alone
        (:func:`mtl_jax.check_heads` tells whether it is).
      shared: the parameters that all tasks share, over which a Gramian is taken and on which an
        :class:`mtl_jax.Aggregator` works: as in :func:`mtl_jax.value_and_grad`, a predicate on a
        parameter's path or a pytree of booleans; ``None`` for all of them.
      scores: ``scores(params, model_state, batch) -> {task: float[batch]}``: each example's score,
        the task's metric being the mean over the examples that have its label.
      labelled: ``labelled(batch) -> {task: bool[batch]}``: which examples have the task's label;
        ``None`` if all have.
      optimizer: ``optimizer(learning_rate, num_steps)``: the optax optimizer of a run.
      learning_rate: the learning rate that the problem is shipped with.
      epochs: passes over the training examples.
      batch_size: examples a step. The last, incomplete batch of an epoch is left out.
      description: a sentence for the reader of the tables.
    """

    name: str
    tasks: Mapping[str, Task]
    train: Split
    validation: Split
    test: Split
    init: Callable[[Array], tuple[PyTree, PyTree]]
    losses: LossesFn = None  # pyright: ignore[reportAssignmentType]  (set in __post_init__)
    encoder: EncoderFn | None = None
    heads: HeadsFn | None = None
    shared: Shared = None
    scores: Callable[[PyTree, PyTree, Batch], dict[str, Float[Array, "batch"]]]
    labelled: Callable[[Batch], dict[str, Bool[Array, "batch"]]] | None = None
    optimizer: Callable[[float, int], optax.GradientTransformation]
    learning_rate: float
    epochs: int
    batch_size: int
    description: str = ""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"The problem {self.name!r} has no tasks.")
        for part in ("train", "validation", "test"):
            sizes = {field: len(values) for field, values in getattr(self, part).items()}
            if len(set(sizes.values())) != 1 or 0 in sizes.values():
                raise ValueError(
                    f"The {part} split of the problem {self.name!r} must hold at least one field, "
                    f"all with the same number of examples, at least one; got {sizes}."
                )
        # A copy made by `dataclasses.replace` is given the losses that were composed before.
        whole = self.losses is not None and not isinstance(self.losses, _Composed)
        given = {"losses": whole, "encoder": self.encoder, "heads": self.heads}
        names = [name for name, value in given.items() if value]
        if names not in (["losses"], ["encoder", "heads"]):
            raise ValueError(
                f"The problem {self.name!r} must be given either `losses`, or `encoder` and "
                f"`heads`; got {' and '.join(f'`{name}`' for name in names) or 'none of them'}."
            )
        if self.encoder is not None and self.heads is not None:
            composed = _Composed(self.encoder, self.heads, tuple(self.tasks))
            object.__setattr__(self, "losses", composed)

    def size(self, part: str) -> int:
        """The number of examples in ``"train"``, ``"validation"`` or ``"test"``."""
        return len(next(iter(getattr(self, part).values())))

    def with_settings(self, **changes: Any) -> "Problem":
        """The problem with other settings, those that are ``None`` left as they are."""
        return dataclasses.replace(
            self, **{name: value for name, value in changes.items() if value is not None}
        )

    def present(self, batch: Batch) -> dict[str, Bool[Array, ""]] | None:
        """The mask of a batch: for each task whether any example has its label."""
        if self.labelled is None:
            return None
        return jax.tree.map(lambda labelled: labelled.any(), self.labelled(batch))
