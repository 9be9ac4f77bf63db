"""Which options has a row, or its question, and which one does its gold answer name?"""

import pytest

from answers import is_correct
from options import hidden_options, lettered, option_named


def test_a_gold_that_opens_like_a_letter_is_a_text():
    options = ["E. coli", "C. elegans", "D. melanogaster"]
    for gold, letter in (("C. elegans", "B"), ("D. melanogaster", "C"), ("B", "B"), ("(c)", "C")):
        assert option_named(gold, lettered(options)) == letter
    row = {"answer": "C. elegans", "options": options}
    assert is_correct("B", row) and is_correct("C. elegans", row)
    assert not is_correct("C", row)


@pytest.mark.parametrize(
    "text, texts",
    [
        ("What? (A) red (B) blue\n(C) green", "red; blue; green"),
        ("Is point A. closer? A. x\nB. y\nC. z", "x; y; z"),
        ("(a) Open (b) Closed", "Open; Closed"),
        ("Options: (A. red, B. blue)", "red; blue)"),
        ("Is (A) longer?", ""),
        ("What are the options: yes or no?", ""),
        # letters of the question before them, other styles within them, an instruction after them
        ("(a) is before, (b) after.\nOptions: A: colour, B: size, C: none", "colour; size; none"),
        ("(A) or (B)?\nOptions: A: the first, B: both, C: none", "the first; both; none"),
        ("(A) or (B)? A: the first, B: both, C: none", "the first; both; none"),
        ("Options: A: (A) and (B), B: only (B), C: none", "(A) and (B); only (B); none"),
        ("Options: A: vitamin A: x, B: vitamin B: y", "vitamin A: x; vitamin B: y"),
        ("Options: A: 1, B: 2, C: 3\nPlease answer A. B. or C.", "1; 2; 3"),
        ("Options: A: the St. B. Fork, B: y", "the St. B. Fork; y"),
    ],
)
def test_options_that_stand_in_a_question(text, texts):
    assert "; ".join(hidden_options(text).values()) == texts
    # whatever stands before
    assert "; ".join(hidden_options(f"Look. {text}").values()) == texts
