"""Work that is done ahead comes in order, is bounded, and ends with who asked for it."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from threads import each, in_order


@pytest.mark.parametrize("ahead", [0, 10])
def test_in_order_is_a_map_that_runs_ahead(ahead):
    """Whatever order the work ends in; so many are begun beyond the one in use, or one a worker,
    and no more than three at a time."""
    begun, lock, used, at_work, most = [], threading.Lock(), 0, 0, max(3, ahead) + 1

    def work(i):
        nonlocal at_work
        with lock:
            begun.append(i)
            at_work += 1
            assert at_work <= 3 and len(begun) <= used + most
        time.sleep(0.02 if i % 3 == 0 else 0.0)
        with lock:
            at_work -= 1
        return i * i

    for i, found in enumerate(in_order(work, range(40), 3, ahead)):
        assert found == i * i
        deadline = time.monotonic() + 10  # while the first one is in use, the others begin
        while i == 0 and len(begun) < most and time.monotonic() < deadline:
            time.sleep(0.001)
        assert i > 0 or len(begun) == most
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


def test_what_raises_takes_no_finished_work_away():
    """All that ended beside a fault is given before it."""
    barrier = threading.Barrier(4)

    def work(i):
        barrier.wait(10)
        return 1 // i

    given = []
    with pytest.raises(ZeroDivisionError):
        for result in each(work, range(4), 4):
            given.append(result)
    assert sorted(given) == [0, 0, 1]


HANGING = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
from threads import each
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored

def work(i):
    print("begun", flush=True)
    time.sleep(3 if sys.argv[2] == "soon" else 60)
    return i

for found in each(work, range(9), 1):
    print("found", found, flush=True)
"""


@pytest.mark.parametrize("ends", ["soon", "never"])
def test_ctrl_c_waits_for_what_is_under_way_and_twice_for_nothing(ends):
    command = [sys.executable, "-c", HANGING, str(ROOT), ends]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        time.sleep(1)  # until it waits
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert "1 that are under way" in process.stderr.readline()
        if ends == "soon":
            assert process.stdout.readline() == "found 0\n"
        else:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 130
