import shutil

import jax
import numpy as np
import pytest

from experiments.problems import build_problem
from experiments.problems.cifar100 import cifar100
from tests.experiments.tfds_folders import picture, write_cifar

NUM_TRAIN, NUM_TEST = 40, 12


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    labels = {"label": 100, "coarse_label": 20}
    return write_cifar(tmp_path_factory.mktemp("tfds"), "cifar100", labels, NUM_TRAIN, NUM_TEST)


@pytest.fixture(scope="module")
def problem(data_dir):
    return cifar100(data_dir=str(data_dir))


def test_pictures_keep_their_labels_and_splits_share_none(problem):
    indices = []
    for split in (problem.train, problem.validation, problem.test):
        index = split["image"][:, 0, 0, 0].astype(int)
        assert split["image"].dtype == np.uint8
        np.testing.assert_array_equal(split["image"], [picture(i) for i in index])
        np.testing.assert_array_equal(split["fine"], index % 100)
        np.testing.assert_array_equal(split["coarse"], index % 20)
        indices.append(set(index.tolist()))
    assert [len(part) for part in indices] == [36, 4, NUM_TEST]
    assert indices[2] == set(range(NUM_TRAIN, NUM_TRAIN + NUM_TEST))
    assert indices[0] | indices[1] == set(range(NUM_TRAIN))


def test_the_same_validation_split_at_every_call(problem, data_dir):
    again = cifar100(data_dir=str(data_dir))
    np.testing.assert_array_equal(problem.validation["fine"], again.validation["fine"])


def test_training_pictures_are_changed_by_the_key_alone(problem):
    params, state = jax.jit(problem.init)(jax.random.key(0))
    batch = {field: values[:8] for field, values in problem.train.items()}
    task_losses = jax.jit(problem.losses)
    losses = [
        float(task_losses(params, state, jax.random.key(seed), batch)[0]["fine"])
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_problem(problem, check_problem):
    assert problem.labelled is None
    check_problem(problem.with_settings(batch_size=16), steps=12)


@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        ("cifar100", "cifar100"),
        ("cifar100_superclasses", "cifar100"),
        ("cifar100_resnet20", "cifar100"),
        ("cifar100_vgg16", "cifar100"),
        ("cifar10_groups", "cifar10"),
        ("ag_news", "ag_news_subset"),
    ],
)
def test_nothing_prepared(name, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as error:
        build_problem(name, str(tmp_path))
    message = str(error.value)
    for part in (
        str(tmp_path / dataset),
        "'.[prepare]'",
        f"tfds.builder({dataset!r}, data_dir={str(tmp_path)!r}",
        "--data-dir",
    ):
        assert part in message
    assert not list(tmp_path.iterdir())


def test_prepared_in_another_format(data_dir, tmp_path):
    folder = shutil.copytree(data_dir, tmp_path / "data")
    (about,) = folder.rglob("dataset_info.json")
    about.write_text(about.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="in another format than ArrayRecord") as error:
        build_problem("cifar100", str(folder))
    build = "tfds.builder('cifar100', data_dir='FOLDER', file_format='array_record')"
    assert build in str(error.value)
