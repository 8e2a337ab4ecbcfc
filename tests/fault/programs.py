"""The tasks of the fault tests: an interpreter of small programs, whose effects go where no fault of ours reaches.

A program is a list of operations, each `[verb, name, argument]`, made by the functions below. What a run does and sees
it writes to a *ledger*, an append-only file per process: a line before a step's body ends, a line for each value that
an operation gave. `ctx.transaction` writes into the table `effect` of the database under test.

Bodies have the fault points `inside_step` and `inside_transaction`.
"""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg

from pgconductor import Conductor, Context, RetryPolicy, SyncContext
from pgconductor.faults import fault
from tests.waiting import until

LEDGER = "PGCONDUCTOR_TEST_LEDGER"
"""The directory of the ledgers."""

EFFECTS = "create table effect (execution_id uuid not null, name text not null)"
_ADD_EFFECT = "insert into public.effect (execution_id, name) values (%s, %s)"
_AT_ONCE = RetryPolicy(first=0.01, max=0.05)

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


def child(name: str, *program: Operation) -> Operation:
    return ["child", name, list(program)]


def children(name: str, *programs: Program) -> Operation:
    return ["children", name, list(programs)]


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


def note(execution_id: object, event: str, name: str, value: object = None) -> None:
    """Write a line to this process' ledger; it is there once this returns, even if the process is killed then."""
    line = {
        "at": time.monotonic(), "pid": os.getpid(), "execution": str(execution_id), "event": event, "name": name,
        "value": value,
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


# ---------------------------------------------------------------- the tasks


@app.task(max_attempts=4, retry=_AT_ONCE)
async def program(ctx: Context, operations: list[Any]) -> list[Any]:
    """Interpret a program; return the values of its operations."""
    note(ctx.execution_id, "began", "", ctx.attempt)
    values: list[Any] = []
    for verb, name, argument in operations:
        value = await _do(ctx, verb, name, argument)
        note(ctx.execution_id, "saw", name, value)
        values.append(value)
    return values


async def _do(ctx: Context, verb: str, name: str, argument: Any) -> Any:
    if verb == "step":
        return await ctx.step(name, _run_step, ctx.execution_id, name)
    if verb == "step_behind":
        return await ctx.step(name, _run_step_behind, ctx.execution_id, name)
    if verb == "transaction":
        return await ctx.transaction(name, _write, ctx.execution_id, name)
    if verb == "sleep":
        return await ctx.sleep(name, argument)
    if verb == "child":
        return await ctx.invoke(name, program.bind(argument))
    if verb == "children":
        return await ctx.invoke_all(name, [program.bind(each) for each in argument])
    if verb == "gate":
        return await _until_open(name)
    if verb == "emit":
        return [str(await ctx.emit(told, {"to": argument}))]
    if verb == "wait_for":
        return await ctx.wait_for(name, told, where={"to": argument})
    return _do_at_once(ctx, verb, name, argument)


def _do_at_once(ctx: Context | SyncContext, verb: str, name: str, argument: Any) -> None:
    if verb == "fail" and ctx.attempt <= argument:
        raise RuntimeError(f"{name}: attempt {ctx.attempt} fails as it was told")
    if verb == "block":
        time.sleep(argument)
    elif verb == "leave":
        os._exit(9)


@app.task(max_attempts=4, retry=_AT_ONCE)
def plain_program(ctx: SyncContext, operations: list[Any]) -> list[Any]:
    """Do the same in a thread."""
    note(ctx.execution_id, "began", "", ctx.attempt)
    values: list[Any] = []
    for verb, name, argument in operations:
        value = _do_plainly(ctx, verb, name, argument)
        note(ctx.execution_id, "saw", name, value)
        values.append(value)
    return values


def _do_plainly(ctx: SyncContext, verb: str, name: str, argument: Any) -> Any:
    if verb == "step":
        return ctx.step(name, _run_step_here, ctx.execution_id, name)
    if verb == "transaction":
        return ctx.transaction(name, _write_here, ctx.execution_id, name)
    if verb == "sleep":
        return ctx.sleep(name, argument)
    if verb == "child":
        return ctx.invoke(name, plain_program.bind(argument))
    if verb == "children":
        return ctx.invoke_all(name, [plain_program.bind(each) for each in argument])
    if verb == "emit":
        return [str(ctx.emit(told, {"to": argument}))]
    if verb == "wait_for":
        return ctx.wait_for(name, told, where={"to": argument})
    return _do_at_once(ctx, verb, name, argument)


def steps_of(operations: Program) -> Iterator[str]:
    """Return the names of the steps and transactions of a program, without those of its children."""
    return (name for verb, name, _ in operations if verb in ("step", "transaction"))
