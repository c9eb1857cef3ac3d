"""The same steps in PyTorch with TorchJD, timed: a process of its own.

The packages are looked up when it runs, since nothing else needs them.
"""

import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed.child import package_versions, progress, serve
from benchmarks.speed.methods import least_tasks
from benchmarks.speed.records import (
    LEARNING_RATE,
    NETWORKS,
    FrameworkResult,
    Measured,
    Network,
    NetworkResult,
    Request,
)
from benchmarks.speed.timing import (
    Timed,
    quartiles_of_ratio,
    seconds_a_step,
    steps_that_last,
    time_in_rounds,
)

PEERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mgda": ("MGDA", {}),
    "cagrad": ("CAGrad", {"c": 0.5}),
    "pcgrad": ("PCGrad", {}),
    "gradvac": ("GradVac", {}),
    "nash_mtl": ("NashMTL", {}),
    "fair_grad": ("FairGrad", {"alpha": 1.0}),
    "imtl_g": ("IMTLG", {}),
    "aligned_mtl": ("AlignedMTL", {}),
    "upgrad": ("UPGrad", {}),
    "dual_proj": ("DualProj", {}),
    "conflict_free": ("ConFIG", {}),
    "krum": ("Krum", {"n_byzantine": 0}),
    "graddrop": ("GradDrop", {}),
    "trimmed_mean": ("TrimmedMean", {"trim_number": 1}),
    "excess_mtl": ("ExcessMTL", {"robust_step_size": 0.01}),
}
"""TorchJD's name of a method, and the arguments that make it ours."""
SECOND_BATCH: Mapping[str, tuple[str, dict[str, Any]]] = {
    "modo": ("MoDoWeighting", {"gamma": 0.001, "rho": 0.1}),
    "sdmgrad": ("SDMGradWeighting", {}),
}
"""The same of the methods that read the products of the gradients on two batches."""


class Way(NamedTuple):
    """One of the ways that TorchJD documents to take a step.

    Attributes:
      chunk: ``parallel_chunk_size``: ``None`` for all tasks at once, 1 for one after the other.
      by_leaf: ``optimize_gramian_computation``: the Gramian without one large Jacobian.
      autogram: the Gramian from the autogram engine, then one backward pass with the weights.
      second: ``jac`` on two batches, then one backward pass with the weights.
    """

    chunk: int | None = None
    by_leaf: bool = False
    autogram: bool = False
    second: bool = False

    def __str__(self) -> str:
        if self.autogram:
            return "autogram"
        order = "parallel" if self.chunk is None else "sequential"
        function = "jac twice" if self.second else "mtl_backward"
        return f"{function}, {order}" + (", Gramian by leaf" if self.by_leaf else "")


WAYS = (
    *(Way(chunk, by_leaf) for chunk, by_leaf in itertools.product((None, 1), (False, True))),
    Way(autogram=True),
)
SECOND_WAYS = (Way(second=True), Way(chunk=1, second=True))


