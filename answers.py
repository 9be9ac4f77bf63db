"""What did it say, and is that right?

One rule reads every model's answer, tagged or not, and it never guesses: a text that names no
answer has none. `extract_answer` reads; `is_correct` compares with the gold answer. To see how a
new model's answers are read:

    python answers.py FILE.jsonl    # rows of {"raw", "gold"} with "options" or "kind"
"""

import itertools
import re
from collections import defaultdict
from pathlib import Path

from options import OTHER_NUMBER, by_letter, find_letter, option_named, without_denied
from phrases import DECLARED_TEXT, REASON, REFUSED, any_pattern, declared_text
from stated import BOUND, DECLARED_NUMBER, NUMBERS, find_kind, find_number, in_digits
from values import LARGE, MARKUP, WRAPPED, normalise, same_text, same_value

# --------------------------------------------------------------------------------------------------
# tags: where in the output is the answer?

# what a model writes for itself: latents, what it read in them, and Monet's spans
SPANS = re.compile(
    r"<(latent|parser|observation|abs_vis_token)>(?:(?!<\1>).)*?</\1>",  # none runs over another
    re.DOTALL,
)


def last_box(text):
    r"""(start, end) of the content of the last balanced \boxed{...}, or None."""
    opened, closed = [], []
    for brace in re.finditer(r"(\\boxed\s*)?\{|\}", text):
        if brace[0] != "}":
            opened.append((brace.end(), brace[1]))
        elif opened:
            start, is_box = opened.pop()
            if is_box:
                closed.append((start, brace.start()))
    # models box intermediate values, too; a box that a cut-off output leaves open is none
    return max(closed, default=None)


def boxed(text):
    r"""The content of the last balanced \boxed{...}, or None."""
    place = last_box(text)
    if place is None:
        return None
    return re.sub(WRAPPED, r"\1", text[slice(*place)])


def tagged(text):
    """(what follows the last </think>, what its last <answer> or box holds, how that was found).

    How: "answer", "boxed"; or, with None before it, "truncated" (a thought that never ends) or "".
    """
    # We-Math asks for "<Thought process>: <<...>> <Answer>: <<B>>"
    text = re.sub(r"<thought process>\s*:", "<think>", text, flags=re.IGNORECASE)
    text = re.sub(r"<answer>\s*:", "</think><answer>", text, flags=re.IGNORECASE)
    # an output that was cut off inside its thought says nothing yet
    still_thinking = text.rfind("<think>") > text.rfind("</think>")
    said = SPANS.sub(" ", text.rpartition("</think>")[2])
    # the last answer counts: models change their minds, and some forget to close the tag
    *tags, inside = re.split("<answer>", said, flags=re.IGNORECASE)
    inside = re.split("</answer>", inside, flags=re.IGNORECASE)[0]  # all of it without a tag
    box = boxed(inside)
    if tags and box is None:
        return said, inside.strip(), "answer"
    if box is not None:
        return said, box.strip(), "answer" if tags else "boxed"
    return said, None, "truncated" if still_thinking else ""


# --------------------------------------------------------------------------------------------------
# the whole rule


# a line that may stand after the answer
REMARK = any_pattern(
    r"[ *#>]*(?:(?:explanation|note)[ *]*:|i hope this|(?:please )?(?:let me know|feel free))"
    r"(?!.*\banswer\b)"
)


def without_remarks(text):
    """A text without the remarks that it ends with, "I hope this helps!"."""
    lines = text.rstrip().split("\n")
    while len(lines) > 1 and (not lines[-1].strip() or REMARK.match(lines[-1])):
        lines.pop()
    return "\n".join(lines)


