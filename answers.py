"""What did it say, and is that right?

One rule reads every model's answer, tagged or not, and it never guesses: a text that names no
answer has none. `extract_answer` reads; `is_correct` compares with the gold answer. To see how a
new model's answers are read:

    python answers.py FILE.jsonl    # rows of {"raw", "gold"} with "options" or "kind"
"""

import itertools
import os
import re
import string
from collections import defaultdict
from pathlib import Path

from values import (
    FRACTIONS,
    LARGE,
    LONGEST_VALUE,
    MARKUP,
    WRAPPED,
    bare_value,
    latex_value,
    normalise,
    plain,
    same_text,
    same_value,
)

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
# options as signs, so that no rule need know what an option is called: from here on Ⓑ is the letter
# B, ⒝ the text of option B, (Ⓑ⒝) both, and all else are words


def any_of(words):
    """The pattern of any of these words; "_" is the space within one."""
    return f"(?:{'|'.join(words.split())})".replace("_", r"\x20")


LETTER, TEXT, ANY = "[Ⓐ-Ⓩ]", "[⒜-⒵]", "[⒜-Ⓩ]"
SIGN = rf"\(?(?:{LETTER}{TEXT}?|{TEXT})\)?°?"
# options that are named together; of "A, B is" only the last one is
AND = (
    r"(?: (?:and|or|nor|to|&) (?:(?:maybe|perhaps|possibly|even) )?(?:option |choice |the |an? )?"
    r"| ?(?:和|与|及|或|还是) ?)"
)
# an article joins what goes on so, "a cat, a dog and ..."; but "Left, the right side is empty"
COMMA = rf"(?:,{AND}|, ?|, (?:the|an?) (?={SIGN}(?:[.,;!\n]|{AND}|\Z))| ?/ ?| )"
TOGETHER = re.compile(rf"{SIGN}(?:{AND}{SIGN}|{COMMA}{SIGN}(?! (?:is|was|has)\b))+", re.I)

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
# what may not stand beside a mention: "art" is not in "start", nor 5 in 15, 1.5, 5√3 and 5 + 2
WORD_EDGES = r"(?<![A-Za-z0-9_])(?<!\w-)", r"(?![A-Za-z0-9_]|-\w)"
NUMBER_EDGES = (
    r"(?<![A-Za-z0-9_^√/-])(?<!\d[.,:+*×÷])(?<!\d [-+*/×÷:] )(?<!\b[a-z]\+)(?<!\b[a-z] [-+*/×÷] )"
    + NO_BOUND,
    rf"(?![A-Za-z0-9_]|[.,]\d| ?[-+*/×÷=:] ?[\d√π(\\]| ?[+*/×÷] ?[a-z]\b| - [b-hj-z]\b|{GOES_ON})",
)
# nor after a unit: 10 cm is neither in "10 cm^2" nor in "10 cm/s", nor 2x in "2x + 1"
UNIT_EDGE = r"(?!\^|[/·][a-z]| ?[+*×÷] ?[\w(]| ?[<>≤≥≠]| - (?:\d|[b-hj-z]\b))"
# a variable is no letter of an option: "A = 5", "A(1, 2)", "∠A"
LETTER_EDGES = r"(?<![A-Za-z0-9_°∠△^])(?<!\w[-.'])", r"(?![A-Za-z0-9_^+]|['-]\w| ?=|\(\d)"
BESIDE = any_of("in on at of for from between among than near next_to behind above below by")
# nor is the article that opens a sentence, "A dog"; but no article stands before one of these words
NO_NOUN = any_of(
    "is are was were has had would should could does looks seems appears and or nor but because as "
    f"since so to with when while where which that then only also not {BESIDE} "
    "the it its this there option therefore thus hence"
)
OPENS = any_of("Looking According Based Given Note However Here We You I Both")
# "A British flag", "A 3-story house"; but "A Reason: ..." has a heading
ARTICLE = rf"(?<![A-Za-z,;] )A (?!(?i:{NO_NOUN})\b|{OPENS}\b)(?:[a-z]|[A-Z]\w*+(?!:)|\d+-[a-z])"
# a small letter is one in brackets, with a mark at the start, and at the end of a declaration
SMALL = (
    r"(?:(?<=\()(?=\w\))|\A(?=\w[).:](?:\s|\Z))"
    r"|(?:(?<= is )|(?<=: )|(?<=ption ))(?=\w(?:[.,;:!)\n]|\Z)))"
)
# "I have no idea" and "there is no doubt" do not say no
NO = r"no(?! (?:doubt|idea|clue|way to|information)\b)"
# where options are numbers, one that is none of them has a sign, too, but for a step's
OTHER_NUMBER = "⒵"
STEP = re.compile(r"^[^\w\n]*(?:step )?\d{1,2}[.):] (?=\w)|\bstep \d+", re.I | re.M)

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


