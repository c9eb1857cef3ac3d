"""What is distributed, what importing it imports, and what its public names are."""

import ast
import contextlib
import doctest
import email
import functools
import inspect
import io
import pathlib
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import pytest
import yaml
from twine.commands.check import check

import mtl_jax
import mtl_jax.compare
import mtl_jax.evaluation

ROOT = pathlib.Path(__file__).parents[1]
MODULES = (mtl_jax, mtl_jax.evaluation, mtl_jax.compare)
ALIASES = {"Losses", "METHODS", "SPACES", "Space", "Verdict", "WEIGHTINGS", "Weights"}
"""Types and tables, described where they are defined: they can have no docstring."""
PUBLIC = [(module, name) for module in MODULES for name in module.__all__ if name not in ALIASES]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from the sdist, as for a release."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def sdist(built):
    (path,) = built.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    found = contents(wheel)
    info = f"mtl_jax-{mtl_jax.__version__}.dist-info"
    library = {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for path in (ROOT / "mtl_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name: found[name] for name in library} == library
    assert "mtl_jax/py.typed" in library
    assert {name.split("/")[0] for name in found.keys() - library.keys()} == {info}
    assert f"{info}/licenses/LICENSE" in found


def test_it_asks_for_four_packages(wheel):
    info = f"mtl_jax-{mtl_jax.__version__}.dist-info"
    metadata = email.message_from_bytes(contents(wheel)[f"{info}/METADATA"])
    needed = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert {re.split("[<>=]", r)[0] for r in needed} == {"jax", "jaxtyping", "numpy", "optax"}


def test_the_sdist_has_all_that_the_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/")[1] for name in archive.getnames()}
    folders = {".ci", "benchmarks", "docs", "examples", "experiments", "mtl_jax", "tests"}
    pages = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md"}
    assert names >= folders | pages | {"Makefile", "pyproject.toml"}


def test_the_index_would_take_both(sdist, wheel):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        failed = check([str(sdist), str(wheel)], strict=True)
    assert not failed, printed.getvalue()


def test_what_the_index_shows_has_no_link_into_the_repository(wheel):
    """There it would lead nowhere."""
    info = f"mtl_jax-{mtl_jax.__version__}.dist-info"
    shown = email.message_from_bytes(contents(wheel)[f"{info}/METADATA"]).get_payload()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", readme)
    inside = [text for text, target in links if not target.startswith("https://")]
    assert len(inside) > 10
    assert all(text in shown for text in inside)
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]+)\)", shown))
    assert len(shown.splitlines()) == len(readme.splitlines())


def test_the_version_is_said_once():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mtl_jax.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, day = re.findall(r"^## \[([\d.]+)\] - (\S+)$", changes, re.MULTILINE)[0]
    assert version == mtl_jax.__version__
    assert day == citation["date-released"].isoformat()


def test_importing_it_imports_little_more_than_jax_and_optax():
    """Its own modules apart: the time of an import is that of what it imports."""
    program = (
        "import sys, jax, optax, jax.numpy; before = set(sys.modules);"
        "import mtl_jax; print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    # Of JAX, `jax.extend.core`, which it does not import itself: 40 ms of 2 s.
    assert set(ran.stdout.split()) <= {"mtl_jax", "jax", "jaxtyping", "numpy", "wadler_lindig"}


MODULE_PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "mtl_jax").rglob("*.py")
}


def imports(module):
    """The modules of the library that this one imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(MODULE_PATHS[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & MODULE_PATHS.keys() or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULE_PATHS.keys()


@functools.cache
def floor(module):
    """How many modules the longest chain of imports that ends in this one has."""
    return 1 + max(map(floor, imports(module)), default=0)


def test_imports_run_one_way_over_ten_floors():
    """And the contributing page says which modules are on which; a folder is where its top is."""
    library = {name for name in MODULE_PATHS if not name.startswith("mtl_jax.compare")}
    library -= {"mtl_jax", "mtl_jax.__main__"}  # which only hand on what is there
    assert all(imports(name) <= library for name in library)
    assert max(map(floor, library)) <= 10
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 11))
    for number, names in rows:
        for name in re.findall(r"`([\w/]+)`", names):
            module = "mtl_jax." + name.rstrip("/").replace("/", ".")
            inside = {found for found in library if f"{found}.".startswith(f"{module}.")}
            assert max(map(floor, inside)) == int(number), name


def test_completion_offers_the_documented_names_only():
    imported = {"compare", "evaluation"}
    for module in MODULES:
        offered = {name for name in dir(module) if not name.startswith("_")}
        assert offered == {*module.__all__} | (imported if module is mtl_jax else set())
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)


def gaps(module, name):
    """What the docstring of a public name lacks."""
    thing = getattr(module, name)
    text = inspect.getdoc(thing) or ""
    wanted = []
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        wanted += ["Args:"] if signature.parameters else []
        wanted += ["Returns:"] if signature.return_annotation is not None else []
        wanted += ["Example:"]
    elif issubclass(thing, tuple):
        wanted += ["Attributes:"]
    lacking = [f"{name}: {part}" for part in wanted if part not in text]
    return lacking if text else [f"{name}: no docstring"]


def test_every_public_name_says_what_it_is():
    assert [gap for module, name in PUBLIC for gap in gaps(module, name)] == []


def test_the_method_of_the_contributing_page_works(monkeypatch):
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (page,) = re.findall(r"^## Add a method\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"   ```python\n(.*?)   ```", page, re.DOTALL)
    file, record, test = map(textwrap.dedent, blocks)
    names = {"__name__": "square_root"}
    exec(file, names)
    monkeypatch.setattr(mtl_jax, "square_root", names["square_root"], raising=False)
    (example,) = doctest.DocTestFinder().find(names["square_root"], "square_root", globs={})
    assert doctest.DocTestRunner().run(example) == (0, 4)
    method = eval(record, {"Method": mtl_jax.Method, **names})
    assert method.call == "square_root()"
    tests = {"__name__": "test_square_root"}
    exec(test, tests)
    tests["test_definition"]()
    paths = re.findall(r"[`(]((?:mtl_jax|tests|docs|benchmarks|experiments)/[\w./]*)[`)]", page)
    there = {path for path in paths if (ROOT / path).exists()}
    assert set(paths) - there <= {
        "mtl_jax/loss_weightings/square_root.py",
        "tests/loss_weightings/test_square_root.py",
    }
