"""The notebook is the script, executed: `make notebook` makes it so again."""

import pathlib
import re

import jax
import jupytext
import matplotlib.pyplot as plt
import nbformat
import numpy as np

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "diagnosis.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def numbers(text):
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def test_the_notebook_is_the_executed_script(monkeypatch, capsys):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in jupytext.read(SCRIPT).cells]

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert len(pictures) == 3
    assert len(outputs) == 4
    assert NOTEBOOK.stat().st_size < 300_000

    # What it prints and draws is what its code gives.
    monkeypatch.setattr(plt, "show", lambda: None)
    plt.switch_backend("agg")
    names = {}
    with jax.numpy_rank_promotion("allow"):
        for cell in code:
            exec(cell.source, names)
    assert len(plt.get_fignums()) == len(pictures)
    plt.close("all")
    found = numbers(capsys.readouterr().out)
    assert len(found) == 15
    np.testing.assert_allclose(found, numbers(printed), atol=0.2)

    # What the text says of it.
    hard = {name: shares[0] for name, shares in names["unexplained"].items()}
    assert max(hard["uncertainty"], hard["conflict_free"]) < hard["equal"]
    assert hard["equal"] < min(hard["adaptive"], hard["to initial"])
