"""Handles on executions: what an enqueue returns, from inside or outside the process that runs it."""

import gc
from collections.abc import Sequence
from typing import Generic, Protocol
from uuid import UUID

from typing_extensions import TypeVar

from pgconductor.durations import Duration
from pgconductor.engine import Ended
from pgconductor.errors import ExecutionCancelled, ExecutionFailed
from pgconductor.model import State
from pgconductor.stored_error import error_from_json
from pgconductor.task import Call, Returns

R_co = TypeVar("R_co", covariant=True)


class Source(Protocol):
    """What a handle asks for its execution; the conductor is one."""

    async def wait_for_end(self, execution_id: UUID, timeout: Duration | None) -> Ended:
        """Wait until the execution has ended; see `Run.result` for what is raised."""
        ...

    def wait_for_end_sync(self, execution_id: UUID, timeout: Duration | None) -> Ended:
        """Do the same from code without an event loop."""
        ...

    async def state_of(self, execution_id: UUID) -> State:
        """Return where the execution stands."""
        ...

    async def cancel(self, execution: UUID, /, *, reason: str) -> bool:
        """Ask for the execution's end."""
        ...


class Run(Generic[R_co]):
    """A handle on one execution, from inside or outside the process that runs it.

    Handles are cheap and hold nothing open. Two are equal when they name the same execution.
    """

    __slots__ = ("__weakref__", "_id", "_returns", "_source")

    def __init__(self, id: UUID | str, returns: Returns, source: Source) -> None:
        self._id = id
        self._returns = returns
        self._source = source

    @property
    def id(self) -> UUID:
        """The execution's id: a UUID of version 7."""
        if isinstance(self._id, str):
            self._id = UUID(self._id)
        return self._id

    async def result(self, timeout: Duration | None = None) -> R_co:
        """Wait until the execution has ended, and return its value.

        The wait is woken by the database's hint; where none comes, a slow poll finds the end as well. Inside a
        handler, await a `Child`, which parks, or `ctx.invoke`; this waits on the worker.

        Args:
            timeout: How long to wait, in seconds or as `"30s"`; None waits without limit.

        Returns:
            What the handler returned, decoded to its annotated type.

        Raises:
            ExecutionFailed: It failed for good.
            ExecutionCancelled: It was cancelled.
            ExecutionNotFound: It does not exist, or retention has removed it.
            TimeoutError: It has not ended in time. It goes on; ask again.
            DecodeError: The value does not fit the type that this code gives it.

        Source: sql/functions/70_inspect.sql, `watch_results`
        """
        return self._read(await self._source.wait_for_end(self.id, timeout))

    def result_sync(self, timeout: Duration | None = None) -> R_co:
        """Wait until the execution has ended, and return its value; blocks the calling thread.

        Args:
            timeout: As for `result`.

        Returns:
            As `result`.

        Raises:
            ExecutionFailed: As for `result`, and so the others.
        """
        return self._read(self._source.wait_for_end_sync(self.id, timeout))

    async def state(self) -> State:
        """Return where the execution stands now.

        Returns:
            `scheduled`, `ready`, `running`, `waiting`, or the terminal `completed`, `failed`, `cancelled`.

        Raises:
            ExecutionNotFound: It does not exist, or retention has removed it.
        """
        return await self._source.state_of(self.id)

    async def cancel(self, reason: str = "") -> bool:
        """Ask for the end of the execution and of its unfinished attached children. Safe to repeat.

        What does not run is cancelled at once; what runs is told, and whatever it returns later is refused.

        Args:
            reason: Stored with the execution; at most 1,000 characters are kept.

        Returns:
            False if it had already ended, or is not known.
        """
        return await self._source.cancel(self.id, reason=reason)

    def _read(self, ended: Ended) -> R_co:
        if ended.outcome == "completed":
            value: R_co = self._returns.decode(bytes(ended.result).decode())
            return value
        raise error_of(ended)

    def __eq__(self, other: object) -> bool:
        """Compare the executions' ids."""
        return self.id == other.id if isinstance(other, Run) else NotImplemented

    def __hash__(self) -> int:
        """Agree with equality."""
        return hash(self.id)

    def __repr__(self) -> str:
        """Show the execution's id."""
        return f"<{type(self).__name__} {self.id}>"


def runs_of(ids: Sequence[str], calls: Sequence[Call[R_co]], source: Source) -> list[Run[R_co]]:
    """Make the handles on many calls, with the garbage collector held off: none of them is garbage yet.

    It would look for some after each 700 of them, and now and then through all that the program has.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        return [Run(id, call.returns, source) for id, call in zip(ids, calls, strict=True)]
    finally:
        if was_on:
            gc.enable()


def error_of(ended: Ended) -> ExecutionFailed | ExecutionCancelled:
    """Return the error that asking for the result of a failed or cancelled execution raises."""
    execution_id = UUID(ended.id)
    if ended.outcome == "cancelled":
        return ExecutionCancelled(ended.reason or "", execution_id=execution_id, task=ended.task)
    stored = error_from_json(bytes(ended.error))
    return ExecutionFailed(
        stored.message,
        execution_id=execution_id,
        task=ended.task,
        error_type=stored.type,
        remote_traceback=stored.render() if stored.traceback else "",
    )
