"""What the code of single pages must have found: given the names after each of its blocks."""

import re

import jax
import numpy as np
import pytest
from pages import PAGES
from trees import assert_trees_close

import mtl_jax
from mtl_jax.compare import digest
from tests.experiments.tfds_folders import picture, write_cifar


def no_step_was_skipped(after, tmp_path):
    values = after[-1].values()
    assert not any(int(v.skipped) for v in values if isinstance(v, mtl_jax.TrainState))


def readme(after, tmp_path):
    first, second = after
    assert sorted(first["value"].weights) == ["depth", "normals"]
    assert int(first["state"].step) == 1
    params, batch, gradient = first["state"].params, first["batch"], second["gradient"]
    value, grads, _ = jax.jit(gradient)(params, gradient.init(params, batch), batch)
    assert value.gramian.shape == (2, 2)
    assert all(weight > 0 for weight in value.weights.values())
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def index(after, tmp_path):
    value, losses_fn = after[0]["value"], after[0]["losses_fn"]
    assert value.weights["product"] > 1 > value.weights["sum"]
    assert sum(value.weights.values()) == pytest.approx(2, rel=1e-6)
    before = losses_fn(after[0]["params"], after[0]["batch"])
    assert all(value.losses[task] < before[task] / 3 for task in before)
    runs = after[1]["results"].runs
    assert {run.weighting for run in runs} == {"equal", "adaptive", "sum alone", "product alone"}
    assert all(run.failure is None for run in runs)
    (metrics,) = {tuple(run.metrics["test"]["product"]) for run in runs if run.task != "sum"}
    assert metrics == ("absolute error", "R2")


def representation(after, tmp_path):
    value = after[0]["value"]
    assert value.gramian.shape == (2, 2)
    assert all(weight >= 0.499 for weight in value.weights.values())  # 1/K and more
    params, batch, gradient = (after[1][name] for name in ("params", "batch", "gradient"))
    encoder_rows, *_ = jax.jit(gradient)(params, gradient.init(params, batch), batch)
    assert not np.allclose(encoder_rows.gramian, value.gramian)
    frozen = after[-2]  # which count neither in the Gramian nor for the optimizer
    np.testing.assert_array_equal(frozen["frozen_state"].params["stem"], np.eye(4))
    assert np.any(frozen["frozen_state"].params["encoder"] != params["encoder"])
    np.testing.assert_allclose(frozen["value"].gramian, encoder_rows.gramian, rtol=1e-4)
    diagnosed = after[-1]["value"]
    assert diagnosed.weights == {"depth": 1, "normals": 1}
    assert np.all(np.abs(diagnosed.diagnostics.cosines) <= 1 + 1e-6)


def missing_labels(after, tmp_path):
    assert after[0]["value"].weights == {"depth": 1, "normals": 0}
    assert after[0]["state"].skipped == 0
    assert after[1]["value"].weights == {"data": 0, "positive": 1}  # without leaving it out
    assert sum(after[2]["value"].weights.values()) == pytest.approx(2, rel=1e-6)


def many_tasks(after, tmp_path):
    assert after[0]["value"].weights["targets"].shape == (300,)
    assert after[0]["value"].weights["targets"][7] == 0
    state, tasks = after[2]["state"], after[2]["state"].weighting_state.tasks
    assert (int(state.step), int(state.skipped)) == (6, 0)
    steps = dict(zip(tasks.names, np.asarray(state.weighting_state.steps), strict=True))
    assert (steps["targets/0"], steps["targets/299"], steps["largest"]) == (6, 4, 1)


def own_weighting(after, tmp_path):
    assert after[1]["state"].skipped == 0
    value, gramian = after[2]["value"], after[2]["value"].gramian
    lengths = np.sqrt(np.diagonal(gramian))
    assert float(value.weights["a"] * lengths[0]) == pytest.approx(
        float(value.weights["b"] * lengths[1]), rel=1e-5
    )
    params, x = after[3]["params"], after[3]["x"]
    rows = jax.jacobian(after[3]["losses_fn"])(params, x)
    assert_trees_close(after[3]["value"].weights, value.weights, rtol=1e-5, atol=0)  # one number
    total = sum(map(float, rows.values()))
    agrees = {task: 1.0 if row * total > 0 else 0.5 for task, row in rows.items()}
    assert {task: float(weight) for task, weight in after[4]["value"].weights.items()} == agrees
    assert float(after[5]["grads"]) == pytest.approx(float(max(rows.values(), key=abs)))
    weights = after[6]["value"].weights
    assert (weights["a"], weights["b"]) == pytest.approx((0.5, 1.5), rel=1e-5)
    assert isinstance(after[7]["weightings"]["rising"](None), mtl_jax.Weighting)


