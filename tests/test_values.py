"""Are two short texts one value? Expressions against their values, and the slow recursion."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import values


@pytest.mark.parametrize(
    "a, b, equal",
    [
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac12", "0.50", True),
        ("2\\sqrt{3}", "3.4641", True),
        ("2\\pi", "6.28", True),
        ("$\\dfrac{3}{4}$", "3/4", True),
        ("(1,2)", "(1, 2)", True),
        ("1,000", "1000", True),
        ("2^{10}", "1024", True),
        ("-2^2", "-4", True),
        ("\\sqrt[3]{27}", "3", True),
        ("120", "120^\\circ", False),
        ("3:4", "3/4", False),
        ("9^9^9^9", "1", False),
        ("1/0", "1", False),
        ("x + 1", "x+1", True),
        ("2(3+4)", "14", True),
        ("(" * 90, "1", False),
        ("5)", "5", False),
        ("2\\frac{1}{2}", "2.5", True),
        ("1\\frac{3}{4}", "0.75", False),
    ],
)
def test_math_equal(a, b, equal):
    assert values.math_equal(a, b) == equal


def test_levenshtein_against_recursion():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    words = ["".join(w) for n in range(5) for w in itertools.product("ab", repeat=n)]
    for a, b in random.Random(0).sample(list(itertools.product(words, words)), 300):
        assert values.levenshtein(a, b) == slow(a, b)


SHORT = st.text("0123456789.,:/^√π°% \\\\{}abcmx=-+", max_size=12)


@settings(deadline=None)
@given(SHORT, SHORT)
def test_equality_is_one_of_values(a, b):
    """Of a text with itself, and either way round."""
    assert values.same_text(a, a) and values.same_value(a, a)
    assert values.same_value(a, b) == values.same_value(b, a)
    assert values.same_text(a, b) == values.same_text(b, a)


@pytest.mark.parametrize(
    "a, b, equal",
    [
        ("10 m", "10 cm", False),
        ("10", "10 cm", True),
        ("x = 1 : 2", "1:2", True),
        ("1:2", "0.5", True),
        ("60 degrees", "60°", True),
        ("60 °C", "60", True),
        ("3 1/2", "3.5", True),
        (r"\frac { 2 } { 3 }", "2/3", True),
        (r"5 \sqrt { 3 }", r"5\sqrt{3}", True),
        ("2,000", "2000", True),
        ("x = 4 or x = 5", "5", False),
        ("two million", "2", False),
        ("2 million", "2", False),
        ("25%", "25", True),
        ("+145", "145", True),
        ("10¹²", "10^{12}", True),
        ("10⁻³", "0.001", True),
        ("30⁰", "30°", True),
        ("", "0", False),
    ],
)
def test_values_with_and_without_units(a, b, equal):
    assert values.same_value(a, b) == equal == values.same_value(b, a)


@pytest.mark.parametrize(
    "text, bare",
    [(".5", ".5"), (" .5.", ".5"), ("...5", "5"), ("... 12", "12"), (r". \frac12", r"\frac12")],
)
def test_a_point_before_a_digit_is_one(text, bare):
    assert values.without_dots(text) == bare
