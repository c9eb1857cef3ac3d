"""The code of docs/checkpoints.md runs, resumes to the bit, and finds damage."""

import pathlib
import re

import pytest

from mtl_jax.compare import digest

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "checkpoints.md"


def test_code_resumes(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(block, names)
    train = names["train"]
    undisturbed = train(30, tmp_path / "undisturbed")
    first = train(15, tmp_path / "resumed")
    assert int(first.step) == 15
    resumed = train(30, tmp_path / "resumed")
    assert digest(resumed) == digest(undisturbed) != digest(first)
    (tmp_path / "resumed" / "30" / "digest" / "metadata").write_text('"0"')
    with pytest.raises(ValueError, match="step 30 .* is damaged"):
        train(40, tmp_path / "resumed")
