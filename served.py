"""What does a served model answer to our prompts?

49,309 questions x 8 samples are a job for vLLM or SGLang; any OpenAI-compatible server does it.
It is sent the chat that `model.prompt_ids` puts into tokens, each image at the size at which our
own tower would see it, so that the server's own pixel limits change nothing.
"""

from functools import partial
from typing import NamedTuple

from PIL import Image

from endpoint import complete, hidden, image_part, with_retries
from images import open_image, png_of
from model import chat_messages, image_grid
from resume import Patience, Unanswered
from threads import each

TIMEOUT = 1800  # seconds for a reply: a queue of long answers may stand before it


class Reply(NamedTuple):
    text: str
    finished: bool  # False: cut off by max_tokens
    tokens: int  # of a request's answers the mean; 0 where the server does not say


class Served(NamedTuple):
    """A model behind an endpoint, and how it is to answer."""

    url: str  # up to and with /v1
    model: str  # its name there
    key: str  # or endpoint.NO_KEY
    tries: int  # of a request
    max_tokens: int
    temperature: float
    top_p: float


def served_messages(row, processor):
    """A row's chat with its images inside, as a server takes it."""
    images = iter(row["images"])
    messages = chat_messages(row)
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [
                image_part(seen_size(next(images), processor)) if part["type"] == "image" else part
                for part in message["content"]
            ]
    return messages


def seen_size(source, processor):
    """An image as a PNG of the size that the processor would make it."""
    _, h, w = image_grid(processor, source)
    size = (w * processor.patch_size, h * processor.patch_size)
    return png_of(open_image(source).resize(size, Image.BICUBIC))


def draw_answers(served, messages, n, seed):
    """n Replies to a chat, in as few requests as the server allows: some ignore `n`.

    Raises Unanswered where no try gives one, SystemExit where none can.
    """
    replies = []
    while len(replies) < n:
        # another seed per request: the same one would draw the same answers again
        call = partial(ask, served, messages, n - len(replies), seed + len(replies))
        replies += with_retries(call, served.url, served.tries, key=served.key)
    return replies[:n]


def ask(served, messages, n, seed):
    """The Replies that one request gives: at least one, else ValueError."""
    reply = complete(
        served,
        messages,
        TIMEOUT,
        n=n,
        seed=seed % 2**31,  # what all servers take
        max_tokens=served.max_tokens,
        temperature=served.temperature,
        top_p=served.top_p,
    )
    texts = [choice.message.content for choice in reply.choices]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"an answer without text: {hidden(str(reply), served.key)[:200]}")
    # not all servers count
    tokens = round(reply.usage.completion_tokens / len(texts)) if reply.usage else 0
    finished = [choice.finish_reason != "length" for choice in reply.choices]
    return [Reply(hidden(text, served.key), end, tokens) for text, end in zip(texts, finished)]


def ask_all(work, rows, workers, give_up, url, has_answered=False):
    """Yield (row, work(row), None) as they end, or (row, None, the Unanswered that it raised).

    `workers` rows are asked for at once. Raises SystemExit after `give_up` failures in a row, and
    where no try can help. A refusal counts as a failure only while the server has never answered,
    in this run or an earlier one (`has_answered`).
    """
    patience = Patience(give_up, has_answered)

    def outcome(row):
        try:
            found = work(row)
        # returned and not raised: one question must not end the others
        except Unanswered as e:
            patience.failed(
                e,
                f"{url}: {give_up} questions in a row without an answer, the last "
                f"{row['id']!r}: {e}; run again to ask for what is missing",
            )
            return row, None, e
        patience.answered()
        return row, found, None

    yield from each(outcome, rows, workers)
