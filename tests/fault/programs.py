"""The tasks of the fault tests: an interpreter of small programs, whose effects go where no fault of ours reaches.

A program is a list of operations, each `[verb, name, argument]`, made by the functions below. What a run does and sees
it writes to a *ledger*, an append-only file per process: a line before a step's body ends, a line for each value that
an operation gave. `ctx.transaction` writes into the table `effect` of the database under test.

Bodies have the fault points `inside_step` and `inside_transaction`.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg

from pgconductor import (
    ChildCancelled,
    ChildFailed,
    ChildTimeout,
    Conductor,
    Context,
    RetryPolicy,
    SyncContext,
)
from pgconductor.faults import fault
from tests.waiting import until

LEDGER = "PGCONDUCTOR_TEST_LEDGER"
"""The directory of the ledgers."""

EFFECTS = "create table effect (execution_id uuid not null, name text not null)"
_ADD_EFFECT = "insert into public.effect (execution_id, name) values (%s, %s)"
_AT_ONCE = RetryPolicy(first=0.01, max=0.05)
ATTEMPTS = 4
LIMIT = 2
CRASHES = "PGCONDUCTOR_TEST_CRASHES"
"""How many crashes an execution survives, if not as many as by default."""
_CRASHES = int(os.environ.get(CRASHES, "5"))
DIGEST_FROM = 100
"""Longer texts stand in the ledger as digests."""

Operation = list[Any]
Program = list[Operation]

app = Conductor(name="faults")
told = app.event("told", dict[str, str])

# ---------------------------------------------------------------- what a program is made of


def step(name: str) -> Operation:
    """Do something once."""
    return ["step", name, None]


def step_behind(name: str) -> Operation:
    """Do something once, in a body that takes until the test opens the gate of the step's name."""
    return ["step_behind", name, None]


def transaction(name: str) -> Operation:
    """Write a row, once."""
    return ["transaction", name, None]


def sleep(name: str, seconds: float) -> Operation:
    return ["sleep", name, seconds]


def tag(name: str) -> Operation:
    """Do nothing. A first operation by which a model finds the execution of a program."""
    return ["tag", name, None]


def big(name: str, size: int) -> Operation:
    """Do something once whose value has so many bytes."""
    return ["big", name, size]


def together(name: str, *operations: Operation) -> Operation:
    """Do these at the same time; for coroutines alone."""
    return ["together", name, list(operations)]


def caught(operation: Operation) -> Operation:
    """Do this; what becomes of a child is a value, and no error."""
    return ["caught", operation[1], operation]


def child(name: str, *program: Operation) -> Operation:
    return ["child", name, list(program)]


def timed(name: str, seconds: float, on_timeout: str, *program: Operation) -> Operation:
    """Wait so long for a child, and `cancel` or `keep` it then."""
    return ["timed", name, [seconds, on_timeout, list(program)]]


def limited(name: str, *program: Operation) -> Operation:
    """Wait for a child of a task of which no more than `LIMIT` run at once."""
    return ["limited", name, list(program)]


def children(name: str, *programs: Program) -> Operation:
    return ["children", name, list(programs)]


def windowed(name: str, in_flight: int, *programs: Program) -> Operation:
    """Wait for children of which no more than so many are unfinished at a time."""
    return ["windowed", name, [in_flight, list(programs)]]


def started(name: str, count: int, *programs: Program) -> Operation:
    """Start children, and wait for so many of them."""
    return ["started", name, [count, list(programs)]]


def detached(name: str, *program: Operation) -> Operation:
    """Start an execution that is no child."""
    return ["detached", name, list(program)]


def cancel(name: str, execution_id: str) -> Operation:
    """Cancel an execution."""
    return ["cancel", name, execution_id]


def emit(name: str, to: str = "anybody") -> Operation:
    """Emit an event, once; the value is a list of its id."""
    return ["emit", name, to]


def wait_for(name: str, to: str = "anybody") -> Operation:
    """Wait for such an event."""
    return ["wait_for", name, to]


def fail(name: str, times: int) -> Operation:
    """Raise in the first attempts."""
    return ["fail", name, times]


def gate(name: str) -> Operation:
    """Stay here, awaiting, until the test opens the gate."""
    return ["gate", name, None]


def block(name: str, seconds: float) -> Operation:
    """Let nothing else run on the event loop for a while."""
    return ["block", name, seconds]


def leave(name: str) -> Operation:
    """End the process, as a crash in C code would."""
    return ["leave", name, None]


# ---------------------------------------------------------------- the ledger


