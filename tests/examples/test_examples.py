"""Every example trains: what it says comes out, in fewer steps than it takes on its own."""

import importlib
import pathlib
import re

import jax
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
ELSEWHERE = {"distributed", "diagnosis", "tabular"}
"""Tested with real processes, as a notebook, and with the console."""


@pytest.fixture(autouse=True)
def as_a_user():
    """Without the strictness of the library's own tests."""
    with jax.numpy_rank_promotion("allow"):
        yield


def run(name, **arguments):
    return importlib.import_module(f"examples.{name}").main(**arguments)


def test_flax_linen():
    found = run("flax_linen", steps=120)
    assert found["error"] < 2  # the mean radius is 12.5
    assert found["accuracy"] > 0.9


def test_flax_nnx():
    found = run("flax_nnx", steps=100)
    assert found["errors"]["amplitude"] < 0.3  # 0.375 for the mean of the amplitudes
    assert found["errors"]["phase"] < 0.4  # 0.64 for the mean of the sines
    assert 25 < found["present"]["phase"] < 75 < found["present"]["amplitude"]


def test_equinox_module():
    unexplained = run("equinox_module", steps=120)
    assert max(unexplained["nash_mtl"].values()) < 0.1
    assert unexplained["nash_mtl"]["waves"] < unexplained["equal"]["waves"] / 2


def test_bare_pytrees():
    losses = run("bare_pytrees", steps=200)
    assert all(after < before / 4 for before, after in losses.values())


def test_optax_chain():
    found = run("optax_chain", steps=200)
    for way in ("around", "inside"):
        assert all(found[way][task] < found["start"][task] / 5 for task in found[way])


def test_scan_loop():
    found = run("scan_loop", steps=300, seeds=4)
    for losses in found.values():
        assert losses["easy"] < 0.02
        assert losses["hard"] < 0.25  # half the variance of the wave
    assert found["adaptive"]["hard"] < found["equal"]["hard"]


def test_sharded():
    found = run("sharded", steps=20)
    for everywhere, alone in zip(found["everywhere"], found["alone"], strict=True):
        assert everywhere == pytest.approx(alone, rel=1e-4)
    first, last = found["everywhere"][0], found["everywhere"][-1]
    assert all(last[task] < first[task] / 2 for task in first)


def test_physics_informed():
    errors = run("physics_informed", steps=1000, more=50, seeds=2, names=("norm_balance",))
    adam, lbfgs = errors["norm_balance"]
    assert adam < 0.7  # 1 for a network that says 0
    assert lbfgs < 0.75 * adam


def test_many_tasks():
    found = run("many_tasks", steps=120)
    assert all(share > 0.2 for share in found["equal"].values())  # 0 for chance
    assert found["conflict_free"]["poor"] > found["equal"]["poor"] + 0.1
    assert found["conflict_free"]["all"] > found["equal"]["all"]


def test_every_program_is_described_and_tested():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\((\w+)\.py\)", readme))) == PROGRAMS
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(PROGRAMS) <= tested | ELSEWHERE
