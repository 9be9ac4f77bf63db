"""How is a served model asked? Retries with growing pauses, and the failures that none can help."""

import base64
import os
import random
import time
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from resume import Refused, Unanswered

# what a client raises for a failed request, and what reading an answer of another protocol raises
FAILURES = (HTTPError, ValueError, TypeError, LookupError, AttributeError)
HOPELESS = (401, 402, 404)  # no such key, nothing paid, no such page
TRY_AGAIN = (408, 409, 425, 429)  # of the 4xx: a time-out, a conflict, too early, too many requests
LONGEST_PAUSE = 60  # seconds
SHORTEST_KEY = 8  # characters
NO_KEY = "none"  # never empty: the client would send the user's own hub token instead


def check_url(url):
    """Raise SystemExit for what is not a URL of a server."""
    try:
        parts = urlsplit(url)
        # the client would take anything else for the name of a model on the hub
        is_one = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        is_one = False
    if not is_one:
        raise SystemExit(
            f"{url!r} is not an endpoint: expected http://... or https://..., up to and with /v1"
        )
    if parts.username or parts.password:  # which messages and records would show
        raise SystemExit("the url of an endpoint holds a user or a password; expected a key")


def key_in(name):
    """The key that the environment variable `name` holds; NO_KEY for none."""
    key = os.environ.get(name, "").strip()  # of a line of a file, with its end
    # a header holds nothing else, and what refuses it would show it
    if not key.isascii() or not key.isprintable():
        raise SystemExit(f"{name}: the key in it has characters that no request can carry")
    return key or NO_KEY


def complete(server, messages, timeout, **settings):
    """A server's reply to a chat: one request. server: has `url`, `model` ("": its own), `key`."""
    client = InferenceClient(base_url=server.url, api_key=server.key, timeout=timeout)
    return client.chat_completion(messages, model=server.model or None, **settings)


def with_retries(call, url, tries, first_pause=0.5, key=""):
    """call(), which asks an endpoint, with growing pauses between tries or as Retry-After says.

    Raises SystemExit where no try can help (offline, HOPELESS), else Unanswered. `key` appears in
    no message, even where the endpoint echoes it.
    """
    unreadable = 0
    for n in range(tries):
        try:
            return call()
        # a setting of this machine, which no pause changes
        except OfflineModeIsEnabled:
            raise SystemExit(
                f"HF_HUB_OFFLINE is set, and the client then does not ask {url}; unset it"
            ) from None
        except FAILURES as e:
            response, status = getattr(e, "response", None), status_of(e)
            if status in HOPELESS:
                said = hidden(" ".join(str(e).split()), key)
                raise SystemExit(
                    f"{url} answers {status}: {said}; check endpoint, model name and key"
                ) from None
            # an answer that cannot be read is paid for: one more may be better, and no third
            unreadable += not isinstance(e, HTTPError)
            last = n + 1 == tries or unreadable == 2
            if last or is_refusal(status):
                raise unanswered(e, key) from None
            told = "" if response is None else response.headers.get("retry-after", "")
            # Retry-After may also be a date; the growing pause does as well
            pause = float(told) if told.isdigit() else first_pause * 2**n
            time.sleep(min(pause, LONGEST_PAUSE) * random.uniform(1, 1.2))  # not all at once


def status_of(e):
    """The HTTP status of a failure; 0 where no connection came about, or the answer was none."""
    response = getattr(e, "response", None)
    return 0 if response is None else response.status_code


def unanswered(e, key):
    """The Unanswered that a failure, one of FAILURES, is for the item that was asked about."""
    status = status_of(e)
    said = " ".join(hidden(f"{type(e).__name__}: {e}", key).split())[:300]
    # for what it is, such as an image that a filter dislikes, or by a limit that can be mended
    if is_refusal(status):
        return Refused("refused by the endpoint", status, said)
    if not isinstance(e, HTTPError):  # no JSON, or JSON of another protocol
        return Unanswered("answer of another protocol", None, said)
    return Unanswered("no answer from the endpoint", status or None, said)


def is_refusal(status):
    """An HTTP status that says of a request that it will never be answered."""
    return 400 <= status < 500 and status not in TRY_AGAIN


def hidden(text, key):
    """A text that an endpoint sent, without the key that it was asked with.

    A key too short to be a secret ("x", for one's own server) stays: it may be part of a word.
    """
    return text.replace(key, "***") if len(key) >= SHORTEST_KEY else text


def image_part(png):
    """An encoded PNG as a part of a message."""
    text = base64.b64encode(png).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
