"""The table and the pictures of docs/choosing.md, from the tables of results.md and speed.md."""

import pathlib
import re
from typing import NamedTuple

import matplotlib
import matplotlib.axes
import matplotlib.figure

from mtl_jax.compare import WEIGHTINGS

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = DOCS / "choosing.md"
START, END = "<!-- made by python -m experiments.choosing -->\n\n", "\n<!-- end -->"
SIZES = (2, 5, 20)
FORMS = {  # of a step, in speed.md, the cheapest first
    "losses": ("the losses", "tab:blue"),
    "representation": ("the Gramian, at the representation", "tab:orange"),
    "rows": ("the task gradients", "tab:green"),
}
CHANGE, TOPIC = "change from alone, %", "topic accuracy, %"
SHIPPED, FASTER = "learning rate 0.01; 5 seeds", "learning rate 0.03; 5 seeds"  # of utterances

Table = dict[str, dict[str, str]]
"""The rows of a table by name, each with its cells by column."""


class Measured(NamedTuple):
    """What was measured of a method: its form, step times by SIZES, and results by problem."""

    form: str
    prices: list[str]
    multimnist: str
    utterances: str
    topic: str


def _section(page: str, heading: str) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.split(r"^## ", text.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]


def _table(block: str, names: int = 1) -> Table:
    """Read a table whose first columns name its rows."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
    header, _, *rows = lines
    return {" ".join(row[:names]): dict(zip(header, row, strict=True)) for row in rows}


def results(problem: str, settings: str) -> Table:
    """The results after the last epoch, of all tables with these settings."""
    pattern = rf"{re.escape(settings)}\.\n.*?((?:^\|[^\n]*\n)+)"
    blocks = re.findall(pattern, _section("results.md", problem), re.MULTILINE | re.DOTALL)
    return {name: cells for block in blocks for name, cells in _table(block).items()}


def step_times(size: int) -> Table:
    """The step times on the MLP with this many tasks, by method and form."""
    (block, *_) = re.findall(r"(?:^\|.*\n)+", _section("speed.md", f"mlp-{size}"), re.MULTILINE)
    return _table(block, names=2)


def measured() -> dict[str, Measured]:
    """What was measured of every method."""
    times = [step_times(size) for size in SIZES]
    multimnist = results("multimnist", "5 seeds")
    utterances = results("utterances", SHIPPED)
    found = {}
    for name in WEIGHTINGS:
        form = next(form for form in FORMS if f"{name} {form}" in times[-1])
        rows = [table.get(f"{name} {form}") for table in times]
        found[name] = Measured(
            form,
            [row["step time"].split(" [")[0] if row else "" for row in rows],
            multimnist.get(name, {}).get(CHANGE, ""),
            utterances.get(name, {}).get(CHANGE, ""),
            utterances.get(name, {}).get(TOPIC, ""),
        )
    return found


def markdown(methods: dict[str, Measured]) -> str:
    """The table of the page."""
    sizes = ", ".join(map(str, SIZES))
    lines = [
        f"| method | step time, K = {sizes} | multimnist: change from alone, % "
        "| utterances: change from alone, % | topic, the hardest task, % |",
        "|---|---|---|---|---|",
    ]
    for form, (label, _) in FORMS.items():
        lines.append(f"| *reads {label}* | | | | |")
        for name, row in methods.items():
            if row.form == form:
                prices = ", ".join(f"{float(price):.2f}" if price else "–" for price in row.prices)
                cells = (prices, row.multimnist, row.utterances, row.topic)
                lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def decisions(methods: dict[str, Measured]) -> list[tuple[str, str]]:
    """Questions in the order to ask them, each with the answer to take at the first yes."""

    def mean(cell: str) -> float:
        return float(cell.split(" ±")[0])

    def gain(name: str) -> float:
        return mean(methods[name].topic) - mean(methods["equal"].topic)

    faster = results("utterances", FASTER)["equal"][TOPIC]
    tuned = mean(faster) - mean(methods["equal"].topic)
    at_representation = [
        float(row.prices[-1]) for row in methods.values() if row.form == "representation"
    ]
    return [
        (
            "Are equal weights not tuned yet?",
            "Tune their learning rate first: it was worth\n"
            f"{tuned:+.1f} points to the hardest task, more than any method",
        ),
        (
            "Is every task as good as trained alone?",
            "Keep equal weights: there is nothing to gain",
        ),
        (
            "Are losses in different units?",
            "Weights that do not depend on units: constant ones,\n"
            "adaptive(relative_to='initial'), geometric, db_mtl",
        ),
        (
            "Does the hardest task learn too little?",
            f"adaptive ({gain('adaptive'):+.1f} points for it, at the price of plain\n"
            f"training); db_mtl ({gain('db_mtl'):+.1f}, K backward passes)",
        ),
        (
            "Do the gradients conflict?\n(diagnostics=True: cosines below 0)",
            "upgrad, pcgrad, cagrad at the representation:\n"
            f"a step takes {min(at_representation):.2f} to {max(at_representation):.2f} "
            f"at {SIZES[-1]} tasks",
        ),
    ]


def decision_figure(questions: list[tuple[str, str]]) -> matplotlib.figure.Figure:
    """The questions one under the other, the answers beside them."""
    figure = matplotlib.figure.Figure(figsize=(9.5, 1.15 * len(questions) + 0.7))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9.5), ylim=(-len(questions) - 0.1, 0.5))
    axes.axis("off")
    arrow = {"arrowstyle": "->", "color": "0.3", "shrinkA": 0, "shrinkB": 0}
    box = {"boxstyle": "round,pad=0.5", "edgecolor": "0.6"}
    for i, (question, answer) in enumerate(questions):
        place = {"ha": "center", "va": "center", "fontsize": 9.5}
        axes.text(1.8, -i, question, bbox=box | {"facecolor": "#eaf1fb"}, **place)
        axes.text(6.9, -i, answer, bbox=box | {"facecolor": "#eef7ea"}, **place)
        axes.annotate("", (4.55, -i), (3.6, -i), arrowprops=arrow)
        axes.text(4.07, -i + 0.1, "yes", fontsize=9, ha="center")
        axes.annotate("", (1.8, -i - 0.65), (1.8, -i - 0.35), arrowprops=arrow)
        axes.text(1.9, -i - 0.55, "no", fontsize=9)
    axes.text(
        1.8, -len(questions) + 0.15, "Keep equal weights", ha="center", fontsize=9.5,
        bbox=box | {"facecolor": "#eef7ea"},
    )  # fmt: skip
    return figure


def price_figure(methods: dict[str, Measured]) -> matplotlib.figure.Figure:
    """Step time with five tasks against the change from alone on utterances."""
    figure = matplotlib.figure.Figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for form, (label, color) in FORMS.items():
        rows = {name: row for name, row in methods.items() if row.form == form}
        rows = {name: row for name, row in rows.items() if row.utterances and name != "krum"}
        prices = [float(row.prices[1]) for row in rows.values()]
        changes = [tuple(map(float, row.utterances.split(" ± "))) for row in rows.values()]
        means, intervals = zip(*changes, strict=True)
        axes.errorbar(
            prices, means, intervals, fmt="o", markersize=4, linewidth=1, color=color,
            label=f"reads {label}",
        )  # fmt: skip
        for name, price, mean in zip(rows, prices, means, strict=True):
            if form == "rows" or abs(mean - float(methods["equal"].utterances.split()[0])) > 3:
                axes.annotate(
                    name, (price, mean), (5, 3), textcoords="offset points", fontsize=8
                )  # fmt: skip
    equal = float(methods["equal"].utterances.split()[0])
    axes.axhline(equal, color="0.6", linewidth=1, linestyle="--")
    axes.annotate("equal weights", (2.3, equal), (0, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("step time with 5 tasks, relative to plain training (MLP, CPU)")
    axes.set_ylabel("utterances: mean change from\neach task alone, % (5 seeds)")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def main() -> None:
    """Write the table into the page and the pictures beside it."""
    methods = measured()
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    _, after = rest.split(END)
    PAGE.write_text(before + START + markdown(methods) + END + after, encoding="utf-8")
    settings = {"svg.hashsalt": "mtl_jax", "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        for name, figure in (
            ("decision", decision_figure(decisions(methods))),
            ("price", price_figure(methods)),
        ):
            figure.savefig(DOCS / "pictures" / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
