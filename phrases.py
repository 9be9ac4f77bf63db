"""How do people say that they answer, conclude, give a reason or cannot tell?

The phrases that the files below look for, as regular expressions; all but DECLARED_TEXT of text
without layout (values.plain).
"""

import re


def any_of(words):
    """The pattern of any of these words; "_" is the space within one."""
    return f"(?:{'|'.join(words.split())})".replace("_", r"\x20")


def any_pattern(*kinds):
    return re.compile("|".join(kinds), re.IGNORECASE | re.MULTILINE)


# --------------------------------------------------------------------------------------------------
# parts of a sentence

SENTENCE_END = re.compile(r"(?<!\bvs)(?<!\be\.g)[.!?;](?=\s|\Z)|\n|\Z")
IN_CLAUSE = r"(?:[^.,;\n]|[.,](?=\d))"  # "1,250.5" is within one
CLAUSE = f"{IN_CLAUSE}*"  # to its end
REASON = any_pattern(rf"(?:\b(?:because|since|if|when)\b|, (?:as|while) |因为){CLAUSE}")
CONCLUSION = any_pattern(
    r"\b(?:so(?! (?:that|many|much)\b)|thus|hence|therefore|consequently|finally)\b",
    "所以|因此|综上",
)

# --------------------------------------------------------------------------------------------------
# what is said of the answer

UNTIL_BUT = r"(?:(?!\bbut\b)[^.!?\n])*"  # the rest of a sentence
# it cannot be told, and all that the sentence says after that
REFUSED = any_pattern(
    r"(?:\b(?:can ?not|can't|could not|(?:un|not )able to|(?:im|not )possible to|not enough)"
    r"(?: be)?(?: \w+){0,2}? (?:determin|tell|told|say|identif|know|answer|provid|help|see|inform)"
    rf"|\bsorry\b|\b(?:not |un)(?:clear|sure|certain)\b|无法|不能确定|抱歉){UNTIL_BUT}"
)
# "I have no idea" and "there is no doubt" do not say no
NO = r"no(?! (?:doubt|idea|clue|way to|information)\b)"
# "**Final Answer:**\n\n$$12$$" declares 12$$
DECLARED_TEXT = re.compile(
    r"(?:\banswer\W{0,2}\s*(?:is\s*+[:：]?|[:：])|答案\s*(?:[是为]\s*+[:：]?|[:：]))"
    r"(?:\s|[*$`]|\\[\[(])*+(.*)",
    re.IGNORECASE,
)


def declared_text(text):
    """What a text last declares to be the answer, to the end of the line; "" for none."""
    # the last one, as of tags and boxes: what was declared before may have been taken back
    return "".join(DECLARED_TEXT.findall(text)[-1:]).strip()
