"""Are two short texts one value?

Texts as their reader sees them, without layout, and what stands in them: words and numbers in one
form, units that may be left out, and the number that a LaTeX expression is.
"""

import math
import re
import string
import unicodedata
from functools import lru_cache

# --------------------------------------------------------------------------------------------------
# a text as its reader sees it

# full-width forms of ASCII, and what Chinese and typesetters write for a sign of ASCII
UNICODE = {0xFF01 + i: 0x21 + i for i in range(94)}
UNICODE |= str.maketrans("−–‐‑﹣∶“”‘’【】\u3000\xa0", "-----:\"\"''[]  ")
UNICODE |= str.maketrans({"。": ". ", "、": ", ", "⁰": "°", "º": "°"})
# 10²³ is 10^23; a lone ⁰ is a degree, a lone ¹ the mark of a footnote
SUPERSCRIPTS = re.compile("⁻?[⁰¹²³⁴-⁹]{2,}|⁻[⁰¹²³⁴-⁹]|[²³⁴-⁹]")
OF_SUPERSCRIPT = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
UNICODE |= {  # ½ and the like
    n: " " + unicodedata.normalize("NFKC", chr(n)).replace("⁄", "/")
    for n in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))
}
# letters in circles and brackets, which in options.py are the signs of options and nothing else
UNICODE |= {ord(first) + i: ord("A") + i for first in "Ⓐⓐ⒜" for i in range(26)}
# what is not seen: zero-width spaces and joiners, byte order marks, soft hyphens
UNICODE |= dict.fromkeys([0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0xAD])

WRAPPED = r"\\(?:text|math)(?:rm|bf|it|sf|tt)? ?\{([^{}]*)\}"  # \text{B}, \mathbf{B}
MARKUP = r"`{3,}\w*|<[a-z]\w+>|</\w+>|<\|\w+\|>"  # fences, tags, a chat template's tokens
LAYOUT = [
    (re.compile(pattern, re.IGNORECASE), seen)
    for pattern, seen in (
        (r"<<|>>", " "),  # before the tags: "<<blue>>" holds none
        (MARKUP, "\n"),
        (WRAPPED, r"\1"),
        (r"\\sqrt ?\{ ?(\w+) ?\}", r"√\1"),
        (r"\\sqrt ?(?=\d)|(?<![a-z\\])sqrt ?(?=\()", "√"),
        (r"(?<=-)\\?\$(?=\d)", ""),  # -$5
        (r"(?<=\d)\\[dt]?frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}", r" \1/\2"),  # three and a half
        (r"\\[dt]?frac ?\{ ?([\w.√]+) ?\} ?\{ ?([\w.√]+) ?\}", r"\1/\2"),
        (r"\\(?:left|right)(?![a-z])", ""),
        (r"\\pi(?![a-z])", "π"),
        (r"\\geq?(?:slant)?(?![a-z])", "≥"),
        (r"\\leq?(?:slant)?(?![a-z])", "≤"),
        (r"\\neq?(?![a-z])|(?<![\d)])!=", "≠"),
        (r"\\infty(?![a-z])", "∞"),
        (r">=", "≥"),
        (r"<=", "≤"),
        (r"\\pm(?![a-z])", "±"),
        (r"\\times(?![a-z])", "×"),
        (r"\\approx(?![a-z])", "≈"),
        (r"\^ ?\{?\\circ\}?|\\degree", "°"),
        (r"\{,\}", ","),
        (r"\\[()\[\],;:! ]|\\q?quad|\\?\$|[~`#]", " "),
        (r"(?<![\d)])\*+|\*+(?![\d(*])", " "),  # **bold**; but 2*3 is a product
        (r"\\([%&])", r"\1"),
        (r"[^\S\n]+", " "),
        (r"\s*\n\s*", "\n"),
    )
]


def as_seen(text):
    """A text with one code for each character: é is one, whether as one or as e and an accent."""
    text = SUPERSCRIPTS.sub(lambda m: "^" + m[0].translate(OF_SUPERSCRIPT), text)
    return unicodedata.normalize("NFC", text).translate(UNICODE)


def plain(text):
    r"""A text without its layout: "**Answer:** $\text{Ｂ}$" is "Answer: B"."""
    text = as_seen(text)
    for pattern, seen in LAYOUT:
        text = pattern.sub(seen, text)
    return text.strip()


# --------------------------------------------------------------------------------------------------
# one form of what is equal

# a number with such a word after it is part of another
LARGE = "(?:hundred|thousand|million|billion|dozen)s?"

# a gold answer is read once, and what several samples say: a tenth of the toy's sampling
cached = lru_cache(1000)

FRACTIONS = "halves|thirds|quarters|fifths|sixths|eighths|tenths|hundredths"
# the unit of a number: a word or a sign, perhaps with a power; "5 squared" has none
NO_UNIT = rf"or|and|to|pi|is|not|plus|minus|over|mod|squared|cubed|factorial|root|{FRACTIONS}"
UNIT = rf"(?:(?!(?:{NO_UNIT}|{LARGE})\b)[a-z]{{2,}}|[mgshl])(?:\^\{{?\d\}}?)?"


