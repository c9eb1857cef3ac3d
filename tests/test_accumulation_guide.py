"""The code of the guide on accumulation and mixed precision runs, from top to bottom."""

import pathlib
import re

import jax
import numpy as np
from trees import assert_trees_close

import mtl_jax

GUIDE = pathlib.Path(__file__).parents[1] / "docs" / "accumulation.md"


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    names = {}
    steps = []
    for block in blocks:
        exec(block, names)
        steps.append((names["value"], names["state"]))
    (pieces, state), (representation, _), (_, multi_steps) = steps[0], steps[2], steps[4]
    params, batch, weighting = names["params"], names["batch"], mtl_jax.adaptive()
    losses = names["losses_fn"](params, batch)
    assert_trees_close(pieces.losses, losses, rtol=1e-5, atol=0)
    assert_trees_close(
        pieces.weights, weighting.update(losses, weighting.init(losses))[0], rtol=1e-5, atol=0
    )
    assert (state.step, state.skipped) == (1, 0)
    assert_trees_close(representation.losses, losses, rtol=1e-5, atol=0)
    assert names["memory"][8] < names["memory"][1] / 4
    assert (multi_steps.step, multi_steps.opt_state.gradient_step) == (8, 1)
    changed = jax.tree.map(lambda a, b: np.any(a != b), multi_steps.params, params)
    assert all(jax.tree.leaves(changed))
