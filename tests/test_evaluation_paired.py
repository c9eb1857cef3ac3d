import itertools
import math

import numpy as np
import pytest
import scipy.stats

from mtl_jax.evaluation import compare_table, compare_to_baseline, holm

EQUAL = np.array([0.561, 0.555, 0.570, 0.566, 0.549, 0.558])
BETTER = EQUAL + np.array([0.026, 0.034, 0.026, 0.024, 0.036, 0.031])
NOISY = EQUAL + np.array([0.010, -0.020, 0.015, -0.004, 0.012, -0.007])


def sign_flip_p_value(differences):
    means = [np.mean(differences * signs) for signs in itertools.product([1, -1], repeat=6)]
    return np.mean(np.abs(means) >= abs(np.mean(differences)) - 1e-12)


def test_p_values_are_those_of_their_definitions():
    for values in (BETTER, NOISY):
        d = values - EQUAL
        t = d.mean() / np.sqrt(np.sum((d - d.mean()) ** 2) / (6 * 5))
        found = compare_to_baseline(values, EQUAL, True)
        assert found.difference == pytest.approx(d.mean())
        assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(abs(t), 5))
        assert found.corrected_p_value == found.p_value
        found = compare_to_baseline(values, EQUAL, True, test="sign-flip")
        assert found.p_value == pytest.approx(sign_flip_p_value(d))
    assert compare_to_baseline(BETTER, EQUAL, True, test="sign-flip").p_value == 2**-5


def test_interval_is_the_expanded_percentile_interval_of_all_resamples():
    differences = BETTER - EQUAL
    resamples = np.array(list(itertools.product(range(6), repeat=6)))
    means = differences[resamples].mean(axis=1)
    tail = scipy.stats.norm.cdf(-np.sqrt(6 / 5) * scipy.stats.t.ppf(0.975, 5))
    low, high = compare_to_baseline(BETTER, EQUAL, True).interval
    np.testing.assert_allclose([low, high], np.quantile(means, [tail, 1 - tail]), atol=4e-4)
    # The plain one is narrower.
    plain = np.quantile(means, [0.025, 0.975])
    assert low < plain[0] - 1e-3
    assert high > plain[1] + 1e-3


def test_interval_of_few_seeds_is_that_of_a_t_test():
    found = compare_to_baseline(NOISY[:4], EQUAL[:4], True)
    expected = scipy.stats.ttest_rel(NOISY[:4], EQUAL[:4])
    np.testing.assert_allclose(found.interval, expected.confidence_interval(0.95))
    wider = compare_to_baseline(NOISY[:4], EQUAL[:4], True, confidence=0.99)
    np.testing.assert_allclose(wider.interval, expected.confidence_interval(0.99))


def test_interval_holds_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        low, high = compare_to_baseline(rng.normal(size=5), rng.normal(size=5), True).interval
        held.append(low < 0 < high)
    assert 0.89 < np.mean(held) < 0.97  # the plain percentile interval: 0.85


def test_verdicts():
    assert compare_to_baseline(BETTER, EQUAL, True).verdict == "better"
    assert compare_to_baseline(BETTER, EQUAL, False).verdict == "worse"
    assert compare_to_baseline(EQUAL, BETTER, True).verdict == "worse"
    assert compare_to_baseline(EQUAL, BETTER, False).verdict == "better"
    assert compare_to_baseline(NOISY, EQUAL, True).verdict == "undecided"
    assert compare_to_baseline(BETTER, EQUAL, True, test="sign-flip").verdict == "better"
    # A p-value of 0.00003 does not suffice for 1 - 0.00001.
    assert compare_to_baseline(BETTER, EQUAL, True, confidence=0.99999).verdict == "undecided"


def test_the_same_seed_counts_twice_only_in_its_pair():
    swapped = compare_to_baseline(EQUAL, BETTER, True)
    found = compare_to_baseline(BETTER, EQUAL, True)
    assert swapped.difference == pytest.approx(-found.difference)
    assert swapped.p_value == pytest.approx(found.p_value)
    order = [3, 1, 5, 0, 4, 2]
    assert compare_to_baseline(BETTER[order], EQUAL[order], True).p_value == (
        pytest.approx(found.p_value)
    )
    # Unpaired, the same metrics leave the effect in the spread of the seeds.
    spread = np.linspace(-1, 1, 6)
    paired = compare_to_baseline(BETTER + spread, EQUAL + spread, True)
    assert paired.p_value == pytest.approx(found.p_value)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("test", ["t", "sign-flip"])
def test_too_few_seeds(number, test):
    found = compare_to_baseline(BETTER[:number], EQUAL[:number], True, test=test)
    assert found.seeds == number
    assert found.verdict == "undecided: too few seeds"
    assert math.isnan(found.p_value) == (number < 2)
    assert np.isnan(found.interval).all() == (number < 2)
    assert math.isnan(found.difference) == (number == 0)


