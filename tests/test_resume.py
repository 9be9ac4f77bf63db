"""Work that is done ahead comes in order, is bounded, and ends with who asked for it."""

import threading
import time

import pytest

from resume import in_order


def test_in_order_is_a_map_that_runs_ahead():
    """Whatever order the work ends in; never more than the workers and one in use are begun."""
    begun, lock, used = [], threading.Lock(), 0

    def work(i):
        with lock:
            begun.append(i)
            assert len(begun) <= used + 3 + 1
        time.sleep(0.02 if i % 3 == 0 else 0.0)
        return i * i

    for i, found in enumerate(in_order(work, range(40), 3)):
        assert found == i * i
        used = i + 1
    assert sorted(begun) == list(range(40)) and used == 40
    assert list(in_order(work, [], 3)) == []


def test_an_error_comes_where_its_item_would():
    def work(i):
        return 1 // (i - 5)

    found = in_order(work, range(9), 2)
    assert [next(found) for _ in range(5)] == [1 // (i - 5) for i in range(5)]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_who_stops_early_starts_nothing_more():
    begun = []
    found = in_order(lambda i: begun.append(i) or i, range(1000), 2)
    next(found)
    found.close()
    n = len(begun)
    time.sleep(0.05)
    assert len(begun) == n <= 4
