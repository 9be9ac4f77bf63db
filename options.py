"""Which option does a text choose?

`find_letter` puts a sign in place of each mention of an option, leaves out what is denied, asked,
listed or taken back, and lets rules look for the one option that is left, from the surest rule on.
"""

import itertools
import os
import re
import string
from collections import defaultdict

from phrases import (
    CLAUSE,
    CONCLUSION,
    IN_CLAUSE,
    NO,
    REASON,
    REFUSED,
    SENTENCE_END,
    UNTIL_BUT,
    any_of,
    any_pattern,
    declared_text,
)
from stated import COUNT_WORDS, GOES_ON, NO_BOUND, NUMBERS, STATED, TENS, UNKNOWN, WORDS
from values import bare_value, plain, same_text, same_value

# --------------------------------------------------------------------------------------------------
# options as signs, so that no rule need know what an option is called: from here on Ⓑ is the letter
# B, ⒝ the text of option B, (Ⓑ⒝) both, and all else are words

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
# where options are numbers, one that is none of them has a sign, too, but for a step's
OTHER_NUMBER = "⒵"
STEP = re.compile(r"^[^\w\n]*(?:step )?\d{1,2}[.):] (?=\w)|\bstep \d+", re.I | re.M)

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

# of two that are declared, the other one counts: "C is also correct", "C is plausible"
HALF_DECLARED = any_pattern(rf"\balso\b|\b(?:plausible|likely)(?: one| {NOUN})?\Z")

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

# what names an option in passing: a place in the picture, "in row B", a thing, "point B",
# or what the one that is meant is compared with
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
# a row's options, and the one that its gold answer names


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


OPTIONS_FOLLOW = re.compile(r"\b(?:options|choices)\s*:", re.IGNORECASE)
OPTION_MARKS = (  # small letters last, for a tie: in a question they may be parts of a picture
    r"\(([A-H])\)\s*",
    r"(?<![A-Za-z])([A-H])\.\s+",
    r"(?<![A-Za-z])([A-H]):\s+",
    r"\(([a-h])\)\s*",
)


def hidden_options(text):
    """{letter: text} of options written into a question; {} if there are none.

    As "(A) x (B) y", "A. x\\nB. y", "A: x, B: y" or "(a) x (b) y"; after "Options:" where that
    stands in the question.
    """
    for heading in reversed(list(OPTIONS_FOLLOW.finditer(text))):
        listed = text[heading.end() :]
        # of one style, that of the first mark: "A: (A) and (B), B: only (B)"
        marks = [mark for style in OPTION_MARKS if (mark := re.search(style, listed))]
        if marks:
            style = min(marks, key=re.Match.start).re
            run = max(runs_of(style, listed), key=len, default=[])
            if len(run) > 1:
                return texts_between(run, listed)
    # else the longest, of these the last: letters of the question itself come before
    found = [run for style in OPTION_MARKS for run in reversed(runs_of(style, text))]
    run = max(found, key=len, default=[])
    # a lone "(A)" may be a point of the figure that the question is about
    return texts_between(run, text) if len(run) > 1 else {}


def runs_of(style, text):
    """The runs of marks A, B, C, ... in a text, one for each A that it has."""
    runs = []
    waiting = defaultdict(list)  # {letter: the runs that go on with it}
    for mark in re.finditer(style, text):
        letter = mark[1].upper()
        longer = waiting.pop(letter, [])
        if letter == "A":
            longer.append([])
            runs += longer
        for run in longer:
            run.append(mark)
        waiting[chr(ord(letter) + 1)] += longer
    return runs


def texts_between(run, text):
    """{letter: text}: an option ends where the next one begins, the last with its line."""
    texts = [text[a.end() : b.start()] for a, b in zip(run, run[1:])]
    texts.append(text[run[-1].end() :].strip().partition("\n")[0])
    letters = [mark[1].upper() for mark in run]
    return {letter: option.strip(" ,;\n") for letter, option in zip(letters, texts)}


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