# "twenty" is neither in "twenty-five" nor in "two hundred and twenty"
BEGINS_NUMBER = "".join(rf"(?<!{tens}[- ])" for tens in TENS) + "".join(
    rf"(?<!{large} )(?<!{large} and )" for large in ("hundred", "thousand", "million")
)
ENDS_NUMBER = rf"(?![- ](?:{'|'.join(WORDS[1:10])})\b|-[a-z])"


def marked(text, options):
    """The text with a sign for each mention of an option {letter: text}.

    "(B) blue, or green" is "(Ⓑ⒝⒞)": what is named together stands together.
    """
    patterns = {letter: option_pattern(letter, options) for letter in options}
    # the longest first: "dark red" is not "red"
    told = [letter for letter in options if patterns[letter]]
    told.sort(key=lambda letter: len(options[letter]), reverse=True)
    kinds = []
    for x in told:
        letter = rf"(?<![A-Za-z0-9_'])(?:{x}\)?|{x.lower()}[).:])[ .:,([-]{{1,4}}(?:the |an? )?"
        kinds.append(rf"(?P<{x}both>\(?{letter}{patterns[x]}\)?)")
    for x in told:
        kinds.append(f"(?P<{x}text>{patterns[x]})")
    letters = "".join(options)
    before, after = LETTER_EDGES
    kinds.append(f"(?P<letter>{SMALL}[{letters.lower()}]|{before}(?!{ARTICLE})[{letters}]{after})")
    if any(NUMBERS.fullmatch(bare_value(option)) for option in options.values()):
        before, after = NUMBER_EDGES
        kinds.append(rf"(?P<other>{before}\d+(?:\.\d+)?{after})")
    said = re.sub("|".join(kinds), sign, STEP.sub("", text))
    return TOGETHER.sub(together, said)


def sign(mention):
    """The sign of a mention."""
    kind = mention.lastgroup
    if kind == "other":
        return OTHER_NUMBER
    option = mention[0].upper() if kind == "letter" else kind[0]
    letter, text = (chr(ord(first) + ord(option) - ord("A")) for first in "Ⓐ⒜")
    if kind == "letter":
        return letter
    return f"({letter}{text})" if kind.endswith("both") else text


def together(mentions):
    signs = signs_in(mentions[0])
    # a model that runs in circles says nothing
    return f"({signs})" if len(signs) < 10 else ""


def option_pattern(letter, options):
    """A pattern of an option's text, whatever its spaces; "" where that says too little."""
    option = option_words(options[letter])
    # "a" is in most sentences
    if len(option) < 2 and not re.match(r"\d|[α-ω]", option):
        return ""
    parts = re.findall(r"-?\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s]|_", option)
    said = [NO if option == "no" else r"\s?".join(map(re.escape, parts))]
    said += [
        BEGINS_NUMBER + word.replace("-", "[- ]") + ENDS_NUMBER
        for word, digit in COUNT_WORDS.items()
        if digit == option and word != "one"
    ]
    said = [pattern.replace("°", r"(?:°|degrees?\b)") for pattern in said]
    # "yes" stands for the one option that opens with it, as in "Yes, it is"
    if parts[0] in ("yes", "no"):
        alike = [x for x in options.values() if re.match(rf"{parts[0]}\b", option_words(x))]
        said += [NO if parts[0] == "no" else "yes"] if len(alike) == 1 else []
    if option == "one":  # "the last one" counts nothing
        said = ["(?:(?<=is )|(?<=only )|(?<=exactly ))one(?! of)"]
    before, _ = NUMBER_EDGES if parts[0][-1].isdigit() else WORD_EDGES
    _, after = NUMBER_EDGES if parts[-1][-1].isdigit() else WORD_EDGES
    if "/" in parts and parts[0].isdigit():  # "1 1/2" is no half
        before += r"(?<!\d )"
    if any(part.isdigit() for part in parts):
        after += UNIT_EDGE
        before += "" if parts[0][-1].isdigit() else NO_BOUND  # which NUMBER_EDGES have
    return f"(?i:{before}(?:{'|'.join(said)}){after})"


