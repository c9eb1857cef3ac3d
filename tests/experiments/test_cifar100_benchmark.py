"""The networks and the recipe of the CIFAR literature, and the program that runs the benchmark."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from made_runs import ACCURACY, made_results

import mtl_jax
from experiments.networks.cifar import VGG, NormalisedConv, ResNet
from experiments.problems.cifar100_benchmark import STANDARDISED
from experiments.problems.classification import classification, sgd_cosine
from experiments.problems.pictures import flip_and_shift
from experiments.recipes import cifar100_benchmark
from mtl_jax.compare import Task, compare, mean_of
from tests.experiments.tfds_folders import write_cifar

SMALL = ResNet(blocks=1, channels=(4,))


def parameters(encoder):
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(
    ("encoder", "features", "published"),
    [
        (ResNet(), 64, 272_474),  # 0.27 million in the paper
        (ResNet(blocks=9), 64, 855_770),
        (VGG(), 512, 14_728_266),
    ],
)
def test_published_numbers_of_parameters(encoder, features, published):
    """Published with a last layer for the 10 classes of CIFAR-10."""
    assert parameters(encoder) + (features + 1) * 10 == published


def test_normalisation_against_its_definition():
    x = jax.random.normal(jax.random.key(0), (5, 7, 6, 3))
    layer = NormalisedConv(4, stride=2)
    variables = layer.init(jax.random.key(1), x, train=False)
    kernel = variables["params"]["Conv_0"]["kernel"]
    layout = ("NHWC", "HWIO", "NHWC")
    convolved = np.float64(
        lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1), (1, 1)], dimension_numbers=layout)
    )
    mean, variance = convolved.mean(axis=(0, 1, 2)), convolved.var(axis=(0, 1, 2))
    y, updated = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, (convolved - mean) / np.sqrt(variance + 1e-5), atol=1e-5)
    running = updated["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(running["mean"], 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * variance, rtol=1e-5)
    y = layer.apply(variables | updated, x, train=False)
    expected = (convolved - 0.1 * mean) / np.sqrt(0.9 + 0.1 * variance + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.fixture(scope="module")
def small():
    """A problem of small random pictures with a network that has batch statistics."""
    rng = np.random.default_rng(0)
    split = {
        "image": rng.integers(0, 256, (8, 8, 8, 3), np.uint8),
        "fine": np.arange(8, dtype=np.int32) % 3,
        "coarse": np.arange(8, dtype=np.int32) % 2,
    }
    return classification(
        name="small",
        description="",
        classes={"fine": 20, "coarse": 2},
        splits=dict.fromkeys(("train", "validation", "test"), split),
        inputs=STANDARDISED,
        encoder=SMALL,
        optimizer=sgd_cosine,
        learning_rate=0.1,
        epochs=3,
        batch_size=8,
    )


def test_training_uses_the_batch_and_metrics_the_running_statistics(small):
    params, state = jax.jit(small.init)(jax.random.key(0))
    other = jax.tree.map(lambda leaf: leaf + 3 * jnp.arange(leaf.size)[::-1], state)
    batch = {field: jnp.asarray(values) for field, values in small.train.items()}
    losses_fn = jax.jit(small.losses)
    losses, new_state = losses_fn(params, state, jax.random.key(1), batch)
    same_losses, _ = losses_fn(params, other, jax.random.key(1), batch)
    assert losses == same_losses
    moved = jax.tree.map(lambda old, new: float(jnp.abs(new - old).max()), state, new_state)
    assert all(change > 0 for change in jax.tree.leaves(moved))

    predict = jax.jit(small.predict)
    shifted = batch | {"image": batch["image"].at[4:].set(0)}
    found = predict(params, state, batch)["fine"]
    np.testing.assert_allclose(predict(params, state, shifted)["fine"][:4], found[:4], rtol=1e-5)
    assert not np.allclose(predict(params, other, batch)["fine"], found, atol=0.1)


def test_the_comparison_carries_the_running_statistics(small):
    """With a learning rate of 0 and one batch n times over they are 1 - 0.9^n of the batch's."""

    def total(model_state):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(model_state))

    def predict(params, model_state, batch):
        return dict.fromkeys(small.tasks, jnp.full(len(batch["fine"]), total(model_state)))

    statistic = Task(mean_of(lambda output, label: output, "sum of the statistics"))
    problem = dataclasses.replace(
        small, learning_rate=0.0, predict=predict, tasks=dict.fromkeys(small.tasks, statistic)
    )
    start = total(jax.jit(problem.init)(jax.random.key(0))[1])  # 0 and 1, whatever the key
    weightings = {"upgrad": lambda settings: mtl_jax.upgrad()}
    for run in compare(problem, weightings, seeds=[0], alone=False).runs:
        assert run.skipped == 0
        found = np.array(run.metrics["test"]["fine"]["sum of the statistics"]) - start
        assert abs(found[0]) > 0.1
        expected = (1 - 0.9 ** np.arange(1, 4)) / 0.1
        np.testing.assert_allclose(found / found[0], expected, rtol=1e-3)


