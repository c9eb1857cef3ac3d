"""``mtl-jax compare --distributed``: two processes with four devices each."""

import json
import signal
import time

import numpy as np
import pytest
from processes import PATIENCE, TIMEOUT, Processes, assert_fails_in_time, free_port

from mtl_jax.__main__ import main

EPOCHS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def command(folder):
    """``mtl-jax compare`` on the toy problem."""

    def command(*arguments):
        words = ("compare", "toy_problem:make_problem", "--weightings", "equal", "--seeds", 1)
        words += ("--no-alone", "--epochs", EPOCHS)
        return [str(word) for word in (*words, "--runs-dir", folder, *arguments)]

    return command


@pytest.fixture(scope="module")
def start(command):
    """Starts it in a process of its own."""
    with Processes() as processes:
        yield lambda *arguments: processes.start("-m", "mtl_jax", *command(*arguments), devices=4)


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
    return json.loads((folder / "results.json").read_text())


def numbers(found):
    (run,) = found["runs"]
    test = [run["metrics"]["test"][task]["squared error"] for task in ("line", "square")]
    return [*run["train_losses"].values(), *test]


def test_two_processes_find_what_one_finds(command, pair, folder):
    main(command("--name", "one", "--data-parallel"))  # with eight devices, too
    np.testing.assert_allclose(
        numbers(read(folder / "pair")), numbers(read(folder / "one")), rtol=1e-5
    )
    first, second = pair
    assert "equal" in first
    assert "equal" not in second  # process 0 alone prints


def test_a_lost_process_ends_the_other_and_all_is_resumed(start, pair, folder):
    seconds = 8  # enough to meet, too; the one that is left waits for them at full speed
    often = ("--checkpoint-seconds", 0)
    first, second = start_pair(start, "--name", "killed", *often, timeout=seconds)
    checkpoints = folder / "killed" / "checkpoints" / "toy" / "equal_seed0"

    def saved():
        return [int(path.name) // 6 for path in checkpoints.glob("*") if path.name.isdigit()]

    while max(saved(), default=0) < 2:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    assert_fails_in_time(first, seconds)
    assert max(saved()) < EPOCHS
    finish(start_pair(start, "--name", "killed", "--resume"))
    killed, pair = read(folder / "killed"), read(folder / "pair")
    assert killed.pop("command") != pair.pop("command")  # but for the names
    assert killed == pair


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
