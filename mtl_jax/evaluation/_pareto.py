"""The Pareto set of several runs, and the volume that it dominates."""

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray


def pareto_front(points: ArrayLike, higher_is_better: bool | Sequence[bool]) -> NDArray[np.bool_]:
    """Which points no other one dominates.

    A point dominates another if it is at least as good in every objective and better in one. Of
    equal points all are on the front or none.

    Args:
      points: ``[points, objectives]``, such as a row of the tasks' metrics for each weighting. A
        row that is not finite, of a run that failed, is not on the front.
      higher_is_better: the direction of all objectives, or one for each.

    Returns:
      A boolean for each point.

    Raises:
      ValueError: if the points are not a matrix, or the directions do not fit them.

    References:
      López-Ibáñez et al., `moocore <https://multi-objective.github.io/moocore/python/>`_, which
      finds them

    Example:
      >>> from mtl_jax.evaluation import pareto_front
      >>> pareto_front([[0.9, 0.5], [0.8, 0.7], [0.8, 0.6]], higher_is_better=True).tolist()
      [True, True, False]
    """
    array, maximise = _checked("pareto_front", points, higher_is_better)
    front = np.zeros(len(array), bool)
    finished = np.isfinite(array).all(axis=1)
    if finished.any():
        front[finished] = moocore.is_nondominated(
            array[finished], maximise=maximise, keep_weakly=True
        )
    return front


def hypervolume(
    points: ArrayLike, reference: ArrayLike, higher_is_better: bool | Sequence[bool]
) -> float:
    r"""The volume that the points dominate, down to a reference point.

    .. math:: \mathrm{HV}(P, r) = \operatorname{volume} \bigcup_{p \in P}
              \{x : x \text{ between } r \text{ and } p \text{ in every objective}\}.

    The larger, the better: it grows with every point that is not dominated, and only with those.
    A point that is not better than the reference in every objective adds nothing.

    It is exact, for up to 31 objectives, and its time grows exponentially with their number: we
    measured less than a millisecond for 100 points in 6 objectives and 12 in 20, but 0.2 s for 100
    in 8 and 20 s for 16 in 20.

    The number depends on the reference and on the objectives' units, so weightings are compared
    with one reference for all, such as the worst value of each task's metric over all runs, or the
    metrics of the tasks trained alone. With one point for each seed it says what the weighting
    reaches at best; averaged over seeds it is the mean of one-point volumes.

    Args:
      points: ``[points, objectives]``. Rows that are not finite, of runs that failed, are left
        out.
      reference: the reference point, ``[objectives]``.
      higher_is_better: the direction of all objectives, or one for each.

    Returns:
      The hypervolume; 0 if there are no points.

    Raises:
      ValueError: if the points are not a matrix, the reference or the directions do not fit them,
        the reference is not finite, or there are more than 31 objectives.

    References:
      Zitzler and Thiele, `Multiobjective Evolutionary Algorithms
      <https://doi.org/10.1109/4235.797969>`_, IEEE Transactions on Evolutionary Computation 1999;
      López-Ibáñez et al., `moocore <https://multi-objective.github.io/moocore/python/>`_, which
      computes it

    Example:
      >>> from mtl_jax.evaluation import hypervolume
      >>> hypervolume([[3.0, 1.0], [1.0, 2.0]], reference=[0.0, 0.0], higher_is_better=True)
      4.0
    """
    array, maximise = _checked("hypervolume", points, higher_is_better)
    corner = np.asarray(reference, np.float64)
    if corner.shape != array.shape[1:] or not np.isfinite(corner).all():
        raise ValueError(
            f"hypervolume: the reference must be {array.shape[1]} finite numbers, one an "
            f"objective; got {reference!r}."
        )
    array = array[np.isfinite(array).all(axis=1)]
    return float(moocore.hypervolume(array, ref=corner, maximise=maximise)) if len(array) else 0.0


def _checked(
    caller: str, points: ArrayLike, higher_is_better: bool | Sequence[bool]
) -> tuple[np.ndarray, list[bool]]:
    array = np.asarray(points, np.float64)
    if array.ndim != 2 or not array.shape[1]:
        raise ValueError(
            f"{caller}: the points must be a matrix [points, objectives], got shape {array.shape}."
        )
    directions = np.asarray(higher_is_better, bool)
    if directions.shape not in ((), array.shape[1:]):
        raise ValueError(
            f"{caller}: one direction, or one for each of the {array.shape[1]} objectives, got "
            f"{higher_is_better!r}."
        )
    return array, np.broadcast_to(directions, array.shape[1:]).tolist()
