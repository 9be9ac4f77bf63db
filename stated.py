"""Which number, list, or yes or no does a text state?

A number counts where it is said to be the answer, the total, what something is; not where it is a
part of an expression, a bound, a page or a step, or one of several.
"""

import re
from decimal import Decimal

from phrases import (
    CLAUSE,
    CONCLUSION,
    NO,
    REASON,
    REFUSED,
    SENTENCE_END,
    any_of,
    any_pattern,
    declared_text,
)
from values import FRACTIONS, LARGE, LONGEST_VALUE, bare_value, latex_value, plain

# --------------------------------------------------------------------------------------------------
# numbers in digits and in words

# after what is part of a number: "5√3", "3 1/2", "two thirds", "2\sin x", "3e5"; or bounds it
GOES_ON = (
    rf" ?[√π]| ?(?!μ[a-z])[α-ψ]|\^|[ -]\d+/\d| ?{LARGE}\b|e[+-]?\d"
    r"| ?\\(?:cdot|d?frac|sqrt|sin|cos|tan|log|ln|alpha|beta|gamma|theta|phi)(?![a-z])"
    rf"|[ -](?:{FRACTIONS})\b"
    r"| (?:plus|minus|squared|cubed|factorial)\b"
    r"| times (?:\d|[√π]|the square root)| and a half\b"
    r"|\+(?!\w)| or (?:more|less|fewer|greater|higher|lower|above|below)\b"
)
# before a number that is a bound, "more than 5", or has a sign or a function in words, "sin 5"
BOUND = "than minus negative log ln sin cos tan"
NO_BOUND = r"(?<![<>≤≥≠±])(?<![<>≤≥≠±] )" + "".join(rf"(?<!\b{word} )" for word in BOUND.split())

WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
ORDINALS = "first|second|third|(?:four|fif|six|seven|eigh|nin)th"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# {word: digits} of 0 to 99
COUNT_WORDS = {word: str(n) for n, word in enumerate(WORDS)}
COUNT_WORDS |= {tens: str(10 * t) for t, tens in enumerate(TENS, 2)}
COUNT_WORDS |= {
    f"{tens}-{WORDS[n]}": str(10 * t + n) for t, tens in enumerate(TENS, 2) for n in range(1, 10)
}

# 12, 1,234.5, .5, each with a minus that is a sign and not a dash: "x-1" and "1-2" hold no -1 or
# -2. Not a part of another number: "2√3", "2^{-3}", "3/4", "12:30" and "2 million" hold none
NUMBER = (
    r"(?>(?:(?<![A-Za-z0-9_.^)])-)?(?<![A-Za-z0-9_.^√])(?<!\d[:/])(?<!\^[{(])(?<!\^[{(]-)"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![A-Za-z0-9_.^√])-?\.\d+)"
    rf"(?!{GOES_ON}|[:/]\d)"
)
NUMBERS = re.compile(NUMBER, re.ASCII)
# "is 12" and "= about 12", but not the 12 of "is 12 + 3" and of "are 12 red and 3 blue"
IS_A_NUMBER = any_of(
    "is are was were be has have equals? makes? making gives? giving costs? takes?"
)
MEASURE = any_of("total area size length width height distance")
ABOUT = any_of("approximately about around only equal to an? the total of exactly roughly")
VALUE = (
    rf"(?:\b{IS_A_NUMBER}\b|\b{MEASURE} of\b|[=≈:])[\s=≈:]{{0,3}}(?:{ABOUT} ){{0,4}}({NUMBER})"
    r"(?!°? ?[-+*/×÷^] ?[\d(√π]|[^.,;:(\n]{0,40}\b(?:and|or|to) \d)"
)
STATED = re.compile(VALUE, re.ASCII)
# an answer before its explanation
FIRST_LINE = re.compile(
    rf"\A(?:{ABOUT} )?({NUMBER})(?: ?[a-z°%]++(?:\^\d)?){{0,3}}+\.?\n(?!\W*(?:\d|and\b|plus\b))",
    re.ASCII,
)
# what a value is no answer beside: 2x, 30 + y (3 m is none), what is given, and what it is used for
UNKNOWN = re.compile(
    r"\d°? ?(?:[-+*/×÷^] ?[a-z√π(\\]|[a-fi-kn-rt-z]\b)"
    r"|\b(?:given|if|were|let|suppose|need|find|twice|half|double)\b"
)
DECLARED_NUMBER = re.compile(rf"\banswer\b[^.\n\d]{{0,40}}?{VALUE}", re.ASCII)
EITHER = re.compile(rf"(?:{NUMBER} or|\bbetween {NUMBER} and) (?:\w+ ?= ?)?{NUMBER}", re.ASCII)
# "3-4 m", "3 to 4"; but "it rises from 3 to 4" and "= 10-4"
RANGE = re.compile(
    rf"(?:(?<!from ){NUMBER} to |(?<![-+*/×÷=] )(?<![-\w.,/+*×÷=])\d+(?:\.\d+)?-){NUMBER}", re.ASCII
)
# "4 red, 5 blue, so 9": a sentence, or what it concludes
PARTS = any_pattern(SENTENCE_END.pattern, CONCLUSION.pattern)
# what holds numbers beside the one that is meant: "of the 20", "(2 of them red)", "in frame 12" ...
ASIDE = any_pattern(
    r",? (?:not|rather than|instead of) \d+\b(?!\.\d)",
    rf", \d+ of (?:whom|them|these|those|which)\b{CLAUSE}|其中{CLAUSE}|\be\.g\.[^;\n]*",
    r"(?:\bout of|\bof (?:the|these|those)|(?<=\d )of|^of) (?:the |these |those )?\d+\b(?!\.\d)",
    r"\((?!-?[\d.,]+\))[^()\n]*\)",
    r"(?<!\bthe )(?<!\bthis )\b(?:frame|image|picture|photo|figure|view|page|line|step)s? \d+"
    r"(?:(?:,|,? and|-) ?\d+)*\b(?!\.\d)",
)
# ... and a reason or a time, if something is left without it
REASONS = any_pattern(
    REASON.pattern, rf"(?:\b(?:which|after|before)|, (?:who|whose|while|whereas))\b{CLAUSE}"
)
# a word of COUNT_WORDS, perhaps; "twenty-first" is no 20, "one-third" no 1, a "two-door car" has
# two, and "the left one" counts nothing
COUNTED = re.compile(
    r"\bone of\b|\bthe (?:\w+ )?one\b|\b(?:no|another|every|each|some|any) one\b"
    r"|\b(?:hundred|thousand|million)s?(?: and)?[ -][a-z-]+"
    rf"|\b(?:{'|'.join(TENS)})(?:-[a-z]+| (?:{'|'.join(WORDS[1:10])}|{ORDINALS})\b)"
    r"|(?<![a-z])(?<![a-z]-)[a-z]+(?!-(?:half|third|quarter|fifth))",
    re.ASCII,
)
# 2.5e-3, 1.5 × 10^{-3}, 10^3
SCIENTIFIC = re.compile(
    r"(?<![\w.,^/√{])(?:(\d+(?:,\d{3})*(?:\.\d+)?)(?:e| ?(?:[×x*·]|\\cdot) ?10\^)|10\^)"
    r"([{(])?([+-]?\d{1,2})(?(2)[)}])(?![\w^]|\.\d)",
    re.ASCII,
)
# an answer before its explanation, "Yes, there is no doubt"
YES_OR_NO = re.compile(r"\W*(yes|no)\b(?=[.,;:!\n]|\Z)(?!\W*(?:yes|no)\b)")