def test_recipe_against_its_definition():
    optimizer = sgd_cosine(0.1, num_steps=4)
    params, momentum = np.array([2.0, -1.0]), 0.0
    found, opt_state = jnp.array(params), optimizer.init(jnp.array(params))
    for step in range(4):
        gradient = np.array([0.5, 0.3]) * (step + 1)
        momentum = 0.9 * momentum + gradient + 5e-4 * params
        params = params - 0.05 * (1 + np.cos(np.pi * step / 4)) * momentum
        updates, opt_state = optimizer.update(jnp.array(gradient), opt_state, found)
        found = found + updates
    np.testing.assert_allclose(found, params, rtol=1e-6)


def test_pictures_are_standardised_and_their_border_is_black():
    levels = np.array([[0, 0, 0], [129, 124, 112], [255, 255, 255]], np.uint8)
    pictures = np.broadcast_to(levels[:, None, None], (3, 32, 32, 3))
    standardised = STANDARDISED({"image": pictures})
    black, mean, white = standardised[:, 0, 0]
    np.testing.assert_allclose(black, STANDARDISED.black.ravel(), rtol=1e-6)
    assert np.abs(mean).max() < 0.02
    many = jnp.repeat(standardised[2:], 50, axis=0)
    changed = np.asarray(flip_and_shift(jax.random.key(0), many, STANDARDISED.black))
    is_black, is_white = (np.isclose(changed, level, atol=1e-5).all(-1) for level in (black, white))
    assert (is_black ^ is_white).all()
    rows, columns = (32 - is_white.any(axis=axis).sum(axis=1) for axis in (2, 1))
    assert set(rows) | set(columns) == {0, 1, 2, 3, 4}


def test_pictures_are_flipped_left_to_right_and_shifted():
    rows, columns = np.meshgrid(np.arange(1, 33), np.arange(1, 33), indexing="ij")
    own = np.stack([rows, columns, rows], axis=-1).astype(np.float32)
    padded = np.pad(own, ((4, 4), (4, 4), (0, 0)))
    flipped = np.pad(own[:, ::-1], ((4, 4), (4, 4), (0, 0)))
    possible = {
        one[i : i + 32, j : j + 32].tobytes(): (number, i, j)
        for number, one in enumerate((padded, flipped))
        for i in range(9)
        for j in range(9)
    }
    many = jnp.tile(jnp.asarray(own), (300, 1, 1, 1))
    changed = np.asarray(flip_and_shift(jax.random.key(0), many))
    drawn = np.array([possible[picture.tobytes()] for picture in changed])
    assert 100 < drawn[:, 0].sum() < 200
    assert {*drawn[:, 1]} == {*drawn[:, 2]} == {*range(9)}


def test_a_short_run_of_the_benchmark(tmp_path, capsys, monkeypatch):
    labels = {"label": 100, "coarse_label": 20}
    folder = write_cifar(tmp_path / "tfds", "cifar100", labels, 41, 12)
    monkeypatch.setattr("experiments.problems.cifar100_benchmark.ResNet", lambda: SMALL)
    arguments = ["--networks", "resnet20", "--weightings", "pcgrad", "--epochs", "2"]
    arguments += ["--seeds", "1", "--batch-size", "20"]
    arguments += ["--data-dir", str(folder), "--runs-dir", str(tmp_path)]
    cifar100_benchmark.main(arguments)
    printed = capsys.readouterr().out
    assert "40 training pictures, 2 epochs" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| pcgrad"))
    assert "64.53" in row
    assert row.split("|")[2].strip() == "1"  # seed
    cifar100_benchmark.main([*arguments, "--seeds", "2"])  # goes on with the second
    more = capsys.readouterr().out
    row = next(line for line in more.splitlines() if line.startswith("| pcgrad"))
    assert row.split("|")[2].strip() == "2"
    assert "pcgrad, seed 0: finished" not in more
    assert "equal" in printed
    assert (
        'measured_at": "parameters'
        in (tmp_path / "cifar100_benchmark" / "results.json").read_text()
    )


def test_the_table_has_the_best_and_the_last_epoch():
    rows = {"equal": {"fine": [0.0] * 3}, "pcgrad": {"fine": [0.0] * 3}}
    results = made_results(rows, {"fine": ACCURACY}, name="cifar100_resnet20")
    courses = {0: [0.5, 0.7, 0.6], 1: [0.6, 0.5, 0.4], 2: [0.1, 0.2, 0.9]}
    for run in results.runs:
        run.metrics["test"]["fine"]["accuracy"] = courses[run.seed]
        failed = run.weighting == "equal" or run.seed == 2
        run.failure = "it did" if failed else None
    table = cifar100_benchmark.fine_accuracies(results, "cifar100_resnet20")
    equal, pcgrad = ([e.strip() for e in line.split("|")] for line in table.splitlines()[2:])
    assert equal[1:5] == ["equal", "0", "failed", "failed"]
    assert pcgrad[1:6] == ["pcgrad", "2", "65.00 ± 7.07", "50.00 ± 14.14", "64.53"]
