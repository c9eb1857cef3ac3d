"""The course of the runs for TensorBoard."""

import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from mtl_jax.compare.plots import thinned
from mtl_jax.compare.run import Run, folder_name

POINTS = 50
"""Points of an epoch in a curve over steps: each is the mean over some of them."""


class TensorBoard:
    """Writes event files, a folder for each run; to be used in a ``with`` statement.

    Scalars are ``train_loss``, ``validation`` and ``test`` after every epoch, ``weight`` and
    ``conflict`` over the steps, each with the task's name (of conflicts ``share`` and ``cosine``).
    What is not finite, such as the weight of a task that had no labels, is left out.

    Args:
      folder: where the runs' folders are made. A run that is read or resumed is written anew.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._root = folder
        self._folder: pathlib.Path | None = None
        self._writer: Any = None
        self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, run: Run) -> None:
        """Write what the run found since it was written last. Runs come one after the other."""
        import tensorboardX  # only where events are written

        folder = self._root / f"{folder_name(run.weighting)}_seed{run.seed}"
        if folder != self._folder:
            self.__exit__()
            shutil.rmtree(folder, ignore_errors=True)
            self._folder, self._writer = folder, tensorboardX.SummaryWriter(str(folder))
            self._written = 0
        for tag, step, value in _scalars(run, self._written):
            if np.isfinite(value):
                self._writer.add_scalar(tag, value, step)
        self._writer.flush()
        self._written = run.epochs


def _scalars(run: Run, first: int) -> Iterator[tuple[str, int, float]]:
    """Tag, step and value of all that was found from that epoch on."""
    over_epochs = {"train_loss": run.train_losses, "validation": run.validation, "test": run.test}
    over_steps = {"weight": run.weights, "conflict": run.conflict}
    for kind, by_name in over_epochs.items():
        for name, values in by_name.items():
            for epoch in range(first, run.epochs):
                yield f"{kind}/{name}", epoch + 1, values[epoch]
    for kind, by_name in over_steps.items():
        for name, values in by_name.items():
            steps = len(values) // run.epochs
            for epoch in range(first, run.epochs):
                centres, means = thinned(values[epoch * steps : (epoch + 1) * steps], POINTS)
                for centre, mean in zip(centres, means, strict=True):
                    yield f"{kind}/{name}", epoch * steps + round(centre), mean
