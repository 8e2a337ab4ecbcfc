"""The heartbeat: shows the engine that the process lives, from a thread and a connection of its own.

A handler that blocks the event loop must not cost the process its leases, so beats do not run on that loop; and a
pool that is exhausted must not either, so they do not share a connection. The thread runs a small event loop of its
own, where a call that gets no answer can be given up. What it learns it hands to the main loop: cancel signals, that
the process was declared dead, and work that the sweep took over from others.

A beat waits for its answer no longer than until the next one is due; then it takes its connection along, which may be a
silent one. To connect it may take the whole trust, since that can last longer than from beat to beat, past a dead host
or on a busy machine. And where answers are what lasts longer, the limit doubles from beat to beat until one comes; else
none ever would, and a database that is only slow would cost the process its leases.

Beside the beat it runs the sweep, on the same connection, so a sweep must not hold up the beats behind it: it gives up
at a lock that others hold on to, and after a limit that leaves time for the next beat. What it did not do stays to be
done; the next sweep, of any process, finds it. There is no sweep where the beat before it got no answer: the process
could sweep itself.
A sweep that the limit ends is run again, beside the beats and with a minute to end in, on a connection that is opened
for it: taking over reads the leases, and beside a snapshot that is held for long they have many dead rows. The next are
run there at once, until one takes something over quickly.
Where it finds that a vacuum would be in vain, it holds autovacuum off, beside the beats (`vacuum`).
After a long time without answers it lets a whole lease go by before it sweeps again: where the server was away, or
this process stood still, the others must be given the time to show that they live. The engine asks when the server
was started for the same reason, which does not cover the time that its recovery took.

There is a watchdog, too: while handlers run, the main loop notes the time every quarter of a
second; when it has not for longer than the stall limit, the watchdog logs what the loop is doing, once a stall.
"""

import asyncio
import contextlib
import logging
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from pgconductor.engine import Moved
from pgconductor.logs import PACKAGE
from pgconductor.membership import Membership
from pgconductor.running_steps import RunningStep
from pgconductor.scan import Scan
from pgconductor.session import Session
from pgconductor.vacuum import hold_off_vacuum
from pgconductor.written import Blocked

if TYPE_CHECKING:
    from pgconductor.engine import Engine

T = TypeVar("T")
log = logging.getLogger("pgconductor.heartbeat")
PULSE_SECONDS: Final = 0.25
PRUNE_SHARE: Final = 0.2
PASS_OVER_PAUSE: Final = 4.0  # of the time that a prune took which removed nothing
LONG_SWEEP_SECONDS: Final = 60.0
_TAKEN_OVER: Final = "took over %d execution%s of processes that stopped beating (%s): %s"


class Runs(Protocol):
    """What runs in the process; asked from the heartbeat's thread."""

    def name_of(self, task: "asyncio.Task[Any] | None", /) -> str:
        """Say what an asyncio task runs."""
        ...

    def told_steps(self) -> list[RunningStep] | None:
        """Return the steps that a beat tells of."""
        ...


class Listener(Protocol):
    """Who hears of what the heartbeat learns; called in the main loop."""

    @property
    def crew(self) -> Runs:
        """What runs."""
        ...

    def on_cancel(self, ids: list[str]) -> None:
        """These executions are to be cancelled."""
        ...

    def on_declared_dead(self, id: str) -> None:
        """The engine no longer knows this boot id."""
        ...

    def on_stop_requested(self, id: str) -> None:
        """A migration that breaks this release waits for the process to stop."""
        ...

    def on_swept(self, moved: Moved) -> None:
        """Work of dead processes was taken over."""
        ...


class Pulse:
    """The main loop's sign of life, kept up only while handlers run."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread_id = threading.get_ident()
        self.at = time.monotonic()
        self.is_beating = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin; called when handlers begin to run."""
        if not self.is_beating:
            self.is_beating = True
            self._tick()

    def stop(self) -> None:
        """End; called when the process is idle."""
        self.is_beating = False
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        self.at = time.monotonic()
        self._timer = self.loop.call_later(PULSE_SECONDS, self._tick)


