"""Execute a script of cells (`# %%`) and leave it, with its outputs, as a notebook beside it."""

import pathlib
import sys

import jupytext
import nbclient
import nbformat

script = pathlib.Path(sys.argv[1])
notebook = jupytext.read(script)
notebook.metadata.pop("jupytext", None)
for number, cell in enumerate(notebook.cells):
    cell.id = f"cell-{number}"  # drawn at random otherwise
client = nbclient.NotebookClient(notebook, kernel_name="python3", record_timing=False)
client.execute(cwd=script.parent)
nbformat.write(notebook, script.with_suffix(".ipynb"))
