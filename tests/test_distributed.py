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

EXAMPLE = pathlib.Path(__file__).parents[1] / "docs" / "examples" / "distributed.py"
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
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        environment["PYTHONPATH"] = str(EXAMPLE.parents[2])
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def losses_of(output):
    return [list(ast.literal_eval(line.split(" ", 1)[1]).values()) for line in output.splitlines()]


def test_two_processes_get_what_one_gets(start):
    port = free_port()
    alone = start(free_port(), 1, 0, devices=8, steps=200)
    pair = [start(port, 2, process, devices=4, steps=200) for process in range(2)]
    expected, _ = alone.communicate(timeout=60)
    outputs = [child.communicate(timeout=60) for child in pair]
    assert [child.returncode for child in (alone, *pair)] == [0, 0, 0], outputs
    assert outputs[1][0] == ""  # process 0 alone prints
    losses = losses_of(outputs[0][0])
    np.testing.assert_allclose(losses, losses_of(expected), rtol=1e-5)
    assert len(losses) == 2
    assert sum(losses[1]) < 0.9 * sum(losses[0])


def seconds_until_it_fails(child):
    """How long the process still ran; an error if it did not end, or ended well."""
    begin = time.monotonic()
    _, errors = child.communicate(timeout=TIMEOUT + MARGIN)
    assert child.returncode != 0, errors
    return time.monotonic() - begin


@pytest.mark.parametrize("process", [0, 1])
def test_a_peer_that_does_not_come_ends_the_process(start, process):
    child = start(free_port(), 2, process, devices=4, steps=1)
    assert seconds_until_it_fails(child) < TIMEOUT + MARGIN


@pytest.mark.parametrize("killed", [0, 1])
def test_a_peer_that_dies_ends_the_process(start, killed):
    port = free_port()
    pair = [start(port, 2, process, devices=4, steps=10**9) for process in range(2)]
    assert pair[0].stdout.readline().startswith("100 ")
    pair[killed].send_signal(signal.SIGKILL)
    assert seconds_until_it_fails(pair[1 - killed]) < TIMEOUT + MARGIN
