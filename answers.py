"""What did it say, and is that right?

One rule reads every model's answer, tagged or not, and it never guesses: a text that names no
answer has none. `extract_answer` reads; `is_correct` and the check_ functions compare with the
gold answer.
"""

import math
import re
import string

# what a model writes for itself: latents, what it read in them, and Monet's spans
SPANS = re.compile(
    r"<(latent|parser|observation)>.*?</\1>|<abs_vis_token>.*?</abs_vis_token>", re.DOTALL
)
DECLARED = re.compile(r"answer\s*(?:is|:)\s*(.+)", re.IGNORECASE)
# 12, 1,234.5, .5, each with a minus that is a sign and not a dash: "x-1" and "1-2" hold no -1 or -2
NUMBER = re.compile(
    r"(?:(?<![\w.^)])-)?(?<![\w.^])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.^])-?\.\d+"
)
WORDS = "zero one two three four five six seven eight nine ten"
COUNT_WORDS = {word: str(i) for i, word in enumerate(WORDS.split())}

# --------------------------------------------------------------------------------------------------
# tags: where in the output is the answer?


def boxed(text):
    r"""The content of the last balanced \boxed{...}, or None."""
    # models box intermediate values, too: the last box is the answer
    starts = [m.end() for m in re.finditer(r"\\boxed\s*\{", text)]
    for start in reversed(starts):  # a box that a cut-off output leaves open is none
        depth = 1
        for i in range(start, len(text)):
            if text[i] == "{":
                depth += 1
            elif text[i] == "}":
                depth -= 1
            if depth == 0:
                return re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1", text[start:i])
    return None


def tagged(text):
    """(what follows the last </think>, what its last <answer> or box holds, how that was found).

    How: "answer", "boxed"; or, with None before it, "truncated" (a thought that never ends) or "".
    """
    # an output that was cut off inside its thought says nothing yet
    still_thinking = text.rfind("<think>") > text.rfind("</think>")
    said = SPANS.sub(" ", text.rpartition("</think>")[2])
    # the last answer counts: models change their minds, and some forget to close the tag
    _, tag, inside = said.rpartition("<answer>")
    inside = inside.split("</answer>")[0]  # all of `said` where there is no tag
    box = boxed(inside)
    if tag and box is None:
        return said, inside.strip(), "answer"
    if box is not None:
        return said, box.strip(), "answer" if tag else "boxed"
    return said, None, "truncated" if still_thinking else ""


# --------------------------------------------------------------------------------------------------
# letters: which option does a text choose? Each rule takes (text, {letter: text of the option})


def find_letter(text, options):
    """(the letter of `options` {letter: text} that a text chooses, the rule that found it).

    The first rule that finds a letter decides; (None, "none") if none does. In this order:

    - letter: nothing but a letter is said. "B", "(b)", "**B**."
    - option text: nothing but the text of one option is said. "Blue."
    - declared: the last letter that is said to be the answer, option or choice. "The answer is B"
    - last line: the only letter in brackets on the last line, else the only one that stands alone
      there. "(A) is wrong.\\nSo (B)"
    - (X): the only letter in brackets anywhere. "(B) it is\\nbecause of the wall"
    - leading: a letter with a mark after it opens the text. "b. It is\\nthe blue one"
    - stands alone: the only capital that stands alone anywhere. "Take B,\\nsince it is blue"
    - contains option: the only option whose text a short answer holds. "It is a dark wood"
    """
    for name, rule in LETTER_RULES:
        letter = rule(text, options)
        if letter:
            return letter, name
    return None, "none"


def only(letters):
    """The one letter, as a capital, that all of `letters` are; None if there is no such letter."""
    # two letters choose nothing, and one that is named twice is one
    found = {letter.upper() for letter in letters}
    return found.pop() if len(found) == 1 else None


def either_case(options):
    """The pattern of one option letter, capital or small."""
    letters = "".join(options)
    return f"[{letters}{letters.lower()}]"


