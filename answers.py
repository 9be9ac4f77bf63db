"""What did it say, and is that right? One rule reads every model's answer, tagged or not; it never guesses."""

import math
import re
import string

SPANS = re.compile(
    r"<(latent|parser|observation)>.*?</\1>|<abs_vis_token>.*?</abs_vis_token>", re.DOTALL
)
DECLARED = re.compile(r"answer\s*(?:is|:)\s*(.+)", re.IGNORECASE)
NUMBER = re.compile(
    r"(?:(?<![\w.^)])-)?(?<![\w.^])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.^])-?\.\d+"
)
COUNT_WORDS = {
    w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten".split())
}


def boxed(text):
    r"""The content of the last balanced \boxed{...}, or None."""
    for at in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i in range(at, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1", text[at:i])
    return None


def tagged(text):
    """(what follows the last </think>, the content of its last <answer> or box or None, how it was found)."""
    open_think = text.rfind("<think>") > text.rfind("</think>")
    text = SPANS.sub(
        " ", text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
    )
    _, tag, inside = text.rpartition("<answer>")
    inside = inside.split("</answer>")[0]
    box = boxed(inside)
    if tag:
        return text, (inside if box is None else box).strip(), "answer"
    if box is not None:
        return text, box.strip(), "boxed"
    return text, None, "truncated" if open_think else ""


def find_letter(text, options):
    """(the letter of `options` {letter: text} that a text chooses, how it was found), or (None, "none")."""
    capital = f"[{''.join(options)}]"
    either = f"[{''.join(options)}{''.join(options).lower()}]"
    article = r"(?!A\s+[a-z])"  # "A dog" chooses nothing

    def only(letters):
        found = {x.upper() for x in letters}
        return found.pop() if len(found) == 1 else None

    if m := re.fullmatch(rf"[\s*_(\[]*({either})[\s*_)\].:,]*", text):
        return m[1].upper(), "letter"
    if letter := only(k for k, v in options.items() if v and normalise(v) == normalise(text)):
        return letter, "option text"
    declares = (
        r"(?i:\b(?:answer|option|choice)\b[\s*_]*(?:is|:)[\s*_:(\[]*(?:option\s+)?[(*]*)(?!a\s+\w)"
    )
    if said := re.findall(rf"{declares}({either})(?![\w'])", text):
        return said[-1].upper(), "declared"
    last = ([line for line in text.splitlines() if line.strip()] or [""])[-1]
    bare = rf"(?<![\w'])({article}{capital})(?![\w'])"
    if letter := only(re.findall(rf"\(({either})\)", last)) or only(re.findall(bare, last)):
        return letter, "last line"
    if letter := only(re.findall(rf"\(({either})\)", text)):
        return letter, "(X)"
    if m := re.match(rf"\s*\(?({either})[).:](?:\s|$)", text):
        return m[1].upper(), "leading"
    if letter := only(re.findall(bare, text)):
        return letter, "stands alone"
    if len(text) <= 2 * sum(
        map(len, options.values())
    ):  # VLMEvalKit's cap: no option is read into a long answer
        held = [
            k
            for k, v in options.items()
            if (len(v) > 1 or v.isdigit())
            and re.search(rf"(?<!\w){re.escape(v.lower())}(?!\w)", text.lower())
        ]
        if len(held) == 1:
            return held[0], "contains option"
    return None, "none"


def find_kind(text, kind):
    """The last number, the last [list], or the yes or no of a text; None if it has none (or both)."""
    if kind == "number":
        text = re.sub(r"[a-z]+", lambda m: COUNT_WORDS.get(m[0], m[0]), text.lower())
        found = NUMBER.findall(text)
        return found[-1].replace(",", "") if found else None
    if kind == "list":
        found = re.findall(r"\[[^\[\]]*\]", text)
        return found[-1] if found else None
    found = set(re.findall(r"\b(?:yes|no)\b", text.lower()))
    return found.pop() if len(found) == 1 else None


def extract_answer(text, options=None, kind="text"):
    """(answer or None, how it was found) of a model's whole output.

    options {letter: text} (or a list of texts): the answer is a letter. Else `kind` says what it is: text, number, list, yesno.
    """
    text, inside, method = tagged(text)
    if method == "truncated":
        return None, method
    source = text if inside is None else inside
    if options:
        letter, how = find_letter(
            source, lettered(options) if isinstance(options, list) else options
        )
        return letter, method or how
    if kind != "text":
        return find_kind(source, kind), method or kind
    if method:
        return inside or None, method
    if declared := DECLARED.findall(text):
        return declared[-1].strip() or None, "declared"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1], "last line") if lines else (None, "empty")


def lettered(options):
    """{letter: text} of a list of option texts; None if there are none."""
    return dict(zip(string.ascii_uppercase, options)) or None


