"""What is measured, and what was found: read by every process, whatever its framework."""

import dataclasses
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

LEARNING_RATE = 1e-3
"""Of plain gradient descent: the cheapest optimizer hides the least."""
MORE_FORWARD = "1 more forward pass"
"""Noted where a method observes the losses after the step."""


@dataclasses.dataclass(frozen=True)
class Network:
    """An encoder with one linear classifier for each task, and its batch.

    Attributes:
      tasks: the number of tasks K.
      batch_size: the examples of a step.
      inputs: the shape of one example.
      widths: the sizes of the encoder's dense layers; the last one is the representation.
      channels: the output channels of 3 x 3 convolutions of stride 2 in front of them.
      classes: the classes of each task.
      scanned: the steps in one call, in one loop on the device; 1 is a call a step.
    """

    tasks: int
    batch_size: int
    inputs: tuple[int, ...]
    widths: tuple[int, ...]
    channels: tuple[int, ...] = ()
    classes: int = 10
    scanned: int = 1


def _mlp(tasks: int) -> Network:
    return Network(tasks, batch_size=256, inputs=(256,), widths=(512, 512, 512))


def _convolutional(tasks: int) -> Network:
    return Network(tasks, batch_size=64, inputs=(32, 32, 3), widths=(128,), channels=(16, 32, 64))


_TINY = Network(tasks=3, batch_size=8, inputs=(8,), widths=(16, 16), classes=4)

NETWORKS: Mapping[str, Network] = {
    "mlp-2": _mlp(2),
    "mlp-5": _mlp(5),
    "mlp-20": _mlp(20),
    "mlp-5-batch-128": dataclasses.replace(_mlp(5), batch_size=128),
    "conv-2": _convolutional(2),
    "conv-20": _convolutional(20),
    "tiny": _TINY,
    "tiny-scan": dataclasses.replace(_TINY, scanned=100),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What a process is asked to measure.

    Attributes:
      networks: names from ``NETWORKS``.
      methods: the names of the methods; empty for all of them.
      rounds: how often each variant is timed.
      seconds: how long one timing lasts at least.
    """

    networks: tuple[str, ...]
    methods: tuple[str, ...]
    rounds: int
    seconds: float

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Request":
        """Read what ``dataclasses.asdict`` made, after a journey through JSON."""
        networks, methods = tuple(value["networks"]), tuple(value["methods"])
        return cls(networks, methods, value["rounds"], value["seconds"])


@dataclasses.dataclass
class Measured:
    """One way to take a step of one network.

    Attributes:
      method: the method's name; "plain" for the sum of the losses and nothing else.
      form: what the method reads and how: "plain", "losses", "own step", "representation", "rows"
        for the library's own choice, or "rows=<way>".
      step_seconds: the median time of a step.
      ratio: the step time relative to the plain step of the same round: lower quartile, median,
        upper quartile over the rounds.
      compile_seconds: the time to trace and compile the step, where there is such a thing.
      temporary_bytes: what the compiled step needs besides its arguments and results.
      solver_ratio: the time from the Gramian to the weights alone, relative to the plain step.
      note: what the reader should know.
    """

    method: str
    form: str
    step_seconds: float
    ratio: tuple[float, float, float]
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    solver_ratio: float | None = None
    note: str = ""


@dataclasses.dataclass
class NetworkResult:
    """All that one framework measured on one network.

    Attributes:
      network: the network's name.
      measured: the variants, the plain step first.
      forward_flops: floating-point operations of the compiled losses.
      step_flops: those of the compiled losses and their gradient.
      left_out: variants that cannot be measured on this network, with the reason.
    """

    network: str
    measured: list[Measured]
    forward_flops: float | None = None
    step_flops: float | None = None
    left_out: list[str] = dataclasses.field(default_factory=list)

    def find(self, method: str, form: str) -> Measured | None:
        """The variant of this method and form, if it was measured."""
        found = [one for one in self.measured if (one.method, one.form) == (method, form)]
        return found[0] if found else None

    @property
    def plain(self) -> Measured:
        """The plain step."""
        return self.measured[0]


@dataclasses.dataclass
class FrameworkResult:
    """What one process measured.

    Attributes:
      device: the kind of device.
      clock: what was measured: CPU time or wall-clock time.
      versions: of the packages that matter.
      networks: the results by network.
    """

    device: str
    clock: str
    versions: dict[str, str]
    networks: list[NetworkResult]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "FrameworkResult":
        """Read what ``dataclasses.asdict`` made, after a journey through JSON."""
        for network in value["networks"]:
            network["measured"] = [Measured(**one) for one in network["measured"]]
        value["networks"] = [NetworkResult(**network) for network in value["networks"]]
        return cls(**value)

    def and_of(self, more: "FrameworkResult") -> "FrameworkResult":
        """The results with those on further networks, in the order of ``NETWORKS``.

        Raises:
          ValueError: if they are of other versions.
        """
        if self.versions != more.versions:
            raise ValueError(f"What is there is of {self.versions}, not of {more.versions}.")
        found = {result.network: result for result in (*self.networks, *more.networks)}
        ordered = [found[name] for name in NETWORKS if name in found]
        return dataclasses.replace(self, networks=ordered)


@dataclasses.dataclass(frozen=True)
class Speed:
    """All that a run measured, and on what.

    Attributes:
      machine: the processor and what else a reader of times wants to know.
      ours: what was measured in JAX.
      peers: what was measured in PyTorch, if it was.
      request: what was asked for.
      command: the command that did it.
    """

    machine: dict[str, str]
    ours: FrameworkResult
    peers: FrameworkResult | None
    request: Request
    command: str

    @classmethod
    def of_this_machine(
        cls, ours: FrameworkResult, peers: FrameworkResult | None, request: Request, command: str
    ) -> "Speed":
        """The results with a description of this machine."""
        machine = {
            "processor": processor(),
            "cores": str(os.cpu_count()),
            "platform": platform.platform(),
            "python": platform.python_version(),
        }
        return cls(machine, ours, peers, request, command)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Speed":
        """Read what ``dataclasses.asdict`` made, after a journey through JSON."""
        peers = value["peers"]
        return cls(
            machine=value["machine"],
            ours=FrameworkResult.from_json(value["ours"]),
            peers=None if peers is None else FrameworkResult.from_json(peers),
            request=Request.from_json(value["request"]),
            command=value["command"],
        )

    def and_of(self, more: "Speed") -> "Speed":
        """The results with those on further networks.

        Raises:
          ValueError: if they are of other versions or of another machine.
        """
        if self.machine != more.machine:
            raise ValueError("What is there was measured on another machine.")
        networks = {*self.request.networks, *more.request.networks}
        return dataclasses.replace(
            more,
            ours=self.ours.and_of(more.ours),
            peers=None if not (self.peers and more.peers) else self.peers.and_of(more.peers),
            request=dataclasses.replace(
                more.request, networks=tuple(name for name in NETWORKS if name in networks)
            ),
        )

    def peer(self, network: str) -> NetworkResult | None:
        """What was measured in PyTorch on this network, with one call a step."""
        twin = dataclasses.replace(NETWORKS[network], scanned=1)
        peers = self.peers.networks if self.peers else []
        found = [one for one in peers if NETWORKS[one.network] == twin]
        return found[0] if found else None


def processor() -> str:
    """The processor's model, where the system says it."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
