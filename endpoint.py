"""How is a served model asked? Retries with growing pauses, and what no retry can help."""

import random
import time

from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled


def answered(call, url, tries, first_pause=0.5):
    """call(), which asks an endpoint, with growing pauses between tries or the server's Retry-After.

    Raises SystemExit where no try can help (offline, 401, 403, 404), else the last error: HTTPError, or whatever reading an
    answer of another protocol raised.
    """
    for n in range(tries):
        try:
            return call()
        except OfflineModeIsEnabled:
            raise SystemExit(
                f"HF_HUB_OFFLINE is set, and the client then does not ask {url}; unset it"
            ) from None
        except (HTTPError, ValueError, TypeError, LookupError, AttributeError) as e:
            response = getattr(e, "response", None)
            status = response.status_code if response is not None else 0
            if status in (401, 403, 404):
                raise SystemExit(
                    f"{url} answers {status}: {' '.join(str(e).split())}; check endpoint, model name and key"
                ) from None
            if n + 1 == tries or is_refusal(status):
                raise
            told = response.headers.get("retry-after", "") if response is not None else ""
            pause = float(told) if told.isdigit() else first_pause * 2**n
            time.sleep(min(pause, 60) * random.uniform(1, 1.2))  # not all at the same moment


def is_refusal(status):
    """An HTTP status that says of a request that it will never be answered."""
    return 400 <= status < 500 and status not in (408, 409, 425, 429)
