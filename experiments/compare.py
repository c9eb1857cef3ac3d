"""Compare weightings on the shipped problems: ``python -m experiments.compare --help``."""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Annotated, NoReturn

import absl.logging
import tyro

from experiments.problems import PROBLEMS, build_problem
from mtl_jax.compare import (
    WEIGHTINGS,
    OtherConfigurationError,
    Problem,
    compare_and_report,
    look_up,
    named_weightings,
)
from mtl_jax.compare.referee import make_weightings
from mtl_jax.compare.training import steps_per_epoch

_PROBLEMS_HELP = f"The problems to run on: any of {', '.join(PROBLEMS)}."
_WEIGHTINGS_HELP = (
    f"The weightings to compare: any of {', '.join(WEIGHTINGS)}. Equal weights are always run: "
    "the others' step times are relative to theirs. krum and trimmed_mean need three tasks."
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Train one network with each of several weightings, beside each task trained alone.

    Prints a table for each problem and leaves tables, pictures and numbers in RUNS_DIR/NAME, and
    the checkpoints from which --resume continues.
    """

    problem: Annotated[tuple[str, ...], tyro.conf.arg(help=_PROBLEMS_HELP)] = (
        "multimnist",
        "utterances",
    )
    weightings: Annotated[tuple[str, ...], tyro.conf.arg(help=_WEIGHTINGS_HELP)] = (
        "equal",
        "adaptive",
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
    checkpoint_seconds: int | None = 10
    """The least time between two checkpoints of a run, each of which is saved after an epoch: 0 for
    a checkpoint after every epoch, None for no checkpoints."""
    resume: bool = False
    """Whether to continue the comparison in RUNS_DIR/NAME, if there is one: finished runs are not
    run again, and the results are those of a comparison that was never interrupted."""
    data_dir: str | None = None
    """Folder with prepared tensorflow-datasets data, for the problems that read such."""
    name: str = "compare"
    """Name of the folder for the results."""
    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Folder that holds the results of all comparisons."""


def build_problems(config: Config) -> list[Problem]:
    """The problems of a configuration, with its settings.

    Raises:
      ValueError: if a problem is unknown, or a setting does not fit it.
      FileNotFoundError: if a problem's data is not there.
    """
    for name in config.problem:
        look_up(name, PROBLEMS, "problem")  # before any data is read
    problems = [
        build_problem(name, config.data_dir).with_settings(
            epochs=config.epochs, batch_size=config.batch_size, learning_rate=config.learning_rate
        )
        for name in config.problem
    ]
    for problem in problems:
        steps_per_epoch(problem)
    return problems


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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with status 2 after a message if the configuration is wrong.

    Interrupted, it exits with 128 plus the signal's number; with 1 if a file cannot be written.
    """
    config = tyro.cli(Config, prog="python -m experiments.compare", args=arguments)
    given = sys.argv[1:] if arguments is None else arguments
    words = [word for word in given if word not in ("--resume", "--no-resume")]
    command = shlex.join(["python", "-m", "experiments.compare", *words])
    hint = (
        f"To continue:\n\n    {command} --resume\n" if config.checkpoint_seconds is not None else ""
    )
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax logs errors that it also raises
    with _signals_interrupt():
        try:
            _run(config, command, hint)
        except Interrupted as interruption:
            print(f"Interrupted. {hint}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            # XLA may still compile in a thread, and crashes when Python is taken down under it.
            os._exit(interruption.status)


def _run(config: Config, command: str, hint: str) -> None:
    try:
        if config.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {config.seeds}.")
        if config.checkpoint_seconds is None and config.resume:
            raise ValueError("--resume needs checkpoints: give --checkpoint-seconds a number.")
        if config.checkpoint_seconds is not None and config.checkpoint_seconds < 0:
            raise ValueError(
                f"--checkpoint-seconds must be at least 0, got {config.checkpoint_seconds}."
            )
        weightings = named_weightings(list(config.weightings))
        problems = build_problems(config)
        for problem in problems:
            make_weightings(problem, weightings)
    except (ValueError, FileNotFoundError) as error:
        _fail(error, status=2)
    try:
        compare_and_report(
            problems,
            weightings,
            config.runs_dir / config.name,
            seeds=range(config.seeds),
            alone=config.alone,
            conflict=config.conflict,
            checkpoint_seconds=config.checkpoint_seconds,
            resume=config.resume,
            command=command,
        )
    except (OtherConfigurationError, FileExistsError) as error:
        _fail(error, status=2)
    except OSError as error:
        _fail(f"{error}\n{hint}", status=1)


def _fail(error: object, status: int) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
