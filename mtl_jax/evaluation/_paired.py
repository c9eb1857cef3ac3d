"""Whether a weighting is better than the baseline, beyond the noise of the seeds."""

from typing import Literal, NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

Verdict = Literal[
    "better", "worse", "undecided", "undecided: too few seeds", "undecided: missing seeds"
]
"""What a comparison with the baseline says."""

FEWEST_SEEDS = 3
"""With fewer nothing is decided: two differences that lie close together look free of noise."""

FEWEST_FOR_BOOTSTRAP = 5
"""Resampled means stay between the smallest and the largest of n differences, which the true one
does with probability 1 - 2^(1 - n) only: 0.75 for three, 0.94 for five."""

SAME = 1e-6
"""Differences that spread less than this, relative to the metric, are rounding and not noise."""


class PairedComparison(NamedTuple):
    """A weighting's metric against the baseline's, seed by seed.

    Attributes:
      seeds: the number of seeds with which both finished.
      failed: the number of seeds with which the baseline has a value and the weighting has not.
      difference: the mean over these seeds of the metric minus the baseline's; NaN without seeds.
      interval: the confidence interval of the mean difference; NaN for less than two seeds.
      p_value: how probable a mean difference this large or larger, in either direction, is without
        an effect; NaN for less than two seeds.
      corrected_p_value: the same, corrected for the number of comparisons that were made.
      verdict: what they say in words.
    """

    seeds: int
    failed: int
    difference: float
    interval: tuple[float, float]
    p_value: float
    corrected_p_value: float
    verdict: Verdict


def compare_to_baseline(
    values: ArrayLike,
    baseline: ArrayLike,
    higher_is_better: bool,
    *,
    test: Literal["t", "sign-flip"] = "t",
    confidence: float = 0.95,
) -> PairedComparison:
    r"""Compare a weighting's metric with the baseline's, paired over the seeds.

    A seed fixes the initial parameters and the batches of both runs, so much of its luck cancels
    in the difference :math:`d_s = x_s - b_s`. All that follows is about the n differences.

    **The test** is the paired t-test,

    .. math:: t = \frac{\bar d}{\sqrt{\sum_s (d_s - \bar d)^2 / (n (n - 1))}}
              \sim t_{n - 1} \quad \text{without an effect},

    which supposes normal differences. Without an effect the two runs of a seed can change places,
    so the differences are at least symmetric, where the test errs on the safe side for heavy tails
    (Efron), and it keeps its level down to two differences (de Winter). Colas et al. advise against
    bootstrap tests of less than 50 runs, and against permutation tests of less than 10.
    ``test="sign-flip"`` supposes the symmetry alone: the p-value is the share of the :math:`2^n`
    choices of signs with a mean as far from 0. It cannot fall below :math:`2^{1 - n}`, that is
    0.25 for 3 seeds, 0.0625 for 5, 0.031 for 6 and 0.002 for 10; with Holm's correction for twelve
    comparisons it decides nothing for less than 9 seeds. Wilcoxon's test has the same bound. Where
    the differences are all the same, to rounding, there is no noise to measure and the t-test does
    not apply; the p-value is that of the sign-flip test then.

    **The interval** of the mean difference is the bootstrap's, of 9,999 resamples with a fixed
    key. The plain percentile interval is far too narrow for few values: of those that say 95 %
    only 85 % hold the true mean for n = 5. Hesterberg's expanded one takes, in place of the
    quantile :math:`\alpha / 2`,

    .. math:: \Phi\left(-\sqrt{\tfrac{n}{n - 1}} \, t_{n - 1,\, 1 - \alpha/2}\right),

    and holds it in 92 to 96 % for 5 to 10 seeds of normal differences. Below 5 seeds no resampling
    can do it, and the interval is Student's.

    **The verdict** is ``"better"`` or ``"worse"`` for a p-value below 1 - ``confidence``, else
    ``"undecided"``, which is not to say that there is no difference: the interval shows how large
    a one may be. It says ``"undecided: too few seeds"`` for less than 3 seeds, and where the
    sign-flip test could not have decided whatever the values. A weighting that has no finite
    value where the baseline has one is never called better, since the seeds that were hard for it
    are missing: ``"undecided: missing seeds"``.

    Args:
      values: the weighting's metric for each seed; not finite where it failed or
        the metric is undefined.
      baseline: the baseline's, in the same order.
      higher_is_better: the metric's direction.
      test: the test that gives the p-value.
      confidence: the coverage of the interval; 1 - ``confidence`` is what the p-value must be
        below.

    Returns:
      The :class:`PairedComparison`. Its ``corrected_p_value`` is the p-value itself: where several
      comparisons are made, :func:`compare_table` corrects them.

    Raises:
      ValueError: if the two are not vectors of the same length, ``confidence`` is not between 0
        and 1, or there is no such test.

    References:
      Efron, `Student's t-Test under Symmetry Conditions
      <https://doi.org/10.1080/01621459.1969.10501056>`_, JASA 1969;
      de Winter, `Using the Student's t-test with Extremely Small Sample Sizes
      <https://doi.org/10.7275/e4r6-dj05>`_, PARE 2013;
      Colas et al., `A Hitchhiker's Guide to Statistical Comparisons of Reinforcement Learning
      Algorithms <https://arxiv.org/abs/1904.06979>`_, 2019;
      Hesterberg, `What Teachers Should Know about the Bootstrap
      <https://arxiv.org/abs/1411.5279>`_, The American Statistician 2015

    Example:
      >>> from mtl_jax.evaluation import compare_to_baseline
      >>> equal = [0.561, 0.555, 0.570, 0.566, 0.549]
      >>> adaptive = [0.587, 0.589, 0.596, 0.590, 0.585]
      >>> found = compare_to_baseline(adaptive, equal, higher_is_better=True)
      >>> f"{found.difference:+.3f}, p = {found.p_value:.4f}: {found.verdict}"
      '+0.029, p = 0.0003: better'
      >>> compare_to_baseline(adaptive, equal, True, test="sign-flip").verdict
      'undecided: too few seeds'
    """
    if test not in ("t", "sign-flip"):
        raise ValueError(f"compare_to_baseline: test must be 't' or 'sign-flip', got {test!r}.")
    if not 0 < confidence < 1:
        raise ValueError(
            f"compare_to_baseline: confidence must be between 0 and 1, got {confidence}."
        )
    ours, theirs = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if ours.ndim != 1 or ours.shape != theirs.shape:
        raise ValueError(
            "compare_to_baseline: the values and the baseline must be vectors with one entry for "
            f"each seed, in the same order; got shapes {ours.shape} and {theirs.shape}."
        )
    there = np.isfinite(theirs)
    both = there & np.isfinite(ours)
    differences = (ours - theirs)[both]
    if len(differences):
        # Rounding alone is made exactly nothing.
        rounding = SAME * max(np.abs(ours[both]).max(), np.abs(theirs[both]).max())
        if np.ptp(differences) <= rounding:
            mean = differences.mean()
            differences = np.full_like(differences, 0 if abs(mean) <= rounding else mean)
    p_value = _p_value(differences, test)
    found = PairedComparison(
        seeds=len(differences),
        failed=int(np.sum(there & ~both)),
        difference=float(differences.mean()) if len(differences) else float("nan"),
        interval=_interval(differences, confidence),
        p_value=p_value,
        corrected_p_value=p_value,
        verdict="undecided",
    )
    return found._replace(verdict=verdict_of(found, higher_is_better, test, confidence, 1))


