"""Processes with simulated devices, for the tests of several that train together."""

import os
import pathlib
import socket
import subprocess
import sys
import time

QUICKLY_COMPILED = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
"""Flags of XLA with which small programs take a quarter of the time to compile."""

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 5
"""Seconds after which a peer is given up that will not come."""
PATIENCE = 60
"""Seconds for which a peer is waited for that will, on a busy machine."""
MARGIN = 30
"""Seconds for starting Python and for ending it, on a busy machine."""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Processes:
    """Starts Python programs; what still runs at the end of the ``with`` statement is killed."""

    def __init__(self):
        self._started = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for child in self._started:
            child.kill()
            child.communicate()

    def start(self, *arguments, devices):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "NPROC": "16",  # threads of XLA: each simulated device blocks one until its peers come
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "XLA_FLAGS": f"{QUICKLY_COMPILED} --xla_force_host_platform_device_count={devices}",
        }
        child = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(child)
        return child


def assert_fails_in_time(child, seconds=TIMEOUT):
    """It ends within the time-out, with a status other than 0."""
    begin = time.monotonic()
    _, errors = child.communicate(timeout=seconds + MARGIN)
    assert child.returncode not in (0, None), errors
    assert time.monotonic() - begin < seconds + MARGIN