def extract_answer(text, options=None, kind="text", finished=True):
    r"""(answer or None, how it was found) of a model's whole output.

    options {letter: text} (or a list of texts): the answer is a letter. Else `kind` says what it
    is: text, number, list, yesno.

    A thought is not read, and one that never ends is "truncated". Of the rest counts what stands
    in the last tag, "answer" or "boxed"; what is declared after a box counts more, and so does all
    that is said after a box that names no option. In that text the first rule that finds one letter
    decides, and it is named after the tag where the tag holds more than a letter:

    - letter: nothing but a letter is said. "(b)", "**B**", "Ｂ"
    - option text: nothing but one option's text or value. "Blue.", "10\,\text{cm}" for "10 cm"
    - last line: nothing but an option stands on the last line. "Compare them:\nA. sample B" is A
    - declared: the last option that is said to be the answer. "A? No, the answer is B", "故选B"
    - opening: an option opens the text, all of it. "C. blue\nas in row B", "No, it is not inside"
    - conclusion: the only option after the last so, thus, ... "A and B are cut, so it is C"
    - leading: a letter opens it, and no other one follows. "b. It is blue", "A is closer than B"
    - named: the only letter of the last line, else the only option that is named anywhere, by
      letter or text. "Take B,\nsince it is blue", "The map shows all of Africa"
    - value: no option is named, and the only number that is stated is the value of one, "So AC is
      20." for "20 cm"; or no letter is, and the value of one is all that is declared, or else all
      of the last line

    Not chosen is what is denied, "not A", "A: wrong", and what was said of it before; what is taken
    back, "Wait, ..."; what is asked about, "Is it A?", "hard to say whether A", or supposed, "If A
    ..."; the items of a list of options, "A. red\nB. blue"; and what is named in passing, "in row
    B", "because B ...". After a refusal, "it cannot be told", the last three rules find nothing. Of
    an output that is not `finished`, cut off by the token limit, only a tag, a box, what is
    declared and what opens it count: it may have gone on to say the opposite.
    """
    said, inside, tag = tagged(text)
    if tag == "truncated":
        return None, tag
    source = without_remarks(said) if inside is None else inside
    after_box = said[last_box(said)[1] :] if tag == "boxed" else ""
    if options:
        return read_letter(source, after_box, tag, by_letter(options), finished)
    later = DECLARED_NUMBER.findall(in_digits(after_box))
    if later:
        source = inside = later[-1]
        tag = "declared"
    if kind != "text":  # a tag that holds no number is no number: what surrounds it is not read
        return find_kind(source, kind, finished or bool(tag)), tag or kind
    # an empty tag was meant as the answer, and says nothing
    return (inside or None, tag) if tag else read_text(said, finished)


def read_letter(source, after_box, tag, options, finished):
    """(letter, how) of the source, which `tag` held, and of what stands after a box."""
    letter, rule = find_letter(source, options, finished or bool(tag))
    if after_box:
        later, how = find_letter(after_box, options, finished)
        if later and (letter is None or how == "declared"):
            return later, how
    if not tag:
        return letter, rule
    # of a tag that holds a letter or nothing there is no more to say
    return letter, tag if rule in ("letter", "none") else f"{tag}, {rule}"


def read_text(said, finished):
    """(text, how) of an output without a tag."""
    said = re.sub(MARKUP, "\n", said, flags=re.IGNORECASE)
    if DECLARED_TEXT.search(said):
        return declared_text(said) or None, "declared"
    if not finished:
        return None, "truncated"
    # nothing is declared: the last line is what a reader would take
    said = without_remarks(said).strip()
    if not said:
        return None, "empty"
    return said.splitlines()[-1].strip(), "last line"


def extract_final(text):
    """What a reader of the answer sees: the tagged answer, else the text without its reasoning."""
    said, inside, tag = tagged(text)
    if tag == "truncated":
        return ""
    return (said if inside is None else inside).strip()


# --------------------------------------------------------------------------------------------------
# is it right?


def is_correct(answer, row):
    """Does an extracted answer agree with a row's gold answer?

    By text, also that of "It is ..."; where the row has `options` by the option that each names, as
    `extract_answer` reads it; else by value, and of a gold that is a number, yes or no as such an
    answer is read. A number is right only where it is stated: not "at least 12", "x + 12", "9, 12".
    """
    gold, options = row["answer"], row.get("options")
    if answer is None:
        return False
    if same_text(answer, gold):
        return True
    if options:
        options = by_letter(options)
        letter, _ = find_letter(answer, options)
        return letter is not None and letter == option_named(gold, options)
    if is_choice(answer, gold):
        return True
    word = normalise(gold)
    # as it stands, for its signs may count, "(3, 4)"; and without what stands around it, "the 1/2"
    said = [answer] if NUMBERS.fullmatch(word) else [answer, after_is(answer)]
    if any(same_text(a, gold) for a in said):
        return True
    if any(same_value(a, b) for a, b in itertools.product(said, (gold, word))):
        return True
    if word in ("yes", "no"):
        return find_kind(answer, "yesno") == word
    word = in_digits(gold)
    number = find_number(answer) if NUMBERS.fullmatch(word) else None
    return number is not None and same_text(number, word) and states(answer, word)


# where Ⓖ is the gold number, and ⒵ another one
UNSTATED = any_pattern(
    # a bound, or a function's argument: "at least Ⓖ", "≥ Ⓖ", "log(Ⓖ)"
    rf"(?:\b(?:{'|'.join(BOUND.split())}|least|most|over|under|{LARGE}(?: and)?)[ (]|"
    r"[<>≤≥≠±] ?)[({]*Ⓖ",
    # a part of an expression: "x + Ⓖ", "⒵ x Ⓖ", "{a+b}{Ⓖ}", "Ⓖ - y", "Ⓖk"
    r"(?:(?<![a-z])[a-z]|[\d⒵Ⓖ)\]}°π])(?: ?[-+*/×÷^]| x) ?[({]*Ⓖ|\}\{Ⓖ",
    r"Ⓖ[)}°]? ?(?:[+*/×÷^] ?[\w(\\√π⒵]|- ?(?:⒵|[b-hj-z]\b)|x ⒵|[a-fi-kn-rt-z]\b|bn\b)",
    # one of several: "⒵ or Ⓖ", "(⒵, Ⓖ)", "⒵ dogs and Ⓖ cats", "x = ⒵, y = Ⓖ"
    r"(?<!\bin )⒵[)\]°%]* ?(?:,? ?(?:and|or|to|by)|[,;]) ?[(\[]*Ⓖ(?! (?:in )?(?:total|all)\b)",
    r"⒵(?: [a-z]+){1,2} (?:and|or) Ⓖ(?! (?:in )?(?:total|all)\b)",
    r"(?<![\w⒵])[a-z] = ⒵(?:,| and| or) [a-z] = Ⓖ",
)


