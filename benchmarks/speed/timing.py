"""Interleaved timings: every variant once a round, so that a slow moment hits them alike."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Timed(NamedTuple):
    """Something to time.

    Attributes:
      run: takes this many steps and waits for the last one.
      multiple: the number of steps must be a multiple of this.
    """

    run: Callable[[int], None]
    multiple: int = 1


def seconds_a_step(timed: Timed, steps: int, clock: Callable[[], float]) -> float:
    """Time that many steps, rounded up to what is allowed."""
    steps = timed.multiple * math.ceil(steps / timed.multiple)
    start = clock()
    timed.run(steps)
    return (clock() - start) / steps


def steps_that_last(timed: Timed, seconds: float, clock: Callable[[], float]) -> int:
    """How many steps take at least this long, found after a warm-up."""
    timed.run(timed.multiple)
    steps = timed.multiple
    while (lasted := steps * seconds_a_step(timed, steps, clock)) < seconds / 4:
        steps *= 2
    return max(1, math.ceil(steps * seconds / lasted))


def time_in_rounds(
    variants: Mapping[str, Timed], *, rounds: int, seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """The seconds a step of every variant, in every round.

    Args:
      variants: what to time, by name.
      rounds: how often. The order within a round is random.
      seconds: how long one timing lasts at least.
      clock: the clock, in seconds.
    """
    steps = {name: steps_that_last(timed, seconds, clock) for name, timed in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    order, draw = list(variants), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            times[name].append(seconds_a_step(variants[name], steps[name], clock))
    return times


def quartiles_of_ratio(
    times: Sequence[float], reference: Sequence[float]
) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios, each within its round."""
    low, median, high = np.quantile(np.divide(times, reference), (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)


def floor_ratio(forward_flops: float, step_flops: float, tasks: int, every: int = 1) -> float:
    """The least that K gradients cost, in plain steps: 1 forward and K backward passes.

    With ``every``, of a step that computes them every so many steps only, beside the backward
    pass that every step needs.

    Args:
      forward_flops: floating-point operations of the losses, F.
      step_flops: those of the losses and one gradient, F + B.
      tasks: K.
      every: every how many steps.
    """
    backward_flops = step_flops - forward_flops
    if every == 1:
        return (forward_flops + tasks * backward_flops) / step_flops
    return 1 + tasks * backward_flops / (every * step_flops)
