"""What an `async def` handler sees. Each operation asks the journal first; see journal.py and attempt.py."""

import asyncio
import copy
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Concatenate, Literal, cast, overload
from uuid import UUID

from typing_extensions import ParamSpec, TypeVar

from pgconductor.attempt import Attempt
from pgconductor.checks import check_execution_id
from pgconductor.codec import Codec
from pgconductor.durations import Duration, seconds
from pgconductor.errors import AttemptTimeout, Suspend
from pgconductor.faults import fault
from pgconductor.journal import CANCELLED, PENDING, remember_call
from pgconductor.model import EventDef, RetryPolicy
from pgconductor.operations import (
    PLAIN,
    Child,
    RunFacts,
    StepOptions,
    Trying,
    check_instant,
    check_reason,
    check_step_function,
    is_final,
    members_of,
    partition,
    run_in_own_thread,
)
from pgconductor.schedules import schedule_of
from pgconductor.signature import return_codec_of
from pgconductor.task import Call, Task, check_task, runs_on_loop
from pgconductor.transactions import commit_once
from pgconductor.triggers import handed_over

if TYPE_CHECKING:
    from pgconductor.claimed import Recorded
    from pgconductor.engine import Engine, Query

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
E = TypeVar("E")
D = TypeVar("D", default=None)


