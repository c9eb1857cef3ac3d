"""Programs in processes of their own, with simulated devices, for the tests of several together.

They are forked from one process that has imported what they import, which takes them seconds.
"""

import atexit
import importlib.metadata
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time

JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
QUICKLY_COMPILED = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * (JAXLIB < (0, 11))  # an unknown flag later
)
"""Flags of XLA with which small programs take a quarter of the time to compile."""

ROOT = pathlib.Path(__file__).parents[1]
IMPORTED = ["mtl_jax.compare.command_line", "orbax.checkpoint", "toy_problem"]
"""What is imported before a process is forked. None of it starts one of JAX's backends."""
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


class Program:
    """A running Python program, with as much of ``subprocess.Popen`` as the tests use.

    Its arguments are ``-m``, a module and the module's arguments, or a file and its arguments.
    """

    def __init__(self, arguments, environment, folder):
        self._files = [pathlib.Path(folder, name) for name in ("output", "errors")]
        for file in self._files:
            file.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self._process = context.Process(target=_run, args=(arguments, environment, self._files))
        # The first one starts the process that all are forked from, with its environment.
        before = dict(os.environ)
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        self.stdout = _Lines(self._files[0], self._process)

    @property
    def returncode(self):
        """The status it ended with, a signal's number being negative; ``None`` if it runs."""
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self._process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What it printed and what it wrote to the standard error, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return tuple(file.read_text(encoding="utf-8") for file in self._files)


class _Lines:
    """The lines that a process writes to a file."""

    def __init__(self, file, process):
        self._file, self._process, self._read = file, process, 0

    def readline(self):
        """The next line; what is left of one, or nothing, once the process has ended."""
        while True:
            ended = self._process.exitcode is not None
            line = self._file.read_text(encoding="utf-8")[self._read :].partition("\n")
            if line[1] or ended:
                self._read += len(line[0] + line[1])
                return line[0] + line[1]
            time.sleep(0.01)


def forked_cpu_seconds():
    """What all processes that have ended took, and the one that they were forked from."""
    pid = multiprocessing.forkserver._forkserver._forkserver_pid
    if pid is None:
        return 0.0
    numbers = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, numbers[11:15])) / os.sysconf("SC_CLK_TCK")


def _run(arguments, environment, files):
    os.environ |= environment
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as a program does, and a process of multiprocessing does not


class Processes:
    """Starts Python programs; what still runs at the end of the ``with`` statement is killed."""

    def __init__(self):
        self._started = []
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for child in self._started:
            child.kill()
            child.communicate()
        self._folder.cleanup()

    def start(self, *arguments, devices=1, **environment):
        environment |= {
            "NPROC": "16",  # threads of XLA: each simulated device blocks one until its peers come
            "XLA_FLAGS": f"{QUICKLY_COMPILED} --xla_force_host_platform_device_count={devices}",
        }
        folder = pathlib.Path(self._folder.name, str(len(self._started)))
        folder.mkdir()
        child = Program([str(argument) for argument in arguments], environment, folder)
        self._started.append(child)
        return child


def assert_fails_in_time(child, seconds=TIMEOUT):
    """It ends within the time-out, with a status other than 0."""
    begin = time.monotonic()
    _, errors = child.communicate(timeout=seconds + MARGIN)
    assert child.returncode not in (0, None), errors
    assert time.monotonic() - begin < seconds + MARGIN
