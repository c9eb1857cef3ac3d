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


def assert_survivor_ends(pair, killed, seconds):
    pair[killed].send_signal(signal.SIGKILL)
    assert_fails_in_time(pair[1 - killed], seconds)


def start_pair(start, seconds):
    port = free_port()
    return [
        start(port, 2, process, devices=4, steps=10**9, timeout=seconds) for process in range(2)
    ]


def lines_printed(child, number):
    """The next lines on the losses that a process prints, while it goes on."""
    lines = []
    while len(lines) < number:
        line = child.stdout.readline()
        assert line, child.communicate()
        lines += lines_of(line)
    return lines


SECONDS = 15
"""Enough for a pair to meet, and the time after which it gives up."""


def test_two_processes_get_what_one_gets_until_one_dies(start):
    alone = start(free_port(), 1, 0, devices=8, steps=40, timeout=PATIENCE)
    output = alone.communicate(timeout=100)
    assert alone.returncode == 0, output
    expected = lines_of(output[0])
    pair = start_pair(start, SECONDS)
    found = lines_printed(pair[0], 2)
    assert len(expected) == 2
    for line, expected_line in zip(found, expected, strict=True):
        np.testing.assert_allclose(losses_of(line), losses_of(expected_line), rtol=1e-5)
    assert sum(losses_of(found[1])) < 0.9 * sum(losses_of(found[0]))
    assert_survivor_ends(pair, 0, SECONDS)
    silent, _ = pair[1].communicate()
    assert lines_of(silent) == []  # process 0 alone prints


def test_a_peer_that_does_not_come_ends_the_process(start):
    children = [
        start(free_port(), 2, process, devices=4, steps=1, timeout=TIMEOUT) for process in range(2)
    ]
    for child in children:
        assert_fails_in_time(child)


def test_the_first_process_ends_when_its_peer_dies(start):
    pair = start_pair(start, SECONDS)
    lines_printed(pair[0], 1)
    assert_survivor_ends(pair, 1, SECONDS)
