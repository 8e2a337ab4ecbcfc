"""What a worker has buffered."""

from msgspec import Raw

from pgconductor.claimed import Claimed
from pgconductor.worker import Worker


def buffering() -> Worker:
    worker = Worker("q")
    worker.buffer.append((Claimed("1", 1, 1, Raw(b"{}")), 1))
    return worker


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
