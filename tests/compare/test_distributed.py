"""``mtl-jax compare --distributed``: two processes with four devices each."""

import json
import signal
import time

import numpy as np
import pytest
from processes import TIMEOUT, Processes, assert_fails_in_time, free_port


@pytest.fixture
def start(tmp_path):
    """Starts ``mtl-jax compare`` on the toy problem."""
    with Processes() as processes:

        def start(*arguments, devices=4, epochs=2):
            return processes.start(
                *("-m", "mtl_jax", "compare", "toy_problem:make_problem"),
                *("--weightings", "equal", "--seeds", 1, "--no-alone", "--epochs", epochs),
                *("--checkpoint-seconds", 0, "--runs-dir", tmp_path, *arguments),
                devices=devices,
            )

        yield start


def start_pair(start, *arguments, **options):
    port, both = free_port(), ("--distributed", "--processes", 2, "--peer-timeout", TIMEOUT)
    return [
        start(*both, "--coordinator", f"127.0.0.1:{port}", "--process", i, *arguments, **options)
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


def test_two_processes_find_what_one_finds(start, tmp_path):
    pair = start_pair(start, "--name", "pair")
    one = start("--name", "one", "--data-parallel", devices=8)
    first, second, _ = finish([*pair, one])
    np.testing.assert_allclose(
        numbers(read(tmp_path / "pair")), numbers(read(tmp_path / "one")), rtol=1e-5
    )
    assert "equal" in first
    assert "equal" not in second  # process 0 alone prints


def test_a_lost_process_ends_the_other_and_all_is_resumed(start, tmp_path):
    pair = start_pair(start, "--name", "killed", epochs=12)
    checkpoints = tmp_path / "killed" / "checkpoints" / "toy" / "equal_seed0"
    while not any(path.name.isdigit() and int(path.name) > 2 for path in checkpoints.glob("*")):
        assert pair[0].poll() is None, pair[0].communicate()
        time.sleep(0.02)
    pair[1].send_signal(signal.SIGKILL)
    assert_fails_in_time(pair[0])
    saved = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    assert max(saved) < 12
    finish(start_pair(start, "--name", "killed", "--resume", epochs=12))
    finish(start_pair(start, "--name", "undisturbed", epochs=12))
    assert read(tmp_path / "killed") == read(tmp_path / "undisturbed")


def test_a_process_that_does_not_come_ends_the_other(start):
    child = start(
        *("--distributed", "--processes", 2, "--process", 0, "--peer-timeout", TIMEOUT),
        *("--coordinator", f"127.0.0.1:{free_port()}"),
    )
    assert_fails_in_time(child)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distributed"], "Give --coordinator HOST:PORT, --processes and --process"),
        (["--distributed", "--peer-timeout", "0"], "--peer-timeout must be at least 1, got 0"),
    ],
)
def test_what_is_missing_is_said_plainly(arguments, message, start):
    child = start(*arguments)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 2
    assert message in errors
    assert "Traceback" not in errors