class Heartbeat:
    """Runs the thread.

    Args:
        dsn: Where to.
        engine: Builds the queries.
        membership: The boot id; confirmed from here.
        listener: Who hears of what is learnt.
        pulse: The main loop's sign of life.
        scan: Where claims have come to; told with the beats.

    Attributes:
        is_stopping: Passed on with the beats.
        error_count: How many beats and sweeps have failed.
        gave_up_count: How many sweeps and prunes met a lock that others held on to.
        answered_at: When the last answer to a beat came, whatever it said.
    """

    def __init__(
        self, dsn: str, engine: "Engine", membership: Membership, listener: Listener, pulse: Pulse, scan: Scan
    ) -> None:
        self.is_stopping = False
        self.error_count = 0
        self.gave_up_count = 0
        self.answered_at = 0.0
        self._dsn = dsn
        self._engine = engine
        self._membership = membership
        self._timing = membership.timing
        self._answer_limit = membership.timing.beat
        self._listener = listener
        self._pulse = pulse
        self._scan = scan
        self._main = asyncio.get_running_loop()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._poke: asyncio.Event | None = None
        self._ended = False
        self._sweeps_from = 0.0
        self._long_sweep: asyncio.Task[None] | None = None
        self._holding_off: asyncio.Task[None] | None = None
        self._can_hold_off = True
        self._sweeps_apart = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pgconductor heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread; the first beat is sent at once."""
        self._thread.start()

    def poke(self) -> None:
        """Beat now: a signal is waiting."""
        if self._thread.ident is None or not self._ready.wait(1) or self._loop is None or self._poke is None:
            return
        with contextlib.suppress(RuntimeError):  # the thread's loop has just closed
            self._loop.call_soon_threadsafe(self._poke.set)

    def stop(self) -> None:
        """Stop beating; returns when the thread has ended, or is stuck in a call that gets no answer."""
        self._ended = True
        self.poke()
        if self._thread.ident is not None:
            self._thread.join(timeout=2)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            runner.run(self._beat_for_ever())

    async def _beat_for_ever(self) -> None:
        self._loop, self._poke = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        session = Session(self._dsn, "pgconductor heartbeat")
        watchdog = self._loop.create_task(self._watch())
        swept_at = 0.0
        while not self._ended:
            self._poke.clear()
            began_at = time.monotonic()
            await self._guard(self._beat(session))
            is_due = began_at - swept_at >= self._timing.sweep * 0.9 and self._long_sweep is None
            if is_due and began_at <= self.answered_at and began_at >= self._sweeps_from and not self._ended:
                swept_at = began_at
                await self._guard(self._sweep_in_time(session))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, began_at + self._timing.beat - time.monotonic())):
                    await self._poke.wait()
        watchdog.cancel()  # what runs beside the beats is cancelled by the runner
        await session.close()

    async def _guard(self, work: Awaitable[None]) -> None:
        began_at = time.monotonic()
        try:
            await work
        except TimeoutError:
            self.error_count += 1
            log.warning("no answer from Postgres within %.1f s", time.monotonic() - began_at)
        except Exception:
            self.error_count += 1
            log.exception("the heartbeat failed; it goes on")

    async def _beat(self, session: Session) -> None:
        id, asked_at, trust, limit = self._membership.id, time.monotonic(), self._timing.trust, self._answer_limit
        self._answer_limit = max(limit, min(2 * limit, trust))  # a later answer would confirm nothing
        # A call that is repeated after a broken connection would count from its first try: too early, never too late.
        told = self._scan.told(asked_at), self._listener.crew.told_steps(), self._blocked()
        query = self._engine.beat(id, self.is_stopping, *told)
        beat = await session.run(query, timeout=trust, answer_timeout=limit)
        self._answer_limit = self._timing.beat
        now = time.monotonic()
        if self.answered_at and now - self.answered_at > self._timing.expiry / 2:
            self._sweeps_from = now + self._timing.expiry
        self.answered_at = now
        if not beat.alive:
            self._tell(self._listener.on_declared_dead, id)
            return
        self._membership.confirm(id, asked_at)
        if beat.stop and not self.is_stopping:
            self._tell(self._listener.on_stop_requested, id)
        if beat.cancel:
            self._tell(self._listener.on_cancel, beat.cancel)

    async def _sweep_in_time(self, session: Session) -> None:
        try:
            if self._sweeps_apart:
                self._long_sweep = asyncio.create_task(self._sweep_at_length())
            else:
                async with asyncio.timeout(self._timing.sweep_limit):
                    await self._sweep(session)
        except TimeoutError:
            self._sweeps_apart = True
            self._long_sweep = asyncio.create_task(self._sweep_at_length())
            raise

    async def _sweep_at_length(self) -> None:
        """Do what the limit has ended, where no beat waits for it."""
        session = Session(self._dsn, "pgconductor sweep")
        try:
            await self._guard(asyncio.wait_for(self._sweep(session), LONG_SWEEP_SECONDS))
        finally:
            self._long_sweep = None
            await session.close()

    async def _sweep(self, session: Session) -> None:
        began_at = time.monotonic()
        moved = await session.run(self._engine.sweep(self._timing.expiry))
        self._note("sweep", moved.gave_up)
        if moved.lost:
            self._sweeps_apart = time.monotonic() - began_at > self._timing.sweep_limit / 2
            dead, lost = moved.dead or [], moved.first_lost or []
            told = _listed(dead, len(dead)), _listed(lost, moved.lost)
            log.warning(_TAKEN_OVER, moved.lost, "s" * (moved.lost > 1), *told)
        if moved.lost or moved.queues or moved.watchers:
            self._tell(self._listener.on_swept, moved)
        if moved.futile and self._holding_off is None and self._can_hold_off:
            self._holding_off = asyncio.create_task(self._hold_off_vacuum())
        if moved.prune:
            await self._prune(session)

    async def _hold_off_vacuum(self) -> None:
        try:
            self._can_hold_off = await hold_off_vacuum(self._dsn, self._engine)
        finally:
            self._holding_off = None

    async def _prune(self, session: Session) -> None:
        """Remove what has been kept long enough: a batch, and more of them while there is time before the next beat.

        What is only passed over is not urgent, and there may be millions of it: others work meanwhile.
        """
        began_at = time.monotonic()
        until = began_at + self._timing.beat * PRUNE_SHARE
        while (pruned := await session.run(self._engine.prune())).more and not self._ended:
            now = time.monotonic()
            pause = 0.0 if pruned.removed else PASS_OVER_PAUSE * (now - began_at)
            if now + pause > until:
                return
            await asyncio.sleep(pause)
            began_at = now + pause
        self._note("prune", pruned.gave_up)

    def _note(self, what: str, gave_up: str | None) -> None:
        if gave_up is not None:
            self.gave_up_count += 1
            log.warning("the %s gave up at a lock that others hold on to; the next one tries again: %s", what, gave_up)

    def _tell(self, hear: Callable[[T], None], fact: T) -> None:
        with contextlib.suppress(RuntimeError):  # the main loop has just closed
            self._main.call_soon_threadsafe(hear, fact)

    def _blocked(self) -> Blocked | None:
        """Say what blocks the main loop, and for how long it has; None where nothing does."""
        stalled = time.monotonic() - self._pulse.at if self._pulse.is_beating else 0.0
        if stalled <= self._timing.stall_limit:
            return None
        by = self._listener.crew.name_of(asyncio.current_task(self._pulse.loop))
        return Blocked(round(stalled, 1), by)

    async def _watch(self) -> None:
        reported: Blocked | None = None
        while True:
            await asyncio.sleep(PULSE_SECONDS * 2)
            blocked = self._blocked()
            if blocked is not None and reported is None:
                self._report(blocked)
            elif blocked is None and reported is not None:
                log.warning("the event loop goes on; %s had blocked it for %.1f s", reported.by, reported.seconds)
            reported = blocked

    def _report(self, blocked: Blocked) -> None:
        log.warning(
            "the event loop has been blocked for %.1f s by %s; await something, or make it a plain `def` task\n%s",
            blocked.seconds,
            blocked.by,
            _stack_of(self._pulse.thread_id),
        )


def _stack_of(thread_id: int) -> str:
    """Write where a thread is: in the user's code, if it is."""
    frame = sys._current_frames().get(thread_id)  # pyright: ignore[reportPrivateUsage]
    if frame is None:
        return ""
    stack = list(traceback.extract_stack(frame))
    ours = [place for place, each in enumerate(stack, 1) if each.filename.startswith(PACKAGE)]
    return "".join(traceback.format_list(stack[ours[-1] :] if ours and ours[-1] < len(stack) else stack))


def _listed(some: list[str], count: int) -> str:
    """Write the first of so many."""
    few = some[:5]
    return ", ".join(few) + (f" and {count - len(few)} more" if count > len(few) else "")
