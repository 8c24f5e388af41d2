"""Means over a few seeds, and differences of runs that share a seed, with Student's intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats


@dataclass(frozen=True)
class Spread:
    """What is known of a quantity from some independent values of it.

    Args:
        mean: their mean.
        sd: their standard deviation (n - 1); None of one value.
        interval: 95% interval of the true mean by Student's t; None of one value. With 3 it is 4.3 standard errors to each side.
        n: how many values there are.
    """

    mean: float
    sd: float | None
    interval: tuple[float, float] | None
    n: int


def spread(values: Sequence[float]) -> Spread | None:
    """Mean, standard deviation and 95% interval; None of no values."""
    if not values:
        return None
    mean, n = fmean(values), len(values)
    if n == 1:
        return Spread(mean, None, None, 1)
    sd = stdev(values)
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return Spread(mean, sd, (mean - half, mean + half), n)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Spread | None:
    """The spread of values - others over the seeds that both have; None if they share none."""
    return spread([values[seed] - others[seed] for seed in sorted(values) if seed in others])
