"""What the heartbeat does about answers that take long."""

import asyncio
from typing import Any

import pytest

from pgconductor import heartbeat
from pgconductor.engine import Beat, Engine, Moved, Pruned, Query
from pgconductor.heartbeat import Heartbeat, Pulse
from pgconductor.membership import Membership, Timing
from pgconductor.scan import Scan
from tests.waiting import until

TIMING = Timing(beat=0.02, expiry=2.0, sweep=3600.0)


class FarSession:
    """A connection whose answers take longer than the time between two beats."""

    def __init__(self, dsn: str, name: str) -> None: ...

    async def run(self, query: object, *, timeout: float, answer_timeout: float) -> Beat:
        async with asyncio.timeout(answer_timeout):
            await asyncio.sleep(8 * TIMING.beat)
        return Beat(alive=True, cancel=[])

    async def close(self) -> None: ...


class Idle:
    """Runs nothing."""

    def name_of(self, task: object, /) -> str:
        return ""

    def told_steps(self) -> None: ...


class Nobody:
    """Hears nothing."""

    def on_cancel(self, ids: list[str]) -> None: ...
    def on_declared_dead(self, id: str) -> None: ...
    def on_stop_requested(self, id: str) -> None: ...
    def on_swept(self, moved: Moved) -> None: ...

    @property
    def crew(self) -> Idle:
        return Idle()


async def test_a_beat_whose_answer_takes_longer_than_a_beat_is_waited_for_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session: Any = FarSession
    monkeypatch.setattr(heartbeat, "Session", session)
    beating = Heartbeat("", Engine("pgconductor"), Membership(TIMING), Nobody(), Pulse(), Scan())
    beating.start()
    await until(lambda: beating.answered_at > 0)
    assert beating.error_count >= 1
    beating.stop()


async def test_after_a_sweep_that_took_too_long_the_next_go_apart_until_one_takes_over_quickly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swept: list[str] = []

    class Sweeping:
        """A connection on which the first sweep never ends, and the fourth takes something over."""

        def __init__(self, dsn: str, name: str) -> None:
            self.name = name

        async def run(self, query: Query[Any], **limits: float) -> Beat | Moved:
            if "sweep" not in query.statement:
                return Beat(alive=True, cancel=[])
            swept.append(self.name)
            if len(swept) == 1:
                await asyncio.sleep(3600)
            return Moved(lost=len(swept) == 4)

        async def close(self) -> None: ...

    monkeypatch.setattr(heartbeat, "Session", Sweeping)
    timing = Timing(beat=0.02, expiry=2.0, sweep=0.02)
    beating = Heartbeat("", Engine("pgconductor"), Membership(timing), Nobody(), Pulse(), Scan())
    beating.start()
    await until(lambda: len(swept) >= 5)
    beating.stop()
    apart = "pgconductor sweep"
    assert swept[:5] == ["pgconductor heartbeat", apart, apart, apart, "pgconductor heartbeat"]


async def test_prunes_follow_each_other_while_they_remove_and_leave_time_to_others_where_they_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [Pruned(5, more=True), Pruned(0, more=True), Pruned(5, more=True), Pruned(0, more=False)]
    told, sleep = answers.copy(), asyncio.sleep
    pauses: list[float] = []

    class Pruning:
        async def run(self, query: Query[Any]) -> Pruned:
            await sleep(0.001)
            return told.pop(0)

    async def note_pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", note_pause)
    beating = Heartbeat("", Engine("pgconductor"), Membership(Timing(beat=3600.0)), Nobody(), Pulse(), Scan())
    session: Any = Pruning()
    await beating._prune(session)
    assert told == []
    took = 0.001
    assert [pause >= heartbeat.PASS_OVER_PAUSE * took for pause in pauses] == [False, True, False]

    told += [Pruned(0, more=True)]
    monkeypatch.setattr(heartbeat, "PASS_OVER_PAUSE", 1e6)  # longer than is left until the next beat
    await beating._prune(session)
    assert len(pauses) == 3
