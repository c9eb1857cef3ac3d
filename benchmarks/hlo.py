"""What a compiled program sends between devices, read off its HLO text.

JAX has no function for that: ``compiled.cost_analysis()`` does not count collectives. The text,
``compiled.as_text()``, is the program of one device as XLA partitioned it.
"""

import collections
import functools
import math
import re
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)"
    r"\((?P<operands>[^)]*)\)(?P<attributes>.*)$"
)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:body|condition|to_apply|calls|\w+_computations?)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """A collective operation.

    Attributes:
      kind: one of ``KINDS``.
      size: bytes, on one device: the larger of what goes in and what comes out.
    """

    kind: str
    size: int


class _Instruction(NamedTuple):
    opcode: str
    result: int  # bytes
    operands: int  # bytes
    called: tuple[str, ...]
    trips: int | None


def collectives(text: str) -> collections.Counter[Collective]:
    """The collectives of a compiled program, and how often each runs in one call of it.

    Those in the body of a loop count as often as it runs; of the branches of a conditional, the one
    counts that sends the most bytes.

    Args:
      text: ``jax.jit(function).lower(...).compile().as_text()``.

    Raises:
      ValueError: if the text is no HLO module, or has collectives in a loop whose number of trips
        XLA does not know.
    """
    computations, entry = _parse(text)

    @functools.cache
    def run(name: str) -> collections.Counter[Collective]:
        total = collections.Counter[Collective]()
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                # What is started holds its operands beside the results.
                aliased = instruction.operands if kind != instruction.opcode else 0
                size = max(instruction.operands, instruction.result - aliased)
                total[Collective(kind, size)] += 1
            inner = [run(callee) for callee in instruction.called if callee in computations]
            if instruction.opcode == "conditional":
                inner = [max(inner, key=total_bytes)]
            for found in inner:
                trips = 1
                if instruction.opcode == "while" and found:
                    trips = instruction.trips
                    if trips is None:
                        raise ValueError(f"A loop in {name} sends data: how often is not known.")
                total.update({one: trips * times for one, times in found.items()})
        return total

    return run(entry)


def total_bytes(found: collections.Counter[Collective]) -> int:
    """The bytes of all collectives, each counted as often as it runs."""
    return sum(one.size * times for one, times in found.items())


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = name = None
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, sizes = header[2], {}
            computations[name] = []
            entry = name if header[1] else entry
        elif name is not None and (found := _INSTRUCTION.match(line)):
            sizes[found["name"]] = result = _bytes(found["type"])
            # An operand is its name, or its type and then its name.
            names = [part.split(" ")[-1].lstrip("%") for part in found["operands"].split(", ")]
            attributes = found["attributes"]
            trips = _TRIPS.search(attributes)
            called = [
                callee.strip().lstrip("%")
                for several, one in _CALLED.findall(attributes)
                for callee in (several or one).split(",")
            ]
            computations[name].append(
                _Instruction(
                    opcode=found["opcode"],
                    result=result,
                    operands=sum(sizes.get(operand, 0) for operand in names),
                    called=tuple(called),
                    trips=int(trips[1]) if trips else None,
                )
            )
    if entry is None:
        raise ValueError("This is not the text of a compiled HLO module.")
    return computations, entry


def _bytes(type_: str) -> int:
    """The bytes of an array, or of all arrays of a tuple, from its type."""
    return sum(
        math.ceil(_bits(dtype) * math.prod(int(size) for size in shape.split(",") if size) / 8)
        for dtype, shape in _ARRAY.findall(type_)
    )


def _bits(dtype: str) -> int:
    if dtype in ("pred", "token", "opaque"):
        return 8 if dtype == "pred" else 0
    digits = re.search(r"\d+", dtype)
    assert digits is not None, dtype
    return int(digits[0])