def moving(after, tmp_path):
    first, second = after
    assert first["value"].weights == {"depth": 1, "normals": pytest.approx(0.3)}
    assert (second["state"].step, second["state"].skipped) == (1, 0)
    assert second["value"].measured


def physics(after, tmp_path):
    """The figures of the last table are those that the code prints."""
    names = after[-1]
    assert (names["state"].step, names["state"].skipped) == (200, 0)
    assert (names["ntk_state"].step, names["ntk_state"].skipped) == (200, 0)
    rows = re.findall(r"^\| (?:at|after) .*? \| (.*) \|$", PAGES["docs/physics.md"], re.MULTILINE)
    for row, params in zip(rows, (names["params"], names["state"].params), strict=True):
        said = [float(number) for cell in row.split("|") for number in cell.split("/")]
        by_loss, by_root = names["by_loss"](params), names["by_root"](params)
        printed = (by_loss, by_root, names["ntk_weights"](params, names["points"]))
        found = [weights[term] for weights in printed for term in ("initial", "equation")]
        np.testing.assert_allclose(said, found, rtol=0.1)  # 200 steps may round apart
    # What was measured at steps 0 and 100, averaged.
    weights, state = names["ntk_value"].weights, names["ntk_state"].weighting_state.inner
    np.testing.assert_array_equal(state.updates, 2)
    assert weights["initial"] > 5 > 1 > weights["equation"]


def scale(after, tmp_path):
    states = [names.get("state") for names in after]
    for state in states[1:]:
        assert int(state.step) == 3
        assert int(state.skipped) == 0
        assert_trees_close(
            jax.device_get(state.params), jax.device_get(states[1].params), rtol=1e-5, atol=1e-6
        )
    in_parts = states[2]
    for leaf in (in_parts.params["encoder"], in_parts.opt_state[0].mu["encoder"]):
        assert leaf.sharding.spec == jax.sharding.PartitionSpec("data")
    replicas = after[-1]["states"]
    assert replicas.params["encoder"].sharding.spec == jax.sharding.PartitionSpec("seed")
    np.testing.assert_array_equal(replicas.step, 3)
    np.testing.assert_array_equal(replicas.skipped, 0)
    assert len(np.unique(jax.device_get(replicas.params["encoder"])[:, 0, 0])) == jax.device_count()


def accumulation(after, tmp_path):
    names = after[-1]
    value, state = after[0]["value"], after[0]["state"]
    params, batch, weighting = names["params"], names["batch"], mtl_jax.adaptive()
    losses = names["losses_fn"](params, batch)
    assert_trees_close(value.losses, losses, rtol=1e-5, atol=0)
    expected = weighting.update(losses, weighting.init(losses))[0]
    assert_trees_close(value.weights, expected, rtol=1e-5, atol=0)
    assert (state.step, state.skipped) == (1, 0)
    assert_trees_close(after[2]["value"].losses, losses, rtol=1e-5, atol=0)
    assert names["memory"][8] < names["memory"][1] / 4
    multi_steps = after[4]["state"]
    assert (multi_steps.step, multi_steps.opt_state.gradient_step) == (8, 1)
    changed = jax.tree.map(lambda a, b: np.any(a != b), multi_steps.params, params)
    assert all(jax.tree.leaves(changed))


def checkpoints(after, tmp_path):
    """A run resumes to the bit, and finds damage."""
    train = after[-1]["train"]
    undisturbed = train(30, tmp_path / "undisturbed")
    first = train(15, tmp_path / "resumed")
    assert int(first.step) == 15
    resumed = train(30, tmp_path / "resumed")
    assert digest(resumed) == digest(undisturbed) != digest(first)
    (tmp_path / "resumed" / "30" / "digest" / "metadata").write_text('"0"')
    with pytest.raises(ValueError, match="step 30 .* is damaged"):
        train(40, tmp_path / "resumed")


