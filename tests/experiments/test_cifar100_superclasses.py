import jax
import numpy as np
import pytest

from experiments.problems.cifar100 import cifar100_splits
from experiments.problems.cifar100_superclasses import (
    SUPERCLASSES,
    cifar100_superclasses,
    one_task_a_superclass,
)
from experiments.problems.classification import MISSING
from tests.experiments.tfds_folders import write_cifar


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    labels = {"label": 100, "coarse_label": 20}
    return str(write_cifar(tmp_path_factory.mktemp("tfds"), "cifar100", labels, 100, 20))


@pytest.fixture(scope="module")
def problem(data_dir):
    return cifar100_superclasses(data_dir)


def test_a_picture_has_the_label_of_its_own_superclass_alone(problem, data_dir):
    assert list(problem.tasks) == list(SUPERCLASSES)
    assert len(set(SUPERCLASSES)) == 20
    for part, source in cifar100_splits(data_dir).items():
        split = getattr(problem, part)
        np.testing.assert_array_equal(split["image"], source["image"])
        labels = np.stack([split[task] for task in SUPERCLASSES], axis=1)
        np.testing.assert_array_equal((labels != MISSING).sum(axis=1), 1)
        np.testing.assert_array_equal((labels != MISSING).argmax(axis=1), source["coarse"])
        # The classes of a superclass are, in these data, 20 apart.
        np.testing.assert_array_equal(labels.max(axis=1), source["fine"] // 20)


def test_five_classes_in_each_superclass_whatever_their_labels():
    """As in CIFAR-100, where the fine labels of a superclass lie anywhere."""
    rng = np.random.default_rng(0)
    superclass = rng.permutation(np.repeat(np.arange(20), 5))
    fine = rng.permutation(np.repeat(np.arange(100), 3))
    image = np.zeros((300, 2, 2, 3), np.uint8)
    splits = {"train": {"image": image, "fine": fine, "coarse": superclass[fine]}}
    tasks = one_task_a_superclass(splits)["train"]
    for number, task in enumerate(SUPERCLASSES):
        own = superclass[fine] == number
        assert (tasks[task][~own] == MISSING).all()
        pairs = set(zip(fine[own].tolist(), tasks[task][own].tolist(), strict=True))
        assert sorted(position for _, position in pairs) == [0, 1, 2, 3, 4]


def test_tasks_without_an_example_in_the_batch_are_absent(problem):
    batch = {field: values[:6] for field, values in problem.train.items()}
    there = {task for task in SUPERCLASSES if (batch[task] != MISSING).any()}
    present = problem.present(batch)
    assert {task for task, some in present.items() if some} == there
    assert 0 < len(there) < 20


def test_problem(problem):
    params, state = jax.eval_shape(problem.init, jax.random.key(0))
    assert state == {}
    batch = {field: values[:6] for field, values in problem.train.items()}
    losses, _ = jax.eval_shape(problem.losses, params, state, jax.random.key(0), batch)
    outputs = jax.eval_shape(problem.predict, params, state, batch)
    assert set(losses) == set(outputs) == set(SUPERCLASSES)
    assert {kernel["kernel"].shape for kernel in params["heads"].values()} == {(128, 5)}