def option_words(option):
    """An option's text in lower case, without an article before it and a full stop after it."""
    return re.sub(r"^(?:the|an?|it) (?=\w)", "", plain(option).lower()).strip(" .,;:!?")


def signs_in(said, kind=ANY):
    return "".join(re.findall(kind, said))


def only(said):
    """The one letter, as a capital, that all signs of a text mean; None if there is none."""
    # two letters choose nothing, and one that is named twice is one
    found = {chr(ord("A") + (ord(x) - ord("Ⓐ")) % 26) for x in signs_in(said)}
    return found.pop() if len(found) == 1 else None


# --------------------------------------------------------------------------------------------------
# what a text with signs says of them

RUN = rf"\(?(?<!{ANY}){ANY}++\)?"  # options that are named together, or one
LETTERS = rf"\(?(?<!{ANY})(?:{LETTER}++(?!{TEXT})|{OTHER_NUMBER})\)?"  # without a text
NOUN = "(?:option|choice|answer)"
CLEARLY = r"(?: \w+ly| also| thus| therefore| indeed)?"
SEEMS = "(?:is|are|was|were|seems?|looks?|appears?|(?:can|would|must|should) be)(?: to be)?"


def any_pattern(*kinds):
    return re.compile("|".join(kinds), re.IGNORECASE | re.MULTILINE)


NOT = any_of(
    r"\b(?:not|never|neither|nor|none|except|unlike|cannot|rather_than|instead_of)\b n't\b "
    r"rul\w+_out "
    rf"eliminat\w+ exclud\w+ (?:incorrect|wrong)_{NOUN}s? \bno(?=_\(?{ANY}) "
    r"(?<!no_)(?<!a_)(?<!any_)(?<!little_)\bdoubt\w*(?=_(?:it|that)) \bno_evidence "
    r"\b(?:anything|everything)_but unlikely_(?:to_be|that) "
    "不是 不(?:能|应|可|该)?选 而非 并非 排除"
)
WRONG = any_of(
    r"wrong incorrect false untrue impossible unlikely inaccurate invalid less_likely "
    r"too_(?:many|few|much|little|large|big|small|high|low|long|short) "
    r"eliminated excluded ruled_out (?:no|not)(?=[.,;\n]|\Z) "
    rf"not_(?:the_|an?_)?(?:correct|right|true|{NOUN})"
)
DENIED = any_pattern(
    # neither A nor B; I do not think that it is A; the wrong option is A
    rf"{NOT}(?:[ :]{{1,3}}(?!but\b)\w++){{0,4}}[ :]{{0,3}}{RUN}",
    # A is clearly wrong; option A can be excluded; A: wrong; A does not fit
    rf"{RUN}(?:(?: {NOUN})? {SEEMS}{CLEARLY}(?: the| an?)?|:) {WRONG}(?!\w)",
    rf"{RUN}(?: {NOUN})? (?:(?:can ?not|can't) be|(?:do|does)(?: not|n't) (?:match|fit|work))\b",
    rf"{RUN}(?:选项|项)?(?:是?错|不是正确|不正确|不对|不符|有误)",
)
# what is not so is not chosen here, which takes nothing back: "The answer is A. A is not cut"
NOT_SO = any_pattern(
    rf"(?<!only )(?<!though ){RUN}(?: {NOUN}| one)? "
    r"(?:is|are|was|were|do|does|did|can|could|would|should|must)(?:n't| ?not)\b"
    r"(?! (?:only|just|merely|necessarily)\b)",
)
UNTIL_BUT = r"(?:(?!\bbut\b)[^.!?\n])*"  # the rest of a sentence
# it cannot be told, and all that the sentence says after that
REFUSED = any_pattern(
    r"(?:\b(?:can ?not|can't|could not|(?:un|not )able to|(?:im|not )possible to|not enough)"
    r"(?: be)?(?: \w+){0,2}? (?:determin|tell|told|say|identif|know|answer|provid|help|see|inform)"
    rf"|\bsorry\b|\b(?:not |un)(?:clear|sure|certain)\b|无法|不能确定|抱歉){UNTIL_BUT}"
)
QUESTION = re.compile(r"(?<![^.!?\n])[^.!?\n]*+\?")
# no refusal: what it does say stands elsewhere
WONDERED = any_pattern(
    rf"(?<!not )(?<!n't )\b(?:hard|difficult) to (?:say|tell|determine|know)\b{UNTIL_BUT}"
)