def test_sign_flip_test_says_that_it_cannot_decide():
    for number, p_value in ((3, 0.25), (5, 0.0625)):
        found = compare_to_baseline(BETTER[:number], EQUAL[:number], True, test="sign-flip")
        assert found.p_value == p_value
        assert found.verdict == "undecided: too few seeds"
        assert compare_to_baseline(BETTER[:number], EQUAL[:number], True).verdict == "better"
    # Six seeds are enough for one comparison (0.031), not for two.
    table = {"equal": {"a": EQUAL}, "first": {"a": BETTER}, "second": {"a": NOISY}}
    found = compare_table(table, {"a": True}, test="sign-flip")
    assert found["first"]["a"].corrected_p_value == 2 * 2**-5
    assert found["first"]["a"].verdict == "undecided: too few seeds"


def test_failed_seeds():
    nan = math.nan
    missing = np.where([False, True, False, False, True, False], nan, BETTER)
    found = compare_to_baseline(missing, EQUAL, True)
    assert (found.seeds, found.failed) == (4, 2)
    kept = [0, 2, 3, 5]
    expected = compare_to_baseline(BETTER[kept], EQUAL[kept], True)
    assert found[2:6] == expected[2:6]
    assert found.p_value < 0.05
    assert found.verdict == "undecided: missing seeds"
    assert compare_to_baseline(missing, EQUAL, False).verdict == "worse"
    # That the baseline failed is not the weighting's fault.
    found = compare_to_baseline(BETTER, np.where(np.isnan(missing), math.inf, EQUAL), True)
    assert (found.seeds, found.failed, found.verdict) == (4, 0, "better")
    found = compare_to_baseline(np.full(6, nan), EQUAL, True)
    assert (found.seeds, found.failed, found.verdict) == (0, 6, "undecided: missing seeds")


@pytest.mark.parametrize("test", ["t", "sign-flip"])
def test_differences_without_spread_are_not_certainty(test):
    # Such as accuracies on a hundred examples; 0.91 - 0.9 and 0.71 - 0.7 differ by rounding.
    baseline = np.array([0.9, 0.7, 0.8])
    found = compare_to_baseline(baseline + 0.01, baseline, True, test=test)
    assert found.p_value == 0.25
    assert found.verdict.startswith("undecided")
    np.testing.assert_allclose(found.interval, [0.01, 0.01])
    rounded, base = (metric.astype(np.float32) for metric in (baseline + 0.01, baseline))
    assert compare_to_baseline(rounded, base, True, test=test).p_value == 0.25
    found = compare_to_baseline(EQUAL, EQUAL, True, test=test)
    assert (found.difference, found.interval, found.p_value) == (0, (0, 0), 1)
    assert compare_to_baseline(np.zeros(4), np.zeros(4), True, test=test).p_value == 1


def test_results_are_the_same_when_computed_again():
    assert compare_to_baseline(NOISY, EQUAL, True) == compare_to_baseline(NOISY, EQUAL, True)
    many = np.random.default_rng(0).normal(size=(2, 20))
    first, again = (compare_to_baseline(*many, True, test="sign-flip") for _ in range(2))
    assert first == again


def test_holm_by_hand():
    # In rising order 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, and none below the one before.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([[0.5, math.nan], [0.6, 0.02]]), [[1, math.nan], [1, 0.06]])
    np.testing.assert_array_equal(holm([math.nan]), [math.nan])
    assert holm([]).shape == (0,)


@pytest.mark.parametrize("seed", range(5))
def test_holm_rejects_step_by_step(seed):
    # The procedure as Holm describes it: the smallest p-value that is left against the level
    # divided by how many are left, until one is above. Some are equal, none to a level.
    p_values = np.random.default_rng(seed).integers(1, 30, 12) / 240.0
    for level in (0.007, 0.05003, 0.11, 0.51):
        rejected, left = set(), sorted(range(12), key=lambda i: p_values[i])
        while left and p_values[left[0]] <= level / len(left):
            rejected.add(left.pop(0))
        assert set(np.flatnonzero(holm(p_values) <= level)) == rejected
    assert holm(p_values).max() <= 1