def problem(after, tmp_path):
    """Its photographs are turned over in training alone, and tensorflow-datasets is read."""
    tasks, problem = after[0]["tasks"], after[1]["problem"]
    assert [metric.name for metric in tasks["segments"].metrics] == ["mIoU", "pixel accuracy"]
    batches = iter(problem.train_batches(seed=0))
    images = {image.tobytes() for _ in range(9) for image in next(batches)["image"]}
    batches.close()
    originals = [problem.train[index]["image"] for index in range(300)]
    assert images < {image.tobytes() for o in originals for image in (o, o[:, ::-1])}
    assert 0 < len(images - {image.tobytes() for image in originals}) < 288
    batch, _ = next(problem.evaluation_batches("test", 100))
    np.testing.assert_array_equal(batch["image"][7], problem.test[7]["image"])

    labels = {"label": 100, "coarse_label": 20}
    folder = write_cifar(tmp_path, "cifar100", labels, num_train=40, num_test=12)
    splits = after[2]["cifar100"](str(folder))
    assert [len(split) for split in splits] == [36, 4, 12]
    np.testing.assert_array_equal(splits[1][0]["image"], picture(36))
    assert splits[2][0]["fine"] == 40


def tuning(after, tmp_path):
    (names,) = after
    chosen = names["tuning"].chosen("focused")
    assert 0.5 <= chosen.parameters["gamma"] <= 5
    runs = names["results"].of(names["problem"].name)
    assert list(runs) == ["equal", "constant", "dwa", "focused"]


def evaluation(after, tmp_path):
    """The numbers in the text are those that the code gives."""
    names = after[-1]
    topic, role = names["topic"], names["role"]
    assert (topic.verdict, role.verdict) == ("better", "undecided")
    page = " ".join(PAGES["docs/evaluation.md"].split())
    assert f"gained {topic.difference:.1f} points" in page
    assert f"p-value is {topic.corrected_p_value:.4f}" in page
    assert f"{-role.difference:.1f} points were lost" in page
    low, high = role.interval
    assert f"reaches from {-low:.1f} points to {high:.1f} points of gain" in page
    assert f"a gain of {100 * names['gain']:.1f} %" in page
    assert f"FAMO: {100 * names['drop']:.1f} %" in page
    assert names["ranks"] == {"equal": 1.5, "adaptive": 1.5}
    assert names["front"].all()
    (a, b), (c, d) = np.subtract(names["points"], [50, 80])  # the first lower, the second wider
    assert names["volume"] == pytest.approx(a * b + c * d - a * d)


def how_it_works(after, tmp_path):
    assert after[0]["value"].weights == after[0]["weights"]
    weights = after[1]["value"].weights
    assert {task: float(weight) for task, weight in weights["heads/a"].items()} == {"a": 1, "b": 0}
    assert all(weight > 0 for weight in weights["encoder/second"].values())
    state, params = after[2]["state"], after[2]["layers"]
    assert (state.step, state.skipped) == (3, 0)
    assert float(after[2]["value"].weights["a"] + after[2]["value"].weights["b"]) == 1
    state, params = after[3]["state"], after[3]["params"]
    assert (state.step, state.skipped) == (1, 0)
    assert float(state.params) != float(params)


CHECKS = {
    "README.md": readme,
    "docs/index.md": index,
    "docs/how_it_works.md": how_it_works,
    "docs/representation.md": representation,
    "docs/many_tasks.md": many_tasks,
    "docs/missing_labels.md": missing_labels,
    "docs/own_weighting.md": own_weighting,
    "docs/moving.md": moving,
    "docs/physics.md": physics,
    "docs/scale.md": scale,
    "docs/accumulation.md": accumulation,
    "docs/checkpoints.md": checkpoints,
    "docs/evaluation.md": evaluation,
    "docs/problem.md": problem,
    "docs/tuning.md": tuning,
}
