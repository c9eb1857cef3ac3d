"""The table and the pictures of docs/choosing.md, from the tables of results.md and speed.md."""

import pathlib
import re
from typing import NamedTuple

import matplotlib
import matplotlib.figure
import matplotlib.patches

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
        form = next((form for form in FORMS if f"{name} {form}" in times[-1]), None)
        if form is None:  # its price is another one's: constant weights are equal weights
            continue
        rows = [table.get(f"{name} {form}") for table in times]
        found[name] = Measured(
            form,
            [row["step time"].split(" [")[0] if row else "" for row in rows],
            multimnist[name][CHANGE] if name in multimnist else "",
            utterances[name][CHANGE] if name in utterances else "",
            utterances[name][TOPIC] if name in utterances else "",
        )
    return found


def markdown(methods: dict[str, Measured]) -> str:
    """The table of the page."""
    prices = " | ".join(f"K = {size}" for size in SIZES)
    lines = [
        f"| method | {prices} | multimnist | utterances | topic |",
        "|---" * (len(SIZES) + 4) + "|",
    ]
    for form, (label, _) in FORMS.items():
        lines.append(f"| *reads {label}* " + "| " * (len(SIZES) + 3) + "|")
        for name, row in methods.items():
            if row.form == form:
                prices = [f"{float(price):.2f}" if price else "" for price in row.prices]
                cells = (*prices, row.multimnist, row.utterances, row.topic)
                unbroken = " | ".join(cells).replace(" ± ", "\u00a0±\u00a0")
                lines.append(f"| `{name}` | {unbroken} |")
    return "\n".join(lines) + "\n"


def decisions(methods: dict[str, Measured]) -> list[tuple[str, str]]:
    """Questions in the order to ask them, each with the answer to take at the first yes."""

    def mean(cell: str) -> float:
        return float(cell.split(" ±")[0])

    def gain(name: str) -> float:
        return mean(methods[name].topic) - mean(methods["equal"].topic)

    tuned = mean(results("utterances", FASTER)["equal"][TOPIC]) - mean(methods["equal"].topic)
    best = max((name for name in methods if methods[name].topic), key=gain)
    return [
        (
            "Are equal weights not tuned yet?",
            f"Tune their learning rate first: on utterances it brings the hardest\n"
            f"task {tuned:+.1f} points, the best method without it, {best}, {gain(best):+.1f}",
        ),
        (
            "Is every task as good as trained alone?",
            "Keep equal weights",
        ),
        (
            "Are the losses in different units?",
            "What does not depend on units: constant weights chosen for them,\n"
            "adaptive(relative_to='initial'), db_mtl",
        ),
        (
            "Does the hardest task learn too little?",
            f"Untuned, adaptive: {gain('adaptive'):+.1f} points for it, at the price of plain "
            "training;\n"
            f"db_mtl: {gain('db_mtl'):+.1f}, at {float(methods['db_mtl'].prices[1]):.1f} times "
            f"that price for {SIZES[1]} tasks",
        ),
        (
            "Do gradients conflict (cosines below 0)?",
            "upgrad at the representation, which harms no task there:\n"
            f"{float(methods['upgrad'].prices[-1]):.2f} times the price for {SIZES[-1]} tasks",
        ),
    ]


def decision_figure(questions: list[tuple[str, str]]) -> matplotlib.figure.Figure:
    """The questions one under the other, the answers beside them."""
    rows = [*questions, ("", "Keep equal weights")]
    figure = matplotlib.figure.Figure(figsize=(9, 0.9 * len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9), ylim=(0.5 - len(rows), 0.5))
    axes.axis("off")

    def box(left: float, row: int, width: float, text: str, color: str) -> None:
        shape = matplotlib.patches.FancyBboxPatch(
            (left, -row - 0.3), width, 0.6, "round,pad=0,rounding_size=0.1", fc=color, ec="0.6"
        )
        axes.add_patch(shape)
        axes.text(left + width / 2, -row, text, ha="center", va="center", fontsize=9)

    def arrow(start: tuple[float, float], end: tuple[float, float], label: str) -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0})
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.annotate(label, (x, y), (4, 3), textcoords="offset points", fontsize=9)

    for i, (question, answer) in enumerate(rows):
        box(3.9, i, 5, answer, "#eef7ea")
        if question:
            box(0.1, i, 3, question, "#eaf1fb")
            arrow((3.1, -i), (3.9, -i), "yes")
        if i + 1 < len(questions):
            arrow((1.6, -i - 0.3), (1.6, -i - 0.7), "no")
    last = len(rows) - 1
    axes.plot((1.6, 1.6), (-last, 0.7 - last), color="black", linewidth=1)
    arrow((1.6, -last), (3.9, -last), "no")
    return figure


def price_figure(methods: dict[str, Measured]) -> matplotlib.figure.Figure:
    """The change from alone on utterances, best first, with the price of each method."""
    rows = [(name, row) for name, row in methods.items() if row.utterances and name != "krum"]
    rows.sort(key=lambda item: -float(item[1].utterances.split(" ± ")[0]))
    figure = matplotlib.figure.Figure(figsize=(9, 7), layout="constrained")
    axes = figure.add_subplot()
    for form, (label, color) in FORMS.items():
        points = [
            (float(mean), -place, float(interval))
            for place, (_, row) in enumerate(rows)
            if row.form == form
            for mean, interval in [row.utterances.split(" ± ")]
        ]
        means, places, intervals = zip(*points, strict=True)
        style = {"fmt": "o", "markersize": 4, "color": color, "label": f"reads {label}"}
        axes.errorbar(means, places, xerr=intervals, **style)
    axes.axvline(
        float(methods["equal"].utterances.split(" ± ")[0]), color="0.6", linestyle="--", linewidth=1
    )
    labels = [f"{name}  {float(row.prices[1]):.2f}" for name, row in rows]
    axes.set_yticks([-place for place in range(len(rows))], labels, fontsize=8)
    axes.set_ylim(0.7 - len(rows), 0.7)
    axes.set_ylabel(f"method, and the time of a step with {SIZES[1]} tasks (plain training: 1)")
    axes.set_xlabel("utterances: mean change from each task alone, % (5 seeds, not tuned)")
    axes.legend(loc="upper left")
    return figure


def main() -> None:
    """Write the table into the page and the pictures beside it."""
    methods = measured()
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    _, after = rest.split(END)
    PAGE.write_text(before + START + markdown(methods) + END + after, encoding="utf-8")
    with matplotlib.rc_context({"svg.hashsalt": "mtl_jax", "svg.fonttype": "none"}):
        for name, figure in (
            ("decision", decision_figure(decisions(methods))),
            ("price", price_figure(methods)),
        ):
            figure.savefig(DOCS / "pictures" / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
