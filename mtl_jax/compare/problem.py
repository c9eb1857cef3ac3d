"""What the comparison must know of a multi-task problem."""

import dataclasses
import functools
import importlib
import inspect
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from mtl_jax._jacobian import Shared
from mtl_jax._typing import PyTree
from mtl_jax.compare.data import (
    Batch,
    Dataset,
    Split,
    TrainBatches,
    digest_splits,
    evaluation_batches,
    read_split,
)
from mtl_jax.compare.metrics import Metric, accuracy
from mtl_jax.compare.results import MetricInfo, ProblemInfo

SPLITS = ("train", "validation", "test")

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


@dataclasses.dataclass(frozen=True, init=False)
class Task:
    """One task: what is measured of it, and where its labels are.

    Args:
      metrics: the metric, or several of them: :func:`accuracy`, :func:`mean_iou` and the others, or
        a :class:`Metric` of your own. The accuracy by default. Empty for a task that is trained for
        the others alone: an auxiliary one, or a term of a physics-informed loss. It is weighted
        like the others, and counts in no mean over the tasks.
      label: the field that holds the labels, or a function that makes the labels of a batch of the
        task's dataset; ``None`` for the field of the task's name. Labels are for the metrics; the
        losses read the batch themselves.

    Attributes:
      metrics: the metrics, as a tuple.
      label: as above.

    Raises:
      ValueError: if two metrics have the same name.
    """

    metrics: tuple[Metric, ...]
    label: str | Callable[[Mapping[str, Any]], PyTree] | None

    def __init__(
        self,
        metrics: Metric | Sequence[Metric] | None = None,
        label: str | Callable[[Mapping[str, Any]], PyTree] | None = None,
    ) -> None:
        if metrics is None:
            metrics = accuracy()
        metrics = (metrics,) if isinstance(metrics, Metric) else tuple(metrics)
        names = [metric.name for metric in metrics]
        if len(set(names)) < len(names):
            raise ValueError(f"The metrics of a task must have different names; got {names}.")
        object.__setattr__(self, "metrics", metrics)
        object.__setattr__(self, "label", label)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A multi-task problem: data, network, losses, metrics and the settings to train with.

    All functions are pure and are traced by JAX. A batch is a mapping from field to array with
    the fields of the splits.

    A split is a mapping from field to array; or, for data that are read while training, an object
    with ``__len__`` and ``__getitem__`` whose items are mappings from field to array, such as a
    ``grain.MapDataset`` or what ``tfds.data_source`` returns. Grain shuffles and batches it, in
    threads or in worker processes, ahead of the training.

    Tasks can have data of their own: a split is then a mapping from the name of a dataset to one of
    these, such as ``{"news": {"ids": ..., "topic": ...}, "reviews": {"ids": ..., "stars": ...}}``,
    and so are the batches, which hold examples of every dataset. The datasets can have different
    sizes: an epoch passes over the one with the most batches, and over the others as often as that
    takes.

    The losses are given whole, by ``losses``, or in two parts, by ``encoder`` and ``heads``. From
    the parts a weighting that reads the Gramian has it at the representation, for about the price
    of plain training; else it is taken over the ``shared`` parameters.

    Attributes:
      name: the problem's name.
      tasks: the tasks by name. Losses, outputs and labels use these names.
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
      dataset_of: for each task the dataset of its examples; ``None`` if there is only one dataset.
      predict: ``predict(params, model_state, batch) -> {task: output}``, without anything random:
        what the task's metrics compare with its labels, such as logits. A pytree of arrays with the
        examples (of the task's dataset) along the leading axis. A task without metrics needs none.
      labelled: ``labelled(batch) -> {task: bool[batch]}``: which examples (of the task's dataset)
        have the task's label; ``None`` if all have.
      optimizer: ``optimizer(learning_rate, num_steps)``: the optax optimizer of a run. It is called
        while the training step is traced, and the learning rate is then a traced number, so that
        another one needs no other program: hand it to optax, and do not ask for its value.
      learning_rate: the problem's default learning rate.
      epochs: passes over the training examples.
      batch_size: examples a step, of each dataset; or a mapping with a number for each. The last,
        incomplete batch of an epoch is left out.
      transformations: Grain's ``Map``, ``RandomMap`` and ``MapWithIndex``, applied in turn to each
        training example after the shuffling and before the batches are made. What is random is
        drawn anew at every visit to an example, and is the same for all weightings.
      workers: the number of processes that read and transform the training examples; 0 for threads
        of this one. Data and transformations must then be something that can be pickled.
      alone: whether each task is trained alone, too, as a comparison does by default. ``False`` for
        tasks that say nothing without each other, such as the terms of a physics-informed loss.
      description: a sentence for the reader of the tables.

    Raises:
      ValueError: if what is given does not fit together; the message says what.

    Example:
      Two tasks on the same inputs, one with a missing label here and there. In a file of its own,
      such as ``mine.py``, it is what ``mtl-jax compare mine:problem`` compares the weightings on.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> import numpy as np
      >>> import optax
      >>> from mtl_jax.compare import Problem, Task, mean_absolute_error, r2, roc_auc
      >>> def examples(number, seed):
      ...     x = np.random.default_rng(seed).normal(size=(number, 4)).astype(np.float32)
      ...     toxic = np.where(x[:, 3] > 1, -1, x[:, 0] * x[:, 1] > 0)  # -1: nobody has measured it
      ...     return {"x": x, "solubility": x[:, 0] - x[:, 2], "toxic": toxic.astype(np.int32)}
      >>> def init(key):
      ...     hidden, solubility, toxic = jax.random.split(key, 3)
      ...     return {
      ...         "hidden": jax.random.normal(hidden, (4, 32)) / 2,
      ...         "solubility": jax.random.normal(solubility, (32,)) / 6,
      ...         "toxic": jax.random.normal(toxic, (32,)) / 6,
      ...     }, {}
      >>> def predict(params, model_state, batch):
      ...     z = jnp.tanh(batch["x"] @ params["hidden"])
      ...     return {task: z @ params[task] for task in ("solubility", "toxic")}
      >>> def labelled(batch):
      ...     return {"solubility": jnp.full(len(batch["x"]), True), "toxic": batch["toxic"] >= 0}
      >>> def losses(params, model_state, key, batch):
      ...     outputs, has_label = predict(params, model_state, batch), labelled(batch)
      ...     error = optax.squared_error(outputs["solubility"], batch["solubility"])
      ...     entropy = optax.sigmoid_binary_cross_entropy(outputs["toxic"], batch["toxic"])
      ...     return {
      ...         "solubility": jnp.mean(error),
      ...         "toxic": mtl_jax.masked_mean(entropy, has_label["toxic"]),
      ...     }, model_state
      >>> problem = Problem(
      ...     name="molecules",
      ...     tasks={
      ...         "solubility": Task([mean_absolute_error(unit="mol/l"), r2()]),
      ...         "toxic": Task(roc_auc()),
      ...     },
      ...     train=examples(800, seed=0),
      ...     validation=examples(100, seed=1),
      ...     test=examples(100, seed=2),
      ...     init=init,
      ...     losses=losses,
      ...     shared=lambda path: path == "hidden",
      ...     predict=predict,
      ...     labelled=labelled,
      ...     optimizer=lambda learning_rate, num_steps: optax.adam(learning_rate),
      ...     learning_rate=3e-3,
      ...     epochs=20,
      ...     batch_size=64,
      ... )
      >>> problem.steps_per_epoch
      12
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
    dataset_of: Mapping[str, str] | None = None
    predict: Callable[[PyTree, PyTree, Batch], Mapping[str, PyTree]]
    labelled: Callable[[Batch], Mapping[str, Bool[Array, "batch"]]] | None = None
    optimizer: Callable[[Any, int], optax.GradientTransformation]
    learning_rate: float
    epochs: int
    batch_size: int | Mapping[str, int]
    transformations: Sequence[Any] = ()
    workers: int = 0
    alone: bool = True
    description: str = ""

    def __post_init__(self) -> None:
        # Numbers of NumPy become Python's, since records are JSON.
        for name in ("learning_rate", "epochs", "batch_size"):
            object.__setattr__(self, name, _python_number(vars(self)[name]))
        if not any(task.metrics for task in self.tasks.values()):
            raise ValueError(
                f"The problem {self.name!r} has no task with a metric; one at least needs one."
            )
        self._check_datasets()
        self._check_labels()
        self._check_transformations()
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

    def _check_datasets(self) -> None:
        name, names = self.name, list(self.datasets["train"])
        for split in ("validation", "test"):
            if set(self.datasets[split]) != set(names):
                raise ValueError(
                    f"All splits of the problem {name!r} must have the same datasets; the train "
                    f"split has {names}, the {split} split {list(self.datasets[split])}."
                )
        if names == [""]:
            if self.dataset_of is not None or isinstance(self.batch_size, Mapping):
                raise ValueError(
                    f"The problem {name!r} has one dataset, so `dataset_of` must be None and "
                    "`batch_size` a number."
                )
            return
        dataset_of = {} if self.dataset_of is None else self.dataset_of
        if set(dataset_of) != set(self.tasks) or not set(dataset_of.values()) <= set(names):
            raise ValueError(
                f"`dataset_of` of the problem {name!r} must say for each task, {list(self.tasks)}, "
                f"which dataset it has, of {names}; got {self.dataset_of}."
            )
        if isinstance(self.batch_size, Mapping) and set(self.batch_size) != set(names):
            raise ValueError(
                f"`batch_size` of the problem {name!r} must be one number, or one for each "
                f"dataset, {names}; got {dict(self.batch_size)}."
            )
        if self.encoder is not None:
            raise ValueError(
                f"The problem {name!r} has several datasets, and must be given by `losses` and "
                "`shared`: at the representation, the gradients of tasks on different inputs have "
                "nothing in common, so that their inner products say nothing of a conflict."
            )

    def _check_labels(self) -> None:
        for name, task in self.tasks.items():
            field = name if task.label is None else task.label
            dataset = "" if self.dataset_of is None else self.dataset_of[name]
            for split in ("validation", "test") if task.metrics else ():
                fields = self.datasets[split][dataset].fields
                if not callable(field) and field not in fields:
                    raise ValueError(
                        f"The labels of the task {name!r} of the problem {self.name!r} must be a "
                        f"field of the {split} split, which has {list(fields)}; got {field!r}. "
                        "`label` of the task says which field it is."
                    )

    def _check_transformations(self) -> None:
        if self.workers < 0:
            raise ValueError(f"`workers` must be at least 0, got {self.workers}.")
        if not self.transformations:
            return
        from grain import transforms

        known = (transforms.Map, transforms.RandomMap, transforms.MapWithIndex)
        for transformation in self.transformations:
            if not isinstance(transformation, known):
                raise ValueError(
                    f"The transformations of the problem {self.name!r} must be Grain's Map, "
                    "RandomMap or MapWithIndex, which make one example of one; got "
                    f"{transformation!r}."
                )

    @functools.cached_property
    def datasets(self) -> dict[str, dict[str, Dataset]]:
        """The datasets of each split by name; one without a name is ``""``."""
        return {
            split: read_split(
                getattr(self, split), f"The {split} split of the problem {self.name!r}"
            )
            for split in SPLITS
        }

    def sizes(self, split: str) -> dict[str, int]:
        """The number of examples of each dataset; one without a name is ``""``."""
        return {name: len(dataset) for name, dataset in self.datasets[split].items()}

    def size(self, split: str) -> int:
        """The number of examples in ``"train"``, ``"validation"`` or ``"test"``."""
        return sum(self.sizes(split).values())

    @property
    def batch_sizes(self) -> dict[str, int]:
        """The number of examples of each dataset in a batch; one without a name is ``""``."""
        if isinstance(self.batch_size, Mapping):
            return {name: self.batch_size[name] for name in self.datasets["train"]}
        return dict.fromkeys(self.datasets["train"], self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """The number of training steps in an epoch, over the dataset with the most batches.

        Raises:
          ValueError: if the batch size or the epochs are not at least 1, the learning rate is
            negative or not finite, or a batch is larger than the training data.
        """
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be in [0, inf), got {self.learning_rate}.")
        if self.epochs < 1:
            raise ValueError(f"`epochs` must be at least 1, got {self.epochs}.")
        sizes = self.sizes("train")
        for name, batch_size in self.batch_sizes.items():
            if batch_size < 1:
                raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
            if batch_size > sizes[name]:
                of_dataset = f", dataset {name!r}" if name else ""
                raise ValueError(
                    f"The batch size, {batch_size}, is larger than the training data of "
                    f"{self.name!r}{of_dataset}: {sizes[name]} examples."
                )
        return max(sizes[name] // batch_size for name, batch_size in self.batch_sizes.items())

    def with_settings(self, **changes: Any) -> "Problem":
        """The problem with other settings, those that are ``None`` left as they are."""
        return dataclasses.replace(
            self, **{name: value for name, value in changes.items() if value is not None}
        )

    def train_batches(
        self, seed: int, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> TrainBatches:
        """The batches of the run of a seed, from a step on."""
        return TrainBatches(
            self.datasets["train"],
            self.batch_sizes,
            self.steps_per_epoch,
            seed,
            start_step=start_step,
            process_index=process_index,
            process_count=process_count,
            transformations=self.transformations,
            workers=self.workers,
        )

    def evaluation_batches(
        self, split: str, batch_size: int
    ) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """The examples of a split in order, and which of each batch are real, by dataset."""
        return evaluation_batches(self.datasets[split], batch_size)

    def labels(self, batch: Batch) -> dict[str, PyTree]:
        """The labels of each task that has metrics in a batch; traced."""
        found = {}
        for name, task in self.tasks.items():
            if not task.metrics:
                continue
            fields = batch if self.dataset_of is None else batch[self.dataset_of[name]]
            label = name if task.label is None else task.label
            found[name] = label(fields) if callable(label) else fields[label]
        return found

    def counted(
        self, batch: Batch, valid: Mapping[str, Bool[Array, "batch"]]
    ) -> dict[str, Bool[Array, "batch"]]:
        """For each task which examples are real and have its label; traced.

        Args:
          batch: a batch of :meth:`evaluation_batches`.
          valid: which of its examples are real, by dataset.
        """
        labelled = None if self.labelled is None else self.labelled(batch)
        found = {}
        for task in self.tasks:
            real = jnp.asarray(valid["" if self.dataset_of is None else self.dataset_of[task]])
            found[task] = real if labelled is None else real & labelled[task]
        return found

    def present(self, batch: Batch) -> dict[str, Bool[Array, ""]] | None:
        """The mask of a batch: for each task whether any example has its label."""
        if self.labelled is None:
            return None
        return {task: labelled.any() for task, labelled in self.labelled(batch).items()}

    def digest(self) -> str:
        """A digest of the data of all splits.

        Of arrays it is of all bytes. Of data that are read one by one it is of their number and of
        some examples spread evenly.
        """
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return digest_splits(self.datasets)

    def info(self) -> ProblemInfo:
        """What tables and pictures need to know of the problem."""
        return ProblemInfo(
            name=self.name,
            description=self.description,
            tasks={
                name: {
                    metric.name: MetricInfo(metric.higher_is_better, metric.unit)
                    for metric in task.metrics
                }
                for name, task in self.tasks.items()
            },
            examples={split: self.sizes(split) for split in SPLITS},
            epochs=self.epochs,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=self.batch_sizes,
            learning_rate=self.learning_rate,
            data=self.digest(),
        )


def _python_number(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _python_number(entry) for name, entry in value.items()}
    return value.item() if hasattr(value, "item") else value


def _place(error: Exception, module: Any) -> str:
    """Where in a module the error came from: the last of its lines that was being executed."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == module.__file__]
    return f"in {os.path.basename(module.__file__)}, line {lines[-1]}" if lines else ""


def load_problem(name: str, data_dir: str | None = None) -> Problem:
    """The problem at ``package.module:name``.

    Args:
      name: a module that can be imported, from the working folder too, and in it the name of a
        :class:`Problem`, or of a function that returns one.
      data_dir: handed to the function, if it takes an argument of this name.

    Returns:
      The problem.

    Raises:
      ValueError: if there is no such module or name, or it is not a problem.
      FileNotFoundError: if the function does not find its data.

    Example:
      >>> from mtl_jax.compare import load_problem
      >>> load_problem("math:tau")
      Traceback (most recent call last):
      ValueError: 'math:tau' is a float; a Problem is wanted, or a function that returns one.
    """
    module_name, separator, attribute = name.partition(":")
    parts = module_name.split(".")
    if not (separator and attribute and all(map(str.isidentifier, parts))) or parts[-1] == "py":
        path = pathlib.PurePath(module_name.removesuffix(".py"))
        likely = f"{'.'.join(path.parts).strip('./') or 'module'}:{attribute or 'problem'}"
        raise ValueError(
            f"A problem is named as package.module:name; got {name!r}. Is it {likely!r}?"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The message of a module that the user's own imports in vain says which one.
        raise ValueError(f"{name!r}: {error}.") from error
    if not hasattr(module, attribute):
        problems = [key for key, value in vars(module).items() if isinstance(value, Problem)]
        there = f"; its problems are {', '.join(problems)}" if problems else ""
        raise ValueError(f"The module {module_name!r} has no {attribute!r}{there}.")
    found: Any = getattr(module, attribute)
    if callable(found):
        signature = inspect.signature(found)
        options = {"data_dir": data_dir} if "data_dir" in signature.parameters else {}
        try:
            signature.bind(**options)
        except TypeError as error:
            raise ValueError(f"{name!r} cannot be called without arguments: {error}.") from error
        try:
            found = found(**options)
        except (ValueError, FileNotFoundError) as error:
            if place := _place(error, module):
                error.add_note(place)
            raise
    if not isinstance(found, Problem):
        raise ValueError(
            f"{name!r} is a {type(found).__name__}; a Problem is wanted, or a function that "
            "returns one."
        )
    return found
