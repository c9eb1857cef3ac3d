"""Measure what a step costs: ``python -m benchmarks.speed --help``."""

import dataclasses
import importlib.util
import json
import pathlib
import shlex
import sys
from typing import Annotated

import rich.console
import rich.markdown
import tyro

from benchmarks.speed.child import ask
from benchmarks.speed.methods import METHODS, check_methods
from benchmarks.speed.records import NETWORKS, Request, Speed
from benchmarks.speed.report import markdown_report
from mtl_jax.compare import look_up

_NETWORKS_HELP = f"The networks: any of {', '.join(NETWORKS)}."
_METHODS_HELP = f"The methods, all by default: any of {', '.join(METHODS)}."
_PEERS = ("torch", "torchjd")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time a step with every weighting, in every form, beside the plain step.

    For each network, each framework runs in one process on one core; every variant is timed once a
    round. Prints the tables and leaves them and all numbers in OUT_DIR, after every network.
    """

    networks: Annotated[tuple[str, ...], tyro.conf.arg(help=_NETWORKS_HELP)] = tuple(NETWORKS)
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help=_METHODS_HELP)] = ()
    rounds: int = 15
    """How often each variant is timed; reported are the medians."""
    seconds: float = 0.05
    """How long one timing lasts at least."""
    peers: bool = False
    """Whether to time PyTorch and TorchJD, too."""
    resume: bool = False
    """Whether to go on with what is in OUT_DIR: networks that are there are not measured again."""
    out_dir: pathlib.Path = pathlib.Path("runs/speed")
    """Folder for the results."""


def check_peers() -> None:
    """Raise an ``ImportError`` that says what to install if a peer is missing."""
    missing = [name for name in _PEERS if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"--peers needs {' and '.join(missing)}: pip install torch==2.13.0 and then "
            "'torchjd[full]'."
        )


def check(config: Config) -> Request:
    """What the processes are asked to measure.

    Raises:
      ValueError: if a name is unknown or a number is out of range.
      ImportError: if a peer is asked for and missing.
    """
    for name in config.networks:
        look_up(name, NETWORKS, "network")
    check_methods(config.methods)
    if config.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {config.rounds}.")
    if config.seconds < 0:
        raise ValueError(f"--seconds must not be negative, got {config.seconds}.")
    if config.peers:
        check_peers()
    return Request(config.networks, config.methods, config.rounds, config.seconds)


def measured(config: Config, request: Request, command: str) -> Speed:
    """Measure network by network, and write what is known after each.

    A process for each, since thousands of compiled programs in one are more than a system has
    memory maps for.

    Raises:
      RuntimeError: if a process failed.
      ValueError: if what is to be gone on with was measured in another way.
    """
    numbers, page = config.out_dir / "speed.json", config.out_dir / "speed.md"
    speed = None
    if config.resume and numbers.exists():
        speed = Speed.from_json(json.loads(numbers.read_text(encoding="utf-8")))
        same = dataclasses.replace(speed.request, networks=request.networks) == request
        if not same or (speed.peers is None) == config.peers:
            raise ValueError(f"{numbers} is of other options; measure again without --resume.")
    for name in request.networks:
        if speed is not None and name in (result.network for result in speed.ours.networks):
            continue
        one = dataclasses.replace(request, networks=(name,))
        peers = ask("benchmarks.speed.torch_steps", one) if config.peers else None
        ours = ask("benchmarks.speed.jax_steps", one)
        found = Speed.of_this_machine(ours, peers, one, command)
        speed = found if speed is None else speed.and_of(found)
        config.out_dir.mkdir(parents=True, exist_ok=True)
        page.write_text(markdown_report(speed), encoding="utf-8")
        written = json.dumps(dataclasses.asdict(speed), indent=1, allow_nan=False)
        numbers.write_text(written + "\n", encoding="utf-8")
    if speed is None:
        raise ValueError("--networks must name at least one.")
    return speed


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Exits with a message: status 2 if the configuration is wrong, 1 if a measurement failed.
    """
    config = tyro.cli(Config, prog="python -m benchmarks.speed", args=arguments)
    try:
        request = check(config)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.speed", *given])
    try:
        speed = measured(config, request, command.replace(" --resume", ""))
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    report = markdown_report(speed)
    console = rich.console.Console()
    if not console.is_terminal:  # a file or a pipe does not limit the width
        console = rich.console.Console(width=140)
    console.print(rich.markdown.Markdown(report))
    console.print(f"Tables and numbers: {config.out_dir}")


if __name__ == "__main__":
    main()