def normalise(text):
    """Lower case without outer punctuation, articles and extra spaces; numbers in one form (1,000.0 is 1000)."""
    whole = " ".join(text.lower().replace("$", " ").split())
    text = whole.rstrip(string.punctuation + " ").lstrip(
        string.punctuation.replace("-", "").replace(".", "") + " "
    )
    text = text or whole  # "<" and ">" are answers, -3 and .5 are numbers
    text = re.sub(r"^(?:the|an?) (?=\w)", "", text)
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return f"{float(plain):.15g}" if re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)", plain) else text


def letter_of(text):
    """The option letter that an answer starts with, as in "B", "(b)", "B. 12 cm", or None."""
    m = re.match(r"\s*\(?([A-Za-z])(?:\)|[.:)]|\s*$)", text)
    return m[1].upper() if m else None


def is_correct(answer, row):
    """Does an extracted answer agree with a row's gold answer, by letter or by option text where it has `options`?"""
    if answer is None:
        return False
    if normalise(answer) == normalise(row["answer"]):
        return True
    options = row.get("options") or []
    if not options:
        return False

    def index(text):
        if (letter := letter_of(text)) and ord(letter) - 65 < len(options):
            return ord(letter) - 65
        same = [i for i, option in enumerate(options) if normalise(option) == normalise(text)]
        return same[0] if len(same) == 1 else None

    return index(answer) is not None and index(answer) == index(row["answer"])


def check_letter(row):
    return row["extracted"] is not None and row["extracted"] == letter_of(row["answer"])


def check_yesno(row):
    return row["extracted"] == row["answer"].strip().lower()


def levenshtein(a, b):
    """Edit distance of two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def latex_value(text):
    r"""The number that a LaTeX expression of + - * / ^ \frac \sqrt \pi stands for; None for anything else."""
    text = (
        text.replace("\\dfrac", "\\frac")
        .replace("\\tfrac", "\\frac")
        .replace("\\times", "*")
        .replace("\\cdot", "*")
    )
    text = re.sub(
        r"\\(?:left|right|,|;|!|\s)|\s|\$|(?<=\d),(?=\d{3}(?!\d))",
        "",
        text.replace("\\div", "/").replace("π", "\\pi"),
    )
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    tokens = re.findall(r"\d+\.?\d*|\.\d+|\\(?:frac|sqrt|pi)|[-+*/^(){}\[\]]", text, re.ASCII)
    if "".join(tokens) != text or not 0 < len(tokens) <= 100:
        return None
    tokens.append("")

    def take(expected):
        if tokens[0] != expected:
            raise ValueError(f"{expected!r} is missing")
        tokens.pop(0)

    def total():
        value = product()
        while tokens[0] in ("+", "-"):
            value += product() if tokens.pop(0) == "+" else -product()
        return value

    def product():
        value = power()
        while tokens[0] in ("*", "/") or tokens[0] and tokens[0] not in "+-)}]^":
            divide = tokens[0] == "/"
            if tokens[0] in ("*", "/"):
                tokens.pop(0)
            value = value / power() if divide else value * power()
        return value

    def power():
        if tokens[0] == "-":
            tokens.pop(0)
            return -power()
        value = atom()
        if tokens[0] == "^":
            tokens.pop(0)
            value = math.pow(value, power())
        return value

    def group(left, right):
        take(left)
        value = total()
        take(right)
        return value

    def atom():
        if tokens[0] == "(" or tokens[0] == "{":
            return group(tokens[0], {"(": ")", "{": "}"}[tokens[0]])
        token = tokens.pop(0)
        if token == "\\pi":
            return math.pi
        if token == "\\frac":
            return group("{", "}") / group("{", "}")
        if token == "\\sqrt":
            degree = group("[", "]") if tokens[0] == "[" else 2
            return math.pow(atom(), 1 / degree)
        return float(token)

    try:
        value = total()
        take("")
    except (
        ValueError,
        ArithmeticError,
        RecursionError,
    ):  # not an expression, or one without a value
        return None
    return value if math.isfinite(value) else None


def math_equal(a, b):
    """Equal as strings without spaces and outer punctuation, or as values rounded to two decimals (MathVision)."""
    plain = lambda s: re.sub(r"\s|\\[,;! ]", "", s).strip("$.").lower()  # noqa: E731
    if plain(a) == plain(b):
        return True
    x, y = latex_value(a.strip(" .")), latex_value(b.strip(" ."))
    return x is not None and y is not None and round(x, 2) == round(y, 2)


def extract_final(text):
    """What a reader of the answer sees: the tagged answer, else the text without its reasoning."""
    text, inside, _ = tagged(text)
    return (text if inside is None else inside).strip()
