"""Intervals and the paired test against scipy."""

import math
import random
import statistics

import pytest
from scipy import stats
from scipy.stats import binomtest, ttest_1samp

from intervals import (
    difference_interval,
    difference_p,
    holm,
    mcnemar,
    t_quantile,
    t_test,
    wilson,
)


def test_wilson_against_scipy():
    for k, n in ((0, 10), (3, 10), (10, 10), (170, 384)):
        ci = binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((ci.low, ci.high), abs=1e-4)


def test_paired_test_against_scipy():
    rng = random.Random(0)
    for n in (1, 7, 60, 1800):
        a, b = ([int(rng.random() < p) for _ in range(n)] for p in (0.7, 0.6))
        plus = sum(x > y for x, y in zip(a, b))
        minus = sum(x < y for x, y in zip(a, b))
        want = binomtest(plus, plus + minus).pvalue if plus + minus else 1.0
        assert mcnemar(a, b) == pytest.approx(want, rel=1e-9)
        assert mcnemar(b, a) == pytest.approx(want, rel=1e-9)
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1.0


def outcomes(n, p_win, p_loss):
    """Each number of wins and losses of n pairs, with its probability."""
    for wins in range(n + 1):
        for losses in range(n + 1 - wins):
            ways = math.comb(n, wins) * math.comb(n - wins, losses)
            ties = n - wins - losses
            yield wins, losses, ways * p_win**wins * p_loss**losses * (1 - p_win - p_loss) ** ties


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize(
    "chances", [(0.5, 0), (0.5, 0.01), (0.3, 0.02), (0.1, 0.08), (0.02, 0), (0.9, 0.05)]
)
def test_an_interval_covers_the_true_difference(n, chances):
    """By the probability of every outcome, also where all pairs that differ go one way."""
    p_win, p_loss = chances
    covered = 0.0
    for wins, losses, probability in outcomes(n, p_win, p_loss):
        if probability > 1e-9:
            differences = [1.0] * wins + [-1.0] * losses + [0.0] * (n - wins - losses)
            low, high = difference_interval(differences)
            covered += probability * (low <= p_win - p_loss <= high)
    assert covered > 0.93


def test_an_interval_of_partial_grades():
    grades = [0.5, -0.25, 0.0, 1.0]
    low, high = difference_interval(grades)
    assert low < 0.3125 < high
    # of many it is the plain one, and so is the test
    low, high = difference_interval(grades * 1000)
    half = 1.96 * statistics.pstdev(grades) / math.sqrt(4000)
    assert [low, high] == pytest.approx([0.3125 - half, 0.3125 + half], abs=2e-4)
    rng = random.Random(0)
    x = [rng.choice([1.0, -1.0, 0.0, 0.5]) - 0.02 for _ in range(4000)]
    assert difference_p(x) == pytest.approx(ttest_1samp(x, 0).pvalue, rel=0.02)
    # all that differ go one way: no error of 0
    assert difference_p([1.0] * 600) < 1e-99 and difference_p([0.0] * 600) == 1.0


def test_t_test_against_scipy():
    rng = random.Random(0)
    for n in range(2, 20):
        for mean in (0.0, 0.3, 2.0):
            x = [rng.gauss(mean, 1) for _ in range(n)]
            assert t_test(x) == pytest.approx(ttest_1samp(x, 0).pvalue, abs=1e-9)
    assert t_test([0.3]) == 1.0 and t_test([0.0, 0.0]) == 1.0 and t_test([0.5, 0.5]) == 1.0
    assert t_test([0.5] * 3) == 1.0
    x = [25 / 600 - 24 / 600, 21 / 600 - 20 / 600]  # equal but for their rounding
    assert x[0] != x[1] and t_test(x) == 1.0


def test_holm_rejects_what_stepping_down_rejects():
    """The procedure as Holm wrote it: the smallest against level / m, the next one m - 1, ..."""
    rng = random.Random(0)
    for _ in range(300):
        ps = [rng.random() ** 4 for _ in range(rng.randint(1, 8))]
        for level in (0.01, 0.05, 0.3):
            rejected, m = set(), len(ps)
            for i in sorted(range(m), key=lambda i: ps[i]):
                if ps[i] > level / (m - len(rejected)):
                    break
                rejected.add(i)
            assert {i for i, p in enumerate(holm(ps)) if p <= level} == rejected


@pytest.mark.parametrize("n", [1, 2, 3, 9, 12, 177])
@pytest.mark.parametrize("share", [0.01, 0.6, 0.95, 0.999])
def test_students_quantile_against_scipy(n, share):
    assert t_quantile(share, n) == pytest.approx(stats.t.ppf((1 + share) / 2, n), rel=1e-6)
