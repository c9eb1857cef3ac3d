"""Two real processes train as one does, and neither waits for a peer that is gone."""

import ast
import signal

import numpy as np
import pytest
from processes import PATIENCE, ROOT, TIMEOUT, Processes, assert_fails_in_time, free_port

EXAMPLE = ROOT / "examples" / "distributed.py"


@pytest.fixture
def start():
    """Starts a process of the example."""
    with Processes() as processes:

        def start(port, number, process, *, devices, steps, timeout):
            return processes.start(
                *(EXAMPLE, "--coordinator", f"127.0.0.1:{port}"),
                *("--processes", number, "--process", process),
                *("--timeout", timeout, "--steps", steps),
                devices=devices,
            )

        yield start


def lines_of(output):
    """What the example printed; its library for collectives on CPU prints, too."""
    return [line for line in output.splitlines() if line.startswith("step ")]


def losses_of(line):
    return list(ast.literal_eval(line.split(" ", 2)[2]).values())


def test_two_processes_get_what_one_gets(start):
    port = free_port()
    alone = start(free_port(), 1, 0, devices=8, steps=40, timeout=PATIENCE)
    pair = [start(port, 2, process, devices=4, steps=40, timeout=PATIENCE) for process in range(2)]
    outputs = [child.communicate(timeout=100) for child in (alone, *pair)]
    assert [child.returncode for child in (alone, *pair)] == [0, 0, 0], outputs
    expected, found, silent = (lines_of(output) for output, _ in outputs)
    assert len(expected) == len(found) == 2
    for line, expected_line in zip(found, expected, strict=True):
        np.testing.assert_allclose(losses_of(line), losses_of(expected_line), rtol=1e-5)
    assert sum(losses_of(found[1])) < 0.9 * sum(losses_of(found[0]))
    assert silent == []  # process 0 alone prints


def test_a_peer_that_does_not_come_ends_the_process(start):
    children = [
        start(free_port(), 2, process, devices=4, steps=1, timeout=TIMEOUT) for process in range(2)
    ]
    for child in children:
        assert_fails_in_time(child)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_peer_that_dies_ends_the_process(start, killed):
    port = free_port()
    seconds = 15  # enough to meet, too
    pair = [
        start(port, 2, process, devices=4, steps=10**9, timeout=seconds) for process in range(2)
    ]
    while not (line := pair[0].stdout.readline()).startswith("step "):
        assert line, pair[0].communicate()
    pair[killed].send_signal(signal.SIGKILL)
    assert_fails_in_time(pair[1 - killed], seconds)
