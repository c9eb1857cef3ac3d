"""The tables of the pages, made from the records of the methods: ``make tables``.

Only what stands between a table's marks is replaced; the text around it is written by hand. The
prices in the README's table are medians of what docs/speed.md says.
"""

import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from mtl_jax import METHODS
from mtl_jax._search_space import Range
from mtl_jax.compare import SPACES
from mtl_jax.methods import Method

ROOT = pathlib.Path(__file__).parents[1]
LOSSES, AFTER, GRAMIAN, ROWS, SECOND = (
    "the losses",
    "the losses after the step, too",
    "the Gramian",
    "the task gradients",
    "a second batch",
)
REFERENCE = {
    LOSSES: "loss_weightings",
    AFTER: "loss_weightings",
    GRAMIAN: "gramian_weightings",
    ROWS: "aggregators",
    SECOND: "second_batch_weightings",
}
"""The page of the reference that a method is on, by what it reads."""

README_ROWS = {
    "the losses": LOSSES,
    "the losses, again after the step": AFTER,
    "the inner products of the task gradients": GRAMIAN,
    "the task gradients": ROWS,
    "a second batch": SECOND,
}
"""What the methods of a row of the README's table read, by the row's first cell."""

SIZES = (2, 5, 20)
"""The numbers of tasks K for which prices are given."""
IN_TURN = "conflict_free_momentum"
"""The method that takes one task's gradient a step."""


class Part(NamedTuple):
    """A part of a page that is made.

    Attributes:
      start: the text in front of it.
      end: the text behind it.
      make: makes what belongs between them.
    """

    start: str
    end: str
    make: Callable[[], str]


def marked(name: str, make: Callable[[], str], gap: str = "\n") -> Part:
    """A part between two comments, which the page does not show."""
    start = f"<!-- {name}: made by docs/tables.py -->\n"
    end = f"<!-- end of {name} -->"
    return Part(start, end, lambda: f"{gap}{make()}{gap}")


def reading(*reads: str, aggregators: bool | None = None) -> list[Method]:
    """The methods that read one of these; only aggregators, or none of them, if so asked."""
    return [
        method
        for method in METHODS.values()
        if method.reads in reads and aggregators in (None, method.total is None)
    ]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    text[1] = text[1].replace(" ", "")
    return "\n".join(re.sub(r"\|  (?=\|)", "| ", line) for line in text) + "\n"


def linked(method: Method) -> str:
    """The shortest call, which leads to the method's place in the reference."""
    page = f"reference/{REFERENCE[method.reads]}.md#{method.name}"
    return f"[`{method.call}`]({page})" + (" (one more F)" if method.reads == AFTER else "")


def sources(method: Method) -> str:
    """The publications."""
    return ", ".join(f"[{label}]({address})" for label, address in method.sources) or "this project"


def weightings(*reads: str) -> str:
    """The table of weightings, by what gets more weight."""
    return table(
        ("method", "what gets more weight", "weights sum to", "losses", "source"),
        (
            (linked(method), method.effect, method.total or "", method.domain, sources(method))
            for method in reading(*reads, aggregators=False)
        ),
    )


def directions() -> str:
    """The table of the weightings of the Gramian, by the direction that they take."""

    def weights(method: Method) -> str:
        return f"sum to {method.total}" if method.total in ("K", "1") else method.total or ""

    words: dict[bool | str, str] = {True: "yes", False: ""}
    return table(
        ("method", "the direction", "non-conflicting", "weights", "losses", "source"),
        (
            (
                linked(method),
                method.effect,
                words.get(method.non_conflicting, str(method.non_conflicting)),
                weights(method),
                method.domain,
                sources(method),
            )
            for method in reading(GRAMIAN)
        ),
    )


def aggregators() -> str:
    """The table of the aggregators."""
    return table(
        ("method", "the gradient", "losses", "source"),
        (
            (linked(method), method.effect, method.domain, sources(method))
            for method in reading(ROWS, aggregators=True)
        ),
    )


def measured() -> str:
    """The sentence on which methods docs/speed.md has step times of."""
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    found = set(re.findall(r"^\| `?(\w+)`? +\|", page, re.MULTILINE)) | {"constant"}
    names = (name for method in METHODS.values() for name in (method.name, *method.variants))
    missing = [f"`{name}`" for name in names if name not in found]
    said = "Measured: [speed.md](speed.md); a step of `constant` is one of `equal`."
    return said + (f" Not measured yet: {', '.join(missing)}.\n" if missing else "\n")


def reference(methods: Iterable[Method]) -> str:
    """A heading for each method, with its docstring."""
    return "\n".join(
        f"## {method.name}\n\n```{{eval-rst}}\n.. autofunction:: mtl_jax.{method.name}\n```\n"
        for method in methods
    )


def names_of(reads: str) -> list[str]:
    """The methods that read this, in all their variants, as they are measured."""
    return [name for method in reading(reads) for name in (method.name, *method.variants)]