def states(answer, number):
    """Does an answer state a number: not deny it, bound it, use it in a sum or name others, too?"""

    def sign(found):
        return "Ⓖ" if same_text(found[0], number) else OTHER_NUMBER

    said = without_denied(NUMBERS.sub(sign, in_digits(answer)))
    return "Ⓖ" in UNSTATED.sub(" ", said)


# a gold answer that is a letter, "B" or "(B)", or a letter with its text, "B. 60°"; no list of them
CHOICE = re.compile(
    r"\s*(?:\(([A-H])\)|([A-H])(?:[.:)]|(?=\s*\Z)))\s*((?!and\b|or\b|[,&])(?:(?!\b[B-H][.:)]).)*)",
    re.DOTALL,
)


def is_choice(answer, gold):
    """Does an answer choose the letter of a gold answer whose options stand in the question?"""
    of_gold, said = CHOICE.fullmatch(gold), CHOICE.fullmatch(answer)
    if not of_gold:
        return False
    text = of_gold[3]
    if text and said and said[3] and normalise(text) not in normalise(said[3]):
        if not any(same_value(x, text) for x in (said[3], after_is(said[3]))):
            return False  # "A. Jones" is not "A. Smith"
    letter, _ = find_letter(answer, dict.fromkeys("ABCDEFGH", ""))
    return letter == (of_gold[1] or of_gold[2]) or bool(text) and same_value(answer, text)


IS_SAID = re.compile(
    r"\b(?:is|are|(?:would|must|should) be)\b|(?<=\bit)'s\b"
    r"|\b(?:says|reads|shows)\b(?!.*\b(?:is|are)\b)",
    re.IGNORECASE,
)
IS_ANSWER = any_pattern(
    r" (?:is|would be) (?:the )?(?:correct|right|answer)(?: answer| value)?[.!]?\s*\Z"
)


def after_is(text):
    r"""What a text says the answer is, or a sentence its subject: "8\pi." of "So the area is 8\pi."

    "" where it refuses, does not think so, or says words of several.
    """
    if REFUSED.search(text) or re.search(r"(?:not|n't) (?:think|believe|say|mean)\b|doubt", text):
        return ""
    text = IS_ANSWER.sub("", declared_text(text) or text)  # "Paris is the answer"
    of_one = IS_SAID.split(REASON.sub(" ", text))
    return of_one[-1] if len(of_one) < 3 or re.search(r"\d", of_one[-1]) else ""


# --------------------------------------------------------------------------------------------------
# how is a new model read?


def main(file):
    """Print what is read from each row, by which rule, and what rules agree with the gold answers.

    A line is "=" where they agree, "-" where nothing is read and "!" where something else is.
    """
    from tables import read_json_rows  # for this command alone: tables.py stands below this file

    right = defaultdict(list)  # by rule
    rows, _ = read_json_rows(Path(file))
    for n, row in enumerate(rows):
        if not {"raw", "gold"} <= set(row):
            raise SystemExit(f"{file}: row {n} needs raw and gold; it has {', '.join(row)}")
        options, gold, kind = row.get("options"), str(row["gold"]), row.get("kind", "text")
        if not isinstance(row["raw"], str) or kind not in ("text", "number", "list", "yesno"):
            wanted = "raw must be a text, and kind text, number, list or yesno"
            raise SystemExit(f"{file}: row {n}: {wanted}; found {row['raw']!r} and {kind!r}")
        if isinstance(options, list):
            options = list(map(str, options))
        answer, rule = extract_answer(row["raw"], options, kind)
        agrees = is_correct(answer, {"answer": gold, "options": options})
        right[rule].append(agrees)
        sign = "=" if agrees else "-" if answer is None else "!"
        print(sign, repr(answer), repr(gold), rule, repr(row["raw"][-60:]), sep="  ")
    print()
    right["all"] = sum(right.values(), [])
    for rule, agree in sorted(right.items(), key=lambda found: len(found[1])):
        print(f"{sum(agree):6} of {len(agree):6}  {rule}")


if __name__ == "__main__":
    from launch import start

    start(main)
