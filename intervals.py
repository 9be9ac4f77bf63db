"""How sure is an accuracy, and a difference of two on the same questions?"""

import math
from functools import cache

from scores import mean


def wilson(correct, n):
    """The 95 % Wilson interval of an accuracy, as (low, high)."""
    if n == 0:
        return 0.0, 1.0
    z = 1.96
    # not p +- 1.96 sd, which leaves 0 and 1 no width
    p, q = correct / n, z * z / n
    # the middle is drawn towards 1/2, the more the fewer questions there are
    middle = (p + q / 2) / (1 + q)
    half = z * math.sqrt(p * (1 - p) / n + q / (4 * n)) / (1 + q)
    return middle - half, middle + half


def mcnemar(a, b):
    """Exact two-sided p-value of the paired scores a and b of the same questions.

    A sign test on the pairs that differ.
    """
    # ties say nothing of which is better
    plus = sum(x > y for x, y in zip(a, b))
    minus = sum(x < y for x, y in zip(a, b))
    n, least = plus + minus, min(plus, minus)
    # twice the tail of n throws of a fair coin, on the side of the rarer outcome
    at_most_least = sum(math.comb(n, i) for i in range(least + 1))
    return min(1.0, 2 * at_most_least / 2**n)


def paired_difference(a, b):
    """What the grades a and b of the same questions differ by, in words."""
    differences = [y - x for x, y in zip(a, b)]
    d = mean(differences)
    low, high = difference_interval(differences)
    wins = sum(x > 0 for x in differences)
    losses = sum(x < 0 for x in differences)
    return (
        f"n = {len(a)}, A {mean(a):.3f}, B {mean(b):.3f}, B - A {d:+.3f} (95 % interval {low:+.3f} "
        f"to {high:+.3f}); B wins {wins}, loses {losses}, McNemar p = {mcnemar(b, a):.3g}"
    )


def difference_interval(differences):
    """The 95 % interval of the mean of paired differences of grades, as (low, high)."""
    d, error = mean_and_error(differences)
    return max(-1.0, d - 1.96 * error), min(1.0, d + 1.96 * error)


def difference_p(differences):
    """Two-sided p-value of the mean of paired differences of grades being 0."""
    d, error = mean_and_error(differences)
    return math.erfc(abs(d) / error / math.sqrt(2))


def mean_and_error(differences):
    """The mean of paired differences of grades, and its standard error.

    Bonett and Price's (2012): after two more questions, one that A alone has right and one that B
    has. Intervals then cover 95 % where few pairs differ, too, and where all that do go one way.
    """
    n = len(differences) + 2
    d = math.fsum(differences) / n
    square = (math.fsum(x * x for x in differences) + 2) / n
    return d, math.sqrt((square - d * d) / n)


def t_test(x):
    """Exact two-sided p-value of the mean of numbers x being 0, one per seed.

    1 for a single one, and for equal ones: nothing is known of their spread.
    """
    if len(x) == 1:
        return 1.0
    n, m = len(x) - 1, mean(x)
    error = math.sqrt(sum((v - m) ** 2 for v in x) / n / len(x))
    if error < 1e-12:  # equal but for the rounding of shares such as 25 / 600 - 24 / 600
        return 1.0
    return 1 - t_within(abs(m) / error, n)


def t_within(t, n):
    """P(|T| < t) of Student's t with n degrees of freedom.

    By the closed form for a whole n: with theta = atan(t / sqrt(n)), a finite sum of powers of
    cos(theta).
    """
    theta = math.atan(t / math.sqrt(n))
    sine, square = math.sin(theta), math.cos(theta) ** 2
    odd = n % 2
    term = math.cos(theta) if odd else 1.0
    total = term if n > 1 else 0.0
    for i in range(2 + odd, n - 1, 2):
        term *= square * (i - 1) / i
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


@cache
def t_quantile(share, n):
    """The t with P(|T| < t) = share: 12.706 of .95 and one degree of freedom. By bisection."""
    low, high = 0.0, 1.0
    while t_within(high, n) < share:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, n) < share else (low, middle)
    return high


def holm(ps):
    """Holm's adjusted p-values of tests that are read together, in the order given."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        # never less than that of a smaller p
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted
