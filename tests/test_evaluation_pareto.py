import itertools

import numpy as np
import pytest

from mtl_jax.evaluation import hypervolume, pareto_front


def dominated_cells(points):
    """The number of unit cells between 0 and any of the points: their hypervolume."""
    cells = {
        cell
        for point in points
        for cell in itertools.product(*(range(coordinate) for coordinate in point))
    }
    return len(cells)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_counts_the_cells_that_are_dominated(objectives):
    rng = np.random.default_rng(objectives)
    for _ in range(5):
        points = rng.integers(0, 6, (7, objectives))
        expected = dominated_cells(points.tolist())
        origin = np.zeros(objectives)
        assert hypervolume(points, origin, higher_is_better=True) == pytest.approx(expected)
        assert hypervolume(-points, origin, higher_is_better=False) == pytest.approx(expected)
        # Dominated points add nothing.
        front = points[pareto_front(points, higher_is_better=True)]
        assert hypervolume(front, origin, higher_is_better=True) == pytest.approx(expected)


def test_hypervolume_by_hand():
    # An accuracy and an error: two rectangles of 0.9 x 0.5 and 0.6 x 0.8, sharing 0.6 x 0.5.
    points = [[0.9, 1.5], [0.6, 1.2]]
    volume = hypervolume(points, [0.0, 2.0], higher_is_better=[True, False])
    assert volume == pytest.approx(0.45 + 0.48 - 0.30)
    # Neither a failed run nor one that is no better than the reference counts.
    more = [*points, [np.nan, 0.0], [0.99, 2.0], [-1.0, 0.0]]
    assert hypervolume(more, [0.0, 2.0], higher_is_better=[True, False]) == pytest.approx(volume)
    assert hypervolume([[np.nan, 1.0]], [0.0, 0.0], higher_is_better=True) == 0
    assert hypervolume(np.empty((0, 2)), [0.0, 0.0], higher_is_better=True) == 0


@pytest.mark.parametrize("directions", [True, False, [True, False, True]])
def test_pareto_front_is_that_of_the_definition(directions):
    rng = np.random.default_rng(0)
    for _ in range(5):
        points = rng.integers(0, 4, (15, 3))  # with ties and equal points
        merit = np.where(directions, points, -points)
        expected = [
            not any((other >= own).all() and (other > own).any() for other in merit)
            for own in merit
        ]
        np.testing.assert_array_equal(pareto_front(points, directions), expected)


def test_failed_runs_are_not_on_the_front():
    points = [[np.nan, 9.0], [1.0, 2.0], [1.0, 1.0], [np.inf, 0.0]]
    assert pareto_front(points, higher_is_better=True).tolist() == [False, True, False, False]
    assert pareto_front([[np.nan, 1.0]], higher_is_better=True).tolist() == [False]
    assert pareto_front(np.empty((0, 2)), higher_is_better=True).tolist() == []


def test_errors():
    with pytest.raises(ValueError, match=r"pareto_front: .*matrix.*got shape \(3,\)"):
        pareto_front([1.0, 2.0, 3.0], higher_is_better=True)
    with pytest.raises(ValueError, match=r"each of the 2 objectives, got \[True\]"):
        pareto_front([[1.0, 2.0]], higher_is_better=[True])
    with pytest.raises(ValueError, match=r"2 finite numbers.*got \[0.0\]"):
        hypervolume([[1.0, 2.0]], [0.0], higher_is_better=True)
    with pytest.raises(ValueError, match="2 finite numbers"):
        hypervolume([[1.0, 2.0]], [0.0, np.nan], higher_is_better=True)
