"""The data of a problem: the splits in their forms, and the batches that are made of them."""

import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from mtl_jax._typing import PyTree

T = TypeVar("T")

Batch = Mapping[str, Any]
"""A mapping from field to array, the examples along the leading axis; with several datasets a
mapping from dataset to such a mapping."""

Split = Any
"""A part of the data. It consists of one dataset, or is a mapping with a name for each of several.

A dataset is a mapping from field to array, the examples along the leading axis; or an object with
``__len__`` and ``__getitem__``, whose items are mappings from field to array: a
``grain.MapDataset``, what ``tfds.data_source`` returns, a list, a class of one's own."""

DEVICE_BYTES = 2**30
"""Arrays of the training split that are larger together stay on the host, and are sent batch by
batch."""

_EXAMPLES_IN_DIGEST = 16
_ENDLESS = 2**40  # steps
_THREADS = min(4, os.cpu_count() or 1)


# Splits


class ArrayDataset:
    """Examples as rows of arrays.

    Attributes:
      fields: the arrays by field.
    """

    def __init__(self, fields: Mapping[str, Any], what: str) -> None:
        self.fields = {field: np.asarray(values) for field, values in fields.items()}
        sizes = {field: len(values) for field, values in fields.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise ValueError(
                f"{what} must hold at least one field, all with the same number of examples, at "
                f"least one; got {sizes}."
            )
        _check_numbers(self.fields, what)

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, rows: Any) -> dict[str, np.ndarray]:
        """The fields of one example or of several."""
        return {field: values[rows] for field, values in self.fields.items()}


class SourceDataset:
    """Examples that are read one by one.

    Attributes:
      examples: the ``grain.MapDataset``.
      fields: the fields of the first example.
    """

    def __init__(self, source: Any, what: str) -> None:
        import grain  # here, since importing it takes seconds and arrays need none of it

        self.what = what
        is_grain = isinstance(source, grain.MapDataset)
        self.examples = source if is_grain else grain.MapDataset.source(source)
        if not len(self):
            raise ValueError(f"{what} must hold at least one example; got none.")
        first = self[0]
        self.fields = {field: np.asarray(value) for field, value in first.items()}
        _check_numbers(self.fields, what)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """An example. An index beyond the number of examples means another pass over them.

        Raises:
          ValueError: if there is none, or it is not a mapping.
        """
        example = self.examples[index]
        if not isinstance(example, Mapping) or not example:
            hint = ""
            if example is None:
                hint = " A filtered dataset has gaps: leave the examples out before it is made."
            raise ValueError(
                f"{self.what} must hold examples that are mappings from field to array; number "
                f"{index % len(self)} is {type(example).__name__}.{hint}"
            )
        return example


Dataset = ArrayDataset | SourceDataset


def read_split(split: Split, what: str) -> dict[str, Dataset]:
    """The datasets of a split by name; the one dataset of a split without names is ``""``.

    Args:
      split: the split, in any of its forms.
      what: what it is called in messages, such as ``"The train split"``.

    Raises:
      ValueError: if it has another form, or a dataset has no examples.
    """
    if not isinstance(split, Mapping):
        return {"": _read_dataset(split, what)}
    named = {name: isinstance(value, Mapping) or _is_source(value) for name, value in split.items()}
    if not any(named.values()):
        return {"": ArrayDataset(split, what)}
    if not all(named.values()):
        raise ValueError(
            f"{what} must be a mapping from field to array, or from the name of a dataset to a "
            f"dataset; got both: {', '.join(name for name in named if not named[name])} are arrays."
        )
    return {name: _read_dataset(data, f"{what}, dataset {name!r},") for name, data in split.items()}


def joined(by_dataset: Mapping[str, T]) -> Any:
    """What is given by dataset in the form of a batch: that of the one dataset, or a mapping."""
    return by_dataset[""] if "" in by_dataset else dict(by_dataset)


def digest_splits(splits: Mapping[str, Mapping[str, Dataset]]) -> str:
    """The SHA-256 digest of the data.

    Of arrays it is of all bytes. Of datasets that are read one by one it is of their number of
    examples and of some examples spread evenly, so that it tells another version of the data, and
    not a change of a single example.

    Args:
      splits: the datasets of each split.
    """
    found = hashlib.sha256()

    def add(name: str, array: Any) -> None:
        array = np.ascontiguousarray(array)
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.reshape(-1).view(np.uint8).data)

    for split, datasets in splits.items():
        for name, dataset in datasets.items():
            found.update(f"{split}/{name} {len(dataset)}\n".encode())
            if isinstance(dataset, ArrayDataset):
                examples: list[Mapping[str, Any]] = [dataset.fields]
            else:
                places = np.linspace(0, len(dataset) - 1, _EXAMPLES_IN_DIGEST)
                examples = [dataset[index] for index in np.unique(places.astype(int)).tolist()]
            for example in examples:
                for field in sorted(example):
                    add(field, example[field])
    return found.hexdigest()


