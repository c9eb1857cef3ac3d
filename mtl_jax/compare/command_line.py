"""The program ``mtl-jax``: ``new``, ``compare``, ``report`` and ``list``."""

import dataclasses
import importlib.util
import inspect
import itertools
import keyword
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import absl.logging
import jax
import rich.box
import rich.console
import rich.table
import tyro

from mtl_jax.compare.comparison import SettingsError, compare
from mtl_jax.compare.devices import all_devices
from mtl_jax.compare.problem import Problem, load_problem
from mtl_jax.compare.report import Report, report_main, template, terminal
from mtl_jax.compare.results import DamagedFileError
from mtl_jax.compare.tuning import Select, TuningError
from mtl_jax.compare.weightings import WEIGHTINGS, named_weightings
from mtl_jax.methods import METHODS

_WEIGHTINGS_HELP = (
    f"The weightings to compare: any of {', '.join(WEIGHTINGS)}; `mtl-jax list` says what each "
    "reads and costs. Equal weights are always run: the others' step times are relative to "
    "theirs. krum and trimmed_mean need three tasks."
)
_PROBLEM_HELP = (
    "Your problems, each as package.module:name, the name of a Problem or of a function that "
    "returns one; the module may lie in the working folder."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class New:
    """Write NAME.py, a problem that runs as it is and is marked where to make it yours.

    Attributes:
      name: The problem's name; also that of the file, in the working folder.
      inputs: What the network reads: the columns of a table, pictures, or texts.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    inputs: Literal["table", "images", "text"] = "table"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What can be said on the command line of a comparison, but for the problems.

    Attributes:
      weightings: the weightings to compare, by name.
      seeds: Number of seeds: 0, 1, ... Each sets initial parameters, order of batches and draws.
      epochs: Passes over the training data; the problem's own number if not given.
      batch_size: Examples a step; the problem's own number if not given.
      learning_rate: Peak learning rate; the problem's own if not given.
      alone: Whether to train each task alone, too, and show the changes against that. Not for a
        problem that says of its tasks that this means nothing.
      conflict: Whether to measure how the tasks' gradients conflict for all weightings, not only
        for those that read them. Steps cost a little more then, and on a problem without encoder
        and heads a backward pass for each task.
      tune: Number of settings that are tried for each weighting and each task alone, on the
        validation data: learning rates, and values of the weighting's own parameters. The seeds
        are then run with the best, and constant weights, tuned, are always compared, too.
      select: What is tuned for. The mean change of the tasks' metrics against equal weights, or
        the task that is furthest behind what it reaches alone.
      prune: Whether to end trials of the tuning early that fall behind the others.
      checkpoint_seconds: The least time between two checkpoints of a run. With None there are none
        within runs; finished runs are kept in any case.
      resume: Whether to continue the comparison in RUNS_DIR/NAME, if there is one. Finished runs
        are not run again, and the results are those of a comparison that was never interrupted.
      reuse: Folders of other comparisons on the same data, such as runs/compare. What they have
        with the same settings is taken from there and not trained again.
      log: Where losses, metrics, weights and conflicts of every run are logged, too. They are
        TensorBoard's event files in RUNS_DIR/NAME/tensorboard.
      data_parallel: Whether to spread each batch over all devices of this machine.
      distributed: Whether this is one of several processes that train together, on the devices of
        all, each started with the same command. All must see the same files. If one is lost, the
        others end with an error; start all again then, and resume.
      coordinator: HOST:PORT where process 0 listens; found out under Slurm, Open MPI, Kubernetes
        and on TPU.
      processes: Number of processes; found out there, too.
      process: Number of this process, from 0; found out there, too.
      peer_timeout: Seconds for which the processes wait for one that does not come or does not
        answer.
      data_dir: Folder with the data, for the problems that read it from one.
      name: Name of the folder for the results.
      runs_dir: Folder that holds the results of all comparisons.
    """

    weightings: Annotated[tuple[str, ...], tyro.conf.arg(help=_WEIGHTINGS_HELP)] = (
        "equal",
        "adaptive",
        "adaptive_softmax",
        "dwa",
        "uncertainty",
    )
    seeds: int = 3
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    alone: bool = True
    conflict: bool = False
    tune: int | None = None
    select: Select = "mean"
    prune: bool = False
    checkpoint_seconds: int | None = 10
    resume: bool = False
    reuse: tuple[pathlib.Path, ...] = ()
    log: Literal["tensorboard"] | None = None
    data_parallel: bool = False
    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    peer_timeout: int = 100
    data_dir: str | None = None
    name: str = "compare"
    runs_dir: pathlib.Path = pathlib.Path("runs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Options):
    """Train one network with each of several weightings, beside each task trained alone.

    Prints tables for each problem and leaves in RUNS_DIR/NAME tables, pictures and numbers, all on
    one page in report.html, and what is needed to continue with --resume.
    """

    problem: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(help=_PROBLEM_HELP, metavar="PROBLEM", help_behavior_hint="(at least one)"),
    ]


@dataclasses.dataclass(frozen=True)
class List:
    """Show all methods: what a step costs, the parameters, the source."""


Command = (
    Annotated[New, tyro.conf.subcommand("new")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[List, tyro.conf.subcommand("list")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand."""
    given = sys.argv[1:] if arguments is None else arguments
    config = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]  (a union of types is one for tyro)
        prog="mtl-jax",
        description="Balance the losses of several tasks: begin a problem of your own, compare "
        "weightings on it, show what was found again, list the methods.",
        args=given,
    )
    if isinstance(config, List):
        terminal().print(methods_table())
    elif isinstance(config, Report):
        report_main(config)
    elif isinstance(config, New):
        new(config)
    else:
        run(config, config.problem, load_problem, ["mtl-jax", *given])


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
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax logs errors that it also raises
    with _Signals() as signals:
        try:
            given = (options.coordinator, options.processes, options.process)
            if options.distributed:
                _meet(options)
            elif any(one is not None for one in given):
                fail("--coordinator, --processes and --process are for --distributed.")
            _run(options, names, build, command)
        except BaseException:
            # A signal that comes while JAX traces can come out as an error of another kind.
            if signals.number is None:
                raise
            print(f"Interrupted. {_hint(command)}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            # XLA may still compile in a thread, and crashes when Python is taken down under it.
            os._exit(128 + signals.number)


def _run(
    options: Options,
    names: Sequence[str],
    build: Callable[[str, str | None], Problem],
    command: str,
) -> None:
    try:
        if not names:
            swallowed = [word for word in options.weightings if ":" in word]
            hint = f" Put {swallowed[0]} before --weightings." if swallowed else ""
            raise ValueError(f"A problem is needed, as package.module:name.{hint}")
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
    except (ValueError, FileNotFoundError) as error:
        fail(error)
    refusals = (SettingsError, FileExistsError, FileNotFoundError, DamagedFileError, TuningError)
    try:
        compare(
            problems,
            weightings,
            options.runs_dir / options.name,
            seeds=range(options.seeds),
            alone=options.alone,
            conflict=options.conflict,
            tune=options.tune,
            select=options.select,
            prune=options.prune,
            checkpoint_seconds=options.checkpoint_seconds,
            resume=options.resume,
            reuse=options.reuse,
            mesh=mesh,
            log=options.log,
            command=command,
            console=terminal(),
        )
    except refusals as error:
        fail(error)
    except OSError as error:
        fail(f"{error}\n{_hint(command)}", status=1)


def _hint(command: str) -> str:
    return f"To continue:\n\n    {command} --resume\n"


def _meet(options: Options) -> None:
    """Wait for the other processes; before JAX is used for anything else."""
    try:
        if options.peer_timeout < 1:
            raise ValueError(f"--peer-timeout must be at least 1, got {options.peer_timeout}.")
        if options.coordinator is not None and ":" not in options.coordinator:
            raise ValueError(f"--coordinator has no port: {options.coordinator}.")
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


class _Signals:
    """A context in which Ctrl-C and the signal that ends a job on a cluster are an exception.

    Attributes:
      number: the signal that came, or ``None``.
    """

    number: int | None = None

    def __enter__(self) -> "_Signals":
        signals = (signal.SIGINT, signal.SIGTERM)
        self._old = {number: signal.signal(number, self._interrupt) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> NoReturn:
        self.number = number
        raise KeyboardInterrupt


def fail(error: object, status: int = 2) -> NoReturn:
    """Say what is wrong, with where it is if the error has a note of that, and exit."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("in ")]
    notes = "".join(f" ({note})" for note in notes)  # not those of JAX
    print(f"error: {error}{notes}", file=sys.stderr)
    sys.exit(status)


# A new problem


def new(config: New) -> None:
    """Write a problem to begin with; exits with status 2 if that is not possible."""
    path = pathlib.Path(f"{config.name}.py")
    if not config.name.isidentifier() or keyword.iskeyword(config.name):
        fail(f"NAME must be one that Python can import, such as my_problem; got {config.name!r}.")
    if _is_installed(config.name) and not path.exists():
        fail(f"{config.name!r} is the name of an installed module; take another one.")
    text = template("problem.py.jinja").render(dataclasses.asdict(config))
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        fail(f"{path} exists already; take another NAME.")
    except OSError as error:
        fail(error, status=1)
    print(
        f"Written: {path}, a problem that runs as it is. CHANGE marks what to replace for your "
        f"data.\n\n    mtl-jax compare {config.name}:problem --seeds 5"
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # __main__ has no spec
        return True


# The methods


_PRICES: Mapping[str, str] = {
    "the losses": "1 forward, 1 backward",
    "the losses after the step, too": "2 forward, 1 backward",
    "the Gramian": "1 forward, 1 backward at the representation; else 1 forward, K backward",
    "the task gradients": "1 forward, K backward; K gradients held",
    "a second batch": "2 forward, 2 or 3 backward, 1 forward derivative; for sdmgrad K + 1 and K",
}


def methods_table() -> rich.table.Table:
    """The methods as a table for a terminal, by what they read, the cheapest first."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("method", "parameters", "source"):
        table.add_column(column, overflow="fold")
    for reads, methods in itertools.groupby(METHODS.values(), lambda method: method.reads):
        table.add_section()
        table.add_row(f"[bold]reads {reads}[/bold]", f"[bold]{_PRICES[reads]}[/bold]", "")
        for method in methods:
            sources = (
                f"{label}, {address.replace('https://arxiv.org/abs/', 'arXiv ')}"
                for label, address in method.sources
            )
            source = "; ".join(sources) or "this project"
            table.add_row(method.name, parameters(method.factory), source)
    return table


def parameters(function: Callable[..., Any]) -> str:
    """A function's parameters with their defaults.

    Example:
      >>> import mtl_jax
      >>> parameters(mtl_jax.dwa)
      'window, temperature=2.0'
    """
    return ", ".join(map(_with_default, inspect.signature(function).parameters.values()))


def _with_default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    default = "<function>" if callable(parameter.default) else repr(parameter.default)
    return f"{parameter.name}={default}"
