"""One process for each framework, on one core: how it is started, and how it answers."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

from benchmarks.speed.records import FrameworkResult, Request

ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def ask(module: str, request: Request) -> FrameworkResult:
    """Measure in a process of its own, pinned to one core.

    Args:
      module: the module that measures, run as a program.
      request: what to measure.

    Raises:
      RuntimeError: if the process failed; it has said why.
    """
    command = [sys.executable, "-m", module, json.dumps(dataclasses.asdict(request))]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD['XLA_FLAGS']}".strip()
    environment = os.environ | ONE_THREAD | {"XLA_FLAGS": flags}
    with one_core():
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{module} failed with status {done.returncode}.")
    return FrameworkResult.from_json(json.loads(done.stdout))


def serve(measure: Callable[[Request], FrameworkResult]) -> None:
    """Be such a process: the request is the argument, the answer goes to standard output."""
    request = Request.from_json(json.loads(sys.argv[1]))
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(request)
    print(json.dumps(dataclasses.asdict(result), allow_nan=False))


def progress(message: str) -> None:
    """Tell the person who waits."""
    print(message, file=sys.stderr, flush=True)


def package_versions(*packages: str) -> dict[str, str]:
    """The installed versions of these packages."""
    return {package: importlib.metadata.version(package) for package in packages}


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Let processes that are started inside run on one core, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
