"""The page about many devices: its code runs, in three ways that agree; its table is complete."""

import pathlib
import re

import jax
import numpy as np

from experiments.communication import WAYS

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    names, states = {}, []
    for block in blocks:
        exec(block, names)
        states.append(names.get("state"))
    for state in states[1:]:
        assert int(state.step) == 3
        assert int(state.skipped) == 0
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            jax.device_get(state.params),
            jax.device_get(states[1].params),
        )
    in_parts = states[2]
    for leaf in (in_parts.params["encoder"], in_parts.opt_state[0].mu["encoder"]):
        assert leaf.sharding.spec == jax.sharding.PartitionSpec("data")


def test_table_is_complete():
    rows = re.findall(r"^\| (.*?) +\|", PAGE, re.MULTILINE)
    assert rows == ["step", *WAYS]
    assert "Made by `python -m experiments.communication`" in PAGE