class Model:
    """The network, its batch and its optimizer.

    Attributes:
      encoder: what the tasks share.
      optimizer: of all parameters.
    """

    def __init__(self, torch: Any, network: Network) -> None:
        nn = torch.nn
        torch.manual_seed(0)
        layers, size = [], network.inputs[-1]
        for channels in network.channels:
            layers += [nn.Conv2d(size, channels, 3, stride=2, padding=1), nn.ReLU()]
            size = channels
        if network.channels:
            side = network.inputs[0] // 2 ** len(network.channels)
            layers, size = [*layers, nn.Flatten()], size * side**2
        for width in network.widths:
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.encoder = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(size, network.classes) for _ in range(network.tasks))
        parameters = [*self.encoder.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
        *space, depth = network.inputs
        self._inputs = torch.randn(network.batch_size, depth, *space)
        shape = (network.tasks, network.batch_size)
        self._labels = torch.unbind(torch.randint(network.classes, shape))
        self._second = self._inputs.flip(0), [labels.flip(0) for labels in self._labels]
        self._loss = nn.functional.cross_entropy

    def losses(self, second: bool = False) -> tuple[Any, list[Any]]:
        """The representation and the task losses; of a second batch, the first in another order."""
        batch = self._second if second else (self._inputs, self._labels)
        z = self.encoder(batch[0])
        pairs = zip(self.heads, batch[1], strict=True)
        return z, [self._loss(head(z), labels) for head, labels in pairs]


def plain_step(torch: Any, network: Network) -> Timed:
    """The step on the sum of the losses."""
    model = Model(torch, network)

    def step() -> None:
        model.optimizer.zero_grad()
        _, losses = model.losses()
        torch.stack(losses).sum().backward()
        model.optimizer.step()

    return _repeated(step)


def peer_step(torch: Any, network: Network, method: str, way: Way) -> Timed:
    """A step of TorchJD.

    Raises:
      TypeError: if the method cannot be had in this way.
    """
    aggregation = importlib.import_module("torchjd.aggregation")
    autojac = importlib.import_module("torchjd.autojac")
    name, arguments = PEERS[method]
    if method == "nash_mtl":
        arguments = {"n_tasks": network.tasks}
    reads_gramian = issubclass(getattr(aggregation, name), aggregation.GramianWeightedAggregator)
    if (way.by_leaf or way.autogram) and not reads_gramian:
        raise TypeError(f"{name} does not read the Gramian alone.")
    model = Model(torch, network)
    if way.autogram:
        engine = importlib.import_module("torchjd.autogram").Engine(model.encoder, batch_dim=None)
        weighting = getattr(aggregation, f"{name}Weighting")(**arguments)

        def gradient() -> None:
            losses = torch.stack(model.losses()[1])
            losses.backward(weighting(engine.compute_gramian(losses)))

    else:
        aggregator = getattr(aggregation, name)(**arguments)
        shared = list(model.encoder.parameters())
        options = {"optimize_gramian_computation": True} if way.by_leaf else {}

        def gradient() -> None:
            z, losses = model.losses()
            autojac.mtl_backward(losses, features=z, parallel_chunk_size=way.chunk)
            autojac.jac_to_grad(shared, aggregator, **options)

    def step() -> None:
        model.optimizer.zero_grad()
        gradient()
        model.optimizer.step()

    return _repeated(step)


def second_batch_step(torch: Any, network: Network, method: str, way: Way) -> Timed:
    """A step of TorchJD with two batches, trained on the first."""
    aggregation = importlib.import_module("torchjd.aggregation")
    jac = importlib.import_module("torchjd.autojac").jac
    name, arguments = SECOND_BATCH[method]
    weighting = getattr(aggregation, name)(**arguments)
    model = Model(torch, network)
    shared = list(model.encoder.parameters())

    def rows(losses: list[Any], retain_graph: bool) -> Any:
        leaves = jac(losses, shared, retain_graph=retain_graph, parallel_chunk_size=way.chunk)
        return torch.cat([leaf.flatten(1) for leaf in leaves], dim=1)

    def step() -> None:
        model.optimizer.zero_grad()
        losses = model.losses()[1]
        first = rows(losses, retain_graph=True)
        second = rows(model.losses(second=True)[1], retain_graph=False)
        torch.stack(losses).backward(weighting(first @ second.T))
        model.optimizer.step()

    return _repeated(step)


def _repeated(step: Callable[[], None]) -> Timed:
    def run(number: int) -> None:
        for _ in range(number):
            step()

    return Timed(run)


def _ways(torch: Any, network: Network, method: str) -> Iterator[tuple[Way, Timed]]:
    if method in SECOND_BATCH:
        for way in SECOND_WAYS:
            yield way, second_batch_step(torch, network, method, way)
        return
    for way in WAYS:
        try:
            yield way, peer_step(torch, network, method, way)
        except TypeError:
            continue


def fastest(
    torch: Any, network: Network, method: str, seconds: float, clock: Callable[[], float]
) -> tuple[Way, Timed]:
    """The way that a short trial finds fastest: each three times, the best of each."""

    def trial(found: tuple[Way, Timed]) -> float:
        steps = steps_that_last(found[1], seconds, clock)
        return min(seconds_a_step(found[1], steps, clock) for _ in range(3))

    return min(_ways(torch, network, method), key=trial)


def measure_network(torch: Any, name: str, request: Request) -> NetworkResult:
    """Time the plain step and all methods on one network."""
    clock, network = time.process_time, NETWORKS[name]
    variants, ways, left_out = {"plain": plain_step(torch, network)}, {}, []
    known = (*PEERS, *SECOND_BATCH)
    for method in request.methods or known:
        if method not in known or network.tasks < least_tasks(method):
            continue
        try:
            ways[method], variants[method] = fastest(torch, network, method, request.seconds, clock)
        except (ImportError, ValueError) as error:
            left_out.append(f"{method}: {error}")
    progress(f"{name}: TorchJD's {len(ways)} methods; {request.rounds} rounds")
    times = time_in_rounds(variants, rounds=request.rounds, seconds=request.seconds, clock=clock)
    measured = [
        Measured(
            method,
            "rows" if method in ways else "plain",
            step_seconds=float(np.median(seconds)),
            ratio=quartiles_of_ratio(seconds, times["plain"]),
            note=str(ways.get(method, "")),
        )
        for method, seconds in times.items()
    ]
    return NetworkResult(name, measured, left_out=left_out)


def measure(request: Request) -> FrameworkResult:
    """Time all networks asked for; a step in a loop on the device is not to be had here."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    names = [name for name in request.networks if NETWORKS[name].scanned == 1]
    return FrameworkResult(
        device="cpu",
        clock="CPU time",
        versions=package_versions("torch", "torchjd"),
        networks=[measure_network(torch, name, request) for name in names],
    )


if __name__ == "__main__":
    serve(measure)
