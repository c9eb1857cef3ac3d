r"""The table and the pictures of docs/choosing.md, from records.

``python -m experiments.choosing runs/multimnist runs/utterances`` reads what the comparisons left,
with ``--faster`` that of utterances at its better learning rate, and what ``python -m
benchmarks.speed`` left.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import matplotlib
import matplotlib.figure
import matplotlib.patches
import tyro

from benchmarks.speed.records import FrameworkResult
from mtl_jax.compare import WEIGHTINGS, Results
from mtl_jax.compare.analysis import Analysis, Estimate

DOCS = pathlib.Path(__file__).parents[1] / "docs"
START, END = "<!-- made by python -m experiments.choosing -->\n\n", "\n<!-- end -->"
NETWORKS = {2: "mlp-2", 5: "mlp-5", 20: "mlp-20"}  # of the benchmark, by the number of tasks
FORMS = {  # of a step in the benchmark, the cheapest first
    "losses": ("the losses", "tab:blue"),
    "representation": ("the Gramian, at the representation", "tab:orange"),
    "rows": ("the task gradients", "tab:green"),
    "second batch": ("a second batch", "tab:red"),
}
HARDEST = "topic"  # of utterances


@dataclasses.dataclass(frozen=True)
class Config:
    """Make the table and the pictures of choosing.md from records."""

    folders: Annotated[
        tuple[pathlib.Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FOLDER", help="Comparisons on multimnist and utterances."),
    ]
    faster: pathlib.Path
    """The comparison on utterances with the learning rate that suits equal weights."""
    speed: pathlib.Path = pathlib.Path("runs/speed/speed.json")
    """What the benchmark of a step left."""
    out: pathlib.Path = DOCS
    """The folder with choosing.md and pictures/."""


class Measured(NamedTuple):
    """What was measured of a method.

    Attributes:
      form: what it reads, a key of :data:`FORMS`.
      prices: the time of a step in that of plain training, by the number of tasks.
      multimnist: the mean change from each task alone.
      utterances: the same, on the other problem.
      hardest: the accuracy in the hardest task of that.
    """

    form: str
    prices: dict[int, float]
    multimnist: Estimate | None
    utterances: Estimate | None
    hardest: Estimate | None


def measured(results: Results, speed: FrameworkResult) -> dict[str, Measured]:
    """What was measured of every method.

    Args:
      results: of multimnist and utterances.
      speed: the times of a step.
    """
    networks = {network.network: network for network in speed.networks}
    rows = {
        problem: {row.name: row for row in Analysis(results, problem).rows}
        for problem in ("multimnist", "utterances")
    }
    found = {}
    for name in WEIGHTINGS:
        times = {
            (form, tasks): variant.ratio[1]
            for form in FORMS
            for tasks, network in NETWORKS.items()
            if (variant := networks[network].find(name, form)) is not None
        }
        form = next((form for form in FORMS if (form, max(NETWORKS)) in times), None)
        if form is None:  # its price is another one's: constant weights are equal weights
            continue
        multimnist, utterances = (rows[problem].get(name) for problem in rows)
        found[name] = Measured(
            form,
            {tasks: time for (read, tasks), time in times.items() if read == form},
            multimnist and multimnist.against_alone,
            utterances and utterances.against_alone,
            hardest(results, name) if utterances else None,
        )
    return found


def hardest(results: Results, name: str) -> Estimate:
    """What a weighting reached in the hardest task of utterances, in per cent."""
    analysis = Analysis(results, "utterances")
    (cells,) = [row.cells for row in analysis.rows if row.name == name]
    (number,) = [n for n, column in enumerate(analysis.columns) if column.task == HARDEST]
    estimate = cells[number].estimate
    return Estimate.from_values([100 * value for value in estimate.values])


def markdown(methods: Mapping[str, Measured]) -> str:
    """The table of the page."""
    prices = " | ".join(f"K = {tasks}" for tasks in NETWORKS)
    lines = [
        f"| method | {prices} | multimnist | utterances | {HARDEST} |",
        "|---" * (len(NETWORKS) + 4) + "|",
    ]
    for form, (label, _) in FORMS.items():
        lines.append(f"| *reads {label}* " + "| " * (len(NETWORKS) + 3) + "|")
        for name, row in methods.items():
            if row.form == form:
                times = [f"{row.prices[k]:.2f}" if k in row.prices else "" for k in NETWORKS]
                found = [_interval(row.multimnist, 100, "+"), _interval(row.utterances, 100, "+")]
                cells = (*times, *found, _interval(row.hardest))
                lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _interval(estimate: Estimate | None, scale: int = 1, sign: str = "") -> str:
    """A mean and its interval, without a break between them."""
    if estimate is None:
        return ""
    return f"{scale * estimate.mean:{sign}.2f}\u00a0±\u00a0{scale * estimate.half_width:.2f}"


def decisions(methods: Mapping[str, Measured], faster: Estimate) -> list[tuple[str, str]]:
    """Questions in the order to ask them, each with the answer to take at the first yes.

    Args:
      methods: what was measured.
      faster: what equal weights reach in the hardest task at a learning rate that suits them.
    """
    known = {name: row.hardest.mean for name, row in methods.items() if row.hardest is not None}

    def gain(name: str) -> float:
        return known[name] - known["equal"]

    best = max(known, key=gain)
    tuned = faster.mean - known["equal"]
    few, many = (sorted(NETWORKS)[place] for place in (1, -1))
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
            f"db_mtl: {gain('db_mtl'):+.1f}, at {methods['db_mtl'].prices[few]:.1f} times "
            f"that price for {few} tasks",
        ),
        (
            "Do gradients conflict (cosines below 0)?",
            "upgrad at the representation, which harms no task there:\n"
            f"{methods['upgrad'].prices[many]:.2f} times the price for {many} tasks",
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


def price_figure(methods: Mapping[str, Measured]) -> matplotlib.figure.Figure:
    """The change from alone on utterances, best first, with the price of each method."""
    few = sorted(NETWORKS)[1]
    # krum is far to the left of all others.
    found = {n: row.utterances for n, row in methods.items() if row.utterances and n != "krum"}
    names = sorted(found, key=lambda name: -found[name].mean)
    figure = matplotlib.figure.Figure(figsize=(9, 7), layout="constrained")
    axes = figure.add_subplot()
    for form, (label, color) in FORMS.items():
        points = [
            (100 * found[name].mean, -place, 100 * found[name].half_width)
            for place, name in enumerate(names)
            if methods[name].form == form
        ]
        if points:
            means, places, intervals = zip(*points, strict=True)
            style = {"fmt": "o", "markersize": 4, "color": color, "label": f"reads {label}"}
            axes.errorbar(means, places, xerr=intervals, **style)
    axes.axvline(100 * found["equal"].mean, color="0.6", linestyle="--", linewidth=1)
    labels = [f"{name}  {methods[name].prices[few]:.2f}" for name in names]
    axes.set_yticks([-place for place in range(len(names))], labels, fontsize=8)
    axes.set_ylim(0.7 - len(names), 0.7)
    axes.set_ylabel(f"method, and the time of a step with {few} tasks (plain training: 1)")
    axes.set_xlabel("utterances: mean change from each task alone, % (5 seeds, not tuned)")
    axes.legend(loc="upper left")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Write the table into the page and the pictures beside it."""
    config = tyro.cli(Config, prog="python -m experiments.choosing", args=arguments)
    try:
        results = Results.combine([Results.read(folder) for folder in config.folders])
        faster = hardest(Results.read(config.faster), "equal")
        content = json.loads(config.speed.read_text(encoding="utf-8"))
        missing = {"multimnist", "utterances"} - set(results.problems)
        if missing:
            raise ValueError(f"The folders have no runs on {' and '.join(sorted(missing))}.")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    methods = measured(results, FrameworkResult.from_json(content["ours"]))
    page = config.out / "choosing.md"
    before, rest = page.read_text(encoding="utf-8").split(START)
    _, after = rest.split(END)
    page.write_text(before + START + markdown(methods) + END + after, encoding="utf-8")
    with matplotlib.rc_context({"svg.hashsalt": "mtl_jax", "svg.fonttype": "none"}):
        for name, figure in (
            ("decision", decision_figure(decisions(methods, faster))),
            ("price", price_figure(methods)),
        ):
            path = config.out / "pictures" / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