def in_brackets(text, options):
    """All letters in round brackets, as in "(B)"."""
    return re.findall(rf"\(({either_case(options)})\)", text)


def standing_alone(text, options):
    """All capitals that are words of their own. The article of "A dog" is none."""
    letters = "".join(options)
    return re.findall(rf"(?<![\w'])((?!A\s+[a-z])[{letters}])(?![\w'])", text)


def nothing_but_a_letter(text, options):
    m = re.fullmatch(rf"[\s*_(\[]*({either_case(options)})[\s*_)\].:,]*", text)
    return m[1].upper() if m else None


def nothing_but_an_option(text, options):
    # "Blue." and "blue" are one
    said = normalise(text)
    return only(k for k, option in options.items() if option and normalise(option) == said)


def declared_letter(text, options):
    noun = r"\b(?:answer|option|choice)\b"
    # with what Markdown and brackets put around it: "**Answer:** (B)"
    opening = r"[\s*_]*(?:is|:)[\s*_:(\[]*(?:option\s+)?[(*]*"
    not_an_article = r"(?!a\s+\w)"  # "the answer is a dog"
    # the last one counts: a model may name an option, and think better of it
    said = re.findall(
        rf"(?i:{noun}{opening}){not_an_article}({either_case(options)})(?![\w'])", text
    )
    return said[-1].upper() if said else None


def letter_of_last_line(text, options):
    # a conclusion stands at the end, whatever was weighed before it
    last = (lines_of(text) or [""])[-1]
    return only(in_brackets(last, options)) or only(standing_alone(last, options))


def letter_in_brackets(text, options):
    return only(in_brackets(text, options))


def leading_letter(text, options):
    # with a mark and a space, since "A dog" and "e.g." choose nothing
    m = re.match(rf"\s*\(?({either_case(options)})[).:](?:\s|$)", text)
    return m[1].upper() if m else None


def letter_that_stands_alone(text, options):
    return only(standing_alone(text, options))


def option_within(text, options):
    # VLMEvalKit's cap: no option is read into an answer twice as long as all of them
    if len(text) > 2 * sum(len(option) for option in options.values()):
        return None
    text = text.lower()
    # two options in one answer choose nothing
    held = []
    for letter, option in options.items():
        # whole words: "art" is not in "start"
        telling = len(option) > 1 or option.isdigit()  # "a" is in most sentences
        if telling and re.search(rf"(?<!\w){re.escape(option.lower())}(?!\w)", text):
            held.append(letter)
    return held[0] if len(held) == 1 else None


LETTER_RULES = (
    ("letter", nothing_but_a_letter),
    ("option text", nothing_but_an_option),
    ("declared", declared_letter),
    ("last line", letter_of_last_line),
    ("(X)", letter_in_brackets),
    ("leading", leading_letter),
    ("stands alone", letter_that_stands_alone),
    ("contains option", option_within),
)

# --------------------------------------------------------------------------------------------------
# other kinds of answer


def find_kind(text, kind):
    """The last number, last [list], or the yes or no of a text; None if it has none (or both)."""
    if kind == "number":
        return last_number(text)
    if kind == "list":
        lists = re.findall(r"\[[^\[\]]*\]", text)
        return lists[-1] if lists else None
    # "no" in a sentence that also says "yes" settles nothing
    words = set(re.findall(r"\b(?:yes|no)\b", text.lower()))
    return words.pop() if len(words) == 1 else None


def last_number(text):
    """The last number of a text, digits or a word up to ten, without thousands separators."""

    def digits(word):
        return COUNT_WORDS.get(word[0], word[0])

    # the last: a calculation ends in its result
    found = NUMBER.findall(re.sub(r"[a-z]+", digits, text.lower()))
    return found[-1].replace(",", "") if found else None