# "the answer to this", "my option" - "is", ":" - "clearly the option" and the option
ANSWER = (
    r"(?:(?<!each )(?<!every )(?<!any )(?<!other )(?<!possible )(?<!to )\bans(?:wer)?\b"
    r"(?! (?:choice|option)s)|"
    r"(?:^|\b(?:the|my|correct|right|best|final|chosen) )(?:option|choice)\b)"
)
IS = r"(?:[^.!?:\n⒜-Ⓩ]{0,40}?\b(?:is|was|be)\b|(?: \w+){0,3} ?(?:[:=]| -)|\n|)"
HEDGE = any_of(
    "the an? that it is must should would be either both clearly definitely probably likely most "
    f"therefore thus indeed just letter number figure image shape point box panel {NOUN} 选项"
)
OPTION = rf"[\s:=\"'\[{{<-]{{0,9}}(?:{HEDGE}[ :]{{1,2}}){{0,5}}[\"'\[{{<]{{0,2}}{RUN}"
DECLARED = any_pattern(
    ANSWER + IS + OPTION,
    rf"\b(?:choose|chose|select(?:ed)?|pick(?:ed)?|go(?:ing)? with)\b{OPTION}",
    # B is clearly the best choice
    rf"{RUN}(?: {NOUN})? (?:is|(?:must|would|should) be){CLEARLY}(?: the| an?)?(?: most| best)? "
    rf"(?:correct|right|best|true|answer|accurate|plausible|likely)(?: one| {NOUN})?"
    r"(?=[.,;:!)\n]|\Z| (?:because|since|as|for|based|here)\b)",
    # 正确答案是B; 故选B; B选项正确
    rf"答案[^.,;\n⒜-Ⓩ]{{0,8}}{RUN}",
    rf"选(?:择|项[是为:])?[ :]{{0,2}}(?:选项)?{RUN}",
    rf"{RUN}(?:选项|项)?是?(?:正确|对的)",
)
CONCLUSION = any_pattern(
    r"\b(?:so(?! (?:that|many|much)\b)|thus|hence|therefore|consequently|finally)\b",
    "所以|因此|综上",
)

# of two that are declared, the other one counts: "C is also correct", "C is plausible"
HALF_DECLARED = any_pattern(rf"\balso\b|\b(?:plausible|likely)(?: one| {NOUN})?\Z")

IN_CLAUSE = r"(?:[^.,;\n]|[.,](?=\d))"  # "1,250.5" is within one
CLAUSE = f"{IN_CLAUSE}*"  # to its end
# what is only supposed, or what others do
SUPPOSED = any_pattern(
    rf"\bif\b(?: the {NOUN})?(?:(?! the (?:\w+ )?{NOUN}\b){IN_CLAUSE})*"
    rf"(?:(?<!\bif so), the (?:\w+ )?{NOUN} would be{CLAUSE})?",
    rf"\b(?:might|may|could|would|some) (?:think|say)\b{CLAUSE}",
    rf"\b(?:many|some|others|people|they) (?:\w+ )?(?:choose|chose|select|pick|go with)\b{CLAUSE}",
    rf"\bmistake\b(?: \w+){{0,2}} to\b{CLAUSE}",
)
IT_IS = any_pattern(rf"\bit(?:'s| is) (?:the |an? )?{RUN}(?!,? (?:that|which|who))")
# what takes back all that was said before, if something else is said then
TAKEN_BACK = any_pattern(
    # "Wait, no, it is A" names no option No
    r"(?<!\w )\b(?:wait|hm+|actually|on second thought|correction)\b ?[,.:!…-]"
    rf"(?: ?{TEXT}, (?={IT_IS.pattern}))?",
    r"\b(?:no, that's (?:wrong|not)|i disagree)\b",
)

# what names an option in passing: a reason, a place in the picture, "in row B", a thing, "point B"
REASON = any_pattern(rf"(?:\b(?:because|since|if|when)\b|, (?:as|while) |因为){CLAUSE}")
# what the one that is meant is compared with
COMPARED = any_pattern(
    rf"(?<!other )\b(?:than|compared (?:to|with)|comparing|in contrast to)(?: the| an?)? {RUN}"
)
NAME = rf"(?!(?:{NOUN}|letter|is|was|are|be|so|and|or|nor|thus|hence|then|that)\b)[a-z]+"
PLACE = any_pattern(rf"\b{BESIDE}(?: {NAME}){{0,2}} {LETTERS}")
THING = any_pattern(rf"\b{NAME} {LETTERS}")

