import jax
import numpy as np
import pytest

from experiments.problems.cifar10_groups import cifar10_groups
from tests.experiments.tfds_folders import picture, write_cifar

# The classes in the order of their labels, and which are animals.
ANIMAL = {
    "airplane": 0,
    "automobile": 0,
    "bird": 1,
    "cat": 1,
    "deer": 1,
    "dog": 1,
    "frog": 1,
    "horse": 1,
    "ship": 0,
    "truck": 0,
}


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    folder = write_cifar(tmp_path_factory.mktemp("tfds"), "cifar10", {"label": 10}, 40, 20)
    return cifar10_groups(data_dir=str(folder))


def test_the_three_labels_of_every_class(problem):
    for split in (problem.train, problem.validation, problem.test):
        index = split["image"][:, 0, 0, 0].astype(int)
        np.testing.assert_array_equal(split["image"], [picture(i) for i in index])
        np.testing.assert_array_equal(split["class"], index % 10)
        np.testing.assert_array_equal(
            split["animal"], np.array(list(ANIMAL.values()))[split["class"]]
        )
        np.testing.assert_array_equal(split["above_5"], split["class"] > 5)
    assert set(problem.test["class"]) == set(range(10))
    assert [problem.size(part) for part in ("train", "validation", "test")] == [36, 4, 20]


def test_problem(problem):
    assert problem.labelled is None
    params, state = jax.eval_shape(problem.init, jax.random.key(0))
    losses, _ = jax.eval_shape(problem.losses, params, state, jax.random.key(0), problem.train)
    outputs = jax.eval_shape(problem.predict, params, state, problem.test)
    assert set(losses) == set(outputs) == set(problem.tasks)
    classes = {task: params["heads"][task]["bias"].size for task in problem.tasks}
    assert classes == {"class": 10, "animal": 2, "above_5": 2}
