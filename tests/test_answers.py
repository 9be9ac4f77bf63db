"""What did it say, and is that right? Golden strings, and fuzz."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import answers
import scores

OPTIONS = {"A": "red", "B": "blue", "C": "green", "D": "a dark wood"}


@pytest.mark.parametrize(
    "text, letter",
    [
        ("\\boxed{B}", "B"),
        ("<think>A or D?</think>\n\\boxed{B}", "B"),
        ("<answer>B</answer>", "B"),
        ("<answer>The answer is b</answer>", "B"),
        ("Answer: B", "B"),
        ("Answer: (B)", "B"),
        ("**Answer:** B", "B"),
        ("The answer is B", "B"),
        (
            "The correct option is (B), as shown by the long wall on the left, "
            "which A and C, unlike D, do not have here",
            "B",
        ),
        ("b", "B"),
        ("Because AB=3, so C", "C"),
        # what the rule says of other outputs
        ("<answer>A</answer> no: <answer>(B) blue", "B"),
        ("<answer>\\boxed{\\text{B}}</answer>", "B"),
        ("\\boxed{A} then \\boxed{B", "A"),
        ("<latent></latent> <parser> (A) A </parser> B", "B"),
        ("<abs_vis_token>x</abs_vis_token><observation>A</observation>B", "B"),
        ("<think> C </think> <think> D </think> The option is: **B**.", "B"),
        ("(A) is wrong.\nSo (B)", "B"),
        ("(B) it is\nbecause of the wall", "B"),
        ("B. blue", "B"),
        ("Blue.", "B"),
        ("It is a dark wood", "D"),
        ("The answer is a dog", None),
        ("A dog", None),
        ("A and B\nor C and D", None),
        ("red or blue", None),
        ("blue " * 40, None),
        ("<think> it is B", None),
        ("<think> it is \\boxed{B}", "B"),
        ("", None),
        ("<answer></answer> B", None),
        ("E", None),
    ],
)
def test_letters(text, letter):
    assert answers.extract_answer(text, OPTIONS)[0] == letter
    assert answers.extract_answer(text, list(OPTIONS.values()))[0] == letter


def test_a_truncated_thought_says_so():
    assert answers.extract_answer("<think> it is B", OPTIONS) == (None, "truncated")


@pytest.mark.parametrize(
    "text, kind, value",
    [
        ("The area is 5 cm^2", "number", "5"),
        ("= 1,234.50.", "number", "1234.50"),
        ("<answer>three</answer>", "number", "3"),
        ("1-2", "number", "2"),
        ("It is -3", "number", "-3"),
        (".5", "number", ".5"),
        ("no number", "number", None),
        ("so [1, 2.5]", "list", "[1, 2.5]"),
        ("No, there is not", "yesno", "no"),
        ("Yes.", "yesno", "yes"),
        ("yes and no", "yesno", None),
    ],
)
def test_values(text, kind, value):
    assert answers.extract_answer(text, None, kind)[0] == value


# fmt: off
PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "A", "(B)", "b",
    "answer is ", " ", "\n", "blue", "dark wood", "12", "-.5", "<parser>", "</parser>",
    "Option: ", "**", "³", "é",
]
# fmt: on
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_extraction_under_fuzz(text):
    """Nothing crashes it, and no answer is credited that the text does not hold."""
    letter, _ = answers.extract_answer(text, OPTIONS)
    if letter is not None:
        words = " ".join(text.lower().split())
        assert letter.lower() in text.lower() or answers.normalise(OPTIONS[letter]) in words
    for kind in ("text", "list", "yesno"):
        value, _ = answers.extract_answer(text, None, kind)
        if value is not None:
            assert all(word in text.lower() for word in value.lower().split()) or "\\" in text
    value, method = answers.extract_answer(text, None, "number")
    if value is not None:
        check_number(text, value, method)
    answers.math_equal(text, "1")


def check_number(text, value, method):
    """A number that was read is one, is in the text, and passes the checks that take numbers."""
    float(value)
    words = [word for word, n in answers.COUNT_WORDS.items() if n == value]
    assert value in text.replace(",", "") or any(word in text.lower() for word in words)
    row = {"answer": "7", "raw": text, "extracted": value, "method": method}
    row |= {"question_type": "free_form", "options": None}
    for answer_type in ("integer", "float"):
        assert scores.check_mathvista(row | {"answer_type": answer_type}) in (True, False)
    assert 0 <= scores.check_vsi(row) <= 1


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
    ],
)
def test_math_equal(a, b, equal):
    assert answers.math_equal(a, b) == equal


def test_levenshtein_against_recursion():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    words = ["".join(w) for n in range(5) for w in itertools.product("ab", repeat=n)]
    for a, b in random.Random(0).sample(list(itertools.product(words, words)), 300):
        assert answers.levenshtein(a, b) == slow(a, b)


@pytest.mark.parametrize(
    "text,answer",
    [
        ("<think> a </think> <answer> red circle, blue ring </answer>", "red circle, blue ring"),
        ("<think> a <answer>no</answer> </think>\n<answer>B", "B"),
        (r"<think>A or D?</think> so \boxed{\text{B}}", "B"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("<think> never closed", None),
        ("Well.\nThe answer is 12 cm.", "12 cm."),
        ("<latent></latent> <parser> the answer is C </parser> <answer>D</answer>", "D"),
        ("", None),
    ],
)
def test_extraction(text, answer):
    assert answers.extract_answer(text)[0] == answer


@pytest.mark.parametrize(
    "answer,gold,options,right",
    [
        ("Red  Circle, blue ring.", "red circle, blue ring", [], True),
        ("red circle", "red circle, blue ring", [], False),
        ("<", ">", [], False),
        (">", ">", [], True),
        ("1000001", "1000000", [], False),
        ("1,000", "1000.0", [], True),
        ("0.5", ".50", [], True),
        ("12", "13", [], False),
        ("-3", "3", [], False),
        ("(b)", "B", ["4", "5"], True),
        ("B. 5", "B", ["4", "5"], True),
        ("5", "B", ["4", "5"], True),
        ("A", "B", ["4", "5"], False),
        ("E", "B", ["4", "5"], False),
        (None, "x", [], False),
        ("", "B", ["4", "5"], False),
    ],
)
def test_check(answer, gold, options, right):
    assert answers.is_correct(answer, {"answer": gold, "options": options}) == right
