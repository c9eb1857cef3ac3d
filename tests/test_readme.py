"""The README's code runs, and its table of methods is complete."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

import mtl_jax
from mtl_jax.compare import WEIGHTINGS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
VARIANTS = {"adaptive_initial"}
WRAPPERS = {"every", "after_warmup", "ema", "clipped", "normalized", "with_preference"}


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)
        if block is blocks[0]:
            assert sorted(names["value"].weights) == ["depth", "normals"]
            assert int(names["state"].step) == 1
    assert int(names["weighting_state"].steps[0]) == 1
    # Both steps do the same.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        names["state"].params,
        names["params"],
    )
    params = {"encoder": jnp.ones((4, 2)), "depth": jnp.ones((2, 1)), "normals": jnp.ones((2, 3))}
    state = mtl_jax.upgrad().init(names["losses"])
    value, gradient, _ = names["gradient_fn"](params, state, names["batch"])
    assert all(weight > 0 for weight in value.weights.values())
    assert jax.tree.structure(gradient) == jax.tree.structure(params)


def methods(text):
    return set(re.findall(r"`(\w+)\(", text))


def test_methods_tables_are_complete():
    table = README[README.index("| reads |") : README.index("Wrappers compose")]
    rows = methods("\n".join(line for line in table.splitlines() if line.startswith("|")))
    known = (set(WEIGHTINGS) - VARIANTS) | {"constant"}
    assert rows == known
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE)) == known | WRAPPERS
    assert all(hasattr(mtl_jax, name) for name in known | WRAPPERS)


def test_readme_is_short():
    assert len(README.splitlines()) <= 100
