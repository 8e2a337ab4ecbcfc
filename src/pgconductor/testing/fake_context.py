"""Contexts without a database, for unit tests of the bare handler: `await checkout(FakeContext(...), 7)`."""

import copy
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Concatenate, Literal, TypeVar, cast, overload
from uuid import UUID, uuid4

from typing_extensions import ParamSpec
from typing_extensions import TypeVar as DefaultTypeVar

from pgconductor.claimed import NULL, Claimed
from pgconductor.context import Context
from pgconductor.durations import Duration, parse_duration
from pgconductor.errors import ConfigurationError
from pgconductor.journal import Journal
from pgconductor.memos import Memos
from pgconductor.model import EventDef, RetryPolicy
from pgconductor.operations import (
    PLAIN,
    Child,
    Marked,
    RunFacts,
    StepOptions,
    check_instant,
    is_final,
    members_of,
    partition,
)
from pgconductor.signature import return_codec_of
from pgconductor.sync_context import SyncContext
from pgconductor.task import Call, Task
from pgconductor.testing.script import Asked, Script, arguments, copied

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
E = TypeVar("E")
D = DefaultTypeVar("D", default=None)

_UNSET: Any = object()
_NEEDS_DATABASE = "; to run it, test with the fixture conductor_test"


class _Fake(RunFacts[D]):
    """What both fakes share: the facts that the test sets, the script, and how a step's function is tried.

    Operations are asked of a journal, too, which knows of no earlier run: it refuses what it refuses in production.
    """

    _options: StepOptions = PLAIN

    def __init__(
        self,
        *,
        deps: D = _UNSET,
        results: Mapping[str, Any] | None = None,
        attempt: int = 1,
        cancelled: bool = False,
        trigger: str = "invoke",
    ) -> None:
        self._script = Script(results or {}, is_cancelled=cancelled)
        self._given_deps = deps
        self._given_attempt = attempt
        self._given_trigger = trigger
        self._id = uuid4()
        self._journal = Journal(Claimed(str(self._id), 0, 0, NULL), 0, Memos())

    @property
    def calls(self) -> list[Asked]:
        """What the handler asked for, in order."""
        return self._script.calls

    @property
    def deps(self) -> D:
        """What the test gave.

        Raises:
            ConfigurationError: It gave nothing.
        """
        if self._given_deps is _UNSET:
            raise ConfigurationError(type(self).__name__, "the handler uses ctx.deps", "give it deps=")
        return self._given_deps

    @cached_property
    def execution_id(self) -> UUID:
        """A random id."""
        return self._id

    @cached_property
    def parent_id(self) -> UUID | None:
        """None: a root."""
        return None

    @cached_property
    def root_id(self) -> UUID:
        """The same as `execution_id`."""
        return self._id

    @property
    def task(self) -> str:
        """Always `test`."""
        return "test"

    @property
    def queue(self) -> str:
        """Always `default`."""
        return "default"

    @property
    def attempt(self) -> int:
        """What the test gave."""
        return self._given_attempt

    @property
    def trigger(self) -> str:
        """What the test gave."""
        return self._given_trigger

    @cached_property
    def logger(self) -> "logging.LoggerAdapter[Any]":
        """A plain logger."""
        return logging.LoggerAdapter(logging.getLogger("pgconductor.task.test"), {})

    @property
    def cancelled(self) -> bool:
        """What the test gave; if true, the next operation raises `CancelledError`."""
        return self._script.is_cancelled

    def _with(self, retry: RetryPolicy | None, max_attempts: int, timeout: Duration | None) -> Any:
        other = copy.copy(self)
        other._options = StepOptions(retry, max_attempts, timeout)
        return other

    def _gives_up(self, error: Exception, number: int) -> bool:
        return number >= self._options.max_attempts or is_final(error, self._options.retry)

    def _transacted(self, name: str, fn: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        self._script.note("transaction", name, given)
        self._journal.begin(name, "transaction")
        value = self._script.given("transaction", name, _NEEDS_DATABASE)
        return copied(return_codec_of(fn), value, f"transaction {name!r}")

    def _slept(self, name: str, duration: Duration) -> None:
        slept = parse_duration(duration, f"sleep {name!r}: duration")
        self._script.note("sleep", name, slept)
        self._journal.sleep(name, due_in=slept.total_seconds())

    def _slept_until(self, name: str, at: datetime) -> None:
        self._script.note("sleep_until", name, check_instant(name, at))
        self._journal.sleep(name, due_at=at)

    def _invoked(self, name: str, call: Call[R], timeout: Duration | None, on_timeout: str) -> R:
        self._script.note("invoke", name, call)
        self._journal.invoke(name, call, timeout, on_timeout)
        return cast("R", self._script.child_value("invoke", name, call))

    def _invoked_all(
        self, name: str, calls: Sequence[Call[R]], timeout: Duration | None, max_in_flight: int | None
    ) -> list[R]:
        self._script.note("invoke_all", name, list(calls))
        self._journal.invoke_all(name, calls, timeout, max_in_flight)
        return self._script.child_values(name, calls)

    def _started(self, name: str, call: Call[R], *, detached: bool) -> Child[R]:
        self._script.note("start", name, call)
        child_id, _ = self._journal.start(name, call, detached=detached)
        return Child(child_id, name, call, self, detached=detached)

    def _waited(
        self, name: str, children: Sequence[Child[R]], count: int | None, timeout: Duration | None
    ) -> tuple[list[Child[R]], list[Child[R]]]:
        members, needed = members_of(name, children, count)
        if not children:
            return [], []
        self._script.note("wait", name, members)
        self._journal.wait(name, members, needed, timeout)
        return partition(children, self._script.finished(name, children, needed, timeout))

    def _resulted(self, child: Child[R], timeout: Duration | None) -> R:
        members, needed = members_of("result", [child], 1)
        if timeout is not None:
            name = self._journal.result_name(child.step)
            self._journal.wait(name, members, needed, timeout, is_ours=True)
        return cast("R", self._script.child_value("start", child.step, child.call))

    def _waited_for(self, name: str, event: EventDef[E], where: dict[str, Any] | None, timeout: Duration | None) -> E:
        self._script.note("wait_for", name, where)
        self._journal.wait_for(name, event, where, timeout)
        return cast("E", self._script.of_type(event.payload, "wait_for", name))

    def _emitted(self, event: EventDef[E], payload: E) -> UUID:
        self._journal.emit(event, payload)
        self._script.note("emit", event.name, payload, is_named=False)
        return self._script.execution_id(self._script.numbered(f"emit:{event.name}"))


class FakeContext(_Fake[D], Context[D]):
    """A context for the unit test of an `async def` handler, without a database.

    `ctx.step` runs its function, and the value goes through JSON as in production. Everything that reaches further
    gets its answer from `results`. Nothing waits: sleeps, and pauses between the tries of a step, are over at once.
    Names, durations, the options of children and the payloads of events are refused where production refuses them.

        ctx = FakeContext(deps=Deps(...), results={"charge": Receipt("c1")})
        assert await checkout(ctx, 7) == "c1"
        assert ("sleep", "cool-off", timedelta(days=1)) in ctx.calls

    Args:
        deps: What the handler finds as `ctx.deps`.
        results: By the name of the operation: what a step, a child, a transaction or a wait gives; an exception is
            raised. A step of that name does not run. Of `invoke_all` a list, in which exceptions stand for failed
            children; of `ctx.wait` the names of the children that have ended, by default those with results.
        attempt: What the handler finds as `ctx.attempt`.
        cancelled: Whether the execution is being cancelled.
        trigger: What the handler finds as `ctx.trigger`.

    Attributes:
        calls: What the handler asked for, in order, as `(verb, name, value)`; see `Asked`.
    """

    @overload
    async def step(self, name: str, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    async def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def step(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the function, or give the result of that name."""
        self._script.note("step", name, arguments(args, kwargs))
        self._journal.begin(name, "step")
        value = self._script.given("step", name) if self._script.has(name) else await self._try(name, fn, args, kwargs)
        return copied(return_codec_of(fn), value, f"step {name!r}")

    async def _try(self, name: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        number = 1
        while True:
            try:
                with Marked(name):
                    value = fn(*args, **kwargs)
                    return await value if inspect.isawaitable(value) else value
            except Exception as error:
                if self._gives_up(error, number):
                    raise
            number += 1

    def step_options(
        self, *, retry: RetryPolicy | None = None, max_attempts: int = 1, timeout: Duration | None = None
    ) -> "FakeContext[D]":
        """Return this context with other rules for its steps; tries follow each other at once, without a timeout."""
        return cast("FakeContext[D]", self._with(retry, max_attempts, timeout))

    async def transaction(
        self, name: str, fn: Callable[Concatenate[Any, P], Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Give the result of that name; the function, which needs a connection, does not run."""
        return cast("T", self._transacted(name, fn, arguments(args, kwargs)))

    async def sleep(self, name: str, duration: Duration) -> None:
        """Note it."""
        self._slept(name, duration)

    async def sleep_until(self, name: str, at: datetime) -> None:
        """Note it."""
        self._slept_until(name, at)

    async def checkpoint(self) -> None:
        """Note it."""
        self._script.note("checkpoint", "", is_named=False)

    async def invoke(
        self,
        name: str,
        call: Call[R],
        *,
        timeout: Duration | None = None,
        on_timeout: Literal["cancel", "keep"] = "cancel",
    ) -> R:
        """Give the result of that name."""
        return self._invoked(name, call, timeout, on_timeout)

    async def invoke_all(
        self,
        name: str,
        calls: Sequence[Call[R]],
        *,
        timeout: Duration | None = None,
        max_in_flight: int | None = None,
    ) -> list[R]:
        """Give the list of results of that name."""
        return self._invoked_all(name, calls, timeout, max_in_flight)

    async def start(self, name: str, call: Call[R], *, detached: bool = False) -> Child[R]:
        """Note it; the child gives the result of that name when it is awaited."""
        return self._started(name, call, detached=detached)

    async def wait(
        self, name: str, children: Sequence[Child[R]], *, count: int | None = None, timeout: Duration | None = None
    ) -> tuple[list[Child[R]], list[Child[R]]]:
        """Find those children ended whose results are given."""
        return self._waited(name, children, count, timeout)

    async def child_result(self, child: Child[R], timeout: Duration | None) -> R:
        """Give the result of a started child; `Child.result` calls this."""
        return self._resulted(child, timeout)

    async def wait_for(
        self, name: str, event: EventDef[E], *, where: dict[str, Any] | None = None, timeout: Duration | None = None
    ) -> E:
        """Give the result of that name: the event's payload."""
        return self._waited_for(name, event, where, timeout)

    async def emit(self, event: EventDef[E], payload: E) -> UUID:
        """Note it, if the payload is of the event's type."""
        return self._emitted(event, payload)

    async def cancel(self, execution_id: UUID, reason: str = "") -> bool:
        """Note it; true, unless a result `cancel#1`, `cancel#2`, … is given."""
        self._script.note("cancel", str(execution_id), reason, is_named=False)
        return bool(self._script.optional(self._script.numbered("cancel"), True))

    async def schedule(self, name: str, call: Call[Any], *, cron: str, tz: str = "UTC") -> None:  # noqa: ARG002
        """Note it."""
        self._script.note("schedule", name, call, is_named=False)

    async def unschedule(self, name: str, task: Task[..., Any]) -> None:
        """Note it."""
        self._script.note("unschedule", name, task.name, is_named=False)


class FakeSyncContext(_Fake[D], SyncContext[D]):
    """A context for the unit test of a plain `def` handler, without a database. See `FakeContext`.

    Args:
        deps: As for `FakeContext`, and so the others.
    """

    def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the function, or give the result of that name."""
        self._script.note("step", name, arguments(args, kwargs))
        self._journal.begin(name, "step")
        value = self._script.given("step", name) if self._script.has(name) else self._try(name, fn, args, kwargs)
        return cast("T", copied(return_codec_of(fn), value, f"step {name!r}"))

    def _try(self, name: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        number = 1
        while True:
            try:
                with Marked(name):
                    return fn(*args, **kwargs)
            except Exception as error:
                if self._gives_up(error, number):
                    raise
            number += 1

    def step_options(
        self, *, retry: RetryPolicy | None = None, max_attempts: int = 1, timeout: Duration | None = None
    ) -> "FakeSyncContext[D]":
        """Return this context with other rules for its steps; tries follow each other at once, without a timeout."""
        return cast("FakeSyncContext[D]", self._with(retry, max_attempts, timeout))

    def transaction(self, name: str, fn: Callable[Concatenate[Any, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Give the result of that name; the function, which needs a connection, does not run."""
        return cast("T", self._transacted(name, fn, arguments(args, kwargs)))

    def sleep(self, name: str, duration: Duration) -> None:
        """Note it."""
        self._slept(name, duration)

    def sleep_until(self, name: str, at: datetime) -> None:
        """Note it."""
        self._slept_until(name, at)

    def checkpoint(self) -> None:
        """Note it."""
        self._script.note("checkpoint", "", is_named=False)

    def invoke(
        self,
        name: str,
        call: Call[R],
        *,
        timeout: Duration | None = None,
        on_timeout: Literal["cancel", "keep"] = "cancel",
    ) -> R:
        """Give the result of that name."""
        return self._invoked(name, call, timeout, on_timeout)

    def invoke_all(
        self,
        name: str,
        calls: Sequence[Call[R]],
        *,
        timeout: Duration | None = None,
        max_in_flight: int | None = None,
    ) -> list[R]:
        """Give the list of results of that name."""
        return self._invoked_all(name, calls, timeout, max_in_flight)

    def start(self, name: str, call: Call[R], *, detached: bool = False) -> Child[R]:
        """Note it; the child gives the result of that name when it is asked for it."""
        return self._started(name, call, detached=detached)

    def wait(
        self, name: str, children: Sequence[Child[R]], *, count: int | None = None, timeout: Duration | None = None
    ) -> tuple[list[Child[R]], list[Child[R]]]:
        """Find those children ended whose results are given."""
        return self._waited(name, children, count, timeout)

    def child_result(self, child: Child[R], timeout: Duration | None) -> R:
        """Give the result of a started child; `Child.result_sync` calls this."""
        return self._resulted(child, timeout)

    def wait_for(
        self, name: str, event: EventDef[E], *, where: dict[str, Any] | None = None, timeout: Duration | None = None
    ) -> E:
        """Give the result of that name: the event's payload."""
        return self._waited_for(name, event, where, timeout)

    def emit(self, event: EventDef[E], payload: E) -> UUID:
        """Note it, if the payload is of the event's type."""
        return self._emitted(event, payload)

    def cancel(self, execution_id: UUID, reason: str = "") -> bool:
        """Note it; true, unless a result `cancel#1`, `cancel#2`, … is given."""
        self._script.note("cancel", str(execution_id), reason, is_named=False)
        return bool(self._script.optional(self._script.numbered("cancel"), True))

    def schedule(self, name: str, call: Call[Any], *, cron: str, tz: str = "UTC") -> None:  # noqa: ARG002
        """Note it."""
        self._script.note("schedule", name, call, is_named=False)

    def unschedule(self, name: str, task: Task[..., Any]) -> None:
        """Note it."""
        self._script.note("unschedule", name, task.name, is_named=False)
