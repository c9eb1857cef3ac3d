import dataclasses

import numpy as np
import pytest
from made_runs import made_problem, made_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_jax.compare.results import read_run, write_run
from mtl_jax.compare.tensorboard import TensorBoard


def read(folder):
    """Every scalar of the event files in a folder: ``{tag: [(step, value), ...]}``."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def upto(run, epochs):
    """The run as it was after so many epochs."""
    steps = len(run.weights["topic"]) // run.epochs * epochs
    return dataclasses.replace(
        run,
        metrics={
            split: {
                task: {metric: values[:epochs] for metric, values in metrics.items()}
                for task, metrics in tasks.items()
            }
            for split, tasks in run.metrics.items()
        },
        train_losses={task: values[:epochs] for task, values in run.train_losses.items()},
        weights={task: values[:steps] for task, values in run.weights.items()},
        conflict={kind: values[:steps] for kind, values in run.conflict.items()},
    )


@pytest.fixture
def run():
    weights = {"topic": np.arange(18.0), "depth": np.full(18, 0.5)}
    weights["depth"][4] = np.nan
    return made_run(
        made_problem(name="a problem"),
        "a/b",
        1,
        {"topic": [0.1, 0.2, 0.4], "depth": [3, 2, 1]},
        weights=weights,
        conflict={"share": np.linspace(0, 1, 18)},
    )


def test_all_that_a_run_found_can_be_read_back(run, tmp_path):
    other = made_run(made_problem(name="a problem"), "other", 0, {"topic": [1.0] * 3})
    with TensorBoard(tmp_path) as events:
        for epochs in (1, 2, 3):
            events.write(upto(run, epochs))
        events.write(other)
    folders = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")}
    assert folders == {"a problem/a%2Fb_seed1", "a problem/other_seed0"}
    found = read(tmp_path / "a problem" / "a%2Fb_seed1")
    assert set(found) == {
        *(f"{split}/topic/accuracy" for split in ("validation", "test")),
        *(f"{split}/depth/error" for split in ("validation", "test")),
        *(f"{kind}/{task}" for task in ("topic", "depth") for kind in ("train_loss", "weight")),
        "conflict/share",
    }
    expected = [(1, 0.1), (2, 0.2), (3, 0.4)]
    np.testing.assert_allclose(found["test/topic/accuracy"], expected, rtol=1e-6)
    assert found["train_loss/depth"] == [(1, 2.0), (2, 2.0), (3, 1.0)]
    assert found["weight/topic"] == [(step, float(step)) for step in range(18)]
    assert [step for step, _ in found["weight/depth"]] == [s for s in range(18) if s != 4]
    topic = read(tmp_path / "a problem" / "other_seed0")["test/topic/accuracy"]
    assert topic == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_a_resumed_run_is_written_anew(run, tmp_path):
    with TensorBoard(tmp_path) as events:
        events.write(upto(run, 1))
        events.write(upto(run, 2))
    with TensorBoard(tmp_path) as events:
        events.write(run)  # it went on
    (folder,) = tmp_path.glob("*/*")
    assert [step for step, _ in read(folder)["test/topic/accuracy"]] == [1, 2, 3]


def test_a_run_that_was_read_has_its_curves_over_the_same_steps(run, tmp_path):
    long = dataclasses.replace(run, weights={"topic": np.arange(3000.0)}, conflict={})
    with TensorBoard(tmp_path / "live") as events:
        for epochs in (1, 2, 3):
            events.write(upto(long, epochs))
    with TensorBoard(tmp_path / "again") as events:
        events.write(read_run(write_run(tmp_path, long)))
    live, again = (
        read(tmp_path / name / "a problem" / "a%2Fb_seed1")["weight/topic"]
        for name in ("live", "again")
    )
    assert (len(live), len(again)) == (150, 200)
    for points in (live, again):
        np.testing.assert_allclose(*np.transpose(points), atol=0.5)  # a step's value is its number
