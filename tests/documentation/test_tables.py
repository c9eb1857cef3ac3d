"""The tables of the pages are complete, and their figures are those of the measurements."""

import inspect
import re
import runpy
import shutil
import statistics

import optax
import pytest
import scipy.stats
from pages import DOCS, PAGES

import mtl_jax
import mtl_jax.compare
import mtl_jax.evaluation
import mtl_jax.solvers
from benchmarks.communication import WAYS
from experiments import evidence
from experiments.problems import PROBLEMS
from mtl_jax.compare import WEIGHTINGS

VARIANTS = {name for method in mtl_jax.METHODS.values() for name in method.variants}
WRAPPERS = {
    *("every", "after_warmup", "ema", "clipped", "normalized", "with_preference", "log_losses")
}
METHODS = set(mtl_jax.METHODS)
NETWORKS = (2, 5, 20)
"""The numbers of tasks of the networks that the speed page has a section for."""


def test_tables_of_methods_are_those_of_the_records():
    """If one is not, `make tables` makes it."""
    made = runpy.run_path(str(DOCS / "tables.py"))["pages"]()
    assert [path for path, text in made.items() if PAGES[path] != text] == []


def test_methods():
    assert set(WEIGHTINGS) == METHODS | VARIANTS | {"adaptive_alone"}
    readme = PAGES["README.md"]
    table = readme[readme.index("| reads |") : readme.index("```python\nweighting = mtl_jax.every")]
    rows = "\n".join(line for line in table.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(\w+)\(", rows)) == METHODS
    page = PAGES["docs/methods.md"]
    assert set(re.findall(r"^\| \[`(\w+)\(", page, re.MULTILINE)) == METHODS | WRAPPERS
    assert all(hasattr(mtl_jax, name) for name in METHODS | WRAPPERS)


# The methods that LibMTL or TorchJD has, too.
ELSEWHERE = {
    *("equal", "constant", "adaptive", "dwa", "uncertainty", "random_weighting", "geometric"),
    *("imtl_l", "stch", "famo", "gradnorm", "mgda", "cagrad", "pcgrad", "gradvac", "nash_mtl"),
    *("fair_grad", "imtl_g", "aligned_mtl", "upgrad", "dual_proj", "conflict_free", "krum"),
    *("graddrop", "trimmed_mean", "moco", "excess_mtl", "db_mtl"),
    *("modo", "auto_lambda", "sdmgrad"),
}


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 100


@pytest.mark.parametrize(
    "module",
    [mtl_jax, mtl_jax.compare, mtl_jax.evaluation, mtl_jax.solvers],
    ids=lambda m: m.__name__,
)
def test_every_public_name_is_in_the_reference_once(module):
    text = "\n".join(page for name, page in PAGES.items() if name.startswith("docs/reference/"))
    names = re.findall(
        r"^## (\w+)\n\n```{eval-rst}\n\.\. auto\w+:: ([\w.]+)\.\1\b", text, re.MULTILINE
    )
    prefix = module.__name__
    inside = ("mtl_jax.compare", "mtl_jax.evaluation", "mtl_jax.solvers")
    found = [
        name
        for name, where in names
        if where.startswith(prefix) and (prefix != "mtl_jax" or not where.startswith(inside))
    ]
    assert sorted(found) == sorted(module.__all__)


def section(page, heading):
    return re.split(r"^## ", PAGES[page].split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]


def table(block, names=1):
    """The rows of a table by their names, which are its first columns."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
    header, _, *rows = lines
    return {" ".join(row[:names]): dict(zip(header, row, strict=True)) for row in rows}


def step_times(size):
    (block, *_) = re.findall(r"(?:^\|.*\n)+", section("docs/speed.md", f"mlp-{size}"), re.MULTILINE)
    return table(block, names=2)


def test_what_is_measured():
    """The speed page has the price of every method but those that are said to lack one."""
    seen = {row.split()[0] for size in NETWORKS for row in step_times(size)}
    seen |= set(re.findall(r"^\| `(\w+)` \| \d", PAGES["docs/speed.md"], re.MULTILINE))
    missing = re.findall(r"Not measured yet: ([^.]*)\.", PAGES["docs/methods.md"])
    said = {"constant", *re.findall(r"`(\w+)`", "".join(missing))}
    assert (METHODS | VARIANTS) - seen == said


def test_results_are_made_from_the_kept_records(tmp_path):
    """If one is not, `python -m experiments.evidence` makes it."""
    docs = tmp_path / "docs"
    shutil.copytree(DOCS / "results", docs / "results")
    shutil.copytree(DOCS / "pictures", docs / "pictures")
    shutil.copy(DOCS / "results.md", docs / "results.md")
    shutil.copy(DOCS.parent / "README.md", tmp_path / "README.md")
    evidence.main(["--docs", str(docs), "--readme", str(tmp_path / "README.md")])
    made = ["README.md", "docs/results.md"]
    made += [f"docs/results/{path.name}" for path in docs.glob("results/*.md")]
    assert [name for name in made if PAGES[name] != (tmp_path / name).read_text("utf-8")] == []
    for name in ("evidence.svg", "predictors.svg"):
        made = (docs / "pictures" / name).read_bytes()
        assert made == (DOCS / "pictures" / name).read_bytes(), name
    size = sum(path.stat().st_size for path in docs.rglob("results.json"))
    assert size < 2e6


def names_in(page, start, end):
    text = PAGES[page][PAGES[page].index(start) :]
    return {name.split("(")[0] for name in re.findall(r"`(\w+[^`]*)`", text[: text.index(end)])}


def test_which_weights_sum_to_the_number_of_tasks():
    said = names_in("docs/how_it_works.md", "- `equal`, `adaptive`, `group_dro`", " sum to K")
    assert said == {name for name, method in mtl_jax.METHODS.items() if method.total == "K"}


def test_which_methods_need_positive_losses():
    """Those that say so of themselves, in the form that their parameters choose."""
    said = names_in("docs/missing_labels.md", "exactly 0: `geometric`", ".\n")
    folders = DOCS.parent / "mtl_jax"
    files = [path for folder in folders.glob("*_weightings") for path in folder.glob("*.py")]
    found = {path.stem for path in files if "positive_losses=" in path.read_text("utf-8")}
    assert said == found | {"log_losses"}


def test_the_page_of_problems_names_every_metric():
    module = mtl_jax.compare.metrics
    functions = inspect.getmembers(module, inspect.isfunction)
    made = {
        n for n, f in functions if n in mtl_jax.compare.__all__ and f.__module__ == module.__name__
    }
    table = section("docs/problem.md", "Metrics")
    assert made <= set(re.findall(r"`(\w+)", table))


def test_the_page_of_results_names_every_problem():
    table = section("docs/results.md", "The problems")
    assert set(PROBLEMS) <= set(re.findall(r"\w+", table))


def test_prices_are_the_medians_of_what_was_measured():
    """In the README, and on the page of representations."""

    def prices(form, *reads):
        found = []
        for size in NETWORKS:
            times = step_times(size)
            names = [
                name
                for method in mtl_jax.METHODS.values()
                if method.reads in reads and method.name != "conflict_free_momentum"
                for name in (method.name, *method.variants)
            ]
            of_form = [
                float(times[f"{name} {form}"]["step time"].split(" [")[0])
                for name in names
                if f"{name} {form}" in times
            ]
            found.append(statistics.median(of_form))
        digits = [2 if price < 1.5 else 1 if price < 10 else 0 for price in found]
        return [f"{price:.{number}f}" for price, number in zip(found, digits, strict=True)]

    said = {
        "1 forward, 1 backward": prices("losses", "the losses"),
        "2 forward, 1 backward": prices("losses", "the losses after the step, too"),
        "at the representation": prices("representation", "the Gramian"),
        "over the encoder: K backward passes of it": prices("encoder rows", "the Gramian"),
        "over all parameters: 1 forward, K backward": prices("rows", "the Gramian"),
        "1 forward, K backward, K gradients held": prices("rows", "the task gradients"),
    }
    for passes, found in said.items():
        assert f"{passes}: {', '.join(found)}" in PAGES["README.md"]
    rows = table("".join(re.findall(r"^\|.*\n", PAGES["docs/representation.md"], re.MULTILINE)))
    for row, form in (
        ("at the representation", "representation"),
        ('over the encoder\'s parameters, `gramian="encoder"`', "encoder rows"),
        ("over the parameters of any network", "rows"),
    ):
        assert list(rows[row].values())[1:] == prices(form, "the Gramian")


def test_collectives():
    page = PAGES["docs/scale.md"]
    assert re.findall(r"^\| (.*?) +\|", page, re.MULTILINE) == ["step", *WAYS]
    assert "Made by `python -m benchmarks.communication`" in page


def test_power_of_seeds():
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", PAGES["docs/evaluation.md"], re.MULTILINE)
    assert [int(number) for number, _ in rows] == [3, 4, 5, 6, 8, 10, 20]
    for number, cells in rows:
        *effects, smallest = map(float, cells.split("|"))
        seeds = int(number)
        for comparisons, effect in zip((1, 12, 30), effects, strict=True):
            critical = scipy.stats.t.ppf(1 - 0.025 / comparisons, seeds - 1)
            power = scipy.stats.nct.sf(critical, seeds - 1, effect * seeds**0.5)
            assert power == pytest.approx(0.8, abs=0.01)
        assert smallest == pytest.approx(2.0 ** (1 - seeds), rel=0.05)


@pytest.mark.parametrize("page", ["docs/moving.md", "docs/physics.md"])
def test_moving(page):
    """What stands beside the names of other libraries are calls that can be made here."""
    rows = re.findall(r"^\|[^|]*\| ([^|]*) \|[^|]*\|$", PAGES[page], re.MULTILINE)
    calls = [call for row in rows for call in re.findall(r"`(\w+\([^`]*\))`", row)]
    known = {"optimizer": optax.adam(1e-3), "steps_per_epoch": 10, "k": 10, "K": 3, "mu": 0.5}
    known |= {"weights": {"data": 1.0}, "learning_rate": 0.1}
    made = [eval(call, vars(mtl_jax) | known) for call in calls]
    assert all(isinstance(one, mtl_jax.Weighting | mtl_jax.Aggregator) for one in made)
    assert len(made) > 10
    if page == "docs/moving.md":
        assert set(re.findall(r"\w+(?=\()", " ".join(calls))) & METHODS == ELSEWHERE


def test_defaults_that_are_said_to_be_shared():
    """Those of LibMTL and of the codes on physics.md, where a page says that ours are the same."""
    theirs = {
        "moco": {"beta": 0.5, "beta_sigma": 0.5, "gamma": 0.1, "gamma_sigma": 0.5, "rho": 0},
        "db_mtl": {"beta": 0.9, "beta_sigma": 0},
        "excess_mtl": {"step_size": 0.01},
        "famo": {"learning_rate": 0.025, "weight_decay": 1e-3},
        "stch": {"mu": 1.0},
        "modo": {"gamma": 0.001, "rho": 0.1},
        "sdmgrad": {"regularization": 0.3, "iterations": 20, "momentum": 0.5},
        "norm_balance": {"momentum": 0.9},
        "lr_annealing": {"alpha": 0.1},
        "relobralo": {"alpha": 0.999, "temperature": 1.0, "rho": 1.0},
    }
    for name, defaults in theirs.items():
        parameters = inspect.signature(getattr(mtl_jax, name)).parameters
        assert {key: parameters[key].default for key in defaults} == defaults