class Context(RunFacts[D]):
    """What an `async def` handler is given: its durable operations, its deps and the facts of its run.

    Every operation has a name, unique in the execution. What an operation gave once it gives again whenever the
    handler runs again. A name may be used once a run; in a loop, number it.
    """

    _options: StepOptions = PLAIN

    # ------------------------------------------------------------ steps

    @overload
    async def step(self, name: str, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    async def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def step(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a function once and remember what it returned: a recorded step is never run again.

        The value is stored before this returns, and comes back through JSON the first time too, so that the first run
        sees what later ones see. A plain function runs on the event loop. A failing step is not remembered.

        Args:
            name: 1 to 200 bytes, unique in the execution.
            fn: Coroutine function or plain function. It must not use the context. A step that is interrupted runs
                again, so what it does outside should bear repetition.
            *args: For `fn`.
            **kwargs: For `fn`.

        Returns:
            What `fn` returned, decoded to its return annotation.

        Raises:
            EncodeError: The value cannot be stored; the execution fails unless it is caught.
            DuplicateStep: The name has been used in this run.
            StepMismatch: The name is recorded for another kind of operation.
            AttemptTimeout: `step_options(timeout=)` passed.

        Source: sql/functions/25_save.sql
        """
        attempt = self._attempt
        memo = attempt.recall(name, "step")
        if memo is None and attempt.must_stay(name):
            await attempt.stay(name)
        check_step_function(fn, f"step {name!r}")
        codec = return_codec_of(fn)
        memo = memo or attempt.journal.begin(name, "step")
        if memo is not None:
            return _recorded(codec, memo)
        with _Working(attempt):
            fault("before_step")
            began_at = time.monotonic()
            value = await self._tries(name, fn, args, kwargs)
            raw, copied = codec.store(value, f"step {name!r}")
            fault("before_step_save")
            step = attempt.journal.finished(name, "step", raw, began_at)
            await attempt.store(attempt.host.save(step), lambda _: attempt.journal.remember(step))
            fault("after_step_save")
        return copied

    def step_options(
        self, *, retry: RetryPolicy | None = None, max_attempts: int = 1, timeout: Duration | None = None
    ) -> "Context[D]":
        """Return this context with other rules for its steps: `await ctx.step_options(max_attempts=3).step(...)`.

        Args:
            retry: How long to wait between tries, on the worker.
            max_attempts: How often a step is tried within one attempt of the task; at least 1.
            timeout: How long one try may run. A plain function then runs in a thread of its own, since nothing could
                end it on the event loop, and may go on beside the next try.

        Returns:
            A context of the same run.

        Raises:
            ConfigurationError: `max_attempts` is below 1.
        """
        other = copy.copy(self)
        other._options = StepOptions(retry, max_attempts, timeout)
        return other

    def _tries(self, name: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Awaitable[Any]:
        once = self._options.max_attempts == 1
        return self._try(name, fn, args, kwargs) if once else self._try_often(name, fn, args, kwargs)

    async def _try_often(self, name: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        options = self._options
        for number in range(1, options.max_attempts):
            try:
                return await self._try(name, fn, args, kwargs)
            except Exception as error:
                if is_final(error, options.retry):
                    raise
                await asyncio.sleep(self._pause_after(name, number, options, error))
        return await self._try(name, fn, args, kwargs)

    async def _try(self, name: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        timeout = self._options.timeout
        with Trying(self._attempt, name):
            if timeout is None:
                value = fn(*args, **kwargs)
                return await value if inspect.isawaitable(value) else value
            return await self._limited(name, fn, args, kwargs, timeout)

    async def _limited(self, name: str, fn: Callable[..., Any], args: Any, kwargs: Any, timeout: float) -> Any:
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                if inspect.iscoroutinefunction(fn):
                    return await fn(*args, **kwargs)
                value = await asyncio.wrap_future(run_in_own_thread(lambda: fn(*args, **kwargs)))
                return await value if inspect.isawaitable(value) else value
        except TimeoutError:
            if limit.expired():
                raise AttemptTimeout(self.task, timeout, step=name) from None
            raise

    async def transaction(
        self, name: str, fn: Callable[Concatenate[Any, P], Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a function in a transaction of the engine's database; its writes and the step commit together.

        Args:
            name: As for `step`.
            fn: Coroutine function; its first argument is a psycopg `AsyncConnection`. It cannot commit by itself.
            *args: For `fn`.
            **kwargs: For `fn`.

        Returns:
            What `fn` returned, decoded to its return annotation.

        Raises:
            EncodeError: The value cannot be stored; nothing was written.
            DuplicateStep: The name has been used in this run.
            StepMismatch: The name is recorded for another kind of operation.

        Source: sql/functions/25_save.sql, `save_transaction`
        """
        attempt = self._attempt
        await attempt.boundary(name)
        check_step_function(fn, f"transaction {name!r}")
        codec = return_codec_of(fn)
        memo = attempt.journal.begin(name, "transaction")
        if memo is not None:
            return cast("T", _recorded(codec, memo))
        with _Working(attempt):
            return cast("T", await commit_once(attempt, name, lambda conn: fn(conn, *args, **kwargs), codec))

    # ------------------------------------------------------------ sleeping

    async def sleep(self, name: str, duration: Duration) -> None:
        """Park for a while, on the database's clock.

        Args:
            name: As for `step`.
            duration: From the first time the handler came here; seconds, `"15m"` or a `timedelta`.
        """
        await self._attempt.boundary(name)
        due_in = seconds(duration, f"sleep {name!r}: duration")
        if self._attempt.journal.sleep(name, due_in=due_in) is PENDING:
            await self._attempt.pend(name)

    async def sleep_until(self, name: str, at: datetime) -> None:
        """Park until an instant of the database's clock.

        Args:
            name: As for `step`.
            at: With a time zone; one that has passed returns soon.
        """
        await self._attempt.boundary(name)
        if self._attempt.journal.sleep(name, due_at=check_instant(name, at)) is PENDING:
            await self._attempt.pend(name)

    async def checkpoint(self) -> None:
        """Let shutdown, cancellation or a closing window leave the handler here; else return at once."""
        await self._attempt.boundary()
        await asyncio.sleep(0)

    # ------------------------------------------------------------ children

    async def invoke(
        self,
        name: str,
        call: Call[R],
        *,
        timeout: Duration | None = None,
        on_timeout: Literal["cancel", "keep"] = "cancel",
    ) -> R:
        """Create a child, park until it has ended, and return its value.

        Creating the child and leaving the worker are one transaction; the child's end and becoming ready again are
        another. Use it under `asyncio.gather` or a `TaskGroup` to wait for several at once.

        Args:
            name: As for `step`.
            call: `task.bind(...)`.
            timeout: From here to the child's end, its time in the queue and its retries included.
            on_timeout: What happens to the child then: `cancel` it with its own children, or `keep` it running.

        Returns:
            What the child returned.

        Raises:
            ChildFailed: It failed for good. Uncaught, this execution fails at once.
            ChildCancelled: It was cancelled. Uncaught, this execution fails at once.
            ChildTimeout: It did not end in time. Uncaught, this attempt fails, and the next one invokes afresh.
            DepthExceeded: This execution stands 100 levels below its root.

        Source: sql/functions/30_settle.sql and 40_wake.sql
        """
        attempt = self._attempt
        if type(call) is Call and (memo := attempt.recall(name, "invoke", call.task)) is not None:
            value: R = attempt.journal.child_value(memo, call)
            return value
        if attempt.must_stay(name):
            await attempt.stay(name)
        answer = attempt.journal.invoke(name, call, timeout, on_timeout)
        if answer is PENDING:
            await attempt.pend(name)
        return cast("R", answer)

    async def invoke_all(
        self,
        name: str,
        calls: Sequence[Call[R]],
        *,
        timeout: Duration | None = None,
        max_in_flight: int | None = None,
    ) -> list[R]:
        """Create many children in one round trip, park once, and return their values in order.

        Args:
            name: As for `step`.
            calls: Up to 10,000.
            timeout: For all of them; on expiry the rest is cancelled.
            max_in_flight: How many may be unfinished at a time; the database releases the next ones.

        Returns:
            The children's values.

        Raises:
            ExceptionGroup: All have ended, and some failed or were cancelled: a `ChildFailed` for each.
            ChildTimeout: Not all ended in time.
            TooMany: More than 10,000 calls.
        """
        await self._attempt.boundary(name)
        answer = self._attempt.journal.invoke_all(name, calls, timeout, max_in_flight)
        return cast("list[R]", await self._answer(name, answer))

    async def start(self, name: str, call: Call[R], *, detached: bool = False) -> Child[R]:
        """Create a child and go on.

        Args:
            name: As for `step`.
            call: `task.bind(...)`.
            detached: Outside this execution's tree: not cancelled with it, and nothing to wait for.

        Returns:
            The child, for `wait` or `await child.result()`.
        """
        attempt = self._attempt
        await attempt.boundary()
        child_id, operation = attempt.journal.start(name, call, detached=detached)
        if operation is not None:
            with _Working(attempt):
                await attempt.store(attempt.host.open(operation), lambda _: attempt.journal.remember_open(operation))
        return Child(child_id, name, call, self, detached=detached)

    async def wait(
        self, name: str, children: Sequence[Child[R]], *, count: int | None = None, timeout: Duration | None = None
    ) -> tuple[list[Child[R]], list[Child[R]]]:
        """Park until so many started children have ended; a failed one counts too.

        Args:
            name: As for `step`.
            children: Started by this execution, attached.
            count: How many; None for all.
            timeout: After it, return with what there is.

        Returns:
            Those that had ended and the others, as of that moment, in every run.

        Raises:
            ValueError: `count` is not between 1 and the number of children, or a child is given twice.
        """
        return await self._wait(name, children, count, timeout)

    async def _wait(
        self,
        name: str,
        children: Sequence[Child[R]],
        count: int | None,
        timeout: Duration | None,
        *,
        is_ours: bool = False,
    ) -> tuple[list[Child[R]], list[Child[R]]]:
        members, needed = members_of(name, children, count)
        if not children:
            return [], []
        await self._attempt.boundary(name)
        done = await self._answer(name, self._attempt.journal.wait(name, members, needed, timeout, is_ours=is_ours))
        return partition(children, cast("list[str]", done))

    async def child_result(self, child: Child[R], timeout: Duration | None) -> R:
        """Park until a started child has ended; `Child.result` calls this."""
        members_of("result", [child], 1)
        journal = self._attempt.journal
        if timeout is not None:
            name = journal.result_name(child.step)
            done, _ = await self._wait(name, [child], 1, timeout, is_ours=True)
            if not done:
                raise journal.late_result(name, child.step)
        name = journal.result_name(child.step)
        await self._attempt.boundary(name)
        return cast("R", await self._answer(name, journal.result_of(name, child.step, child.call)))

    async def _answer(self, name: str, answer: object) -> object:
        if answer is PENDING:
            await self._attempt.pend(name)
        return answer

    # ------------------------------------------------------------ reaching out

    async def cancel(self, execution_id: UUID, reason: str = "") -> bool:
        """Ask for the end of an execution, once: a run that comes here again gets the first answer.

        Args:
            execution_id: Any execution of this engine.
            reason: Stored with it.

        Returns:
            False if it had already ended, or is not known.
        """
        attempt = self._attempt
        await attempt.boundary()
        wanted = check_execution_id(execution_id, "cancel")
        name = attempt.journal.numbered("cancel")
        memo = attempt.journal.begin(name, "call")
        if memo is not None:
            return bytes(memo.value) == b"true"
        query = attempt.host.engine.cancel_as_step(
            attempt.host.orchestrator_id, attempt.claimed.id, attempt.token, name, wanted, check_reason(reason)
        )
        with _Working(attempt):
            moved = await attempt.store(
                attempt.host.run_query(query), lambda moved: attempt.journal.remember_cancel(name, moved)
            )
        if moved is None:
            attempt.exit = "abandoned"
            raise Suspend
        return moved.result in CANCELLED

    async def wait_for(
        self, name: str, event: EventDef[E], *, where: dict[str, Any] | None = None, timeout: Duration | None = None
    ) -> E:
        """Park until an event is emitted, and return its payload.

        An event counts that was emitted after this execution was created, even before the handler came here. It
        answers at most one wait of an execution, so a second wait gets the next event.

        Args:
            name: As for `step`.
            event: From `Conductor.event`.
            where: What the payload must contain, as JSON containment: `{"order_id": 7}`, nested objects included.
            timeout: From the first time the handler came here, on the database's clock.

        Returns:
            The payload.

        Raises:
            WaitTimeout: No such event came in time; so in every run. Uncaught, this attempt fails, and the next one
                waits afresh.
            StepMismatch: The name is recorded for another kind of operation or another event.
            DecodeError: The payload is not of the event's type; SQL can emit anything.

        Source: sql/functions/56_events.sql
        """
        await self._attempt.boundary(name)
        return cast("E", await self._answer(name, self._attempt.journal.wait_for(name, event, where, timeout)))

    async def emit(self, event: EventDef[E], payload: E) -> UUID:
        """Emit an event, once: a run that comes here again gets the first one's id.

        The event and the record that it was emitted are one transaction.

        Args:
            event: From `Conductor.event`.
            payload: Of the event's type; at most 1 MiB of JSON.

        Returns:
            The event's id.

        Raises:
            EncodeError: The payload cannot be stored; the execution fails unless it is caught.

        Source: sql/functions/25_save.sql, `emit_of_steps`
        """
        attempt = self._attempt
        await attempt.boundary()
        event_id, step = attempt.journal.emit(event, payload)
        if step is not None:
            with _Working(attempt):
                await attempt.store(attempt.host.save(step), lambda _: attempt.journal.remember(step))
        return event_id

    async def schedule(self, name: str, call: Call[Any], *, cron: str, tz: str = "UTC") -> None:
        """Start a call on a schedule from now on, once per tick; a schedule of that name and task is changed.

        It outlives this execution, deploys and restarts, until `unschedule`. Of ticks that fell while nothing ran, the
        latest runs. With an unchanged expression and zone, the ticks go on as they were.

        Args:
            name: What `Tick.name` says; with the task, it is the schedule's identity.
            call: `task.bind(...)`; its options `queue` and `priority` hold for every tick.
            cron: As for `cron(...)`.
            tz: The IANA zone whose clock the fields mean.

        Raises:
            ConfigurationError: The expression cannot be read or never fires, the zone is not known, or the call has
                options that say when or whether it runs. Nothing was scheduled.

        Source: sql/functions/55_schedules.sql
        """
        row = schedule_of(name, call, cron, tz)
        await self._record_once("schedule", lambda engine, step, lease: engine.schedule_as_step(lease, step, row))

    async def unschedule(self, name: str, task: Task[..., Any]) -> None:
        """Remove a schedule that `schedule` made, if there is one. What it has started goes on.

        Args:
            name: As given to `schedule`.
            task: The task of its call.
        """
        check_task(task, f"unschedule {name!r}")
        await self._record_once(
            "unschedule", lambda engine, step, lease: engine.unschedule_as_step(lease, step, task.name, name)
        )

    async def _record_once(self, verb: str, query: "Callable[[Engine, str, tuple[str, str, int]], Query[str]]") -> None:
        """Do what answers nothing, and record in the same transaction that it is done."""
        attempt = self._attempt
        await attempt.boundary()
        name = attempt.journal.numbered(verb)
        if attempt.journal.begin(name, "call") is not None:
            return
        asked = query(attempt.host.engine, name, (attempt.host.orchestrator_id, attempt.claimed.id, attempt.token))
        with _Working(attempt):
            answer = await attempt.store(
                attempt.host.run_query(asked), lambda answer: remember_call(attempt.journal, name, answer)
            )
        if answer == "false":
            attempt.exit = "abandoned"
            raise Suspend


class BatchContext(RunFacts[D]):
    """What a batch handler is given: facts and deps, and no durable operations."""


def call_handler(attempt: Attempt) -> Awaitable[Any]:
    """Call a task's handler with its context and payload, wherever it runs."""
    task = attempt.task
    fn: Any = task.fn
    signature: Any = task.payload
    payload = bytes(attempt.claimed.payload)
    if task.config.batch is not None:
        return _call_batch(fn, attempt, signature.decode_element(payload))
    args, kwargs = signature.decode_payload(payload)
    if signature.triggers:
        kwargs.update(handed_over(signature.triggers, attempt.claimed, signature.required_triggers))
    if runs_on_loop(task):
        context: Context[Any] = Context(attempt)
        called: Awaitable[Any] = fn(context, *args, **kwargs)
        return called
    from pgconductor.sync_context import call_in_thread

    return call_in_thread(fn, attempt, args, kwargs)


async def _call_batch(fn: Callable[..., Any], attempt: Attempt, element: Any) -> Any:
    """Run a batch of one."""
    values = await fn(BatchContext[Any](attempt), [element])
    return None if values is None else values[0]


def _recorded(codec: Codec[Any], memo: "Recorded") -> Any:
    return codec.decode(memo.value, "step", memo.name)


class _Working:
    """Keeps a run from being parked or settled. Not a generator: that would cost each step three times as much."""

    __slots__ = ("_attempt",)

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def __enter__(self) -> None:
        self._attempt.begin_work(self)

    def __exit__(self, *_: object) -> None:
        self._attempt.end_work(self)
