"""The page of a measurement: what was promised, and a table for each network."""

import statistics

import tabulate

from benchmarks.speed.promises import floor_of, lowest, promises, solver_share
from benchmarks.speed.records import NETWORKS, NetworkResult, Speed


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
        "compiled floating-point operations. *compile* is the CPU time, in seconds, by which "
        "tracing and compiling the step takes longer than for the plain step. *memory* "
        "(temporary, as the compiler says) is relative to the plain step; *solver* is the way "
        "from the Gramian to the weights, in % of the method's own step.",
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
    if (floor := lowest(result)) is not None:
        parts.append(f"floor of full rows {floor:.2f}")
    return "; ".join(part for part in parts if part) + "." + _left_out(result)


def network_table(result: NetworkResult) -> str:
    """A row for each variant."""
    rows = []
    for one in result.measured:
        low, median, high = one.ratio
        floor = floor_of(result, one)
        share = solver_share(one)
        rows.append(
            [
                one.method,
                one.form,
                f"{median:.3f} [{low:.3f}, {high:.3f}]",
                "" if floor is None else f"{median / floor:.2f}",
                _added(one.compile_seconds, result.plain.compile_seconds),
                _relative(one.temporary_bytes, result.plain.temporary_bytes),
                "" if share is None else f"{100 * share:.1f}",
                one.note,
            ]
        )
    headers = ["method", "form", "step time", "of floor", "compile, s", "memory", "solver, %", ""]
    return _table(rows, headers)


def peer_sentence(result: NetworkResult, peer: NetworkResult) -> str:
    """The two plain steps."""
    ours, theirs = result.plain.step_seconds, peer.plain.step_seconds
    return (
        f"The plain step takes {_milliseconds(ours)} ms here and {_milliseconds(theirs)} ms in "
        f"PyTorch ({ours / theirs:.2f}). TorchJD, in its fastest way for each method:"
        f"{_left_out(peer)}"
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
                for form in ("rows", "encoder rows", "representation", "second batch")
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
        "second batch",
    ]
    return _table(rows, headers)


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


def _left_out(result: NetworkResult) -> str:
    """What was not measured, by reason; a method that was measured in no form is named once."""
    measured = {one.method for one in result.measured}
    by_reason: dict[str, dict[str, None]] = {}
    for entry in result.left_out:
        label, _, reason = entry.partition(": ")
        method, _, form = label.partition(", ")
        name = f"{method} ({form})" if method in measured else method
        by_reason.setdefault(reason, {})[name] = None
    return "".join(f" Left out, {reason}: {', '.join(of)}." for reason, of in by_reason.items())


def _relative(value: float | None, reference: float | None) -> str:
    return "" if value is None or not reference else f"{value / reference:.2f}"


def _added(value: float | None, reference: float | None) -> str:
    return "" if value is None or reference is None else f"{value - reference:+.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"


def _table(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate.tabulate(rows, headers, tablefmt="github", disable_numparse=True)