@cached
def normalise(text):
    """Lower case without outer punctuation, articles and extra spaces; numbers in one form.

    "The  Blue one." is "blue one", "1,000.0" is "1000".
    """
    # $ is a price or the edge of a formula; neither changes a value
    whole = " ".join(as_seen(text).lower().replace("$", " ").split())
    before = string.punctuation.replace("-", "").replace(".", "")  # -3 and .5 are numbers
    bare = whole.rstrip(string.punctuation + " ").lstrip(before + " ")
    text = bare or whole  # "<" and ">" are answers
    text = re.sub(r"^(?:the|an?) (?=\w)", "", text)
    # 1,000 and 1000 are one number
    digits = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    if re.fullmatch(r"-?(?:\d+(?:\.\d*)?|\.\d+)", digits):
        # 1000.0, 1000. and 1000 become one text; 15 digits are what a float holds for sure
        return f"{float(digits):.15g}"
    return text


def same_text(a, b):
    return normalise(a) == normalise(b)


METRIC = re.compile(r"\b(square |cubic )?(centi|milli|kilo)?(met(?:er|re)|gram|lit(?:er|re))s?\b")


def symbol(unit):
    """The symbol of a metric unit's name: "square centimeters" is "cm^2"."""
    power = {"square ": "^2", "cubic ": "^3"}.get(unit[1], "")
    return (unit[2] or "")[:1] + unit[3][0] + power


@cached
def form_of(text):
    """A value or an equation in one form: "X = 3 1/2 degrees" is "x=(3+1/2)°"."""
    text = re.sub(r" ?degrees?\b", "°", plain(text).lower())
    text = METRIC.sub(symbol, text)
    text = re.sub(r"(?<![\d./])(\d+) (\d+/\d+)\b", r"(\1+\2)", text)  # "3 1/2"
    text = re.sub(r" ?([^a-z ]) ?", r"\1", text)
    return without_dots(re.sub(r"\^\{(\w+)\}", r"^\1", text))


def without_dots(text):
    """A text without the spaces and full stops around it; but .5 is a number."""
    text = text.rstrip(" .")
    bare = text.lstrip(" .")
    return "." + bare if re.match(r" *\.\d", text) else bare


@cached
def value_of(text):
    """A value in one form: "x = 1 : 2" is "1:2", and so is "3 : 6 = 1 : 2"."""
    # two equations have no one value
    listed = text.count("=") > 1 and re.search(r"[,;](?!\d{3})|\b(?:or|and)\b", text)
    form = form_of(text)
    return form if listed else re.split("[=≈]", form)[-1]


def bare_value(text):
    """A value without unit, degree, percent and currency: "x = 60°" is "60", "6 units" is "6"."""
    return without_unit(value_of(text))


@cached
def without_unit(value):
    """A value that is in one form already, without unit, degree, percent and currency."""
    value = re.sub("°(?:[cf]$)?|%|^[€£¥₹]", "", value)
    return re.sub(rf"(?<=[\d.)}}π]) ?{UNIT}(?:[ /]{UNIT}){{0,2}}\.?$", "", value)


def same_value(a, b):
    """Is the short text `a` the value `b`? Units count where both have one: 10 m is not 10 cm."""
    if max(len(a), len(b)) > LONGEST_VALUE:
        return False
    x, y = value_of(a), value_of(b)
    forms = form_of(a), form_of(b)
    # "AB = CD" is not "EF = CD", nor "x + y = 5" "x - y = 5"; but "AB = 5" and "x = 5" are both 5
    if all("=" in form for form in forms):
        named = not any(re.search(r"[-+*/^×÷√]|\d[a-z]", form.split("=")[0]) for form in forms)
        if not named or latex_value(without_unit(x)) is None:
            x, y = forms
    pairs = {(x, y), (without_unit(x), y), (x, without_unit(y))}  # mostly one
    return any(equal_values(*pair) for pair in pairs)


def equal_values(x, y):
    if x == y:
        return True
    if re.fullmatch(r"\d+(?:-\d+)+|\d+/\d+/\d+", y):
        # what is asked for is a range, a score or a date, and no sum
        return re.sub(r"\b0+(?=\d)", "", x) == re.sub(r"\b0+(?=\d)", "", y)
    # a ratio is a fraction
    v, w = latex_value(x.replace(":", "/")), latex_value(y.replace(":", "/"))
    return v is not None and w is not None and math.isclose(v, w, rel_tol=1e-9)


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
        return without_dots(without_dots(re.sub(r"\s|\\[,;! ]", "", text)).strip("$")).lower()

    if bare(a) == bare(b):
        return True
    # 6.28 is right where 2\pi is: rounded, as the official script does
    x, y = latex_value(without_dots(a)), latex_value(without_dots(b))
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
    "√": r"\sqrt",
    "×": "*",
    "÷": "/",
}
# spaces, \left, \right, $ and thousands separators
LATEX_LAYOUT = re.compile(r"\\(?:left|right|,|;|!|\s)|\s|\$|(?<=\d),(?=\d{3}(?!\d))")
LATEX_TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\(?:frac|sqrt|pi)|[-+*/^(){}\[\]]", re.ASCII)
LONGEST_VALUE = 100  # characters
MOST_TOKENS = 100  # longer answers are no values, and nesting stays within Python's own stack


@cached
def latex_value(text):
    r"""The number that an expression of + - * / ^ \frac \sqrt \pi is; None for anything else."""
    for name, synonym in LATEX_SYNONYMS.items():
        text = text.replace(name, synonym)
    text = LATEX_LAYOUT.sub("", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)  # \frac12 is a half
    # 1\frac{3}{4} is no product
    text = re.sub(r"(?<![\w.)}^])(\d+)(\\frac\{\d+\}\{\d+\})(?!\^)", r"(\1+\2)", text)
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
    power   = ("-" | "+") power | atom ["^" power]            -2^2 is -4, 2^3^2 is 2^9
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
        if self.next_is("-", "+"):
            return -self.power() if self.take() == "-" else self.power()
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
