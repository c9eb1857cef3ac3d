"""``mtl-jax compare --distributed``: two processes with four devices each."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 5
"""Seconds after which a peer is given up."""
MARGIN = 30
"""Seconds for starting Python and for ending it, on a busy machine."""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """Starts ``mtl-jax compare``; what still runs at the end of the test is killed."""
    started = []

    def start(*arguments, devices=4, epochs=2):
        command = [sys.executable, "-m", "mtl_jax", "compare", "toy_problem:make_problem"]
        command += ["--weightings", "equal", "--seeds", "1", "--no-alone", "--epochs", str(epochs)]
        command += ["--checkpoint-seconds", "0", "--runs-dir", str(tmp_path), *map(str, arguments)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "NPROC": "16",  # threads of XLA: each simulated device blocks one until its peers come
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


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
    begin = time.monotonic()
    _, errors = pair[0].communicate(timeout=TIMEOUT + MARGIN)
    assert pair[0].returncode not in (0, None), errors
    assert time.monotonic() - begin < TIMEOUT + MARGIN
    saved = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    assert max(saved) < 12
    finish(start_pair(start, "--name", "killed", "--resume", epochs=12))
    finish(start_pair(start, "--name", "undisturbed", epochs=12))
    assert read(tmp_path / "killed") == read(tmp_path / "undisturbed")


def test_a_process_that_does_not_come_ends_the_other(start):
    (child,) = [start_pair_member(start)]
    begin = time.monotonic()
    _, errors = child.communicate(timeout=TIMEOUT + MARGIN)
    assert child.returncode not in (0, None), errors
    assert time.monotonic() - begin < TIMEOUT + MARGIN


def start_pair_member(start):
    return start(
        *("--distributed", "--processes", 2, "--process", 0, "--peer-timeout", TIMEOUT),
        *("--coordinator", f"127.0.0.1:{free_port()}"),
    )


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
