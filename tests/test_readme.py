"""The README's code runs, and its table of methods is complete."""

import pathlib
import re

import jax
import numpy as np

import mtl_jax
from mtl_jax.compare import WEIGHTINGS

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)
    assert sorted(names["value"].weights) == ["depth", "normals"]
    assert int(names["state"].step) == int(names["weighting_state"].steps[0]) == 1
    # Both steps do the same.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        names["state"].params,
        names["params"],
    )


def test_methods_table_is_complete():
    rows = re.findall(r"^\| `(\w+)\(", README, re.MULTILINE)
    assert set(rows) == (set(WEIGHTINGS) - {"adaptive_initial"}) | {"constant"}
    assert all(hasattr(mtl_jax, name) for name in rows)


def test_readme_is_short():
    assert len(README.splitlines()) <= 100