def digest(value: object) -> object:
    """Return a value as it stands in the ledger."""
    is_long = isinstance(value, str) and len(value) > DIGEST_FROM
    return hashlib.sha256(value.encode()).hexdigest() if is_long and isinstance(value, str) else value


def note(execution_id: object, event: str, name: str, value: object = None) -> None:
    """Write a line to this process' ledger; it is there once this returns, even if the process is killed then."""
    line = {
        "at": time.monotonic(), "pid": os.getpid(), "execution": str(execution_id), "event": event, "name": name,
        "value": digest(value),
    }  # fmt: skip
    descriptor = os.open(Path(os.environ[LEDGER], f"{os.getpid()}.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, json.dumps(line).encode() + b"\n")
    finally:
        os.close(descriptor)


def _body(execution_id: object, name: str, point: str) -> str:
    note(execution_id, "ran", name)
    fault(point)
    return uuid4().hex


async def _run_step(execution_id: object, name: str) -> str:
    await asyncio.sleep(0)
    return _body(execution_id, name, "inside_step")


async def _run_step_behind(execution_id: object, name: str) -> str:
    value = _body(execution_id, name, "inside_step")
    await _until_open(name)
    return value


def _run_step_here(execution_id: object, name: str) -> str:
    return _body(execution_id, name, "inside_step")


async def _write(conn: psycopg.AsyncConnection[Any], execution_id: object, name: str) -> str:
    await conn.execute(_ADD_EFFECT, [execution_id, name])
    return _body(execution_id, name, "inside_transaction")


def _write_here(conn: psycopg.Connection[Any], execution_id: object, name: str) -> str:
    conn.execute(_ADD_EFFECT, [execution_id, name])
    return _body(execution_id, name, "inside_transaction")


async def _until_open(gate: str) -> None:
    await until(Path(os.environ[LEDGER], f"{gate}.open").exists)


async def _run_big(execution_id: object, name: str, size: int) -> str:
    return _body(execution_id, name, "inside_step") * (size // 32)


# ---------------------------------------------------------------- the tasks


@app.task(max_attempts=ATTEMPTS, max_crashes=_CRASHES, retry=_AT_ONCE)
async def program(ctx: Context, operations: list[Any]) -> list[Any]:
    """Interpret a program; return the values of its operations."""
    return await _interpret(ctx, operations)


@app.task(max_attempts=ATTEMPTS, max_crashes=_CRASHES, retry=_AT_ONCE, concurrency=LIMIT)
async def limited_program(ctx: Context, operations: list[Any]) -> list[Any]:
    """Do the same, but in no more than `LIMIT` executions at once."""
    return await _interpret(ctx, operations)


async def _interpret(ctx: Context, operations: list[Any]) -> list[Any]:
    note(ctx.execution_id, "began", "", ctx.attempt)
    return [await _do(ctx, *operation) for operation in operations]


async def _do(ctx: Context, verb: str, name: str, argument: Any) -> Any:
    value = await _VERBS[verb](ctx, name, argument)
    note(ctx.execution_id, "saw", name, value)
    return value


async def _do_step(ctx: Context, name: str, argument: Any) -> str:
    return await ctx.step(name, _run_step, ctx.execution_id, name)


async def _do_step_behind(ctx: Context, name: str, argument: Any) -> str:
    return await ctx.step(name, _run_step_behind, ctx.execution_id, name)


async def _do_big(ctx: Context, name: str, size: Any) -> str:
    return await ctx.step(name, _run_big, ctx.execution_id, name, size)


async def _do_transaction(ctx: Context, name: str, argument: Any) -> str:
    return await ctx.transaction(name, _write, ctx.execution_id, name)


async def _do_sleep(ctx: Context, name: str, duration: Any) -> None:
    await ctx.sleep(name, duration)


async def _do_child(ctx: Context, name: str, operations: Any) -> Any:
    return await ctx.invoke(name, program.bind(operations))


async def _do_timed(ctx: Context, name: str, argument: Any) -> Any:
    timeout, on_timeout, operations = argument
    return await ctx.invoke(name, program.bind(operations), timeout=timeout, on_timeout=on_timeout)


async def _do_limited(ctx: Context, name: str, operations: Any) -> Any:
    return await ctx.invoke(name, limited_program.bind(operations))


async def _do_children(ctx: Context, name: str, programs: Any) -> Any:
    return await ctx.invoke_all(name, [program.bind(each) for each in programs])


async def _do_windowed(ctx: Context, name: str, argument: Any) -> Any:
    in_flight, programs = argument
    return await ctx.invoke_all(name, [program.bind(each) for each in programs], max_in_flight=in_flight)


async def _do_started(ctx: Context, name: str, argument: Any) -> list[str]:
    count, programs = argument
    members = [await ctx.start(f"{name}.{n}", program.bind(each)) for n, each in enumerate(programs)]
    done, _ = await ctx.wait(name, members, count=count)
    return [child.step for child in done]


async def _do_detached(ctx: Context, name: str, operations: Any) -> list[str]:
    return [str((await ctx.start(name, program.bind(operations), detached=True)).id)]


async def _do_cancel(ctx: Context, name: str, execution_id: Any) -> bool:
    return await ctx.cancel(UUID(execution_id), "a program was told to")


async def _do_emit(ctx: Context, name: str, to: Any) -> list[str]:
    return [str(await ctx.emit(told, {"to": to}))]


async def _do_wait_for(ctx: Context, name: str, to: Any) -> dict[str, str]:
    return await ctx.wait_for(name, told, where={"to": to})


async def _do_together(ctx: Context, name: str, operations: Any) -> list[Any]:
    return await asyncio.gather(*(_do(ctx, *operation) for operation in operations))


async def _do_caught(ctx: Context, name: str, operation: Any) -> Any:
    try:
        return await _VERBS[operation[0]](ctx, *operation[1:])
    except (ChildFailed, ChildCancelled, ChildTimeout, ExceptionGroup) as error:
        return [type(error).__name__]


async def _do_gate(ctx: Context, name: str, argument: Any) -> None:
    await _until_open(name)


async def _do_tag(ctx: Context, name: str, argument: Any) -> None:
    await asyncio.sleep(0)


async def _fail(ctx: Context, name: str, times: Any) -> None:
    _fail_here(ctx, name, times)


async def _block(ctx: Context, name: str, duration: Any) -> None:
    _block_here(ctx, name, duration)


async def _leave(ctx: Context, name: str, argument: Any) -> None:
    _leave_here(ctx, name, argument)


_VERBS: dict[str, Callable[[Context, str, Any], Awaitable[Any]]] = {
    "step": _do_step,
    "step_behind": _do_step_behind,
    "big": _do_big,
    "transaction": _do_transaction,
    "sleep": _do_sleep,
    "child": _do_child,
    "timed": _do_timed,
    "limited": _do_limited,
    "children": _do_children,
    "windowed": _do_windowed,
    "started": _do_started,
    "detached": _do_detached,
    "cancel": _do_cancel,
    "emit": _do_emit,
    "wait_for": _do_wait_for,
    "together": _do_together,
    "caught": _do_caught,
    "gate": _do_gate,
    "tag": _do_tag,
    "fail": _fail,
    "block": _block,
    "leave": _leave,
}


def _fail_here(ctx: Context | SyncContext, name: str, times: int) -> None:
    if ctx.attempt <= times:
        raise RuntimeError(f"{name}: attempt {ctx.attempt} fails as it was told")


def _block_here(ctx: Context | SyncContext, name: str, duration: float) -> None:
    time.sleep(duration)


def _leave_here(ctx: Context | SyncContext, name: str, argument: Any) -> None:
    os._exit(9)


def _pass(ctx: SyncContext, name: str, argument: Any) -> None:
    return None


@app.task(max_attempts=ATTEMPTS, max_crashes=_CRASHES, retry=_AT_ONCE)
def plain_program(ctx: SyncContext, operations: list[Any]) -> list[Any]:
    """Do the same in a thread."""
    note(ctx.execution_id, "began", "", ctx.attempt)
    values: list[Any] = []
    for verb, name, argument in operations:
        value = _PLAIN_VERBS[verb](ctx, name, argument)
        note(ctx.execution_id, "saw", name, value)
        values.append(value)
    return values


def _emit_plainly(ctx: SyncContext, name: str, to: Any) -> list[str]:
    return [str(ctx.emit(told, {"to": to}))]


_PLAIN_VERBS: dict[str, Callable[[SyncContext, str, Any], Any]] = {
    "step": lambda ctx, name, _: ctx.step(name, _run_step_here, ctx.execution_id, name),
    "transaction": lambda ctx, name, _: ctx.transaction(name, _write_here, ctx.execution_id, name),
    "sleep": lambda ctx, name, duration: ctx.sleep(name, duration),
    "child": lambda ctx, name, operations: ctx.invoke(name, plain_program.bind(operations)),
    "children": lambda ctx, name, programs: ctx.invoke_all(name, [plain_program.bind(each) for each in programs]),
    "emit": _emit_plainly,
    "wait_for": lambda ctx, name, to: ctx.wait_for(name, told, where={"to": to}),
    "tag": _pass,
    "fail": _fail_here,
    "block": _block_here,
    "leave": _leave_here,
}
