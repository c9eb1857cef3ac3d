"""The page of a measurement: what was promised, and a table for each network."""

import dataclasses
import os
import pathlib
import platform
import statistics
from collections.abc import Iterator

import tabulate

from experiments.speed.methods import EVERY, HELD
from experiments.speed.records import (
    MORE_FORWARD,
    NETWORKS,
    FrameworkResult,
    Measured,
    NetworkResult,
    Request,
)
from experiments.speed.timing import floor_ratio


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


def markdown_report(speed: Speed) -> str:
    """The whole page, in Markdown."""
    ours, request = speed.ours, speed.request
    versions = ours.versions | (speed.peers.versions if speed.peers else {})
    lines = [
        "# What a step costs",
        "",
        f"{ours.clock} on {ours.device} ({speed.machine['processor']}, "
        f"{speed.machine['cores']} cores, one of them used; {speed.machine['platform']}), relative "
        "to the plain step of the same round: the sum of the losses, differentiated, and plain "
        f"gradient descent. Medians of {request.rounds} rounds, quartiles in brackets. *of floor* "
        "compares with the least that K gradients cost, 1 forward and K backward passes in "
        "compiled floating-point operations. *compile* and *memory* (temporary, as the compiler "
        "says) are relative to the plain step, too; *solver* is the way from the Gramian to the "
        "weights, in % of the method's own step.",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items())
        + f", Python {speed.machine['python']}.",
        "",
        f"    {speed.command}",
        "",
        "## Goals",
        "",
        promises_table(speed),
        "",
    ]
    for result in ours.networks:
        lines += [f"## {result.network}", "", describe(result), "", network_table(result), ""]
        peer = speed.peer(result.network)
        if peer is not None:
            lines += [peer_sentence(result, peer), "", peer_table(result, peer), ""]
    return "\n".join(lines)


def describe(result: NetworkResult) -> str:
    """The network in words, with its plain step."""
    network, plain = NETWORKS[result.network], result.plain
    shape = " x ".join(map(str, network.inputs))
    sizes = "-".join(map(str, (shape, *network.channels, *network.widths)))
    memory, seconds = plain.temporary_bytes, plain.compile_seconds
    parts = [
        f"{network.tasks} tasks, encoder {sizes}, batch {network.batch_size}",
        f"{network.scanned} steps in one call" if network.scanned > 1 else "one call a step",
        f"plain step {_milliseconds(plain.step_seconds)} ms",
        "" if seconds is None else f"compiled in {seconds:.2f} s",
        "" if memory is None else f"{memory / 2**20:.3g} MiB of temporary memory",
    ]
    if (floor := _floor(result)) is not None:
        parts.append(f"floor of full rows {floor:.2f}")
    left_out = "".join(f" Left out: {reason}." for reason in result.left_out)
    return "; ".join(part for part in parts if part) + "." + left_out


def network_table(result: NetworkResult) -> str:
    """A row for each variant."""
    rows = []
    for one in result.measured:
        low, median, high = one.ratio
        floor = _floor_of(result, one)
        share = _solver_share(one)
        rows.append(
            [
                one.method,
                one.form,
                f"{median:.3f} [{low:.3f}, {high:.3f}]",
                "" if floor is None else f"{median / floor:.2f}",
                _relative(one.compile_seconds, result.plain.compile_seconds),
                _relative(one.temporary_bytes, result.plain.temporary_bytes),
                "" if share is None else f"{100 * share:.1f}",
                one.note,
            ]
        )
    headers = ["method", "form", "step time", "of floor", "compile", "memory", "solver, %", ""]
    return _table(rows, headers)


def peer_sentence(result: NetworkResult, peer: NetworkResult) -> str:
    """The two plain steps."""
    ours, theirs = result.plain.step_seconds, peer.plain.step_seconds
    left_out = "".join(f" Left out: {reason}." for reason in peer.left_out)
    return (
        f"The plain step takes {_milliseconds(ours)} ms here and {_milliseconds(theirs)} ms in "
        f"PyTorch ({ours / theirs:.2f}). TorchJD, in its fastest way for each method:{left_out}"
    )


def peer_table(result: NetworkResult, peer: NetworkResult) -> str:
    """A row for each of the peer's methods, with our time as a share of its time."""
    rows = []
    for theirs in peer.measured:
        if theirs.form != "rows":
            continue
        rows.append(
            [theirs.method, theirs.note, _milliseconds(theirs.step_seconds)]
            + [
                "" if one is None else f"{one.step_seconds / theirs.step_seconds:.3f}"
                for form in ("rows", "encoder rows", "representation")
                for one in [result.find(theirs.method, form)]
            ]
        )
    headers = [
        "method",
        "TorchJD's way",
        "TorchJD, ms",
        "ours: rows",
        "encoder rows",
        "representation",
    ]
    return _table(rows, headers)


