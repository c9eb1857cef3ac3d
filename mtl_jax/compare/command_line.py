"""The command line of the referee: ``mtl-jax compare``, and what other programs build on."""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Annotated, Literal, NoReturn

import absl.logging
import jax
import tyro

from mtl_jax.compare.batches import check_devices, steps_per_epoch
from mtl_jax.compare.devices import all_devices
from mtl_jax.compare.fingerprint import OtherConfigurationError
from mtl_jax.compare.loading import load_problem
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.referee import make_weightings
from mtl_jax.compare.report import compare_and_report
from mtl_jax.compare.settings import TUNING_SEED, TuningError
from mtl_jax.compare.weightings import WEIGHTINGS, named_weightings

_WEIGHTINGS_HELP = (
    f"The weightings to compare: any of {', '.join(WEIGHTINGS)}. Equal weights are always run: "
    "the others' step times are relative to theirs. krum and trimmed_mean need three tasks."
)
_PROBLEM_HELP = (
    "Your problems, each as package.module:name, the name of a Problem or of a function that "
    "returns one; the module may lie in the working folder."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What can be said on the command line of a comparison, but for the problems."""

    weightings: Annotated[tuple[str, ...], tyro.conf.arg(help=_WEIGHTINGS_HELP)] = (
        "equal",
        "adaptive",
        "adaptive_softmax",
        "dwa",
        "uncertainty",
    )
    seeds: int = 3
    """Number of seeds: 0, 1, ... Each sets initial parameters, order of batches and draws."""
    epochs: int | None = None
    """Passes over the training data; the problem's own number if not given."""
    batch_size: int | None = None
    """Examples a step; the problem's own number if not given."""
    learning_rate: float | None = None
    """Peak learning rate; the problem's own if not given."""
    alone: bool = True
    """Whether to train each task alone, too, and show the mean change against that."""
    conflict: bool = False
    """Whether to measure how the tasks' gradients conflict for all weightings, not only for those
    that read them: steps cost a little more, and on a problem without encoder and heads a
    backward pass for each task."""
    tune: int | None = None
    """Number of settings that are tried for each weighting and each task alone, on the validation
    data: learning rates, and values of the weighting's own parameters. The seeds are then run with
    the best, and constant weights, tuned, are always compared, too."""
    prune: bool = False
    """Whether to end trials of --tune early that fall behind the others."""
    jobs: int = 1
    """Number of weightings that --tune searches at once, which saves time where compiling takes
    long beside training. What is found does not depend on it. Runs follow one another, so that
    their times can be compared."""
    checkpoint_seconds: int | None = 10
    """The least time between two checkpoints of a run, each of which is saved after an epoch: 0 for
    a checkpoint after every epoch, None for no checkpoints."""
    resume: bool = False
    """Whether to continue the comparison in RUNS_DIR/NAME, if there is one: finished runs are not
    run again, and the results are those of a comparison that was never interrupted."""
    log: Literal["tensorboard"] | None = None
    """Where losses, metrics, weights and conflicts of every run are logged, too: as TensorBoard's
    event files in RUNS_DIR/NAME/tensorboard."""
    data_parallel: bool = False
    """Whether to spread each batch over all devices of this machine."""
    distributed: bool = False
    """Whether this is one of several processes that train together, on the devices of all, each
    started with the same command. All must see the same files. If one is lost, the others end with
    an error; start all again, with --resume."""
    coordinator: str | None = None
    """HOST:PORT where process 0 listens; found out under Slurm, Open MPI, Kubernetes and on TPU."""
    processes: int | None = None
    """Number of processes; found out there, too."""
    process: int | None = None
    """Number of this process, from 0; found out there, too."""
    peer_timeout: int = 100
    """Seconds for which the processes wait for one that does not come or does not answer."""
    data_dir: str | None = None
    """Folder with the data, for the problems that read it from one."""
    name: str = "compare"
    """Name of the folder for the results."""
    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Folder that holds the results of all comparisons."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Train one network with each of several weightings, beside each task trained alone.

    Prints tables for each problem and leaves in RUNS_DIR/NAME tables, pictures and numbers, all on
    one page in report.html, and the checkpoints from which --resume continues.
    """

    problem: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(help=_PROBLEM_HELP, metavar="PROBLEM")
    ]


def main(config: Config, words: Sequence[str]) -> None:
    """Run ``mtl-jax compare``, whose arguments are the words."""
    run(config, config.problem, load_problem, ["mtl-jax", "compare", *words])


def run(
    options: Options,
    names: Sequence[str],
    build: Callable[[str, str | None], Problem],
    words: Sequence[str],
) -> None:
    """Run a comparison; exits with status 2 after a message if something is wrong with its options.

    Interrupted, it exits with 128 plus the signal's number; with 1 if a file cannot be written.

    Args:
      options: the options.
      names: the problems' names.
      build: makes a problem from its name and the folder of its data.
      words: the command that was given, to print it.
    """
    words = [word for word in words if word not in ("--resume", "--no-resume")]
    command = shlex.join(words)
    resumable = options.checkpoint_seconds is not None
    hint = f"To continue:\n\n    {command} --resume\n" if resumable else ""
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax logs errors that it also raises
    with _signals_interrupt():
        try:
            if options.distributed:
                _meet(options)
            _run(options, names, build, command, hint)
        except Interrupted as interruption:
            print(f"Interrupted. {hint}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            # XLA may still compile in a thread, and crashes when Python is taken down under it.
            os._exit(interruption.status)


def _run(
    options: Options,
    names: Sequence[str],
    build: Callable[[str, str | None], Problem],
    command: str,
    hint: str,
) -> None:
    try:
        _check(options)
        if not names:
            raise ValueError("A problem is needed, as package.module:name.")
        weightings = named_weightings(list(options.weightings))
        problems = [
            build(name, options.data_dir).with_settings(
                epochs=options.epochs,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
            )
            for name in names
        ]
        mesh = all_devices() if options.data_parallel or options.distributed else None
        for problem in problems:
            steps_per_epoch(problem)
            check_devices(problem, mesh)
            make_weightings(problem, weightings)
    except (ValueError, FileNotFoundError) as error:
        fail(error)
    try:
        compare_and_report(
            problems,
            weightings,
            options.runs_dir / options.name,
            seeds=range(options.seeds),
            alone=options.alone,
            conflict=options.conflict,
            tune_trials=options.tune,
            prune=options.prune,
            jobs=options.jobs,
            checkpoint_seconds=options.checkpoint_seconds,
            resume=options.resume,
            command=command,
            log=options.log,
            mesh=mesh,
        )
    except (OtherConfigurationError, FileExistsError, TuningError) as error:
        fail(error)
    except OSError as error:
        fail(f"{error}\n{hint}", status=1)


def _meet(options: Options) -> None:
    """Wait for the other processes; before JAX is used for anything else."""
    try:
        if options.peer_timeout < 1:
            raise ValueError(f"--peer-timeout must be at least 1, got {options.peer_timeout}.")
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process,
            initialization_timeout=options.peer_timeout,
            heartbeat_timeout_seconds=options.peer_timeout,
            shutdown_timeout_seconds=options.peer_timeout,
        )
    except ValueError as error:
        fail(
            f"{error} Give --coordinator HOST:PORT, --processes and --process, unless a system "
            "that JAX knows starts the processes."
        )
    except RuntimeError as error:
        fail(f"the processes did not meet: {error}", status=1)


def _check(options: Options) -> None:
    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {options.seeds}.")
    for name in ("tune", "jobs"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}.")
    if options.tune is None and (options.prune or options.jobs > 1):
        raise ValueError("--prune and --jobs are about the trials of --tune, which is not given.")
    if options.jobs > 1 and (options.data_parallel or options.distributed):
        raise ValueError("--jobs must be 1 when a batch is spread over all devices.")
    if options.tune is not None and options.seeds > TUNING_SEED:
        raise ValueError(f"--seeds must be at most {TUNING_SEED} with --tune, whose seed that is.")
    seconds = options.checkpoint_seconds
    if seconds is None and options.resume:
        raise ValueError("--resume needs checkpoints: give --checkpoint-seconds a number.")
    if seconds is not None and seconds < 0:
        raise ValueError(f"--checkpoint-seconds must be at least 0, got {seconds}.")


class Interrupted(KeyboardInterrupt):
    """The process got the signal to end."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number  # as a shell says it


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Ctrl-C and the signal that ends a job on a cluster are an exception, and so tidied up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def fail(error: object, status: int = 2) -> NoReturn:
    """Say what is wrong and exit."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)
