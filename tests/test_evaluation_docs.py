"""The code of docs/evaluation.md runs, and its numbers are what it gives."""

import pathlib
import re

import numpy as np
import pytest
import scipy.stats

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)
    topic, role = names["topic"], names["role"]
    assert (topic.verdict, role.verdict) == ("better", "undecided")
    page = " ".join(PAGE.split())
    assert f"gained {topic.difference:.1f} points" in page
    assert f"p-value is {topic.corrected_p_value:.4f}" in page
    assert f"{-role.difference:.1f} points were lost" in page
    low, high = role.interval
    assert f"reaches from {-low:.1f} points to {high:.1f} points of gain" in page
    assert f"a gain of {100 * names['gain']:.1f} %" in page
    assert f"FAMO: {100 * names['drop']:.1f} %" in page
    assert names["ranks"] == {"equal": 1.5, "adaptive": 1.5}
    assert names["front"].all()
    (a, b), (c, d) = np.subtract(names["points"], [50, 80])  # the first lower, the second wider
    assert names["volume"] == pytest.approx(a * b + c * d - a * d)


def test_table_of_seeds():
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", PAGE, re.MULTILINE)
    assert [int(number) for number, _ in rows] == [3, 4, 5, 6, 8, 10, 20]
    for number, cells in rows:
        *effects, smallest = map(float, cells.split("|"))
        seeds = int(number)
        for comparisons, effect in zip((1, 12, 30), effects, strict=True):
            critical = scipy.stats.t.ppf(1 - 0.025 / comparisons, seeds - 1)
            power = scipy.stats.nct.sf(critical, seeds - 1, effect * np.sqrt(seeds))
            assert power == pytest.approx(0.8, abs=0.01)
        assert smallest == pytest.approx(2.0 ** (1 - seeds), rel=0.05)