def _p_value(differences: np.ndarray, test: str) -> float:
    number = len(differences)
    if number < 2:
        return float("nan")
    if np.ptp(differences) == 0:
        return _smallest_p_value(number) if differences[0] else 1.0
    if test == "t":
        result = scipy.stats.ttest_1samp(differences, 0)
        return float(result.pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    # Exact for up to 13 seeds; the key fixes which signs are drawn for more.
    return float(
        scipy.stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", rng=np.random.default_rng(0)
        ).pvalue
    )


def _smallest_p_value(number: int) -> float:
    """The smallest p-value of a sign-flip test: all differences have the same sign."""
    return 2.0 ** (1 - number)


def _interval(differences: np.ndarray, confidence: float) -> tuple[float, float]:
    number = len(differences)
    if number < 2:
        return float("nan"), float("nan")
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    if number < FEWEST_FOR_BOOTSTRAP:
        low, high = scipy.stats.ttest_1samp(differences, 0).confidence_interval(confidence)
    else:
        t = scipy.stats.t.ppf((1 + confidence) / 2, number - 1)
        tail = scipy.stats.norm.cdf(-np.sqrt(number / (number - 1)) * t)
        low, high = scipy.stats.bootstrap(
            (differences,),
            np.mean,
            confidence_level=float(1 - 2 * tail),
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return float(low), float(high)


def verdict_of(
    found: PairedComparison, higher_is_better: bool, test: str, confidence: float, number: int
) -> Verdict:
    """The verdict on one of ``number`` comparisons, by its corrected p-value."""
    significant = found.seeds >= FEWEST_SEEDS and found.corrected_p_value < 1 - confidence
    better = (found.difference > 0) == higher_is_better
    if significant and not better:
        return "worse"
    if found.failed:
        return "undecided: missing seeds"
    if significant:
        return "better"
    hopeless = test == "sign-flip" and number * _smallest_p_value(found.seeds) >= 1 - confidence
    if found.seeds < FEWEST_SEEDS or hopeless:
        return "undecided: too few seeds"
    return "undecided"
