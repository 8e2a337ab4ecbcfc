"""The client: register tasks, enqueue calls, wait for results, cancel, and look after queues."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Protocol, Self, cast, overload
from uuid import UUID

from typing_extensions import ParamSpec, TypeVar, Unpack

from pgconductor import embedded, schema
from pgconductor.address import address_of_environment, check_address
from pgconductor.annotations import describe_type
from pgconductor.calls import CallPlan
from pgconductor.checks import check_execution_id, check_function, check_name, check_text
from pgconductor.client import Clients, LoopClient, ids_of
from pgconductor.codec import UNTYPED, codec_for
from pgconductor.connections import send_async, send_sync
from pgconductor.durations import Duration, format_duration, seconds
from pgconductor.engine import Ended, Engine
from pgconductor.errors import ConfigurationError, ExecutionNotFound
from pgconductor.events import new_event
from pgconductor.model import EventDef, State
from pgconductor.options import Options, TaskOptions, parse_options
from pgconductor.registration import make_reference, make_task
from pgconductor.run import Run, runs_of
from pgconductor.schema import check_schema_name
from pgconductor.task import Call, Task, check_calls
from pgconductor.written import NewExecution

if TYPE_CHECKING:
    from pgconductor.context import BatchContext, Context
    from pgconductor.sync_context import SyncContext
    from pgconductor.worker import Worker

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
D = TypeVar("D", default=None)
E = TypeVar("E")

_UNSET: Any = object()


def _wait_as_long_as_it_takes(_: UUID) -> None:
    """Refuse nothing; what `result()` without a timeout does outside of tests."""


class _Decorator(Protocol[D]):
    """What `app.task(...)` with options returns."""

    @overload
    def __call__(self, fn: "Callable[Concatenate[Context[D], P], Awaitable[R]]", /) -> Task[P, R]: ...
    @overload
    def __call__(self, fn: "Callable[Concatenate[SyncContext[D], P], R]", /) -> Task[P, R]: ...
    @overload
    def __call__(self, fn: "Callable[[BatchContext[D], list[T]], Awaitable[list[R] | None]]", /) -> Task[[T], R]: ...


class Conductor(Generic[D]):
    """Name tasks and send calls to them; the handle on one deployment in one schema of one database.

    Making one does no I/O: the address is looked up and the first connection opened when they are needed. It may be
    used from any thread and any number of event loops, one after the other or together. Leaving `async with`, or
    `close`, closes its connections; orchestrators have their own.

    Args:
        dsn: Where Postgres is; else `PGCONDUCTOR_URL`, else `DATABASE_URL`, else the development server, which is
            started if need be.
        schema: The schema that holds the engine.
        name: The deployment: at its start it replaces only the schedules and triggers that its own name declared.
        lifespan: Opens what handlers find as `ctx.deps`, once a worker process, and closes it.
        context: What handlers find as `ctx.deps`, where it needs no opening.

    Attributes:
        tasks: The registered tasks by name.
        engine: Builds the queries of the schema.
        schema: As given.
        name: As given.

    Raises:
        ConfigurationError: The address, the schema, the name or the lifespan cannot be used, or both `lifespan` and
            `context` are given.
    """

    @overload
    def __init__(
        self: "Conductor[None]", dsn: str | None = None, *, schema: str = "pgconductor", name: str = "default"
    ) -> None: ...
    @overload
    def __init__(
        self,
        dsn: str | None = None,
        *,
        schema: str = "pgconductor",
        name: str = "default",
        lifespan: Callable[[], AbstractAsyncContextManager[D]],
    ) -> None: ...
    @overload
    def __init__(
        self, dsn: str | None = None, *, schema: str = "pgconductor", name: str = "default", context: D
    ) -> None: ...
    def __init__(
        self,
        dsn: str | None = None,
        *,
        schema: str = "pgconductor",
        name: str = "default",
        lifespan: Callable[[], AbstractAsyncContextManager[D]] | None = None,
        context: D = _UNSET,
    ) -> None:
        if lifespan is not None and context is not _UNSET:
            raise ConfigurationError("Conductor", "lifespan= and context= both say what ctx.deps is", "give one")
        if lifespan is not None:
            check_function(lifespan, "Conductor: lifespan")
        if dsn is not None:
            check_address(dsn, "Conductor: dsn")
        self.name = check_name(name, "Conductor: name")
        self.schema = check_schema_name(schema)
        self.tasks: dict[str, Task[..., Any]] = {}
        self._payloads: dict[str, Any] = {}  # by name of the event
        self.engine = Engine(schema)
        self._given_dsn = dsn
        self._dsn: str | None = None
        self._lifespan = lifespan
        self._deps = context
        self._before_wait: Callable[[UUID], None] = _wait_as_long_as_it_takes
        self._clients = self._make_clients()

    # ---------------------------------------------------------------- registering

    def event(self, name: str, payload: type[E]) -> EventDef[E]:
        """Name a kind of event and the type of its payload. Nothing is stored.

        Args:
            name: 1 to 200 bytes of printable UTF-8, such as `order.paid`.
            payload: The payload's type.

        Returns:
            The definition, to emit, wait for and trigger by.

        Raises:
            ConfigurationError: The name cannot be used or was given with another type, or the type has no JSON form.
        """
        codec_for(payload)
        known = self._payloads.setdefault(check_name(name, "event: name"), payload)
        if known != payload:
            fault = f"carries {describe_type(known)} already, so it cannot carry {describe_type(payload)}"
            raise ConfigurationError(f"event {name!r}", fault, "use its first definition, or another name")
        return EventDef(name, payload)

    @overload
    def task(self, fn: "Callable[Concatenate[Context[D], P], Awaitable[R]]", /) -> Task[P, R]: ...
    @overload
    def task(self, fn: "Callable[Concatenate[SyncContext[D], P], R]", /) -> Task[P, R]: ...
    @overload
    def task(self, **options: Unpack[TaskOptions]) -> _Decorator[D]: ...
    def task(self, fn: Callable[..., Any] | None = None, **options: Unpack[TaskOptions]) -> Any:
        """Register the decorated function as a task: `@app.task`, or `@app.task(max_attempts=5, ...)`.

        Args:
            fn: The handler; its first parameter is the context. An `async def` runs on the worker's event loop, a
                plain `def` in a thread.
            **options: As `TaskOptions` lists them.

        Returns:
            The task; the function itself is called by `task(ctx, ...)`.

        Raises:
            ConfigurationError: An option or the signature cannot work, or the name is taken. Nothing was registered.
        """
        if fn is not None:
            return self._register(make_task(fn, options, self))

        def decorate(fn: Callable[..., Any]) -> Task[..., Any]:
            return self._register(make_task(fn, options, self))

        return decorate

    @overload
    def create_task(
        self, fn: "Callable[Concatenate[Context[D], P], Awaitable[R]]", /, **options: Unpack[TaskOptions]
    ) -> Task[P, R]: ...
    @overload
    def create_task(
        self, fn: "Callable[Concatenate[SyncContext[D], P], R]", /, **options: Unpack[TaskOptions]
    ) -> Task[P, R]: ...
    def create_task(self, fn: Callable[..., Any], /, **options: Unpack[TaskOptions]) -> Task[..., Any]:
        """Register a function as a task without decorating it; otherwise as `task`.

        Args:
            fn: The handler, as for `task`.
            **options: As `TaskOptions` lists them.

        Returns:
            The task.

        Raises:
            ConfigurationError: As for `task`.
        """
        return self._register(make_task(fn, options, self))

    def define_task(self, name: str, payload: type[Any], returns: type[R], *, queue: str = "default") -> Task[..., R]:
        """Refer to a task whose code is elsewhere, to invoke it or start it as a child. Registers nothing.

        Args:
            name: Its name there.
            payload: The type of its payload: a model, or `dict`.
            returns: The type of its result.
            queue: Its queue, as long as no worker has registered it.

        Returns:
            A reference; called with one instance of `payload`, or its fields as keywords.

        Raises:
            ConfigurationError: A name or type cannot be used.
        """
        return make_reference(name, payload, returns, queue, self)

    # ---------------------------------------------------------------- calls

    async def invoke(self, call: Call[R], **options: Unpack[Options]) -> Run[R]:
        """Enqueue one call, and return a handle on its execution once it is stored.

        Calls made at the same time share a statement. A reply that is lost with its connection is asked for again,
        and never makes a second execution. With `conn=`, the execution exists when that transaction commits.

        Args:
            call: From `Task.bind`.
            **options: As `Options` lists them; those of the call win.

        Returns:
            A handle; with `dedupe_key`, possibly on an earlier execution.

        Raises:
            NotInvocable: `invocable()` is not among the task's triggers. Nothing was enqueued.
            TypeError: `conn=` is a synchronous connection. Nothing was enqueued.
            ServerError: Postgres cannot be reached, is not migrated, or refuses; says if the outcome is unknown.

        Source: sql/functions/10_enqueue.sql
        """
        plan = self._plan(options)
        row = plan.row(call)
        if plan.conn is not None:
            (execution_id,) = await self._enqueue_within(plan.conn, [row])
        else:
            execution_id = await self._clients.here().enqueue(row)
        return Run(execution_id, call.returns, self)

    def invoke_sync(self, call: Call[R], **options: Unpack[Options]) -> Run[R]:
        """Enqueue one call from code without an event loop; otherwise as `invoke`.

        Args:
            call: From `Task.bind`.
            **options: As `Options` lists them; those of the call win.

        Returns:
            A handle; read it with `result_sync`.

        Raises:
            NotInvocable: As for `invoke`, and so the others.
            TypeError: `conn=` is an asynchronous connection. Nothing was enqueued.
        """
        plan = self._plan(options)
        row = plan.row(call)
        if plan.conn is not None:
            query = self.engine.enqueue_within([row])
            enqueued = query.read(send_sync(plan.conn, query.statement, cast("str", query.parameters[0])))
            (execution_id,) = ids_of([row], enqueued)
        else:
            execution_id = self._clients.run_sync(lambda client: client.enqueue(row))
        return Run(execution_id, call.returns, self)

    async def invoke_many(self, calls: Sequence[Call[R]], **options: Unpack[Options]) -> list[Run[R]]:
        """Enqueue calls in one statement and one transaction: all of them or none.

        Args:
            calls: From `Task.bind`; of one task or several; together at most 256 MiB of payload. Encode and send
                more than that in parts.
            **options: As `Options` lists them; those of a call win.

        Returns:
            A handle a call, in their order; calls with the same `dedupe_key` share an execution.

        Raises:
            EncodeError: The payloads are too large together. Nothing was enqueued.
            NotInvocable: As for `invoke`, and so the others. Nothing was enqueued.
        """
        ids = await self._enqueue_calls(self._plan(options), calls) if calls else []
        return runs_of(ids, calls, self)

    async def emit(self, event: EventDef[E], payload: E, *, conn: object = None) -> UUID:
        """Emit an event: it starts the tasks that subscribe to it, and answers the executions that wait for it.

        A reply that is lost with its connection is asked for again, and never makes a second event. With `conn=`, the
        event and what it starts exist when that transaction commits, and never if it does not.

        Args:
            event: From `event`.
            payload: Of the event's type; at most 1 MiB of JSON.
            conn: An asynchronous connection: emit inside its transaction. From synchronous code, see `emit_sync`.

        Returns:
            The event's id.

        Raises:
            EncodeError: The payload cannot be stored. Nothing was emitted.
            TypeError: `conn=` is a synchronous connection. Nothing was emitted.
            ServerError: Postgres cannot be reached, is not migrated, or refuses; says if the outcome is unknown.

        Source: sql/functions/56_events.sql
        """
        new = new_event(event, payload)
        if conn is not None:
            query = self.engine.emit_within([new])
            await send_async(conn, query.statement, cast("str", query.parameters[0]))
        else:
            await self._clients.here().emit(new)
        return UUID(new.id)

    def emit_sync(self, event: EventDef[E], payload: E, *, conn: object = None) -> UUID:
        """Emit an event from code without an event loop; otherwise as `emit`.

        Args:
            event: From `event`.
            payload: Of the event's type.
            conn: A synchronous connection: emit inside its transaction.

        Returns:
            The event's id.

        Raises:
            TypeError: `conn=` is an asynchronous connection. Nothing was emitted.
        """
        new = new_event(event, payload)
        if conn is not None:
            query = self.engine.emit_within([new])
            send_sync(conn, query.statement, cast("str", query.parameters[0]))
        else:
            self._clients.run_sync(lambda client: client.emit(new))
        return UUID(new.id)

    # ---------------------------------------------------------------- executions

    async def run(self, execution_id: UUID) -> Run[Any]:
        """Return a handle on an execution; its result is plain JSON.

        Raises:
            ExecutionNotFound: It does not exist, or retention has removed it.
        """
        checked = UUID(check_execution_id(execution_id, "run"))
        await self.state_of(checked)
        return Run(checked, UNTYPED, self)

    async def cancel(
        self,
        execution: UUID | Task[..., Any],
        dedupe_key: str | None = None,
        *,
        reason: str = "Cancelled by user",
    ) -> bool:
        """Ask for the end of an execution and of its unfinished attached children. Safe to repeat.

        What does not run is cancelled at once; what runs is told, and whatever it returns later is refused.

        Args:
            execution: The execution's id, or the task that the dedupe key belongs to.
            dedupe_key: With a task: the key that the execution was enqueued with.
            reason: Stored with the execution; at most 1,000 characters are kept.

        Returns:
            False if it had already ended, or is not known; where a reply was lost, also if this very call has ended it.

        Raises:
            ConfigurationError: A task without a key, an id with one, or neither a task nor an id.

        Source: sql/functions/50_cancel.sql
        """
        reason = check_text(reason, "cancel: reason", 100_000)[:1000] if reason else ""
        if isinstance(execution, Task):
            if dedupe_key is None:
                raise ConfigurationError("cancel", "a task may have many executions", "give dedupe_key=, or an id")
            query = self.engine.cancel_by_key(execution.name, check_name(dedupe_key, "cancel: dedupe_key"), reason)
        elif dedupe_key is None:
            query = self.engine.cancel(check_execution_id(execution, "cancel"), reason)
        else:
            raise ConfigurationError("cancel", "an id needs no dedupe_key=", "give the task instead of the id")
        return await self._clients.here().move(query) in ("cancelled", "requested")

    async def retry(self, execution_id: UUID) -> bool:
        """Run a failed or cancelled execution again: recorded steps stay, attempts are counted anew.

        Its parent has had its answer and hears nothing more.

        Returns:
            False if it has not ended, was completed, or is not known.

        Raises:
            ServerError: Postgres cannot be reached or refuses. A lost reply is not asked for again: it says so.

        Source: sql/functions/50_cancel.sql, `redrive`
        """
        checked = check_execution_id(execution_id, "retry")
        return await self._clients.here().move(self.engine.redrive(checked)) == "ready"

    async def wait_for_end(self, execution_id: UUID, timeout: Duration | None) -> Ended:
        """Wait for an execution's end; `Run.result` says what is raised."""
        if timeout is None:
            self._before_wait(execution_id)
        return await _end(self._clients.here(), execution_id, timeout)

    def wait_for_end_sync(self, execution_id: UUID, timeout: Duration | None) -> Ended:
        """Do the same from code without an event loop."""
        if timeout is None:
            self._before_wait(execution_id)
        return self._clients.run_sync(lambda client: _end(client, execution_id, timeout))

    async def state_of(self, execution_id: UUID) -> State:
        """Return where an execution stands.

        Raises:
            ExecutionNotFound: It does not exist, or retention has removed it.
        """
        state = await self._clients.here().run(self.engine.state_of(str(execution_id)))
        if state is None:
            raise ExecutionNotFound(execution_id)
        return cast("State", state)

    # ---------------------------------------------------------------- queues and workers

    async def pause(self, queue: str) -> None:
        """Stop the starts of a queue's executions, on all workers, until `resume`. What runs goes on."""
        await self._clients.here().run(self.engine.pause_queue(check_name(queue, "queue")))

    async def resume(self, queue: str) -> None:
        """Let a paused queue start executions again."""
        client = self._clients.here()
        await client.run(self.engine.resume_queue(check_name(queue, "queue")))
        queues = await client.run(self.engine.register_queues([queue]))
        client.hint([each.id for each in queues or ()])

    def create_worker(
        self, queue: str, *, concurrency: int = 10, fetch_size: int | None = None, poll_interval: Duration = 1
    ) -> "Worker":
        """Describe how one queue is worked on, for `Orchestrator(app, workers=[...])`.

        Args:
            queue: The queue.
            concurrency: How many of its executions run at once; 1 to 10,000.
            fetch_size: The most that one look at the queue brings; chosen to fit unless given.
            poll_interval: How often to look where no hint comes: twice as long while they do; the least of a process.

        Returns:
            The worker; it starts with its orchestrator.

        Raises:
            ConfigurationError: A number is out of bounds.
        """
        from pgconductor.worker import Worker

        return Worker(queue, concurrency=concurrency, fetch_size=fetch_size, poll_interval=poll_interval)

    @asynccontextmanager
    async def lifespan_context(self) -> AsyncGenerator[D]:
        """Open what handlers find as `ctx.deps`, and close it at the end. For whoever runs handlers."""
        if self._lifespan is not None:
            async with self._lifespan() as deps:
                yield deps
        else:
            yield cast("D", None if self._deps is _UNSET else self._deps)

    # ---------------------------------------------------------------- the database

    @property
    def dsn(self) -> str:
        """Where Postgres is. The first look may start the development server, which takes seconds."""
        if self._dsn is None:
            self._dsn = embedded.resolve_dsn(self._given_dsn)
        return self._dsn

    @contextmanager
    def bound_to(
        self,
        dsn: str,
        engine: Engine,
        deps: D = _UNSET,
        before_wait: Callable[[UUID], None] = _wait_as_long_as_it_takes,
    ) -> Generator[None]:
        """Lead to another database for the length of a block. For the testing kit.

        Args:
            dsn: Of a migrated database.
            engine: Builds the queries; may carry a clock of its own.
            deps: What handlers find as `ctx.deps`, if not what the lifespan or context provides.
            before_wait: Told of an execution before its end is waited for without a limit; may refuse.
        """
        kept = dict(vars(self))
        self.engine, self._given_dsn, self._dsn = engine, dsn, dsn
        self._before_wait = before_wait
        self._clients = self._make_clients()
        if deps is not _UNSET:
            self._lifespan, self._deps = None, deps
        try:
            yield
        finally:
            vars(self).update(kept)

    def use_address(self, dsn: str) -> None:
        """Connect elsewhere from now on, whatever the code and the environment say. For the command line and tests.

        Args:
            dsn: Where Postgres is. Connections that are open stay where they are.
        """
        self._given_dsn, self._dsn = dsn, None

    async def migrate(self) -> None:
        """Install the engine in its schema, or bring it up to this release; safe to repeat and to run at once.

        Raises:
            ServerError: The server is too old, not reachable, or an old worker stands in the way.
        """
        await schema.migrate_async(await self._address(), self.schema)

    async def close(self) -> None:
        """Close the connections of the client, once the calls on their way have arrived. Safe to repeat.

        Orchestrators keep theirs. The conductor can be used again, on new connections.
        """
        await self._clients.close()

    async def __aenter__(self) -> Self:
        """Return the conductor; it is closed at the end of the block."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self.close()

    def __repr__(self) -> str:
        """Show the deployment and the schema."""
        return f"<Conductor {self.name} schema={self.schema}>"

    # ---------------------------------------------------------------- inside

    def _register(self, task: Task[..., Any]) -> Task[..., Any]:
        if task.name in self.tasks:
            raise ConfigurationError(f"task {task.name!r}", "the name is taken by another task", "give name=")
        self.tasks[task.name] = task
        return task

    def _make_clients(self) -> Clients:
        return Clients(lambda: LoopClient(self.engine, self._address, self._migrate_development_server))

    def _plan(self, options: Options) -> CallPlan:
        return CallPlan(parse_options("invoke", **options), self.tasks)

    async def _enqueue_calls(self, plan: CallPlan, calls: Sequence[Call[Any]]) -> list[str]:
        check_calls(calls, "invoke_many")
        alike = plan.alike(calls)
        if alike is not None:
            return await self._clients.here().enqueue_alike(alike)
        rows = plan.rows(calls)
        if plan.conn is not None:
            return plan.spread(await self._enqueue_within(plan.conn, rows))
        return plan.spread(await self._clients.here().enqueue_many(rows))

    async def _enqueue_within(self, connection: object, rows: Sequence[NewExecution]) -> list[str]:
        query = self.engine.enqueue_within(rows)
        answer = await send_async(connection, query.statement, cast("str", query.parameters[0]))
        return ids_of(rows, query.read(answer))

    async def _address(self) -> str:
        return self._dsn if self._dsn is not None else await asyncio.to_thread(lambda: self.dsn)

    async def _migrate_development_server(self) -> bool:
        """Install the engine in a development server of ours; in any other database that is the user's to do."""
        if self._given_dsn or address_of_environment():
            return False
        await self.migrate()
        return True


async def _end(client: LoopClient, execution_id: UUID, timeout: Duration | None) -> Ended:
    limit = None if timeout is None else seconds(timeout, "result: timeout")
    try:
        async with asyncio.timeout(limit):
            ended = await client.ended(str(execution_id))
    except TimeoutError:
        if limit is None:
            raise
        late = f"has not ended within {format_duration(limit)}; it goes on, and `pgconductor runs why` says where it is"
        raise TimeoutError(f"execution {execution_id} {late}") from None
    if ended.outcome is None:
        raise ExecutionNotFound(execution_id)
    return ended