KINDS = {"mlp": 0.7, "conv": 1.0, "tiny": 0.1, "tiny-scan": 0.1}
"""The kinds of networks, and the most of TorchJD's time that full rows should take."""
_FULL_ROWS = ("encoder rows", "rows")
"""The forms with the gradient of every task by all shared parameters, as TorchJD's."""


@dataclasses.dataclass(frozen=True)
class Promise:
    """A limit for the worst of several measurements.

    Attributes:
      text: what is promised.
      limit: the most it may be.
      found: the measurements, by what was measured.
    """

    text: str
    limit: float
    found: dict[str, float]


def kind_of(network: str) -> str:
    """The kind of a network."""
    return max((kind for kind in KINDS if network.startswith(kind)), key=len)


def promises_table(speed: Speed) -> str:
    """A row for each promise for which something was measured: the worst measurement."""
    rows = []
    for promise in promises(speed):
        if not promise.found:
            continue
        worst = max(promise.found, key=lambda name: promise.found[name])
        number = sum(value <= promise.limit for value in promise.found.values())
        rows.append(
            [
                promise.text,
                f"{promise.limit:g}",
                f"{statistics.median(promise.found.values()):.3f}",
                f"{promise.found[worst]:.3f}",
                worst,
                f"{number} of {len(promise.found)}",
            ]
        )
    return _table(rows, ["", "at most", "median", "worst", "where", "reached"])


def promises(speed: Speed) -> Iterator[Promise]:
    """What the library promises, with the measurements that bear on it."""
    results = speed.ours.networks
    measured = [(result, one) for result in results for one in result.measured]

    def name(result: NetworkResult, one: Measured) -> str:
        return f"{result.network}: {one.method}, {one.form}"

    def relative_to_floor(chosen: list[tuple[NetworkResult, Measured]]) -> dict[str, float]:
        floors = {name(*pair): (pair[1].ratio[1], _floor_of(*pair)) for pair in chosen}
        return {key: ratio / floor for key, (ratio, floor) in floors.items() if floor is not None}

    for kind in KINDS:
        yield Promise(
            f"loss-based with 1 forward pass, {kind}, of the plain step",
            1.05,
            {
                name(result, one): one.ratio[1]
                for result, one in measured
                if one.form == "losses"
                and MORE_FORWARD not in one.note
                and kind_of(result.network) == kind
            },
        )
    many = [(result, one) for result, one in measured if NETWORKS[result.network].tasks == 20]
    yield Promise(
        "representation, K = 20, of the plain step",
        1.15,
        {name(*pair): pair[1].ratio[1] for pair in many if pair[1].form == "representation"},
    )
    for text, aggregator in (("full rows", False), ("aggregators", True)):
        yield Promise(
            f"{text}, mlp, of the floor",
            1.15,
            relative_to_floor(
                [
                    (result, one)
                    for result, one in measured
                    if one.form in _FULL_ROWS
                    and one.method != HELD
                    and result.network.startswith("mlp")
                    and (one.solver_ratio is None) == aggregator
                ]
            ),
        )
    yield Promise(
        f"Gramian every {EVERY} steps, of its floor",
        1.15,
        relative_to_floor([(result, one) for result, one in measured if one.method == HELD]),
    )
    yield Promise(
        "temporary memory of rows=low_memory, K = 20, of the plain step",
        1.5,
        {
            name(result, one): one.temporary_bytes / result.plain.temporary_bytes
            for result, one in many
            if one.form == "rows=low_memory"
            and one.temporary_bytes
            and result.plain.temporary_bytes
        },
    )
    shares = {name(*pair): _solver_share(pair[1]) for pair in many}
    yield Promise(
        "solver, K = 20, of the step",
        0.04,
        {key: share for key, share in shares.items() if share is not None},
    )
    for kind, limit in KINDS.items():
        for form in _FULL_ROWS:
            yield Promise(
                f"{form}, {kind}, of TorchJD's time",
                limit,
                {
                    name(result, one): one.step_seconds / theirs.step_seconds
                    for result, one in measured
                    if one.form == form and kind_of(result.network) == kind
                    for peer in [speed.peer(result.network)]
                    for theirs in [None if peer is None else peer.find(one.method, "rows")]
                    if theirs is not None
                },
            )


def _floor(result: NetworkResult, every: int = 1) -> float | None:
    if not result.forward_flops or not result.step_flops:
        return None
    tasks = NETWORKS[result.network].tasks
    return floor_ratio(result.forward_flops, result.step_flops, tasks, every)


def _floor_of(result: NetworkResult, one: Measured) -> float | None:
    if not (one.form in _FULL_ROWS or one.form.startswith("rows=")):
        return None
    return _floor(result, EVERY if one.method == HELD else 1)


def _solver_share(one: Measured) -> float | None:
    return None if one.solver_ratio is None else one.solver_ratio / one.ratio[1]


def _relative(value: float | None, reference: float | None) -> str:
    return "" if value is None or not reference else f"{value / reference:.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"


def _table(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate.tabulate(rows, headers, tablefmt="github", disable_numparse=True)
