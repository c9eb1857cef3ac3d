"""The metrics of a problem's tasks, on the validation and the test examples."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from mtl_jax._typing import PyTree
from mtl_jax.compare.devices import number_of_devices, place, replicated, spread
from mtl_jax.compare.fingerprint import digest, text_digest
from mtl_jax.compare.problem import Batch, Problem, Sources, Split
from mtl_jax.compare.sources import Source, by_source, joined


class Evaluator:
    """Computes the metrics of a problem's tasks, compiled once for all runs.

    Args:
      problem: the problem.
      batch_size: examples at a time, or a few more, so that every device has as many.
      mesh: the devices that a batch is spread over.
    """

    def __init__(self, problem: Problem, batch_size: int = 500, mesh: Mesh | None = None) -> None:
        self.problem = problem
        self._digests: dict[str, str] | None = None
        self._sums = jax.jit(self._sum_scores, out_shardings=replicated(mesh))
        batch_size += -batch_size % number_of_devices(mesh)
        self._batches = {
            part: [
                place(batch, spread(mesh))
                for batch in _padded_batches(
                    getattr(problem, part), problem.sizes(part), batch_size
                )
            ]
            for part in ("validation", "test")
        }

    def __call__(self, params: PyTree, model_state: PyTree, part: str) -> dict[str, float]:
        """The metric of each task: the mean score of the split's examples with its label."""
        sums = [
            jax.device_get(self._sums(params, model_state, batch, valid))
            for batch, valid in self._batches[part]
        ]
        metrics = {}
        for task in self.problem.tasks:
            total = sum(float(batch[task][0]) for batch in sums)
            count = sum(int(batch[task][1]) for batch in sums)
            metrics[task] = total / count if count else float("nan")
        return metrics

    def digests(self, params: PyTree, model_state: PyTree) -> dict[str, str]:
        """Digests of the problem's data and of the program that computes the metrics."""
        if self._digests is None:
            parts = ("train", "validation", "test")
            arguments = (params, model_state, *self._batches["test"][0])
            self._digests = {
                "data": digest({part: by_source(getattr(self.problem, part)) for part in parts}),
                "metrics": text_digest(self._sums.lower(*arguments).as_text()),
            }
        return self._digests

    def _sum_scores(
        self, params: PyTree, model_state: PyTree, batch: Batch, valid: dict[Source, Array]
    ) -> dict[str, tuple[Array, Array]]:
        scores = self.problem.scores(params, model_state, batch)
        labelled = None if self.problem.labelled is None else self.problem.labelled(batch)
        sums = {}
        for task in self.problem.tasks:
            own = valid[None if self.problem.source_of is None else self.problem.source_of[task]]
            counted = own if labelled is None else own & labelled[task]
            sums[task] = jnp.sum(jnp.where(counted, scores[task], 0)), jnp.sum(counted)
        return sums


def _padded_batches(
    split: Split | Sources, sizes: dict[Source, int], batch_size: int
) -> Iterator[tuple[Batch, dict[Source, Array]]]:
    """The split in batches of one size, filled up, and which examples of each source are real."""
    for start in range(0, max(sizes.values()), batch_size):
        indices = np.arange(start, start + batch_size)
        valid = {source: indices < size for source, size in sizes.items()}
        batch = {
            source: {
                field: jnp.asarray(values[np.where(valid[source], indices, 0)])
                for field, values in fields.items()
            }
            for source, fields in by_source(split).items()
        }
        yield joined(batch), jax.tree.map(jnp.asarray, valid)
