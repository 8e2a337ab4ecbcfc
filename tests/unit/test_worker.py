"""What a worker has buffered."""

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
