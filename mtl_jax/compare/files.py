"""The files of a comparison's folder, each replaced as a whole."""

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from mtl_jax.compare.checkpoints import problems_in


def check_folder(folder: pathlib.Path, problems: Sequence[str], resume: bool) -> None:
    """Never mix two comparisons in a folder.

    Raises:
      FileExistsError: if the folder holds a comparison that this is not to continue, or that it
        could not continue.
    """
    checkpoints = folder / "checkpoints"
    ways_out = "choose another folder (--name on the command line), or remove this one"
    traces = (folder / "results.json", checkpoints, folder / "tuning")
    if not resume and any(path.exists() for path in traces):
        raise FileExistsError(
            f"{folder} holds a comparison already. Continue it with resume=True (--resume on the "
            f"command line), or {ways_out}."
        )
    if not checkpoints.exists() and (folder / "results.json").exists():
        raise FileExistsError(
            f"{folder} holds results and no checkpoints to resume from: {ways_out}."
        )
    others = problems_in(checkpoints) - set(problems)
    if others:
        raise FileExistsError(
            f"{folder} holds a comparison on {', '.join(sorted(others))}, too. To continue it, "
            f"give all its problems; else {ways_out}."
        )


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a value as JSON, which has no word for what is not finite."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text."""
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Write a file so that at every moment the old or the new one is there, whole."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
