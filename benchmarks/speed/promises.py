"""What the library promises of its speed, beside what was measured."""

import dataclasses
from collections.abc import Iterator

from benchmarks.speed.methods import EVERY, HELD, OWN_STEP
from benchmarks.speed.records import MORE_FORWARD, NETWORKS, Measured, NetworkResult, Speed
from benchmarks.speed.timing import floor_ratio

KINDS = {"mlp": 0.95, "conv": 1.0, "tiny": 0.1, "tiny-scan": 0.1}
"""The kinds of networks, and the most of TorchJD's time that full rows should take."""
LOSSES = {"mlp": 1.03, "conv": 1.03, "tiny": 1.3, "tiny-scan": 1.3}
"""The most of the plain step's time that a step which weights by the losses should take."""
FULL_ROWS = ("encoder rows", "rows")
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


def promises(speed: Speed) -> Iterator[Promise]:
    """What the library promises, with the measurements that bear on it."""
    results = speed.ours.networks
    measured = [(result, one) for result in results for one in result.measured]

    def name(result: NetworkResult, one: Measured) -> str:
        return f"{result.network}: {one.method}, {one.form}"

    def relative_tofloor(chosen: list[tuple[NetworkResult, Measured]]) -> dict[str, float]:
        floors = {name(*pair): (pair[1].ratio[1], floor_of(*pair)) for pair in chosen}
        return {key: ratio / floor for key, (ratio, floor) in floors.items() if floor is not None}

    for kind in KINDS:
        yield Promise(
            f"loss-based with 1 forward pass, {kind}, of the plain step",
            LOSSES[kind],
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
        1.1,
        {name(*pair): pair[1].ratio[1] for pair in many if pair[1].form == "representation"},
    )
    for text, aggregator in (("full rows", False), ("aggregators", True)):
        yield Promise(
            f"{text}, mlp, of the floor",
            1.15,
            relative_tofloor(
                [
                    (result, one)
                    for result, one in measured
                    if one.form in FULL_ROWS
                    and one.method != HELD
                    and result.network.startswith("mlp")
                    and (one.solver_ratio is None) == aggregator
                ]
            ),
        )
    yield Promise(
        f"Gramian every {EVERY} steps, of its floor",
        1.15,
        relative_tofloor([(result, one) for result, one in measured if one.method == HELD]),
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
    yield Promise(
        "CPU seconds that a method adds to the compilation of the step, K = 20",
        1.0,
        {
            name(result, one): one.compile_seconds - result.plain.compile_seconds
            for result, one in many
            if one.form in ("losses", "representation")
            and one.compile_seconds is not None
            and result.plain.compile_seconds is not None
        },
    )
    yield Promise(
        "value_and_grad in a step of one's own, of the plain step",
        1.03,
        {name(*pair): pair[1].ratio[1] for pair in measured if pair[1].form == OWN_STEP},
    )
    shares = {name(*pair): solver_share(pair[1]) for pair in many}
    yield Promise(
        "solver, K = 20, of the step",
        0.04,
        {key: share for key, share in shares.items() if share is not None},
    )
    for kind, limit in KINDS.items():
        for form in FULL_ROWS:
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


def lowest(result: NetworkResult, every: int = 1) -> float | None:
    """The floor of full rows at one in so many steps, in plain steps, if FLOPs were counted."""
    if not result.forward_flops or not result.step_flops:
        return None
    tasks = NETWORKS[result.network].tasks
    return floor_ratio(result.forward_flops, result.step_flops, tasks, every)


def floor_of(result: NetworkResult, one: Measured) -> float | None:
    """The floor of what was measured; ``None`` for what takes no full rows."""
    if not (one.form in FULL_ROWS or one.form.startswith("rows=")):
        return None
    return lowest(result, EVERY if one.method == HELD else 1)


def solver_share(one: Measured) -> float | None:
    """The solver's share of the step."""
    return None if one.solver_ratio is None else one.solver_ratio / one.ratio[1]
