"""How does a teacher write an example, an image model draw its picture, and what did both cost?

They are asked over OpenAI's HTTP protocol: /chat/completions, with images in the message, and
/images/edits. endpoint.py tries a request that fails again; here, an answer that comes but cannot
be used is asked for anew, too. What was answered is kept by what was sent, and never paid again.
"""

import base64
import threading
import time
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.utils import get_session, hf_raise_for_status

from endpoint import complete, hidden, image_part, with_retries
from files import SURROGATE, append, key_of, open_append, read_lines
from resume import Reject, Unanswered

# many threads ask at once, and all write into one file of costs, and into one of replies
LOCK = threading.Lock()


class PaidServer(NamedTuple):
    """A model behind an endpoint, how patiently it is asked, and where its costs are noted."""

    url: str  # up to and with /v1
    model: str
    key: str  # or NO_KEY
    tries: int  # of a request
    first_pause: float  # seconds, then twice as long each time
    timeout: float  # seconds
    costs: Path  # a JSONL file: a line for each request


class Replies:
    """What was paid for: a line of JSONL each, under a key of all that was sent."""

    def __init__(self, path):
        self.known = {line["sent"]: line["reply"] for line in read_lines(path, sent=str, reply=str)}
        self.file = open_append(path)

    def to(self, sent, ask, is_there=bool):
        """The reply (a text) to what was sent (a JSON value): one that is known, else ask().

        is_there(reply): can a known one still be used? A picture's file may be gone.
        """
        key = key_of(sent)
        # two threads may ask the same at once: both have paid, and the last counts
        if not is_there(self.known.get(key, "")):
            reply = ask()
            with LOCK:
                append(self.file, {"sent": key, "reply": reply})
                self.known[key] = reply
        return self.known[key]


def until_usable(server, call):
    """call() until it gives something usable.

    Raises Reject when only unusable answers come, Unanswered when none does, SystemExit where no
    try can help (a wrong key or address).
    """
    for n in range(server.tries):
        try:
            # an unusable answer costs a try, too: an endpoint that only babbles is left in the end
            left = server.tries - n
            return with_retries(call, server.url, left, server.first_pause, server.key)
        except Unanswered:
            raise
        except Reject as e:  # the server is well, its answer is not: draw another
            last = e
    raise last


def edit_image(server, prompt, png):
    """The encoded image that an image model makes of a PNG by a prompt. One request."""
    start = time.monotonic()
    try:
        # plain HTTP: the client's own image calls speak another protocol than OpenAI's
        response = get_session().post(
            f"{server.url.rstrip('/')}/images/edits",
            timeout=server.timeout,
            headers={"Authorization": f"Bearer {server.key}"},
            data={"model": server.model, "prompt": prompt, "n": "1"},
            files={"image": ("query.png", png, "image/png")},
        )
    finally:  # a request that fails has cost time, too
        log_cost(server, start)
    hf_raise_for_status(response)
    drawn = response.json()["data"][0]
    if "b64_json" not in drawn:  # a link, which is not followed
        raise ValueError(f"no b64_json in the answer; there is {', '.join(sorted(drawn))}")
    # strictly: else stray characters are dropped, and broken pixels come out
    return base64.b64decode(drawn["b64_json"], validate=True)


def ask_teacher(server, prompt, pngs, max_tokens, temperature):
    """What a teacher writes who sees images (PNGs), then a prompt. One request; raises Reject."""
    content = [*map(image_part, pngs), {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    settings = {"max_tokens": max_tokens, "temperature": temperature}
    # None where the request fails: seconds are known then, tokens are not
    start, usage = time.monotonic(), None
    try:
        reply = complete(server, messages, server.timeout, **settings)
        usage = reply.usage
    finally:
        log_cost(server, start, usage)
    choice = reply.choices[0]
    # a text without its end has no answer; a new draw may be shorter
    if choice.finish_reason == "length":
        raise Reject("teacher was cut off", max_tokens)
    text = choice.message.content
    # half of a character pair can be written to no file
    if not isinstance(text, str) or SURROGATE.search(text):
        raise Reject("teacher wrote no text")
    # an endpoint may echo its request, and this text becomes training data
    return hidden(text, server.key)


def log_cost(server, start, usage=None):
    """A line per request in `costs`: what was paid is known after a kill, too."""
    line = {"model": server.model, "seconds": round(time.monotonic() - start, 3)}
    for name in ("prompt_tokens", "completion_tokens"):
        # not every server counts tokens
        line[name] = getattr(usage, name, None) or 0
    with LOCK, open(server.costs, "ab", buffering=0) as f:
        append(f, line)