# an item of a list of options opens a line and goes on, or has a mark and opens a sentence
ITEM = any_pattern(
    rf"^[^\w⒜-Ⓩ\n]{{0,4}}(?:{NOUN} )?\(?({LETTER})(?![).:]*$){TEXT}?[).:]*",
    rf"(?<=[.;:,!?] )(?:{NOUN} )?\(?({LETTER}){TEXT}?[).:]",
)
LISTED = re.compile(rf"\(Ⓐ⒜(?:{LETTER}{TEXT})+\)")  # (A) red, (B) blue
SENTENCE_END = re.compile(r"(?<!\bvs)(?<!\be\.g)[.!?;](?=\s|\Z)|\n|\Z")

# how a text opens: with all of an option, "C. blue." and "No, it is", or with C alone on a line ...
OPENING = any_pattern(rf"\(?{LETTER}?{TEXT}\)?(?=[.,;:!\n]|\Z)", rf"\(?{LETTER}\)?(?=[.:]?\n)")
# ... and goes on to others, "Blue, or maybe green"
AND_OTHERS = any_pattern(
    rf", (?:(?:and|or|then|maybe|perhaps|also|an?|the) ){{0,3}}{RUN}(?=[.,;:!\n]|\Z)"
)
# ... or with a letter, as a mark, "C. It is", or as the subject, "C is"
LEADING = any_pattern(rf"(?:{NOUN} )?\(?{LETTER}(?P<mark>[).:,]{{1,2}})?(?=\s)")


def without_denied(said):
    """A text without the options that it denies, and what it said of them before."""
    denied = {}  # sign: where it was denied last
    for m in DENIED.finditer(said):
        denied |= dict.fromkeys(signs_in(m[0]), m.end())
    said = re.sub(ANY, lambda m: m[0] if m.start() >= denied.get(m[0], 0) else "", said)
    return NOT_SO.sub(" not", said)


def without_lists(said):
    """A text without the items of its lists, A, B, ..., each to the end of its sentence."""
    said = LISTED.sub(" ", said)
    items = list(ITEM.finditer(said))
    listed = []
    for run in re.finditer("Ⓐ[Ⓑ-Ⓩ]+", "".join(item[1] or item[2] for item in items)):
        in_order = len(os.path.commonprefix([run[0], "ⒶⒷⒸⒹⒺⒻⒼⒽⒾⒿ"]))
        listed += items[run.start() :][: in_order if in_order > 1 else 0]  # a lone "A." is no list
    kept, end = [], 0
    for item, after in itertools.zip_longest(listed, listed[1:]):
        kept.append(said[end : item.start()])
        end = SENTENCE_END.search(said, item.end(), after.start() if after else len(said)).start()
    return "".join([*kept, said[end:]])


def without_passing(told):
    """A text without what it names in passing."""
    return COMPARED.sub(" ", PLACE.sub(" ", REASON.sub(" ", told)))


# --------------------------------------------------------------------------------------------------
# letters: which option does a text choose? Each rule takes a text with signs, and returns the part
# whose signs it reads


def find_letter(text, options, finished=True):
    """(the letter of `options` {letter: text} that a text chooses, the rule that found it).

    The rules and their order stand in `extract_answer`; (None, "none") if none finds one.
    """
    text = plain(text)
    for name, rule in (("letter", nothing_but_a_letter), ("option text", nothing_but_an_option)):
        letter = rule(text, options)
        if letter:
            return letter, name
    signs = marked(text, options)
    said = without_denied(WONDERED.sub(" ", QUESTION.sub(" ", signs)))
    *taken_back, at_last = TAKEN_BACK.split(said)
    if taken_back:
        if IT_IS.search(at_last) or any(only(rule(at_last)) for _, rule in FIRM_RULES):
            said = at_last
    # what is refused is not said, and a text that refuses names options in passing
    told, refusals = REFUSED.subn(" ", said)
    told = without_lists(told)
    rules = FIRM_RULES if refusals else FIRM_RULES + WEAK_RULES
    if not finished:
        rules = (("declared", declared), ("opening", opening))
    for name, rule in rules:
        found = rule(told)
        letter = only(found)
        if letter in options:
            return letter, name
        if rule is declared and found and not letter:  # two that are declared choose none
            return None, "none"
        if letter:  # a number that is no option, but perhaps the value of one
            break
    plainly = finished and not refusals and not DENIED.search(signs)
    letter = None
    if plainly:
        text = QUESTION.sub(" ", text)
        if not signs_in(told.replace(OTHER_NUMBER, "")):
            letter = option_of_value(text, options)
        if letter is None and not taken_back and not signs_in(signs, LETTER):
            letter = option_alone(text, options)
    return (letter, "value") if letter else (None, "none")


