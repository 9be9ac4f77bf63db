"""How sure is an accuracy, and a difference of two on the same questions?"""

import math

from scores import mean


def wilson(correct, n, z=1.96):
    """The 95 % Wilson interval of an accuracy, as (low, high)."""
    if n == 0:
        return 0.0, 1.0
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
    """The 95 % interval of the mean of paired differences of grades, as (low, high).

    Of right and wrong it is exact, and excludes 0 just where McNemar's p is below .05: that of the
    wins' share among the pairs that differ, whose number is taken as it is.
    """
    n = len(differences)
    if not set(differences) <= {-1.0, 0.0, 1.0}:  # VSI-Bench's grades may lie between
        d = mean(differences)
        # rounding can leave a little less than nothing
        variance = max(0.0, mean(x * x for x in differences) - d * d)
        half = 1.96 * math.sqrt(variance / n)
        return d - half, d + half
    wins, differ = sum(x > 0 for x in differences), sum(x != 0 for x in differences)
    low, high = clopper_pearson(wins, differ)
    return (2 * low - 1) * differ / n, (2 * high - 1) * differ / n


def clopper_pearson(k, n, tail=0.025):
    """The exact 95 % interval of a share of which k of n were seen, as (low, high)."""
    if n == 0:
        return 0.0, 1.0

    def at_least(k, p):
        """The probability of k or more of n."""
        logs = [
            math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
            + i * math.log(p) + (n - i) * math.log1p(-p)
            for i in range(k, n + 1)
        ]  # fmt: skip
        return math.fsum(map(math.exp, logs))

    def solve(k, probability):
        """The p at which k or more have this probability, by bisection: it grows with p."""
        low, high = 0.0, 1.0
        for _ in range(50):
            p = (low + high) / 2
            low, high = (p, high) if at_least(k, p) < probability else (low, p)
        return (low + high) / 2

    # the share below which k or more is improbable, and that above which k or fewer is
    low = solve(k, tail) if k > 0 else 0.0
    high = solve(k + 1, 1 - tail) if k < n else 1.0
    return low, high


def t_test(x):
    """Exact two-sided p-value of the mean of numbers x being 0, one a seed.

    1 for a single one, and for two that are equal, which may be chance.

    By the closed form of Student's t for a whole number of degrees of freedom: with theta =
    atan(t / sqrt(n)), P(|T| < t) is a finite sum of powers of cos(theta).
    """
    if len(x) == 1:
        return 1.0
    n, m = len(x) - 1, mean(x)
    error = math.sqrt(sum((v - m) ** 2 for v in x) / n / len(x))
    if error < 1e-12:  # equal but for the rounding of shares such as 25 / 600 - 24 / 600
        return 0.0 if abs(m) > 1e-12 and len(x) > 2 else 1.0
    theta = math.atan(abs(m) / error / math.sqrt(n))
    sine, square = math.sin(theta), math.cos(theta) ** 2
    odd = n % 2
    term = math.cos(theta) if odd else 1.0
    total = term if n > 1 else 0.0
    for i in range(2 + odd, n - 1, 2):
        term *= square * (i - 1) / i
        total += term
    within = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return 1 - within


def holm(ps):
    """Holm's adjusted p-values of tests that are read together, in the order given."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        # never less than that of a smaller p
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted
