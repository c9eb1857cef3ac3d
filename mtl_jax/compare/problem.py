"""What the referee must know of a multi-task problem."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from mtl_jax._jacobian import Shared
from mtl_jax._typing import PyTree
from mtl_jax.compare.sources import Source, by_source

Batch = Mapping[str, Any]
"""A mapping from field to array, the examples along the leading axis; with several sources a
mapping from source to such a mapping."""

Split = Mapping[str, np.ndarray]
"""A part of the data: a mapping from field to array, the examples along the leading axis."""

Sources = Mapping[str, Split]
"""A part of the data that come from several sources, by source."""


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

    Tasks can have data of their own: the splits are then mappings from source to fields, such as
    ``{"news": {"ids": ..., "topic": ...}, "reviews": {"ids": ..., "stars": ...}}``, and so are the
    batches, which hold examples of every source. The sources can have different sizes: an epoch
    passes over the one with the most batches, and over the others as often as that takes.

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
      source_of: for each task the source of its examples; ``None`` if there is only one source.
      scores: ``scores(params, model_state, batch) -> {task: float[batch]}``: each example's score,
        the task's metric being the mean over the examples that have its label.
        With several sources, the score of the examples of the task's source.
      labelled: ``labelled(batch) -> {task: bool[batch]}``: which examples (of the task's source)
        have the task's label; ``None`` if all have.
      optimizer: ``optimizer(learning_rate, num_steps)``: the optax optimizer of a run.
      learning_rate: the learning rate that the problem is shipped with.
      epochs: passes over the training examples.
      batch_size: examples a step, of each source; or a mapping with a number for each. The last,
        incomplete batch of an epoch is left out.
      description: a sentence for the reader of the tables.
    """

    name: str
    tasks: Mapping[str, Task]
    train: Split | Sources
    validation: Split | Sources
    test: Split | Sources
    init: Callable[[Array], tuple[PyTree, PyTree]]
    losses: LossesFn = None  # pyright: ignore[reportAssignmentType]  (set in __post_init__)
    encoder: EncoderFn | None = None
    heads: HeadsFn | None = None
    shared: Shared = None
    source_of: Mapping[str, str] | None = None
    scores: Callable[[PyTree, PyTree, Batch], dict[str, Float[Array, "batch"]]]
    labelled: Callable[[Batch], dict[str, Bool[Array, "batch"]]] | None = None
    optimizer: Callable[[float, int], optax.GradientTransformation]
    learning_rate: float
    epochs: int
    batch_size: int | Mapping[str, int]
    description: str = ""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"The problem {self.name!r} has no tasks.")
        for part in ("train", "validation", "test"):
            for source, fields in by_source(getattr(self, part)).items():
                sizes = {field: len(values) for field, values in fields.items()}
                if len(set(sizes.values())) != 1 or 0 in sizes.values():
                    of_source = "" if source is None else f", source {source!r},"
                    raise ValueError(
                        f"The {part} split{of_source} of the problem {self.name!r} must hold at "
                        "least one field, all with the same number of examples, at least one; got "
                        f"{sizes}."
                    )
        self._check_sources()
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

    def _check_sources(self) -> None:
        name, sources = self.name, list(by_source(self.train))
        for part in ("validation", "test"):
            if set(by_source(getattr(self, part))) != set(sources):
                raise ValueError(
                    f"All splits of the problem {name!r} must have the same sources; the training "
                    f"split has {sources}, the {part} split {list(by_source(getattr(self, part)))}."
                )
        if sources == [None]:
            if self.source_of is not None or isinstance(self.batch_size, Mapping):
                raise ValueError(
                    f"The problem {name!r} has one source of data, so `source_of` must be None and "
                    "`batch_size` a number."
                )
            return
        source_of = {} if self.source_of is None else self.source_of
        if set(source_of) != set(self.tasks) or not set(source_of.values()) <= set(sources):
            raise ValueError(
                f"`source_of` of the problem {name!r} must say for each task, {list(self.tasks)}, "
                f"which source it has, of {sources}; got {self.source_of}."
            )
        if isinstance(self.batch_size, Mapping) and set(self.batch_size) != set(sources):
            raise ValueError(
                f"`batch_size` of the problem {name!r} must be one number, or one for each source, "
                f"{sources}; got {dict(self.batch_size)}."
            )
        if self.encoder is not None:
            raise ValueError(
                f"The problem {name!r} has several sources, and must be given by `losses` and "
                "`shared`: at the representation, the gradients of tasks on different inputs have "
                "nothing in common, so that their inner products say nothing of a conflict."
            )

    def sizes(self, part: str) -> dict[Source, int]:
        """The number of examples of each source; the one source is ``None``."""
        sources = by_source(getattr(self, part))
        return {source: len(next(iter(fields.values()))) for source, fields in sources.items()}

    def size(self, part: str) -> int:
        """The number of examples in ``"train"``, ``"validation"`` or ``"test"``."""
        return sum(self.sizes(part).values())

    def batch_sizes(self) -> dict[Source, int]:
        """The number of examples of each source in a batch."""
        if isinstance(self.batch_size, Mapping):
            return dict(self.batch_size.items())
        return dict.fromkeys(by_source(self.train), self.batch_size)

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
