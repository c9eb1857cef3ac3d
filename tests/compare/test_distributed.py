"""``mtl-jax compare --distributed``: two processes with four devices each."""

import json
import signal
import time

import numpy as np
import pytest
from processes import PATIENCE, TIMEOUT, Processes, assert_fails_in_time, free_port

EPOCHS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def start(folder):
    """Starts ``mtl-jax compare`` on the toy problem."""
    with Processes() as processes:

        def start(*arguments, devices=4):
            return processes.start(
                *("-m", "mtl_jax", "compare", "toy_problem:make_problem"),
                *("--weightings", "equal", "--seeds", 1, "--no-alone", "--epochs", EPOCHS),
                *("--checkpoint-seconds", 0, "--runs-dir", folder, *arguments),
                devices=devices,
            )

        yield start


@pytest.fixture(scope="module")
def pair(start):
    """What two processes print that nothing disturbs."""
    return finish(start_pair(start, "--name", "pair"))


def start_pair(start, *arguments, timeout=PATIENCE):
    port, both = free_port(), ("--distributed", "--processes", 2, "--peer-timeout", timeout)
    return [
        start(*both, "--coordinator", f"127.0.0.1:{port}", "--process", i, *arguments)
        for i in range(2)
    ]


def finish(children):
    outputs = [child.communicate(timeout=200) for child in children]
    assert [child.returncode for child in children] == [0] * len(children), outputs
    return [output for output, _ in outputs]


def read(folder):
    return json.loads((folder / "results.json").read_text())["toy"]


def numbers(found):
    (run,) = found["weightings"]["equal"]
    return [run[part][task] for part in ("train_loss", "test") for task in ("line", "square")]


def test_two_processes_find_what_one_finds(start, pair, folder):
    finish([start("--name", "one", "--data-parallel", devices=8)])
    np.testing.assert_allclose(
        numbers(read(folder / "pair")), numbers(read(folder / "one")), rtol=1e-5
    )
    first, second = pair
    assert "equal" in first
    assert "equal" not in second  # process 0 alone prints


def test_a_lost_process_ends_the_other_and_all_is_resumed(start, pair, folder):
    seconds = 15  # enough to meet, too
    first, second = start_pair(start, "--name", "killed", timeout=seconds)
    checkpoints = folder / "killed" / "checkpoints" / "toy" / "equal_seed0"

    def saved():
        return [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]

    while max(saved(), default=0) < 2:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    assert_fails_in_time(first, seconds)
    assert max(saved()) < EPOCHS
    finish(start_pair(start, "--name", "killed", "--resume"))
    assert read(folder / "killed") == read(folder / "pair")


def test_a_process_that_does_not_come_ends_the_other(start):
    child = start(
        *("--distributed", "--processes", 2, "--process", 0, "--peer-timeout", TIMEOUT),
        *("--coordinator", f"127.0.0.1:{free_port()}"),
    )
    assert_fails_in_time(child)


def test_what_is_missing_is_said_plainly(start):
    child = start("--distributed")
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 2
    assert "Give --coordinator HOST:PORT, --processes and --process" in errors
    assert "Traceback" not in errors
