"""Intervals and the paired test against scipy."""

import random

import pytest
from scipy.stats import binomtest, ttest_1samp

from intervals import difference_interval, holm, mcnemar, t_test, wilson


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


def test_an_interval_excludes_zero_where_the_exact_test_does():
    """Of every outcome of up to 24 pairs, ties among them, and some larger; scipy's bounds."""
    outcomes = [(w, n - w, t) for n in range(25) for w in range(n + 1) for t in (0, 5) if n + t]
    for wins, losses, ties in [*outcomes, (30, 60, 400), (480, 520, 0), (440, 560, 7)]:
        n = wins + losses
        low, high = difference_interval([1.0] * wins + [-1.0] * losses + [0.0] * ties)
        ours = [1] * wins + [0] * (losses + ties)
        p = mcnemar(ours, [0] * wins + [1] * losses + [0] * ties)
        assert (low > 0 or high < 0) == (p < 0.05), (wins, losses)
        if n:
            share = binomtest(wins, n).proportion_ci(method="exact")
            want = [(2 * x - 1) * n / (n + ties) for x in share]
            assert [low, high] == pytest.approx(want, abs=1e-6)
    # grades between right and wrong have no counts
    grades = [0.5, -0.25, 0.0, 1.0]
    low, high = difference_interval(grades)
    assert (low + high) / 2 == pytest.approx(0.3125) and low < 0.3125 < high


def test_t_test_against_scipy():
    rng = random.Random(0)
    for n in range(2, 20):
        for mean in (0.0, 0.3, 2.0):
            x = [rng.gauss(mean, 1) for _ in range(n)]
            assert t_test(x) == pytest.approx(ttest_1samp(x, 0).pvalue, abs=1e-9)
    assert t_test([0.3]) == 1.0 and t_test([0.0, 0.0]) == 1.0 and t_test([0.5, 0.5]) == 1.0
    assert t_test([0.5] * 3) == 0.0
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
