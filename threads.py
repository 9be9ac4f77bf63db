"""How does work go on in threads, a few items at a time?

Reading a picture, or waiting for a server, keeps no other thread from computing.
"""

import os
import sys
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait


def each(work, items, workers):
    """Yield work(item) as they end, `workers` at a time.

    Few items are held at a time, so `items` may be a generator that reads them as they are needed.
    Where one raises, the results of those under way come first, then what it raised.
    """
    # not `with`, which would wait for all that was submitted even where the caller has stopped
    pool = ThreadPoolExecutor(workers)
    running = set()
    try:
        for item in items:
            running.add(pool.submit(work, item))
            # as many wait as run, so that no worker does
            if len(running) >= 2 * workers:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                yield from results(ended)
        while running:  # no more items: what still runs, as it ends
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            yield from results(ended)
    except GeneratorExit:  # the caller takes no more
        raise
    except BaseException as e:  # Ctrl-C while it waits, too
        try:
            begun = [future for future in running if not future.cancel()]
            # what is under way may have been paid for
            if begun and isinstance(e, KeyboardInterrupt):
                said = f"waiting for the {len(begun)} that are under way; Ctrl-C again ends at once"
                print(f"\n{said}", file=sys.stderr, flush=True)
            yield from (f.result() for f in as_completed(begun) if not f.exception())
        except KeyboardInterrupt:
            os._exit(130)  # Python would wait for the threads, and these for a server
        raise
    finally:  # what has not begun never does
        pool.shutdown(cancel_futures=True)


def results(futures):
    """Yield what they give; what one raised comes last, so that no other's result is lost."""
    raised = []
    for future in futures:
        if future.exception():
            raised.append(future)
        else:
            yield future.result()
    for future in raised:
        future.result()


def in_order(work, items, workers, ahead=0):
    """Yield work(item) in the order of the items, by `workers` at a time.

    `ahead`: items that are begun before the one in use; never fewer than there are workers.
    """
    pool = ThreadPoolExecutor(workers)
    begun = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > max(workers, ahead):
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:  # also where the caller stops early
        pool.shutdown(cancel_futures=True)
