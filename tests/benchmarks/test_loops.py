import json

import numpy as np
import pytest

from benchmarks import loops


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setenv("MTL_JAX_LOOPS", "1")
    monkeypatch.setattr(loops, "WORKERS", 0)


def test_both_loops_train_the_same_network(tmp_path, capsys):
    """A few steps of each."""
    loops.main(["--rounds", "2", "--steps", "2", "--out", str(tmp_path / "loops.json")])
    found = json.loads((tmp_path / "loops.json").read_text())
    assert list(found) == ["nn.Conv", "dense", "Grain"]
    for times in found.values():
        assert np.shape(times["by hand"]) == np.shape(times["comparison"]) == (2,)
        assert np.min([times["by hand"], times["comparison"]]) > 0
    assert [times["steps_per_call"] for times in found.values()] == [1, 100, 1]
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 5
    assert lines[0].split("|")[1].strip() == "problem"


def test_table():
    times = {"by hand": [1.0, 2.0, 4.0], "comparison": [1.1, 2.0, 6.0], "steps_per_call": 9}
    row = loops.table({"one": times}).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "one",
        "2",
        "2",
        "1.10 [1.05, 1.30]",
        "9",
    ]


@pytest.mark.parametrize("name", ["nn.Conv", "dense", "Grain"])
def test_the_losses_of_both_loops_are_those_of_the_problem(name):
    problem, batches = loops.problems(2)[name]
    (batch, *_) = batches(problem, 1)
    params, _ = problem.init(loops.jax.random.key(0))
    losses, _ = problem.losses(params, {}, None, batch)
    assert all(1.5 < loss < 4 for loss in losses.values())  # log(10) for ten classes
