"""Work that is done ahead comes in order, is bounded, and ends with who asked for it."""

import fcntl
import threading
import time

import pytest

from resume import run_stage
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


def test_a_stage_has_one_writer(tmp_path):
    """The lines of two would be mixed, and all asked for twice; stages of other names may run."""
    settings = dict(settings={}, folder=tmp_path, workers=1, give_up=3, rejects="rejects.jsonl")

    def stage(name):
        return run_stage(name, [{"id": "a"}], dict, contents=lambda row: [], **settings)

    (tmp_path / "work").mkdir()
    with open(tmp_path / "work" / ".first.jsonl.lock", "w") as others:
        fcntl.flock(others, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another process is writing here"):
            stage("first")
    assert not (tmp_path / "first.jsonl").exists()
    assert stage("second") == stage("second") == [{"id": "a"}]