def nothing_but_a_letter(text, options):
    letters = "".join(options)
    m = re.fullmatch(rf"[\W_]*([{letters}{letters.lower()}])[\W_]*", text)
    return m[1].upper() if m else None


def nothing_but_an_option(text, options):
    """The letter of the one option whose text, or whose value, is all that is said."""
    # with its own letter, which another option may have for its text: "D. E"
    m = re.match(r"\(?([A-Za-z])(?:[.:)]|\b) ?(?=\S)", text)
    if m and (option := options.get(m[1].upper())) and same_text(text[m.end() :], option):
        return m[1].upper()
    # "Blue." and "blue" are one; so are 10 and "10 cm", unless another option says just that
    for same in (same_text, same_value):
        alike = [letter for letter, option in options.items() if option and same(text, option)]
        if alike:
            return alike[0] if len(alike) == 1 else None
    return None


UNIT_AFTER = re.compile(r" ?[a-z°%]*(?:\^\d|/[a-z]+)?")  # " cm^2"


def option_of_value(text, options):
    """The letter of the one option that is the only value a text states; None if there is none."""
    text = text.lower()
    if UNKNOWN.search(text):
        return None
    # with the word after it: 20 mm is not 20 cm
    stated = {m[1] + UNIT_AFTER.match(text, m.end())[0] for m in STATED.finditer(text)}
    value = stated.pop() if len(stated) == 1 else ""
    alike = [letter for letter, option in options.items() if value and same_value(value, option)]
    return alike[0] if len(alike) == 1 else None


def option_alone(text, options):
    """The letter of the option that is all that is declared or, else, all of the last line."""
    *before, line = text.strip().rsplit("\n", 2)[-2:]
    if before and (NUMBERS.fullmatch(bare_value(before[0])) or STEP.match(line)):
        line = ""  # one of a list
    said = declared_text(text) or line
    return nothing_but_an_option(said, options) if said else None


def last_line(told):
    return told.rpartition("\n")[2]


def alone_on_the_last_line(told):
    line = last_line(told)
    return "" if re.search(r"[^\W_]", line) else line


def declared(told):
    found = DECLARED.findall(SUPPOSED.sub(" ", told))
    firmly = [part for part in found if not HALF_DECLARED.search(part)]
    # the last one: a model may name an option, and think better of it
    return [*found, *firmly][-1] if found else ""


def opening(told):
    told = told.lstrip(" -\n")
    m = OPENING.match(told)
    if not m:
        return ""
    others = AND_OTHERS.match(told, m.end())
    return m[0] + (others[0] if others else "")


def concluded(told):
    _, *conclusions = CONCLUSION.split(last_line(told))
    return without_passing(conclusions[-1]) if conclusions else ""


def leading(told):
    m = LEADING.match(told.lstrip(" -\n"))
    if not m:
        return ""
    # unless it goes on to other options; a letter with a mark, unless to other letters
    rest = THING.sub(" ", without_passing(told))
    return signs_in(rest, LETTER) if m["mark"] else rest


def named(told):
    # a letter on the last line, where a conclusion stands; else whatever stands anywhere
    line, part = without_passing(last_line(told)), without_passing(told)
    if signs_in(line, LETTER) and only(line.replace(OTHER_NUMBER, "")):
        return line.replace(OTHER_NUMBER, "")
    # several letters beside texts are names of things
    letters = signs_in(part, LETTER)
    return part if not letters or only(letters) else signs_in(part, TEXT)


FIRM_RULES = (
    ("last line", alone_on_the_last_line),
    ("declared", declared),
    ("opening", opening),
    ("conclusion", concluded),
)
WEAK_RULES = (
    ("leading", leading),
    ("named", named),
)


# --------------------------------------------------------------------------------------------------
# other kinds of answer

