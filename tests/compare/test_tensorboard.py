import dataclasses

import numpy as np
import pytest
from made_runs import made_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_problem import make_problem

from mtl_jax.__main__ import main
from mtl_jax.compare import compare_and_report
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
    steps = 6 * epochs
    return dataclasses.replace(
        run,
        test={task: values[:epochs] for task, values in run.test.items()},
        validation={task: values[:epochs] for task, values in run.validation.items()},
        train_losses={task: values[:epochs] for task, values in run.train_losses.items()},
        weights={task: values[:steps] for task, values in run.weights.items()},
        conflict={kind: values[:steps] for kind, values in run.conflict.items()},
        epoch_seconds=run.epoch_seconds[:epochs],
    )


@pytest.fixture
def run():
    weights = {"topic": np.arange(18.0), "depth": np.full(18, 0.5)}
    weights["depth"][4] = np.nan
    made = made_run("a/b", 1, {"topic": [0.1, 0.2, 0.4], "depth": [3, 2, 1]}, weights=weights)
    return dataclasses.replace(made, conflict={"share": np.linspace(0, 1, 18)})


def test_all_that_a_run_found_can_be_read_back(run, tmp_path):
    other = made_run("other", 0, {"topic": [1.0] * 3})
    with TensorBoard(tmp_path) as events:
        for epochs in (1, 2, 3):
            events.write(upto(run, epochs))
        events.write(other)
    assert {path.name for path in tmp_path.iterdir()} == {"a%2Fb_seed1", "other_seed0"}
    found = read(tmp_path / "a%2Fb_seed1")
    assert set(found) == {
        *(f"{kind}/{task}" for task in ("topic", "depth") for kind in ("validation", "test")),
        *(f"{kind}/{task}" for task in ("topic", "depth") for kind in ("train_loss", "weight")),
        "conflict/share",
    }
    expected = [(1, 0.1), (2, 0.2), (3, 0.4)]
    np.testing.assert_allclose(found["test/topic"], expected, rtol=1e-6)
    assert found["train_loss/depth"] == [(1, 2.0), (2, 2.0), (3, 1.0)]
    assert found["weight/topic"] == [(step, float(step)) for step in range(18)]
    assert [step for step, _ in found["weight/depth"]] == [s for s in range(18) if s != 4]
    assert read(tmp_path / "other_seed0")["test/topic"] == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_a_resumed_run_is_written_anew(run, tmp_path):
    with TensorBoard(tmp_path) as events:
        events.write(upto(run, 1))
        events.write(upto(run, 2))
    with TensorBoard(tmp_path) as events:
        events.write(run)  # it went on
    (folder,) = tmp_path.iterdir()
    assert [step for step, _ in read(folder)["test/topic"]] == [1, 2, 3]


def test_a_comparison_is_logged(tmp_path):
    (comparison,) = compare_and_report(
        [make_problem(epochs=2)], {}, tmp_path, seeds=[0], alone=False, log="tensorboard"
    )
    (run,) = comparison.runs["equal"]
    found = read(tmp_path / "tensorboard" / "toy" / "equal_seed0")
    for task in ("line", "square"):
        for kind, values in (("test", run.test), ("train_loss", run.train_losses)):
            expected = list(enumerate(values[task], start=1))
            np.testing.assert_allclose(found[f"{kind}/{task}"], expected, rtol=1e-6)
    assert found["weight/line"] == [(step, 1.0) for step in range(12)]


def test_the_command_line_has_it(monkeypatch):
    given = []
    monkeypatch.setattr(
        "mtl_jax.compare.command_line.compare_and_report",
        lambda *args, **options: given.append(options["log"]),
    )
    for more in ([], ["--log", "tensorboard"]):
        main(["compare", "toy_problem:make_problem", "--weightings", "equal", *more])
    assert given == [None, "tensorboard"]
