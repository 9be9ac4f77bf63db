"""Which number does a text state? An expression is one, and a part of it is none."""

import math

import pytest

from answers import is_correct
from stated import find_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"2\sqrt{3}", 2 * 3**0.5),
        (r"\sqrt{5}", 5**0.5),
        (r"5\pi", 5 * math.pi),
        ("10^3", 1000),
        ("2.5e-3", 0.0025),
        ("1.2E4 m", 12000),
        (r"The answer is $1.5 \times 10^{-3}$", 0.0015),
        ("It is about 6 x 10⁴.", 60000),
        ("The answer is 10^{-2}.", 0.01),
        ("It is 2^{-3} of it.", None),
        (r"2\sqrt{3} \times 10^2", 200 * 3**0.5),
        ("1,200 × 10^3", 1.2e6),
        ("The answer is 1,250.5e2.", 125050),
        (r"\frac{3 \times 10^8}{2}", 1.5e8),
        (r"\sqrt{10^4}", 100),
        (r"The answer is \sqrt{10^4}.", None),
        ("2(10^3)", 2000),
        ("3 - 10^2", -97),
        (r"2.5 \times 10^3", 2500),
        (r"\frac{\sqrt3}{2}", 3**0.5 / 2),
        (r"1/\sqrt5", 5**-0.5),
        ("3 1/2", 3.5),
        (r"3\frac{1}{2}", 3.5),
        ("7/10", 0.7),
        ("7 cm", 7),
        ("25 cm^2", 25),
        ("1,234", 1234),
        (r"So the answer is $2\sqrt{3}$.", None),
        ("It is 12:30.", None),
        ("They scored 7/10.", None),
    ],
)
def test_a_part_of_an_expression_is_no_number(text, value):
    number = find_number(text)
    assert number is None if value is None else float(number) == pytest.approx(value)
    for part in (2, 3, 5, 10, 12, 30):
        assert not is_correct(text, {"answer": str(part)})


@pytest.mark.parametrize("gold", ["0.0015", "1.5e-3", r"1.5 \times 10^{-3}", "1.5 × 10⁻³"])
def test_a_gold_in_scientific_notation_is_its_number(gold):
    for said in ("0.0015", "1.5e-3", r"The answer is $1.5 \times 10^{-3}$."):
        assert is_correct(said, {"answer": gold}), said
    assert not is_correct("1.5e-2", {"answer": gold})