def test_table_is_corrected_for_all_its_comparisons():
    middling = EQUAL + np.array([0.010, 0.002, 0.011, 0.001, 0.009, 0.006])
    table = {
        "good": {"score": BETTER, "error": -BETTER},
        "equal": {"score": EQUAL, "error": -EQUAL},
        "middling": {"score": middling, "error": -NOISY},
    }
    directions = {"error": False, "score": True}
    found = compare_table(table, directions)
    assert {name: list(row) for name, row in found.items()} == (
        {"good": ["error", "score"], "middling": ["error", "score"]}
    )
    alone = compare_to_baseline(middling, EQUAL, True)
    cell = found["middling"]["score"]
    assert alone.verdict == "better"
    assert cell[:5] == alone[:5]
    assert cell.corrected_p_value == pytest.approx(2 * alone.p_value)
    p_values = [found[name][column].p_value for name in found for column in directions]
    corrected = [found[name][column].corrected_p_value for name in found for column in directions]
    np.testing.assert_allclose(corrected, holm(p_values))
    assert [found["good"][column].verdict for column in directions] == ["better", "better"]
    assert cell.verdict == "better"
    assert cell.corrected_p_value > 0.01
    strict = compare_table(table, directions, confidence=0.99)["middling"]["score"]
    assert strict.verdict == "undecided"
    assert strict.corrected_p_value == cell.corrected_p_value
    low, high = strict.interval
    assert low < cell.interval[0] < cell.interval[1] < high
    # 0.0125 alone, no longer beyond noise among many: five columns of noise more.
    noise = {f"noise {number}": NOISY for number in range(5)}
    table = {
        "equal": {"score": EQUAL} | dict.fromkeys(noise, EQUAL),
        "middling": {"score": middling} | noise,
    }
    found = compare_table(table, {"score": True} | dict.fromkeys(noise, True))
    assert found["middling"]["score"].corrected_p_value == pytest.approx(6 * alone.p_value)
    assert found["middling"]["score"].verdict == "undecided"
    # What cannot be compared is not counted.
    table["failed"] = dict.fromkeys(table["equal"], np.full(6, math.nan))
    again = compare_table(table, {"score": True} | dict.fromkeys(noise, True))
    assert again["middling"] == found["middling"]
    assert again["failed"]["score"].verdict == "undecided: missing seeds"


NOISE = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.uniform(size=shape),
    "heavy-tailed": lambda rng, shape: rng.standard_t(2, size=shape),
    "skewed": lambda rng, shape: rng.lognormal(size=shape),
    "outlying": lambda rng, shape: rng.normal(size=shape) + 10 * (rng.random(shape) < 0.1),
    "coarsely rounded": lambda rng, shape: np.round(rng.normal(size=shape)),
}


def p_values_of(values, baseline):
    """The p-values of :func:`compare_to_baseline` for the seeds along the last axis."""
    differences = values - baseline
    mean, number = differences.mean(-1), differences.shape[-1]
    spread = differences.std(-1, ddof=1) / np.sqrt(number)
    same = np.ptp(differences, axis=-1) == 0
    t = mean / np.where(same, 1, spread)
    p_values = 2 * scipy.stats.t.sf(np.abs(t), number - 1)
    return np.where(same, np.where(mean == 0, 1, 2.0 ** (1 - number)), p_values)


@pytest.mark.parametrize("kind", NOISE)
def test_noise_is_called_an_effect_as_seldom_as_it_says(kind):
    """docs/evaluation.md: in 2 to 6 % of cases, for 3 to 10 seeds."""
    rng = np.random.default_rng(1)
    for seeds in range(3, 11):
        pair = NOISE[kind](rng, (2, 10_000, seeds))
        p_values = p_values_of(*pair)
        for values, baseline, p_value in zip(*pair[:, :20], p_values, strict=False):
            assert compare_to_baseline(values, baseline, True).p_value == pytest.approx(p_value)
        assert 0.015 < np.mean(p_values < 0.05) < 0.065


@pytest.mark.parametrize("kind", ["normal", "skewed", "coarsely rounded"])
@pytest.mark.parametrize("seeds", [3, 5])
def test_a_table_of_noise_has_an_effect_as_seldom_as_it_says(kind, seeds):
    """docs/evaluation.md: four weightings and three tasks, 0 to 5.2 % of the tables."""
    draws = NOISE[kind](np.random.default_rng(2), (5, 4000, 3, seeds))
    tables = p_values_of(draws[1:], draws[0]).transpose(1, 0, 2).reshape(4000, 12)
    found = [holm(p_values).min() < 0.05 for p_values in tables]
    assert np.mean(found) < 0.053


def test_errors():
    with pytest.raises(ValueError, match=r"same order; got shapes \(2,\) and \(3,\)"):
        compare_to_baseline([1.0, 2.0], [1.0, 2.0, 3.0], True)
    with pytest.raises(ValueError, match=r"got shapes \(\) and \(\)"):
        compare_to_baseline(1.0, 1.0, True)
    with pytest.raises(ValueError, match="test must be 't' or 'sign-flip', got 'wilcoxon'"):
        compare_to_baseline([1.0], [1.0], True, test="wilcoxon")
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        compare_to_baseline([1.0], [1.0], True, confidence=95)
    with pytest.raises(ValueError, match=r"baseline 'equal' is not among the rows \['dwa'\]"):
        compare_table({"dwa": {"a": [1.0]}}, {"a": True})
    with pytest.raises(ValueError, match=r"dwa has the columns \['b'\], the directions \['a'\]"):
        compare_table({"equal": {"a": [1.0]}, "dwa": {"b": [1.0]}}, {"a": True})