def prices(form: str, names: Iterable[str]) -> list[str]:
    """The medians over methods of their step times on the MLP, in plain steps, for each K.

    Raises:
      ValueError: if docs/speed.md has none of them.
    """
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    rows = "|".join(map(re.escape, names))
    medians = []
    for size in SIZES:
        _, _, section = page.partition(f"\n## mlp-{size}\n")
        pattern = rf"^\| (?:{rows}) +\| {re.escape(form)} +\| ([\d.]+) "
        found = re.findall(pattern, section.partition("\n## ")[0], re.MULTILINE)
        if not found:
            raise ValueError(f"docs/speed.md: mlp-{size} has no row of {rows} with {form}.")
        medians.append(statistics.median(map(float, found)))
    digits = (2 if price < 1.5 else 1 if price < 10 else 0 for price in medians)
    return [f"{price:.{number}f}" for price, number in zip(medians, digits, strict=True)]


def price(reads: str) -> str:
    """What a step costs with the methods that read this, in passes and as measured."""
    names = names_of(reads)
    others = [name for name in names if name != IN_TURN]
    how: Mapping[str, list[tuple[str, str, list[str]]]] = {
        LOSSES: [("1 forward, 1 backward", "losses", names)],
        AFTER: [("2 forward, 1 backward", "losses", names)],
        GRAMIAN: [
            ("at the representation", "representation", names),
            ("over the encoder: K backward passes of it", "encoder rows", names),
            ("over all parameters: 1 forward, K backward", "rows", names),
        ],
        ROWS: [
            ("1 forward, K backward, K gradients held", "rows", others),
            (f"1 backward (`{IN_TURN}`)", "rows", [IN_TURN]),
        ],
        SECOND: [
            ("2 forward, 2 backward, 1 forward derivative (`modo`)", "second batch", ["modo"]),
            ("2 forward, K + 1 backward, K derivatives (`sdmgrad`)", "second batch", ["sdmgrad"]),
        ],
    }
    return "; ".join(f"{passes}: {', '.join(prices(form, of))}" for passes, form, of in how[reads])


def gramians() -> str:
    """The prices of the Gramian, by where it is taken."""
    places = {
        "at the representation": "representation",
        'over the encoder\'s parameters, `gramian="encoder"`': "encoder rows",
        "over the parameters of any network": "rows",
    }
    return table(
        ("", *(f"K = {size}" for size in SIZES)),
        ((place, *prices(form, names_of(GRAMIAN))) for place, form in places.items()),
    )


def readme() -> str:
    """The README's table of all methods, by what they read and so cost."""
    return table(
        ("reads", f"price in plain steps, for K = {', '.join(map(str, SIZES))} tasks", "methods"),
        (
            (row, price(reads), " ".join(f"`{method.call}`" for method in reading(reads)))
            for row, reads in README_ROWS.items()
        ),
    )


def searched() -> str:
    """What tuning searches."""
    lines = []
    for name, space in SPACES.items():
        entries = []
        for parameter, dimension in space.items():
            entries.append(f"`{parameter}`: {dimension}")
            if isinstance(dimension, Range):
                entries[-1] += f", {dimension.default:g} by default"
        lines.append(f"| `{name}` | {'; '.join(entries)} |")
    return "\n".join(lines)


PARTS: Mapping[str, list[Part]] = {
    "README.md": [marked("methods", readme, gap="")],
    "docs/methods.md": [
        marked("what is measured", measured),
        marked("weightings of the losses", lambda: weightings(LOSSES, AFTER)),
        marked("weightings of the Gramian", directions),
        marked("weightings of the task gradients", lambda: weightings(ROWS)),
        marked("weightings of a second batch", lambda: weightings(SECOND)),
        marked("aggregators", aggregators),
    ],
    "docs/representation.md": [marked("prices", gramians)],
    "docs/reference/loss_weightings.md": [
        marked("methods", lambda: reference(reading(LOSSES, AFTER))),
    ],
    "docs/reference/gramian_weightings.md": [
        marked("methods", lambda: reference(reading(GRAMIAN))),
    ],
    "docs/reference/aggregators.md": [
        marked("methods", lambda: reference(reading(ROWS))),
    ],
    "docs/reference/second_batch_weightings.md": [
        marked("methods", lambda: reference(reading(SECOND))),
    ],
    "docs/tuning.md": [
        Part("| weighting | searched |\n|---|---|\n", "\n\n", searched),
    ],
}


def pages() -> dict[str, str]:
    """The pages as they should be, by their path in the repository."""
    made = {}
    for path, parts in PARTS.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        for part in parts:
            before, found, rest = text.partition(part.start)
            _, closed, after = rest.partition(part.end)
            if not (found and closed):
                raise ValueError(f"{path}: between {part.start!r} and {part.end!r} is nothing.")
            text = before + part.start + part.make() + part.end + after
        made[path] = text
    return made


if __name__ == "__main__":
    for path, text in pages().items():
        if (ROOT / path).read_text(encoding="utf-8") != text:
            (ROOT / path).write_text(text, encoding="utf-8")
            print(path)
