"""What is wrong with an example? Its form, its parser texts, its auxiliary images.

Each check raises Reject(reason, number, detail): the number is what a threshold was held against.
"""

import re
import unicodedata
from collections import Counter
from itertools import pairwise

from PIL import ImageStat

from answers import extract_answer, is_correct
from data import TAGS, names_no_option, reserved_in, response_fault, strip_latents, strip_parser
from duplicates import largest_difference
from resume import Reject
from values import normalise

WHOLE = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
PARSER = re.compile(r"<parser>(.*?)</parser>", re.DOTALL)


def check_example(row):
    """The form that data.load_examples demands, on one row, and that no field is empty."""
    # first, since all that follows counts and searches in texts
    check_types(row)
    for field in ("question", "answer", "images"):
        if not row[field]:
            raise Reject(f"{field} is empty")
    if len(row.get("options", [])) > 26:
        raise Reject("more options than letters", len(row["options"]))
    if names_no_option(row):
        raise Reject("answer is none of the options", None, row["answer"])
    field, token = reserved_in(row)
    if token:  # in a text it would become a special token: an image or a latent where none is
        raise Reject("reserved token in the text", None, f"{token} in {field}")
    fault, number, said = response_fault(row)
    if fault:
        raise Reject(fault, number, said)
    if not WHOLE.fullmatch(row["response"].strip()):
        raise Reject("text before <think> or after </answer>")


def check_types(row):
    """Texts are texts, and lists are lists of texts."""
    for field in ("id", "question", "answer", "response"):
        if not isinstance(row.get(field), str):
            raise wrong_type(row, field, "str")
    # options may be missing, but not be something else
    for field in ["images", "aux_images"] + ["options"] * ("options" in row):
        value = row.get(field)
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise wrong_type(row, field, "list")


def wrong_type(row, field, expected):
    """The Reject of a field of another type."""
    detail = f"{field}: {row.get(field)!r}, expected {expected}"
    return Reject("field of another type", None, detail)


def check_gold(row):
    """The response's answer is the gold answer."""
    # read as a text: is_correct takes a letter as well as an option in words
    answer, _ = extract_answer(row["response"])
    if not is_correct(answer, row):
        detail = f"{answer!r}, gold {row['answer']!r}"
        raise Reject("answer differs from the gold answer", None, detail)


def check_reasoned(row):
    """Something is said between <think> and </think>, beside spans and what they mean."""
    thought = row["response"].partition("<think>")[2].partition("</think>")[0]
    if not strip_parser(strip_latents(thought)).strip():
        raise Reject("no reasoning")


def check_described(row):
    """A parser text follows each latent span and says what it means."""
    # the tags alone: other text may stand between the span and its parser text
    tags = "".join(TAGS.findall(row["response"]))
    undescribed = len(row["aux_images"]) - tags.count("<latent></latent><parser>")
    if undescribed > 0:
        raise Reject("span without a parser text after it", undescribed, "--need_parser=0 keeps it")


def parser_texts(row):
    """What stands inside each <parser> ... </parser> of a response."""
    return PARSER.findall(row["response"])


def check_parser(text, row, words_min, words_max, repeats):
    """Length and coherence of one parser text.

    words_min, words_max: how many words it may have; repeats: the Jaccard overlap of its words with
    the question's from which it only repeats the question.
    """
    check_length(text, words_min, words_max)
    check_lines(text)
    question = row["question"]
    # digits alone have no script that the other could miss
    if script(question) and script(text) and script(text) != script(question):
        scripts = f"{script(text)}, {script(question)}"
        raise Reject("parser in another script than the question", None, scripts)
    # what the question says already is no reading of a picture
    said, asked = words(text), words(question)
    overlap = len(said & asked) / max(1, len(said | asked))
    if overlap >= repeats:
        raise Reject("parser repeats the question", round(overlap, 3), text)

    # the answer's word alone is no fault, since a picture that helps often shows it; a text that is
    # the answer, or declares it as one, is
    answer, method = extract_answer(text)
    is_all = normalise(text) == normalise(row["answer"])
    if is_all or (method in ("declared", "boxed") and is_correct(answer, row)):
        raise Reject("parser states the answer", None, text)


def check_length(text, words_min, words_max):
    """The number of a parser text's words lies within the bounds."""
    count = len(text.split())
    if script(text) == "CJK":  # written without spaces; about two characters a word
        count = len(re.findall(r"\w", text)) // 2
    if count < words_min:
        raise Reject("parser too short", count, text)
    # without the text, which would fill the file of rejects
    if count > words_max:
        raise Reject("parser too long", count)


def check_lines(text):
    """No line or sentence of a parser text is empty or comes again."""
    lines = [line.strip() for line in text.strip().split("\n")]
    empty = sum(not line and not after for line, after in pairwise(lines))  # one parts paragraphs
    if empty:
        raise Reject("parser has empty lines", empty)
    # a model that runs in circles repeats a line, or a sentence within one
    lines = [line for line in re.split(r"\n|(?<=[.!?])\s+", "\n".join(lines)) if line]
    again = len(lines) - len(set(lines))
    if again:
        raise Reject("parser repeats lines", again)


def words(text):
    """The set of a text's words in lower case."""
    return set(re.findall(r"\w+", text.lower()))


SYMBOLS = re.compile(  # of formulas and figures, in a text of any script: ABC, x, theta
    r"(?<![A-Za-z])[A-Z]{1,3}(?![A-Za-z])|(?<![A-Za-z])[a-z](?![A-Za-z])"
    r"|(?<![\u0370-\u03ff])[\u0370-\u03ff](?![\u0370-\u03ff])"
)


def script(text):
    """The script of most letters of a text: LATIN, CJK, CYRILLIC ...; "" without letters."""
    text = SYMBOLS.sub("", text)
    # a letter's Unicode name begins with its script
    counts = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    if not counts:
        return ""
    name, _ = counts.most_common(1)[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA") else name  # Japanese mixes all three


def check_auxiliary(image, queries, blank, same_as_query):
    """An auxiliary image (RGB) shows something, and something else than the question's images.

    blank, same_as_query: grey levels of the standard deviation, and of the largest difference on a
    coarse grid, below which it does not.
    """
    # image models now and then return one flat colour
    deviation = max(ImageStat.Stat(image).stddev)  # of the liveliest channel
    if deviation < blank:
        raise Reject("auxiliary image is blank", round(deviation, 3))
    # an edit that changed nothing shows nothing that the question's image did not
    for query in queries:
        difference = largest_difference(image, query)
        if difference < same_as_query:
            raise Reject("auxiliary image is the query image", round(difference, 3))
