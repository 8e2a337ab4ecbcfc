"""Writing what runs produce: outcomes (`Settler`), and finished steps and opened operations (`Saver`).

Both commit in groups, each on its own connection, so that a settle never waits for a save. An outcome is handed over
and forgotten; a step is waited for by its handler. Either counts only while the lease exists: what comes back as lost
is dropped, since somebody else has the execution.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple
from uuid import UUID

from msgspec import UNSET, Raw

from pgconductor.batcher import Batcher
from pgconductor.engine import Engine
from pgconductor.errors import EncodeError, StaleLease
from pgconductor.faults import fault
from pgconductor.membership import Membership
from pgconductor.session import Session
from pgconductor.stored_error import error_to_json
from pgconductor.written import Completion, Operation, Outcome, SavedStep

log = logging.getLogger("pgconductor.settler")
Settlement = Completion | Outcome
_REFUSED_DELAY_SECONDS = 60.0


class Effects(NamedTuple):
    """What a call set in motion beside its own work."""

    queues: Sequence[int] | None
    watchers: Sequence[str] | None = None
    next_due: float | None = None


class Settler:
    """Stores outcomes.

    Args:
        session: A connection of its own.
        engine: Builds the query.
        membership: The boot id under which the leases are held.
        on_effects: Told what a settle set in motion.
        on_declared_dead: Told that the engine no longer knows the boot id.
        on_parked: Told the id and the token of what is parked now.

    Attributes:
        batcher: What is not stored yet.
        add: Takes an outcome; returns at once.
    """

    def __init__(
        self,
        session: Session,
        engine: Engine,
        membership: Membership,
        on_effects: Callable[[Effects], None],
        on_declared_dead: Callable[[str], None],
        on_parked: Callable[[str, int], None] | None = None,
    ) -> None:
        self._session = session
        self._engine = engine
        self._membership = membership
        self._on_effects = on_effects
        self._on_declared_dead = on_declared_dead
        self._on_parked = on_parked
        self.settled_count = 0
        self.lost_count = 0
        self.batch_count = 0
        self._void_token = 0
        self.batcher: Batcher[Settlement] = Batcher("settle", self._send, self._reject, _weight)
        self.add: Callable[[Settlement], None] = self.batcher.add

    async def warm_up(self, timeout: float) -> None:
        """Connect, and let the server plan what a settle does: with a completion that is lost, since no claim made it.

        What takes too long the first settle does.
        """
        nobodys = Completion(str(UUID(int=0)), 0, Raw(b"null"))
        with contextlib.suppress(TimeoutError):
            await self._session.run(self._engine.settle(self._membership.id, [nobodys], None), timeout=timeout)

    def void(self, token: int) -> None:
        """Send no outcome of any claim up to this one: it may rest on steps that a failover has taken back."""
        self._void_token = token

    async def _send(self, batch: Sequence[Settlement]) -> None:
        batch = [each for each in batch if each.token > self._void_token] if self._void_token else batch
        if not batch:
            return
        completed = [each for each in batch if type(each) is Completion]
        outcomes = [each for each in batch if type(each) is Outcome] if len(completed) < len(batch) else []
        id = self._membership.id
        fault("before_settle")
        settled = await self._session.run(self._engine.settle(id, completed, outcomes))
        fault("after_settle_reply")
        self.batch_count += 1
        if settled is None:
            log.warning("%d outcomes were dropped: this process had been declared dead", len(batch))
            self._on_declared_dead(id)
            return
        self.settled_count += len(batch)
        if settled.lost:
            self.lost_count += len(settled.lost)
            log.warning(
                "%d outcomes had been settled before, or their leases were lost: %s",
                len(settled.lost),
                ", ".join(settled.lost[:5]),
            )
        if self._on_parked is not None:
            for each in outcomes:
                if each.cached and each.id not in settled.lost:
                    self._on_parked(each.id, each.token)
        self._on_effects(Effects(settled.queues, settled.watchers, settled.next_due))

    def _reject(self, refused: Settlement, error: Exception) -> None:
        """Fail the one execution whose outcome the database refuses; if it refuses that too, give it back."""
        if self.batcher.is_closed:
            return  # it goes back with its lease
        if type(refused) is Outcome and refused.outcome == "failed":
            self.add(Outcome(refused.id, refused.token, "released", delay=_REFUSED_DELAY_SECONDS))
        elif type(refused) is not Outcome or refused.outcome not in ("released", "unstarted"):
            failure = EncodeError("the outcome", f"the database refuses it: {error}")
            self.add(Outcome(refused.id, refused.token, "failed", error=Raw(error_to_json(failure).encode())))


def _weight(settlement: Settlement) -> int:
    if isinstance(settlement, Completion):
        return len(bytes(settlement.result))
    values = sum(len(bytes(raw)) for raw in (settlement.result, settlement.error) if raw is not UNSET)
    return values + sum(operation.weigh() for operation in settlement.ops or ())


class _Write(NamedTuple):
    """Something that a handler waits to have stored."""

    item: SavedStep | Operation
    stored: "asyncio.Future[None]"


class Saver:
    """Stores finished steps and opened operations of running executions.

    Args:
        session: A connection of its own.
        engine: Builds the query.
        membership: The boot id under which the leases are held.
        on_effects: Told what a save set in motion.
        on_declared_dead: Told that the engine no longer knows the boot id.
    """

    def __init__(
        self,
        session: Session,
        engine: Engine,
        membership: Membership,
        on_effects: Callable[[Effects], None],
        on_declared_dead: Callable[[str], None],
    ) -> None:
        self._session = session
        self._engine = engine
        self._membership = membership
        self._on_effects = on_effects
        self._on_declared_dead = on_declared_dead
        self._loop = asyncio.get_running_loop()
        self.batcher: Batcher[_Write] = Batcher("save", self._send, self._reject, _write_weight)

    def add(self, item: SavedStep | Operation) -> "asyncio.Future[None]":
        """Take a step or operation; the future ends when it is stored, with `StaleLease` when the lease is lost."""
        stored: asyncio.Future[None] = self._loop.create_future()
        self.batcher.add(_Write(item, stored))
        return stored

    def give_up(self) -> None:
        """Tell every waiting handler that its lease is lost."""
        for write in self.batcher.pending:
            _fail(write)

    async def _send(self, batch: Sequence[_Write]) -> None:
        live = [write for write in batch if not write.stored.done()]
        if not live:
            return
        steps = [write.item for write in live if type(write.item) is SavedStep]
        operations = [write.item for write in live if type(write.item) is Operation]
        id = self._membership.id
        fault("before_save")
        saved = await self._session.run(self._engine.save(id, steps, operations))
        fault("after_save_reply")
        lost = None if saved is None else set(saved.lost or ())
        for write in live:
            if lost is None or write.item.id in lost:
                _fail(write)
            elif not write.stored.done():
                write.stored.set_result(None)
        if saved is None:
            self._on_declared_dead(id)
        elif saved.queues or saved.next_due is not None:
            self._on_effects(Effects(saved.queues, None, saved.next_due))

    def _reject(self, refused: _Write, error: Exception) -> None:
        if self.batcher.is_closed:
            _fail(refused)  # the lease goes back as the process leaves
        elif not refused.stored.done():
            name = refused.item.name
            failure = EncodeError(f"step {name!r}", f"the database refuses it: {error}")
            refused.stored.set_exception(error if isinstance(error, StaleLease) else failure)


def _fail(write: _Write) -> None:
    if not write.stored.done():
        write.stored.set_exception(StaleLease(UUID(write.item.id)))


def _write_weight(write: _Write) -> int:
    item = write.item
    if type(item) is SavedStep:
        return len(bytes(item.value)) + (0 if item.event is UNSET else len(bytes(item.event.payload)))
    return item.weigh() if type(item) is Operation else 0
