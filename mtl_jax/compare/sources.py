"""Data that come from one source, or from several, each with examples of its own."""

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

Source = str | None
"""The name of a source; ``None`` where there is only one."""


def by_source(data: Mapping[str, Any]) -> dict[Source, Mapping[str, Any]]:
    """The fields of each source, of a split or a batch of either form."""
    if any(isinstance(value, Mapping) for value in data.values()):
        return dict(data.items())
    return {None: data}


def joined(sources: Mapping[Source, T]) -> Any:
    """What is given by source in the form of a split: that of the one source, or a mapping."""
    return sources[None] if None in sources else dict(sources)


def numbers_text(numbers: Mapping[Source, int]) -> str:
    """``"5,000"``, or ``"5,000 (news) + 300 (reviews)"``."""
    return " + ".join(
        f"{number:,}" if source is None else f"{number:,} ({source})"
        for source, number in numbers.items()
    )