def _read_dataset(data: Any, what: str) -> Dataset:
    if isinstance(data, Mapping):
        return ArrayDataset(data, what)
    if _is_source(data):
        return SourceDataset(data, what)
    raise ValueError(
        f"{what} must be a mapping from field to array, or have `__len__` and `__getitem__`, as a "
        f"grain.MapDataset has; got {type(data).__name__}."
    )


def _is_source(data: Any) -> bool:
    is_array = hasattr(data, "dtype") and hasattr(data, "shape")
    return not is_array and hasattr(data, "__len__") and hasattr(data, "__getitem__")


def _check_numbers(fields: Mapping[str, np.ndarray], what: str) -> None:
    for field, values in fields.items():
        if values.dtype.kind in "OSUMm":
            raise ValueError(
                f"{what} must hold numbers; the field {field!r} has dtype {values.dtype}. Leave it "
                "out, or make numbers of it."
            )


# Batches to train with


def arrays_for_device(
    datasets: Mapping[str, Dataset], transformations: Sequence[Any] = ()
) -> dict[str, dict[str, np.ndarray]] | None:
    """The arrays of the datasets, if they are arrays that fit the device as they are."""
    if transformations:
        return None
    arrays = {}
    for name, dataset in datasets.items():
        if not isinstance(dataset, ArrayDataset):
            return None
        arrays[name] = dataset.fields
    size = sum(values.nbytes for fields in arrays.values() for values in fields.values())
    return arrays if size <= DEVICE_BYTES else None


