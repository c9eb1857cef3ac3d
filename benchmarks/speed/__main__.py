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

    Each framework runs in one process on one core; every variant is timed once a round. Prints the
    tables and leaves them and all numbers in OUT_DIR.
    """

    networks: Annotated[tuple[str, ...], tyro.conf.arg(help=_NETWORKS_HELP)] = tuple(NETWORKS)
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help=_METHODS_HELP)] = ()
    rounds: int = 15
    """How often each variant is timed; reported are the medians."""
    seconds: float = 0.05
    """How long one timing lasts at least."""
    peers: bool = False
    """Whether to time PyTorch and TorchJD, too."""
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
        peers = ask("benchmarks.speed.torch_steps", request) if config.peers else None
        ours = ask("benchmarks.speed.jax_steps", request)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    speed = Speed.of_this_machine(ours, peers, request, command)
    report = markdown_report(speed)
    config.out_dir.mkdir(parents=True, exist_ok=True)
    (config.out_dir / "speed.md").write_text(report, encoding="utf-8")
    numbers = json.dumps(dataclasses.asdict(speed), indent=1, allow_nan=False)
    (config.out_dir / "speed.json").write_text(numbers + "\n", encoding="utf-8")
    console = rich.console.Console()
    if not console.is_terminal:  # a file or a pipe does not limit the width
        console = rich.console.Console(width=140)
    console.print(rich.markdown.Markdown(report))
    console.print(f"Tables and numbers: {config.out_dir}")


if __name__ == "__main__":
    main()