def lines_of(text):
    """The lines of a text that hold anything, without outer spaces."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line]


def extract_answer(text, options=None, kind="text"):
    """(answer or None, how it was found) of a model's whole output.

    options {letter: text} (or a list of texts): the answer is a letter. Else `kind` says what it
    is: text, number, list, yesno.
    """
    said, inside, tag = tagged(text)
    if tag == "truncated":
        return None, tag
    source = said if inside is None else inside
    if options:
        # a JSONL row has a list, a benchmark's row has its letters
        if isinstance(options, list):
            options = lettered(options)
        letter, rule = find_letter(source, options)
        return letter, tag or rule
    if kind != "text":  # a tag that holds no number is no number: what surrounds it is not read
        return find_kind(source, kind), tag or kind
    # an empty tag was meant as the answer, and says nothing
    if tag:
        return inside or None, tag
    # the last one, as of tags and boxes: what was declared before may have been taken back
    declared = DECLARED.findall(said)
    if declared:
        return declared[-1].strip() or None, "declared"
    # nothing is declared: the last line is what a reader would take
    lines = lines_of(said)
    if not lines:
        return None, "empty"
    return lines[-1], "last line"


def extract_final(text):
    """What a reader of the answer sees: the tagged answer, else the text without its reasoning."""
    said, inside, _ = tagged(text)
    return (said if inside is None else inside).strip()


def lettered(options):
    """{letter: text} of a list of option texts; None if there are none."""
    return dict(zip(string.ascii_uppercase, without_letters(options))) or None


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
    m = re.match(r"\s*\(?([A-Za-z])(?:\)|[.:)]|\s*$)", text)
    return m[1].upper() if m else None


# --------------------------------------------------------------------------------------------------
# is it right?


def normalise(text):
    """Lower case without outer punctuation, articles and extra spaces; numbers in one form.

    "The  Blue one." is "blue one", "1,000.0" is "1000".
    """
    # $ is a price or the edge of a formula; neither changes a value
    whole = " ".join(text.lower().replace("$", " ").split())
    before = string.punctuation.replace("-", "").replace(".", "")  # -3 and .5 are numbers
    bare = whole.rstrip(string.punctuation + " ").lstrip(before + " ")
    text = bare or whole  # "<" and ">" are answers
    text = re.sub(r"^(?:the|an?) (?=\w)", "", text)
    # 1,000 and 1000 are one number
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    if re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)", plain):
        # 1000.0, 1000. and 1000 become one text; 15 digits are what a float holds for sure
        return f"{float(plain):.15g}"
    return text


def is_correct(answer, row):
    """Does an extracted answer agree with a row's gold answer?

    By text, and where the row has `options` also by letter or by an option's text.
    """
    if answer is None:
        return False
    if normalise(answer) == normalise(row["answer"]):
        return True
    # the gold may be a letter or a text, and so may the answer: both become a place in the list
    options = row.get("options") or []
    options = without_letters(options)
    said = option_index(answer, options)
    return said is not None and said == option_index(row["answer"], options)


def option_index(text, options):
    """Which one of a list of options a text names, by letter or in words; None if unclear."""
    letter = letter_of(text)
    if letter:  # "E" of four options may still be the text of one
        place = string.ascii_uppercase.index(letter)
        if place < len(options):
            return place
    # an answer in words counts where just one option says so
    same = [i for i, option in enumerate(options) if normalise(option) == normalise(text)]
    return same[0] if len(same) == 1 else None


def check_letter(row):
    """Is the extracted letter the one that the gold answer starts with?"""
    return row["extracted"] is not None and row["extracted"] == letter_of(row["answer"])


def check_yesno(row):
    return row["extracted"] == row["answer"].strip().lower()


def levenshtein(a, b):
    """Edit distance of two strings."""
    above = list(range(len(b) + 1))  # of no letter of a to each beginning of b
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            replaced = above[j - 1] + (x != y)
            row.append(min(above[j] + 1, row[j - 1] + 1, replaced))
        above = row
    return above[-1]


def math_equal(a, b):
    """Equal as strings without spaces and outer punctuation, or as values of two decimals.

    As MathVision's own script compares them.
    """

    def bare(text):
        return re.sub(r"\s|\\[,;! ]", "", text).strip("$.").lower()

    if bare(a) == bare(b):
        return True
    # 6.28 is right where 2\pi is: rounded, as the official script does
    x, y = latex_value(a.strip(" .")), latex_value(b.strip(" ."))
    return x is not None and y is not None and round(x, 2) == round(y, 2)


# --------------------------------------------------------------------------------------------------
# the number that a LaTeX expression stands for

LATEX_SYNONYMS = {
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\times": "*",
    r"\cdot": "*",
    r"\div": "/",
    "π": r"\pi",
}
# spaces, \left, \right, $ and thousands separators
LATEX_LAYOUT = re.compile(r"\\(?:left|right|,|;|!|\s)|\s|\$|(?<=\d),(?=\d{3}(?!\d))")
LATEX_TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\(?:frac|sqrt|pi)|[-+*/^(){}\[\]]", re.ASCII)
MOST_TOKENS = 100  # longer answers are no values, and nesting stays within Python's own stack


def latex_value(text):
    r"""The number that an expression of + - * / ^ \frac \sqrt \pi is; None for anything else."""
    for name, plain in LATEX_SYNONYMS.items():
        text = text.replace(name, plain)
    text = LATEX_LAYOUT.sub("", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)  # \frac12 is a half
    tokens = LATEX_TOKEN.findall(text)
    # a sign that is no token: the text is no expression
    if "".join(tokens) != text or not 0 < len(tokens) <= MOST_TOKENS:
        return None
    try:
        value = LatexParser(tokens).whole()
    except (ValueError, ArithmeticError, RecursionError):
        return None  # not an expression, or one without a value, such as 1/0
    return value if math.isfinite(value) else None


class LatexParser:
    r"""Evaluates an expression by recursive descent: one method for each line of the grammar.

    sum     = product { ("+" | "-") product }
    product = power { ["*" | "/"] power }                     2\pi and 2(3+4) multiply
    power   = "-" power | atom ["^" power]                    -2^2 is -4, 2^3^2 is 2^9
    atom    = number | \pi | "(" sum ")" | "{" sum "}"
            | \frac "{" sum "}" "{" sum "}" | \sqrt ["[" sum "]"] atom

    Raises ValueError where the tokens do not follow it.
    """

    def __init__(self, tokens):
        self.tokens = [*tokens, ""]  # "" is the end

    def next_is(self, *tokens):
        return self.tokens[0] in tokens

    def take(self, expected=None):
        """The next token, which must be the expected one if one is named."""
        if expected is not None and not self.next_is(expected):
            raise ValueError(f"{expected!r} is missing")
        return self.tokens.pop(0)

    def whole(self):
        value = self.sum()
        # nothing may be left over: "2)" is no value
        self.take("")
        return value

    def sum(self):
        value = self.product()
        while self.next_is("+", "-"):
            if self.take() == "+":
                value += self.product()
            else:
                value -= self.product()
        return value

    def product(self):
        value = self.power()
        # only these end a product: whatever else comes next is one more factor
        while not self.next_is("+", "-", "^", ")", "}", "]", ""):
            sign = self.take() if self.next_is("*", "/") else "*"
            if sign == "/":
                value /= self.power()
            else:
                value *= self.power()
        return value

    def power(self):
        if self.next_is("-"):
            self.take()
            return -self.power()
        value = self.atom()
        if self.next_is("^"):
            self.take()
            # not **, by which a root of -1 is complex; such an expression has no value here
            value = math.pow(value, self.power())
        return value

    def atom(self):
        if self.next_is("("):
            return self.group("(", ")")
        if self.next_is("{"):
            return self.group("{", "}")
        token = self.take()
        if token == r"\pi":
            return math.pi
        if token == r"\frac":
            return self.group("{", "}") / self.group("{", "}")
        if token == r"\sqrt":
            degree = self.group("[", "]") if self.next_is("[") else 2
            return math.pow(self.atom(), 1 / degree)
        return float(token)

    def group(self, left, right):
        self.take(left)
        value = self.sum()
        self.take(right)
        return value