class Order:
    """The order in which the examples of a dataset are drawn.

    In each epoch they are in another random order; a dataset that an epoch passes over several
    times is in another order each time.

    Args:
      seed: the seed of the run.
      number: the number of the dataset; each has an order of its own.
      size: the number of its examples.
      drawn: how many are drawn in an epoch.
    """

    def __init__(self, seed: int, number: int, size: int, drawn: int) -> None:
        self.seed, self.number, self.size, self.drawn = seed, number, size, drawn
        self.passes = math.ceil(drawn / size)
        self._epochs: dict[int, np.ndarray] = {}

    def rows(self, start: int, number: int) -> np.ndarray:
        """The indices of so many examples from a place of the endless order on, in one epoch."""
        epoch, start = divmod(start, self.drawn)
        return self.epoch(epoch)[start : start + number]

    def epoch(self, epoch: int) -> np.ndarray:
        """The indices of the examples that are drawn in an epoch, in order."""
        found = self._epochs.get(epoch)
        if found is None:
            passes = [
                np.random.default_rng((self.seed, self.number, epoch, i)).permutation(self.size)
                for i in range(self.passes)
            ]
            found = np.concatenate(passes)[: self.drawn].astype(np.int32)
            # Threads that prefetch can be at the end of one epoch and at the start of the next.
            near = {e: order for e, order in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs = near | {epoch: found}
        return found


class TrainBatches:
    """The training batches of a run, step after step and epoch after epoch, without an end.

    Where the arrays are on the device, what is yielded for a step is the indices of its examples;
    else it is a batch of NumPy arrays, prefetched by Grain. :func:`take` makes the batch of either.
    The reading begins with ``iter``; close the iterator when it is not needed any more, which ends
    worker processes.

    Args:
      datasets: the training datasets by name.
      batch_sizes: the number of examples of each in a batch.
      steps: the number of batches in an epoch.
      seed: the seed of the run: with the same one the batches are the same.
      start_step: the step to start with. Nothing before it is read.
      process_index: the number of this process among those that train together.
      process_count: the number of these processes. Batches from the host are then parts of the
        whole batch: the first process has the first examples. Indices are those of the whole batch.
      transformations: Grain's, of the examples.
      workers: the number of Grain's worker processes.

    Attributes:
      device_data: the arrays, to be put on the device once; ``None`` if batches come from the host.

    Raises:
      ValueError: if a batch size is not a multiple of the number of processes.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        batch_sizes: Mapping[str, int],
        steps: int,
        seed: int,
        *,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        transformations: Sequence[Any] = (),
        workers: int = 0,
    ) -> None:
        for name, size in batch_sizes.items():
            if size % process_count:
                of_dataset = f" of the dataset {name!r}" if name else ""
                raise ValueError(
                    f"The batch size{of_dataset}, {size}, must be a multiple of the number of "
                    f"processes, {process_count}."
                )
        self.device_data = arrays_for_device(datasets, transformations)
        self._datasets, self._batch_sizes = datasets, batch_sizes
        self._seed, self._start = seed, start_step
        self._process, self._processes = process_index, process_count
        self._transformations, self._workers = list(transformations), workers
        self._orders = {
            name: Order(seed, number, len(dataset), batch_sizes[name] * steps)
            for number, (name, dataset) in enumerate(datasets.items())
        }

    def __iter__(self) -> Generator[Any, None, None]:
        if self.device_data is not None:
            return self._indices()
        batches = self._batches()
        next(batches)
        return batches

    def example(self) -> Batch:
        """A batch as they are, to find shapes with; made in this process."""
        if self.device_data is None:
            return self._pipeline()[0]
        return take(self.device_data, next(self._indices()))

    def _indices(self) -> Generator[dict[str, np.ndarray], None, None]:
        for step in itertools.count(self._start):
            yield {
                name: order.rows(step * self._batch_sizes[name], self._batch_sizes[name])
                for name, order in self._orders.items()
            }

    def _batches(self) -> Generator[Any, None, None]:
        """First nothing, when the reading has begun; then batch after batch."""
        import grain
        from absl import flags

        if self._workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads a flag of its own before it starts workers
        batches = self._pipeline().to_iter_dataset(_read_options(1 if self._workers else _THREADS))
        options = grain.multiprocessing.MultiprocessingOptions(
            num_workers=self._workers, per_worker_buffer_size=2
        )
        iterator = iter(batches.mp_prefetch(options))
        try:
            iterator.start_prefetch()
            yield None
            for batch in iterator:
                # A worker's arrays lie in shared memory, which must not outlive the iterator.
                yield jax.tree.map(np.array, batch) if self._workers else batch
        finally:
            iterator.close()

    def _pipeline(self) -> Any:
        """The batches as a ``grain.MapDataset``, in which a step is an index."""
        import grain

        parts = []
        for number, (name, dataset) in enumerate(self._datasets.items()):
            order, size = self._orders[name], self._batch_sizes[name]
            part = slice(self._process, None, self._processes)
            if isinstance(dataset, ArrayDataset) and not self._transformations:
                rows = _Rows(dataset, order, size, self._process, self._processes)
                parts.append(grain.MapDataset.range(_ENDLESS).map(rows))
                continue
            seed = np.random.SeedSequence((self._seed, number)).generate_state(1)
            # An example's index is its number among all that are drawn, in all epochs: what a
            # random transformation does with it follows from that and from the seed.
            parts.append(
                grain.MapDataset.range(_ENDLESS * size)
                .seed(int(seed[0]))
                .map(_Drawn(dataset, order))
                .apply(self._transformations)
                .batch(size // self._processes)[part]
            )
        batches = grain.experimental.ZipMapDataset(parts).map(_Joined(tuple(self._datasets)))
        return batches[self._start :]


def take(device_data: PyTree | None, item: Any) -> Batch:
    """The batch of a step; traced.

    Args:
      device_data: as of :class:`TrainBatches`, on the device.
      item: what it yields for the step.
    """
    if device_data is None:
        return item
    return joined(
        {
            name: {field: values[item[name]] for field, values in fields.items()}
            for name, fields in device_data.items()
        }
    )


@dataclasses.dataclass
class _Drawn:
    """The example that is drawn at a place of the endless order."""

    dataset: Dataset
    order: Order

    def __call__(self, place: int) -> Mapping[str, Any]:
        index = int(self.order.rows(place, 1)[0])
        if isinstance(self.dataset, SourceDataset):
            # In every pass the random transformations of a user's own do something else.
            epoch, place = divmod(place, self.order.drawn)
            index += (epoch * self.order.passes + place // self.order.size) * self.order.size
        return self.dataset[index]


@dataclasses.dataclass
class _Rows:
    """The batch of a step, or a process's part of it, as rows of arrays."""

    dataset: ArrayDataset
    order: Order
    batch_size: int
    process: int
    processes: int

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        rows = self.order.rows(step * self.batch_size, self.batch_size)
        return self.dataset[np.split(rows, self.processes)[self.process]]


@dataclasses.dataclass
class _Joined:
    """The form of a batch."""

    names: tuple[str, ...]

    def __call__(self, parts: tuple[Any, ...]) -> Batch:
        return joined(dict(zip(self.names, parts, strict=True)))


# Batches to measure with


def evaluation_batches(
    datasets: Mapping[str, Dataset], batch_size: int
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """The examples of a split in order, in batches of one size.

    Args:
      datasets: the datasets of the split.
      batch_size: examples of each dataset in a batch.

    Yields:
      A batch, filled up with other examples where a dataset has come to its end, and for each
      dataset which of its examples are real.
    """
    number = math.ceil(max(len(dataset) for dataset in datasets.values()) / batch_size)
    parts = [_in_order(dataset, number, batch_size) for dataset in datasets.values()]
    for start, fields in enumerate(zip(*parts, strict=True)):
        indices = np.arange(start * batch_size, (start + 1) * batch_size)
        valid = {name: indices < len(dataset) for name, dataset in datasets.items()}
        yield joined(dict(zip(datasets, fields, strict=True))), valid


def _in_order(dataset: Dataset, number: int, batch_size: int) -> Iterator[Mapping[str, Any]]:
    size = len(dataset)
    if isinstance(dataset, ArrayDataset):
        for start in range(0, number * batch_size, batch_size):
            indices = np.arange(start, start + batch_size)
            full = indices[-1] < size
            yield dataset[indices[0] : indices[-1] + 1] if full else dataset[indices % size]
        return
    import grain

    examples = grain.MapDataset.range(number * batch_size)
    examples = examples.map(lambda index: dataset[index % size])
    iterator = iter(examples.batch(batch_size).to_iter_dataset(_read_options(_THREADS)))
    try:
        yield from iterator
    finally:
        iterator.close()


def _read_options(threads: int) -> Any:
    """Batches are prepared by threads, and a few of them kept ready."""
    import grain

    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
