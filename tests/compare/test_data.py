"""What a step is trained on, and what is measured: in every form that data can have."""

import contextlib
import itertools

import grain
import numpy as np
import pytest
from toy_problem import make_problem, make_two_datasets, split, two_datasets

from mtl_jax.compare import data
from mtl_jax.compare.data import Order, take
from tests.compare.problems import SIZES, Flip, Spots, spots


def first(problem, number, *args, **kwargs):
    """The first batches, and so many of them."""
    batches = problem.train_batches(*args, **kwargs)
    with contextlib.closing(iter(batches)) as iterator:
        return [take(batches.device_data, item) for item in itertools.islice(iterator, number)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        flat, others = flattened(batch), flattened(other)
        assert set(flat) == set(others)
        for name, values in flat.items():
            np.testing.assert_array_equal(values, others[name])


def flattened(batch):
    found = {}
    for name, value in batch.items():
        inner = flattened(value) if isinstance(value, dict) else {"": value}
        found |= {f"{name}/{key}": array for key, array in inner.items()}
    return found


class Rows:
    """Arrays that are read one by one."""

    def __init__(self, fields):
        self.fields = fields

    def __len__(self):
        return len(self.fields["x"])

    def __getitem__(self, index):
        return {field: values[index] for field, values in self.fields.items()}


def read_one_by_one(problem, splits=("train", "validation", "test")):
    """The problem with its arrays behind `__getitem__`."""
    changes = {}
    for name in splits:
        whole = getattr(problem, name)
        nested = isinstance(next(iter(whole.values())), dict)
        changes[name] = {k: Rows(v) for k, v in whole.items()} if nested else Rows(whole)
    return problem.with_settings(**changes)


# Batches to train with


def test_an_epoch_is_every_example_once_but_for_the_incomplete_batch():
    problem = make_problem()  # 200 examples in batches of 32
    assert problem.steps_per_epoch == 6
    batches = problem.train_batches(seed=3)
    indices = [item[""] for item in itertools.islice(batches, 12)]
    assert all(len(item) == 32 for item in indices)
    for epoch in (indices[:6], indices[6:]):
        assert len(set(np.concatenate(epoch).tolist())) == 192
    assert not np.array_equal(indices[0], indices[6])
    x = take(batches.device_data, {"": indices[1]})["x"]
    np.testing.assert_array_equal(x, problem.train["x"][indices[1]])


def test_the_seed_alone_decides_the_batches():
    problem = make_problem()
    assert_same(first(problem, 14, 5), first(make_problem(), 14, 5))
    other = first(problem, 1, 6)
    assert not np.array_equal(other[0]["x"], first(problem, 1, 5)[0]["x"])


def test_datasets_of_unequal_size():
    """An epoch passes over the one with the most batches, over the other as often as it takes."""
    problem = make_two_datasets()
    assert problem.steps_per_epoch == 6
    items = list(itertools.islice(problem.train_batches(0), 12))
    many, few = (np.concatenate([item[name] for item in items[:6]]) for name in ("many", "few"))
    assert (many.size, few.size) == (96, 30)
    assert len(set(many)) == 96  # none twice
    assert sorted(few[:24]) == list(range(24))  # all of them, then in a new order
    assert len(set(few[24:])) == 6
    assert not np.array_equal(few[24:], few[:6])
    again = np.concatenate([item["few"] for item in items[6:]])
    assert sorted(again[:24]) == list(range(24))
    assert not np.array_equal(again, few)
    batch = first(problem, 1, 0)[0]
    np.testing.assert_array_equal(batch["few"]["x"], problem.train["few"]["x"][items[0]["few"]])


def test_datasets_of_the_same_size_have_orders_of_their_own():
    problem = make_two_datasets(train=two_datasets(40, 40, 0), batch_size=8)
    item = next(iter(problem.train_batches(0)))
    assert not np.array_equal(item["many"], item["few"])


@pytest.mark.parametrize("make", [make_problem, make_two_datasets])
def test_examples_that_are_read_one_by_one_come_in_the_same_batches(make):
    """The order is the same in every form, so a problem keeps its numbers when its data grow."""
    problem = make()
    assert_same(first(read_one_by_one(problem), 14, 2), first(problem, 14, 2))


def test_arrays_beyond_the_limit_stay_on_the_host(monkeypatch):
    problem = make_problem()
    expected = first(problem, 8, 1)
    monkeypatch.setattr(data, "DEVICE_BYTES", 100)
    assert problem.train_batches(1).device_data is None
    assert_same(first(problem, 8, 1), expected)
    assert_same([problem.train_batches(1).example()], expected[:1])


PROBLEMS = {
    "arrays": make_problem,
    "two datasets": make_two_datasets,
    "read one by one": lambda: read_one_by_one(make_two_datasets()),
    "random transformations": spots,
    "transformed arrays": lambda: spots(train=data.ArrayDataset(stacked(64), "").fields),
    "a dataset of Grain": lambda: spots(train=grain.MapDataset.source(Spots(64, 0))),
}


def stacked(number):
    examples = [Spots(number, 0)[index] for index in range(number)]
    return {field: np.stack([example[field] for example in examples]) for field in examples[0]}


@pytest.mark.parametrize("name", PROBLEMS)
def test_going_on_at_a_step_is_as_having_come_there(name):
    problem = PROBLEMS[name]()
    batches = first(problem, 11, 4)
    for start in (1, problem.steps_per_epoch, 9):  # within an epoch, and between two
        assert_same(first(problem, 11 - start, 4, start_step=start), batches[start:])


def test_random_transformations():
    problem = spots()
    flipped, seen = [], []
    for batch in first(problem, 12, 0):  # three epochs of 64 examples
        bright = batch["picture"][np.arange(16), batch["row"], batch["column"]]
        np.testing.assert_array_equal(bright, 255)  # the label is turned over with the picture
        seen.append(batch["picture"])
    originals = stacked(64)["picture"]
    for pictures in (np.concatenate(seen[start : start + 4]) for start in (0, 4, 8)):
        # Each example is there once an epoch, as it is or turned over.
        as_it_is = (pictures[:, None] == originals).all(axis=(-2, -1))
        over = (pictures[:, None] == originals[..., ::-1]).all(axis=(-2, -1))
        assert ((as_it_is | over).sum(axis=0) == 1).all()
        flipped.append(over.any(axis=0))
    assert 16 < np.sum(flipped[0]) < 48
    assert not np.array_equal(flipped[0], flipped[1])  # drawn anew at every visit
    assert_same(first(spots(), 3, 0), first(problem, 3, 0))
    others = first(problem, 4, 1)
    assert not np.array_equal(
        np.concatenate([b["picture"] for b in others]), np.concatenate(seen[:4])
    )


def test_the_validation_examples_are_not_transformed():
    problem = spots()
    batch, _ = next(problem.evaluation_batches("validation", 20))
    example = problem.validation[3]
    np.testing.assert_array_equal(batch["picture"][3], example["picture"])


def test_random_maps_of_a_dataset_of_grain_are_drawn_anew_in_every_epoch():
    def dataset():
        return (
            grain.MapDataset.range(6)
            .seed(1)
            .random_map(
                lambda index, rng: {"x": index, "row": index, "column": rng.integers(0, 2**30)}
            )
        )

    problem = spots(train=dataset(), transformations=[], batch_size=3)
    epochs = [
        np.concatenate([b["column"] for b in first(problem, 8, 0)[e : e + 2]]) for e in (0, 2)
    ]
    assert not set(epochs[0].tolist()) & set(epochs[1].tolist())
    again = first(spots(train=dataset(), transformations=[], batch_size=3), 8, 0)
    assert_same(again, first(problem, 8, 0))


def test_workers_give_the_same_batches_from_any_step_on():
    expected = first(spots(), 9, 7)
    assert_same(first(spots(workers=2), 6, 7, start_step=3), expected[3:])


def test_what_a_worker_raises_comes_through():
    with pytest.raises(ValueError, match="cannot be turned over"):
        first(spots(transformations=[Flip(), Broken()], workers=1), 1, 0)


class Broken(grain.transforms.Map):
    def map(self, example):
        raise ValueError("cannot be turned over")


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("form", ["read one by one", "arrays on the host"])
def test_processes_have_parts_of_the_batch(form, count, monkeypatch):
    problem = spots(batch_size=8)
    if form == "arrays on the host":
        monkeypatch.setattr(data, "DEVICE_BYTES", 100)
        problem = spots(batch_size=8, train=stacked(64), transformations=[])
    whole = first(problem, 10, 5, start_step=1)
    parts = [
        first(problem, 10, 5, start_step=1, process_index=index, process_count=count)
        for index in range(count)
    ]
    assert len(parts[0][0]["row"]) == 8 // count
    for step, batch in enumerate(whole):
        joined = {field: np.concatenate([part[step][field] for part in parts]) for field in batch}
        assert_same([joined], [batch])


def test_processes_have_the_same_indices():
    problem = make_problem()
    items = [
        next(iter(problem.train_batches(2, process_index=index, process_count=2)))[""]
        for index in range(2)
    ]
    np.testing.assert_array_equal(*items)
    with pytest.raises(ValueError, match=r"batch size, 32, must be a multiple .* processes, 3\."):
        problem.train_batches(2, process_count=3)
    with pytest.raises(ValueError, match="batch size of the dataset 'few', 5, must be"):
        make_two_datasets().train_batches(0, process_count=2)


def test_an_order_keeps_the_epochs_that_are_near():
    """Of an endless training only as much as threads need that read ahead."""
    order = Order(seed=0, number=0, size=10, drawn=20)
    epochs = [order.epoch(epoch) for epoch in range(5)]
    assert len(order._epochs) == 2
    for epoch in (4, 0, 2):
        np.testing.assert_array_equal(order.epoch(epoch), epochs[epoch])
    for found in epochs:
        assert sorted(found[:10]) == sorted(found[10:]) == list(range(10))


# Batches to measure with


@pytest.mark.parametrize("form", [lambda problem: problem, read_one_by_one])
@pytest.mark.parametrize("batch_size", [7, 500])
def test_evaluation_batches_hold_every_example_once_in_order(form, batch_size):
    problem = make_two_datasets()
    batches = list(form(problem).evaluation_batches("test", batch_size))
    assert len(batches) == -(-70 // batch_size)
    for name, fields in problem.test.items():
        found = [batch[name]["x"][valid[name]] for batch, valid in batches]
        np.testing.assert_array_equal(np.concatenate(found), fields["x"])
    for batch, valid in batches:
        for name in ("many", "few"):
            assert valid[name].shape == (batch_size,)
            assert batch[name]["line"].shape == (batch_size,)
            assert np.isfinite(batch[name]["line"]).all()


def test_evaluation_batches_of_one_dataset():
    batches = list(make_problem().evaluation_batches("validation", 20))
    assert [valid[""].sum() for _, valid in batches] == [20, 20, 10]
    np.testing.assert_array_equal(batches[1][0]["x"], split(50, 1)["x"][20:40])


# The digest


def test_the_digest_of_arrays_is_of_every_byte():
    digest = make_problem().digest()
    assert digest == make_problem().digest() == make_problem(epochs=7).digest()
    assert digest == make_problem(train=split(200, 0) | {}).digest()
    for name in ("train", "validation", "test"):
        changed = dict(getattr(make_problem(), name))
        changed["x"] = changed["x"].copy()
        changed["x"][-1, 0] = np.nextafter(changed["x"][-1, 0], np.float32(9))
        assert make_problem(**{name: changed}).digest() != digest
    renamed = split(200, 0)
    renamed["z"] = renamed.pop("product")
    assert make_problem(train=renamed).digest() != digest
    halves = {field: values.astype(np.float64) for field, values in split(200, 0).items()}
    assert make_problem(train=halves).digest() != digest
    transposed = {field: np.asfortranarray(values) for field, values in split(200, 0).items()}
    assert make_problem(train=transposed).digest() == digest


def test_the_digest_of_data_that_are_read_is_of_their_number_and_of_some():
    reads = []

    class Counted(Spots):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    many = spots(train=Counted(1000, 0))
    reads.clear()
    digest = many.digest()
    assert sorted(set(reads)) == np.linspace(0, 999, 16).astype(int).tolist()
    assert digest == spots(train=Spots(1000, 0)).digest()
    assert digest != spots(train=Spots(999, 0)).digest()
    assert digest != spots(train=Spots(1000, 1)).digest()
    assert spots().digest() == spots(epochs=5, workers=2).digest()
    assert SIZES["train"] == 64


# Forms that are wrong


class Words(Spots):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"id": f"number {index}".encode()}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({}, r"The train split of the problem 'spots' must hold at least one field.*got \{\}"),
        ({"row": np.zeros(3), "column": np.zeros(2)}, r"got \{'row': 3, 'column': 2\}"),
        ({"row": np.zeros(0)}, r"at least one; got \{'row': 0\}"),
        ({"row": np.array(["a"])}, "must hold numbers; the field 'row' has dtype <U1"),
        ([], "must hold at least one example; got none"),
        ([1, 2], "mappings from field to array; number 0 is int"),
        (7, "have `__len__` and `__getitem__`, as a grain.MapDataset has; got int"),
        (np.zeros(3), "as a grain.MapDataset has; got ndarray"),
        (Words(4, 0), "the field 'id' has dtype .S8"),
        ({"a": {"row": np.zeros(2)}, "b": np.zeros(2)}, "got both: b are arrays"),
        (
            grain.MapDataset.source(Spots(4, 0)).filter(lambda example: False),
            "number 0 is NoneType. A filtered dataset has gaps",
        ),
    ],
)
def test_what_is_no_split_is_an_error(train, message):
    with pytest.raises(ValueError, match=message):
        spots(train=train)


def test_gaps_that_are_found_in_training():
    examples = [{"row": number, "column": 0} for number in range(4)]
    dataset = grain.MapDataset.source(examples).filter(lambda example: example["row"] < 3)
    with pytest.raises(ValueError, match=r"A filtered dataset has gaps"):
        first(spots(train=dataset, transformations=[], batch_size=4), 1, 0)
