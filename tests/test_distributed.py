"""Two real processes train as one does, and neither waits for a peer that is gone."""

import ast
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "distributed.py"
TIMEOUT = 5
"""Seconds after which a peer is given up."""
MARGIN = 20
"""Seconds for starting Python and for ending it, on a busy machine."""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def start():
    """Starts a process of the example; what still runs at the end of the test is killed."""
    started = []

    def start(port, processes, process, *, devices, steps):
        command = [sys.executable, str(EXAMPLE), "--coordinator", f"127.0.0.1:{port}"]
        command += ["--processes", str(processes), "--process", str(process)]
        command += ["--timeout", str(TIMEOUT), "--steps", str(steps)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "NPROC": "16",  # threads of XLA: each simulated device blocks one until its peers come
            "PYTHONPATH": str(EXAMPLE.parents[1]),
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


def lines_of(output):
    """What the example printed; its library for collectives on CPU prints, too."""
    return [line for line in output.splitlines() if line.startswith("step ")]


def losses_of(line):
    return list(ast.literal_eval(line.split(" ", 2)[2]).values())


def test_two_processes_get_what_one_gets(start):
    port = free_port()
    alone = start(free_port(), 1, 0, devices=8, steps=40)
    pair = [start(port, 2, process, devices=4, steps=40) for process in range(2)]
    outputs = [child.communicate(timeout=100) for child in (alone, *pair)]
    assert [child.returncode for child in (alone, *pair)] == [0, 0, 0], outputs
    expected, found, silent = (lines_of(output) for output, _ in outputs)
    assert len(expected) == len(found) == 2
    for line, expected_line in zip(found, expected, strict=True):
        np.testing.assert_allclose(losses_of(line), losses_of(expected_line), rtol=1e-5)
    assert sum(losses_of(found[1])) < 0.9 * sum(losses_of(found[0]))
    assert silent == []  # process 0 alone prints


def assert_fails_in_time(child):
    """It ends within the time-out, with a status other than 0."""
    begin = time.monotonic()
    _, errors = child.communicate(timeout=TIMEOUT + MARGIN)
    assert child.returncode not in (0, None), errors
    assert time.monotonic() - begin < TIMEOUT + MARGIN


def test_a_peer_that_does_not_come_ends_the_process(start):
    children = [start(free_port(), 2, process, devices=4, steps=1) for process in range(2)]
    for child in children:
        assert_fails_in_time(child)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_peer_that_dies_ends_the_process(start, killed):
    port = free_port()
    pair = [start(port, 2, process, devices=4, steps=10**9) for process in range(2)]
    while not (line := pair[0].stdout.readline()).startswith("step "):
        assert line, pair[0].communicate()
    pair[killed].send_signal(signal.SIGKILL)
    assert_fails_in_time(pair[1 - killed])