def find_kind(text, kind, finished=True):
    """The number, the last [list], or the yes or no of a text; None if it has none (or both).

    Of a text that was cut off only what is declared, or what it opens with.
    """
    if kind not in ("number", "list", "yesno"):
        raise ValueError(f"{kind!r} is no kind of answer")
    if kind == "number":
        return find_number(text, finished)
    declared = declared_text(text)
    if kind == "list":
        lists = re.findall(r"\[[^\[\]]*\]", text if finished else declared)
        return lists[-1] if lists else None
    said = plain(text).lower()
    for part in (plain(declared).lower(), said):
        opens = YES_OR_NO.match(part)
        if opens:
            return opens[1]
    # "no" in a sentence that also says "yes" settles nothing
    words = set(re.findall(rf"(?<!not )\b(?:yes|{NO})\b", said, re.ASCII))
    return words.pop() if len(words) == 1 and finished else None


def in_digits(text):
    """A text in lower case without layout, its numbers in digits: "five" is 5, 2.5e-3 is 0.0025."""

    def counted(word):
        return COUNT_WORDS.get(word[0].replace(" ", "-"), word[0])

    def written_out(number):
        mantissa, _, exponent = number.groups(default="1")
        return f"{Decimal(mantissa.replace(',', '')).scaleb(int(exponent)):f}"

    return COUNTED.sub(counted, SCIENTIFIC.sub(written_out, plain(text).lower()))


def find_number(text, finished=True):
    """The number that a text gives, digits or a word up to 99, without thousands separators.

    The last that is declared, "the answer is 8"; else one alone on the first line; else, of the
    last sentence with a number, or of what it concludes, the last that is stated, "it is 10.4 for 3
    of them", or the last of all. A refusal gives none.
    """
    # an expression is its value
    text = plain(text).lower()
    bare = bare_value(text) if len(text) <= LONGEST_VALUE else ""
    if re.search(r"[√π^/*\\]", bare):
        value = latex_value(bare)
        if value is not None:
            return f"{value:.15g}"
    text = in_digits(text)
    # "two people, whose ages cannot be told": numbers before a refusal are of other things
    *before, said = REFUSED.split(text)
    whole = " ".join([*before, said])
    declared = DECLARED_NUMBER.findall(whole)
    if not declared and not CONCLUSION.search(said):
        declared = FIRST_LINE.findall(whole)
    if not finished:
        return declared[-1].replace(",", "") if declared else None
    if declared or before:
        found = declared or STATED.findall(said)
    else:
        parts = [part for part in PARTS.split(said) if NUMBERS.search(part)]
        meant = [part for part in (ASIDE.sub(" ", part) for part in parts) if NUMBERS.search(part)]
        # the last that says more than an aside, or the last
        part = [*parts, *meant][-1] if parts else ""
        if EITHER.search(part):
            return None
        kept = REASONS.sub(" ", part)
        found = STATED.findall(kept)
        if not found:  # a range is no number
            kept, part = (RANGE.sub(" ", said) for said in (kept, part))
            found = NUMBERS.findall(kept) or STATED.findall(part) or NUMBERS.findall(part)
    return found[-1].replace(",", "") if found else None
