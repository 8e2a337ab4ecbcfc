"""A run of many: one call of a batch task's handler for several executions, each of which has an outcome of its own.

The first execution opens a batch; those that are claimed until it is full, or its task's `timeout` is over, join it.
Their leases are held meanwhile. All of them take one slot of the worker. What the handler returns is dealt out in
order; what it raises is everybody's failure, and each goes by its own retry budget. A payload that cannot be read, and
a result that cannot be stored, are the failure of that execution alone. One that is cancelled leaves the batch: before
the handler is called it is not handed over, afterwards its result is dropped.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from pgconductor.attempt import Attempt
from pgconductor.claimed import Missing
from pgconductor.context import BatchContext
from pgconductor.errors import AttemptTimeout, ConductorError
from pgconductor.loading import complete, missing_of
from pgconductor.task import Task
from pgconductor.written import Completion, Outcome

Settlements = list[tuple[Attempt, Completion | Outcome | None]]


class BatchMember(Attempt):
    """One execution of a batch."""

    __slots__ = ("_batch",)

    def join(self, batch: "BatchRun") -> None:
        """Belong to a batch."""
        self._batch = batch

    def _interrupt(self) -> None:
        self._batch.on_leaving()

    def request_release(self, *, hard: bool = False) -> None:
        """Leave if the handler was not called yet; with `hard`, in any case."""
        super().request_release(hard=hard)
        self._batch.on_leaving()

    def may_start(self) -> bool:
        """Whether it is still to be handed to the handler."""
        return not (self.is_over() or self.is_leaving)

    async def load(self, missing: Missing) -> None:
        """Load its payload, which is large."""
        complete(self.claimed, None, await self.host.load(missing))

    def element(self) -> Any:
        """Read its payload.

        Raises:
            DecodeError: It no longer fits.
        """
        return cast("Any", self.task.payload).decode_element(bytes(self.claimed.payload))

    def returned(self, value: Any) -> Completion | Outcome | None:
        """Return what is to be settled when the handler has returned this execution's result."""
        if self.is_over():
            return self.leave(self.exit or "released")
        try:
            return self._returned(value)
        except Exception as error:  # noqa: BLE001 (a result that cannot be stored is this execution's failure)
            return self._failed(error)

    def failed(self, error: BaseException) -> Completion | Outcome | None:
        """Return what is to be settled when the handler has raised."""
        return self.leave(self.exit or "released") if self.is_over() else self._failed(error)


class BatchRun:
    """One call of a batch task's handler, from its first execution on.

    Args:
        task: A task with `batch=`.
    """

    def __init__(self, task: Task[..., Any]) -> None:
        self.task = task
        self.members: list[BatchMember] = []
        self.is_open = True
        self._size = task.config.batch.size if task.config.batch else 1
        self._timeout = task.config.batch.timeout.total_seconds() if task.config.batch else 0.0
        self._go = asyncio.Event()
        self._handler: asyncio.Future[Any] | None = None

    @property
    def room(self) -> int:
        """How many more it takes."""
        return self._size - len(self.members) if self.is_open else 0

    def add(self, member: BatchMember) -> None:
        """Take an execution; the last that fits has the handler called."""
        member.join(self)
        self.members.append(member)
        if not self.room:
            self.close()

    def close(self) -> None:
        """Wait for no more."""
        self.is_open = False
        self._go.set()

    def on_leaving(self) -> None:
        """Look whether to go on: a member is to leave."""
        if all(member.is_over() or (self._handler is None and member.is_leaving) for member in self.members):
            self.close()
            if self._handler is not None:
                self._handler.cancel()

    async def run(self) -> Settlements:
        """Wait for more, call the handler, and return what is to be settled of each execution."""
        if self._timeout and self.is_open:
            await asyncio.wait([asyncio.ensure_future(self._go.wait())], timeout=self._timeout)
        self.close()
        failures = await self._load()
        done: Settlements = []
        elements: list[tuple[BatchMember, Any]] = []
        for member in self.members:
            if not member.may_start():
                done.append((member, member.unstarted()))
            elif member in failures:
                done.append((member, member.failed(failures[member])))
            else:
                try:
                    elements.append((member, member.element()))
                except Exception as error:  # noqa: BLE001 (one bad payload delays no other)
                    done.append((member, member.failed(error)))
        for member in self.members:
            member.closed = True
        return done + await self._call(elements) if elements else done

    async def _load(self) -> dict[BatchMember, BaseException]:
        """Load the payloads that are large; return what failed."""
        found = [(member, missing_of(member.claimed, None)) for member in self.members if member.may_start()]
        large = [(member, missing) for member, missing in found if missing is not None]
        failures = await asyncio.gather(*(member.load(missing) for member, missing in large), return_exceptions=True)
        return {member: failure for (member, _), failure in zip(large, failures, strict=True) if failure is not None}

    async def _call(self, elements: list[tuple[BatchMember, Any]]) -> Settlements:
        fn = cast("Callable[..., Awaitable[Any]]", self.task.fn)
        context = BatchContext[Any](elements[0][0])
        handler = fn(context, [element for _, element in elements])
        self._handler = asyncio.get_running_loop().create_task(_guarded(handler))
        try:
            values = self._checked(await self._within(self._handler), len(elements))
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 (a handler's SystemExit is its failure, not the process')
            return [(member, member.failed(error)) for member, _ in elements]
        return [(member, member.returned(value)) for (member, _), value in zip(elements, values, strict=True)]

    async def _within(self, handler: "asyncio.Future[Any]") -> Any:
        timeout = self.task.config.timeout
        done, _ = await asyncio.wait([handler], timeout=timeout.total_seconds() if timeout else None)
        if not done and timeout:
            handler.cancel()
            await asyncio.wait([handler])
            raise AttemptTimeout(self.task.name, timeout)
        return handler.result()

    def _checked(self, values: Any, count: int) -> list[Any]:
        if values is None:
            return [None] * count
        found = type(values).__name__
        if isinstance(values, list):
            results: list[Any] = values  # pyright: ignore[reportUnknownVariableType]
            if len(results) == count:
                return results
            found = f"{len(results)} results"
        raise ConductorError(
            f"batch task {self.task.name!r} was given {count} payloads and returned {found}; "
            "return a list with one result a payload, or None"
        )


async def _guarded(handler: Awaitable[Any]) -> Any:
    """Make a failure of a handler's attempt to end the process: from a task of its own it would end the event loop."""
    try:
        return await handler
    except (SystemExit, KeyboardInterrupt) as error:
        raise ConductorError(f"the handler raised {type(error).__name__}: {error}") from error
