import numpy as np
import pytest

from experiments.problems.multimnist import multimnist, overlaid_digits, source_digits

SIZES = {"train": 400, "validation": 100, "test": 100}


@pytest.fixture(scope="module")
def source():
    return source_digits()


@pytest.fixture(scope="module")
def splits():
    return overlaid_digits(SIZES)


def digits_of(image, side, pictures):
    """The source digits that the picture can be made of, by its part that nothing overlays."""
    if side == "left":
        return np.flatnonzero((pictures[:, :8] == image[:8, :28]).all(axis=(1, 2)))
    return np.flatnonzero((pictures[:, 20:] == image[28:, 8:]).all(axis=(1, 2)))


def test_pictures_labels_and_splits_against_the_source(splits, source):
    pictures, labels = source
    used = {}
    for split, fields in splits.items():
        assert fields["image"].shape == (SIZES[split], 36, 36)
        assert fields["image"].dtype == np.uint8
        used[split] = set()
        for image, left, right in zip(*fields.values(), strict=True):
            pairs = [
                (i, j)
                for i in digits_of(image, "left", pictures)
                for j in digits_of(image, "right", pictures)
                if (np.maximum(image[:28, :28], pictures[i]) == image[:28, :28]).all()
                and (np.maximum(image[8:, 8:], pictures[j]) == image[8:, 8:]).all()
                and (
                    np.maximum(
                        np.pad(pictures[i], ((0, 8), (0, 8))), np.pad(pictures[j], ((8, 0), (8, 0)))
                    )
                    == image
                ).all()
            ]
            assert len(pairs) == 1
            i, j = pairs[0]
            assert (labels[i], labels[j]) == (left, right)
            used[split] |= {i, j}
    assert not used["train"] & used["test"]
    assert not used["train"] & used["validation"]
    assert not used["validation"] & used["test"]


def test_every_digit_is_common_on_both_sides(splits):
    for side in ("left", "right"):
        assert np.bincount(splits["train"][side], minlength=10).min() > 400 / 10 / 2


def test_the_same_data_at_every_call(splits):
    again = overlaid_digits(SIZES)
    for split, fields in splits.items():
        for field, values in fields.items():
            np.testing.assert_array_equal(values, again[split][field])


def test_problem(check_problem):
    problem = multimnist(num_train=300, num_validation=50, num_test=60)
    assert problem.size("train") == 300
    assert list(problem.tasks) == ["left", "right"]
    assert problem.labelled is None
    check_problem(problem.with_settings(batch_size=64), steps=40)
