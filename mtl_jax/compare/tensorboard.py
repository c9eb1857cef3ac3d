"""The course of the runs for TensorBoard."""

import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from mtl_jax.compare.results import Run, file_name, thin

_POINTS = 50
"""Points of an epoch in a curve over steps: each is the mean over some of them."""


class TensorBoard:
    """Writes event files, a folder for each run; to be used in a ``with`` statement.

    Scalars are ``train_loss/<task>``, ``validation/<task>/<metric>`` and ``test/<task>/<metric>``
    after every epoch, ``weight/<task>``, ``conflict/share`` and ``conflict/cosine`` over the steps.
    What is not finite, such as the weight of a task that had no labels, is left out.

    Args:
      folder: where the runs' folders are made, ``<problem>/<run>_seed<seed>``. A run that is read
        or resumed is written anew.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._root = pathlib.Path(folder)
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

        name = f"{file_name(run.weighting)}_seed{run.seed}"
        folder = self._root / file_name(run.problem) / name
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
    by_epoch = {f"train_loss/{task}": values for task, values in run.train_losses.items()}
    for split, tasks in run.metrics.items():
        for task, metrics in tasks.items():
            by_epoch |= {f"{split}/{task}/{name}": values for name, values in metrics.items()}
    for tag, values in by_epoch.items():
        for epoch, value in enumerate(values[first:], start=first + 1):
            yield tag, epoch, value
    by_step = {f"weight/{task}": values for task, values in run.weights.items()}
    by_step |= {f"conflict/{kind}": values for kind, values in run.conflict.items()}
    for tag, values in by_step.items():
        if run.steps is not None:  # it was read, is thinned already, and is written whole
            steps, means = run.steps, values
        else:
            start = len(values) * first // max(run.epochs, 1)
            points = _POINTS * (run.epochs - first)
            steps = thin(np.arange(start, len(values)), points)
            means = thin(values[start:], points)
        for step, value in zip(steps, means, strict=True):
            yield tag, round(step), value