# 12, 1,234.5, .5, each with a minus that is a sign and not a dash: "x-1" and "1-2" hold no -1 or
# -2. Not a part of another number: "2√3", "10^3", "3/4", "12:30" and "2 million" hold none
NUMBER = (
    r"(?>(?:(?<![A-Za-z0-9_.^)])-)?(?<![A-Za-z0-9_.^√])(?<!\d[:/])"
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


def digits(word):
    """The number that a match of COUNTED is, or as it stands."""
    return COUNT_WORDS.get(word[0].replace(" ", "-"), word[0])


def find_number(text, finished=True):
    """The number that a text gives, digits or a word up to 99, without thousands separators.

    The last that is declared, "the answer is 8"; else one alone on the first line; else, of the
    last sentence with a number, or of what it concludes, the last that is stated, "it is 10.4 for 3
    of them", or the last of all. A refusal gives none.
    """

    text = COUNTED.sub(digits, plain(text).lower())
    # an expression is its value
    bare = bare_value(text) if len(text) <= LONGEST_VALUE else ""
    if re.search(r"[√π^/*\\]", bare):
        value = latex_value(bare)
        if value is not None:
            return f"{value:.15g}"
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


# --------------------------------------------------------------------------------------------------
# the whole rule

# "**Final Answer:**\n\n$$12$$" declares 12$$
DECLARED_TEXT = re.compile(
    r"(?:\banswer\W{0,2}\s*(?:is\s*+[:：]?|[:：])|答案\s*(?:[是为]\s*+[:：]?|[:：]))"
    r"(?:\s|[*$`]|\\[\[(])*+(.*)",
    re.IGNORECASE,
)
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


def declared_text(text):
    """What a text last declares to be the answer, to the end of the line; "" for none."""
    # the last one, as of tags and boxes: what was declared before may have been taken back
    return "".join(DECLARED_TEXT.findall(text)[-1:]).strip()


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
    later = DECLARED_NUMBER.findall(plain(after_box).lower())
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


def lettered(options):
    """{letter: text} of a list of option texts; None if there are none."""
    return dict(zip(string.ascii_uppercase, without_letters(options))) or None


def by_letter(options):
    """{letter: text} of a row's options: a JSONL row has a list, a benchmark's row its letters."""
    return lettered(options) if isinstance(options, list) else options


def without_letters(options):
    """Option texts without their letters, where all have them in order: "B. blue" is "blue"."""
    texts = []
    # no letters beyond Z: such a list is compared by its texts alone
    if len(options) > 26:
        return options
    # all or none: of options like "A. Smith" and "blue" the first keeps its initial
    for i, option in enumerate(options):
        letter = chr(ord("A") + i)
        found = re.match(rf"\s*\(?(?:{letter}|{letter.lower()})[).．、:]\s*(.*)", option, re.DOTALL)
        if not found:
            return options
        texts.append(found[1])
    return texts


def letter_of(text):
    """The option letter that an answer starts with, as in "B", "(b)", "B. 12 cm", or None."""
    # a letter with a mark after it, or alone: "Apples" is no A
    m = re.match(r"\s*\(?([A-Za-z])(?:[.:)]|\s*$)", text)
    return m[1].upper() if m else None


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
    word = COUNT_WORDS.get(word, word)
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

    text = COUNTED.sub(digits, plain(answer).lower())
    said = without_denied(NUMBERS.sub(sign, text))
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


def option_named(text, options):
    """The letter of the option that a gold answer names by its letter or its text; None if none."""
    letter = letter_of(text)
    if letter in options and re.fullmatch(r"\W*[A-Za-z]\W*", text):
        return letter
    same = [letter for letter, option in options.items() if same_text(option, text)]
    # "C. elegans" is the text of one and names no C
    if letter in options and len(same) != 1:
        return letter
    # a bare number may be the place of an option
    place = text.strip()
    is_place = place.isdecimal() and len(place) <= 2 and int(place) <= len(options)
    if not same and not is_place:  # "7cm" for "7 cm"
        same = [letter for letter, option in options.items() if same_value(option, text)]
    return same[0] if len(same) == 1 else None


# --------------------------------------------------------------------------------------------------
# how is a new model read?


def main(file):
    """Print what is read from each row, by which rule, and what rules agree with the gold answers.

    A line is "=" where they agree, "-" where nothing is read and "!" where something else is.
    """
    from tables import read_json_rows  # for this command alone: tables.py builds on this file

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
