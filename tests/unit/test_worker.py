"""What a worker has buffered."""

import time

import pytest
from msgspec import Raw

from pgconductor.claimed import Claimed
from pgconductor.worker import Worker


def buffering(count: int = 1) -> Worker:
    worker = Worker("q")
    claim(worker, 1, count)
    return worker


def claim(worker: Worker, token: int, count: int) -> None:
    """Buffer as many executions as a claim brought."""
    worker.buffer.extend((Claimed(f"{token}.{number}", 1, 1, Raw(b"{}")), token) for number in range(count))


def finish(worker: Worker, count: int) -> None:
    """Note ends, as a run's does, and measure their rate, as a claim does."""
    worker._finished_count += count
    worker._measure()


def test_what_is_buffered_behind_what_does_not_end_goes_back() -> None:
    worker = buffering()
    finish(worker, 4)
    assert worker.take_stuck() == []
    assert len(worker.take_stuck()) == 1
    assert worker.take_stuck() == []


def test_what_is_buffered_behind_as_many_ends_as_before_stays() -> None:
    worker = buffering()
    for _ in range(5):
        finish(worker, 4)
        assert worker.take_stuck() == []
    assert len(worker.buffer) == 1


def test_as_many_stay_as_have_ended_and_those_that_stand_behind_them_go_back() -> None:
    worker = buffering(5)
    assert worker.take_stuck() == []
    finish(worker, 2)
    assert [claimed.id for claimed, _ in worker.take_stuck()] == ["1.4", "1.3", "1.2"]
    assert [claimed.id for claimed, _ in worker.buffer] == ["1.0", "1.1"]


def test_what_was_claimed_since_the_last_look_stays() -> None:
    worker = buffering()
    assert worker.take_stuck() == []
    finish(worker, 1)
    worker.buffer.clear()
    claim(worker, 2, 5)
    assert worker.take_stuck() == []
    finish(worker, 1)
    assert len(worker.take_stuck()) == 4


def test_limited_work_that_stands_in_front_hides_nothing_behind_it() -> None:
    worker = buffering(3)
    assert worker.take_stuck() == []
    worker.buffer.appendleft((Claimed("limited", 2, 1, Raw(b"{}")), 2))
    finish(worker, 1)
    assert [claimed.id for claimed, _ in worker.take_stuck()] == ["1.2", "1.1", "1.0"]
    assert [claimed.id for claimed, _ in worker.buffer] == ["limited"]


def test_after_what_went_back_nothing_is_fetched_ahead_until_the_pace_is_measured() -> None:
    worker = buffering(500)
    worker.prefetch_max = 400
    worker.take_stuck()
    worker.take_stuck()
    assert (worker.prefetch_max, worker.low_water, len(worker.buffer)) == (0, 0, 0)


def measured_after(seconds: float, worker: Worker) -> int:
    worker._window_began_at = time.monotonic() - seconds
    worker._measure()
    return worker.prefetch_max


def test_long_runs_that_end_together_are_no_pace() -> None:
    worker = Worker("q", concurrency=1000)
    worker.prefetch_max = 1000
    worker._finished_count = worker._slow_count = 1000
    worker._slow_seconds = 1000 * 2.0
    assert measured_after(0.05, worker) == 50  # 1,000 slots at two seconds: 500 a second


def test_short_runs_count_as_they_end() -> None:
    worker = Worker("q", concurrency=100)
    worker.prefetch_max = 1000
    worker._finished_count = worker._slow_count = 1000
    worker._slow_seconds = 1000 * 0.001
    assert 900 < measured_after(0.1, worker) <= 1000


@pytest.mark.parametrize(("buffered", "room"), [(0, 10), (1, 10), (500, 10)])
def test_limited_work_has_room_however_much_is_fetched_ahead(buffered: int, room: int) -> None:
    assert buffering(buffered).limited_room() == room
