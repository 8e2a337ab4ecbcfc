"""absurd: durable tasks, an engine in SQL functions, pull workers that poll.

A worker process runs several clients, each with a connection. A parent spawns its child in a step and waits for an
event that the child emits, so that it is suspended meanwhile, as its documentation shows.
"""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from absurd_sdk import AsyncAbsurd
from peerscript import Peer, fails, main

logging.disable(logging.CRITICAL)

STEPS = 10
FAN = 1_000
DONE = "select count(*) from absurd.t_bench where task_name = '{kind}' and state = 'completed'{and_result}"
SPAWN_MANY = """
select count(*) from generate_series(%s::int, %s::int) g,
  lateral absurd.spawn_task('bench', %s, jsonb_build_object('i', g, 'padding', %s::text), %s::jsonb)"""


def _done(kind: str, result: str = "") -> str:
    return DONE.format(kind=kind, and_result=f" and completed_payload = {result}" if result else "")


class Absurd(Peer):
    package = "absurd-sdk"
    table = "absurd.t_bench"
    done = {
        **{kind: _done(kind) for kind in ("noop", "padded", "fail")},
        "parent": _done("parent", "params->'i'"),
        "steps": _done("steps", f"'{STEPS}'"),
        "fan": _done("fan", f"'{FAN}'"),
    }
    fill = """select count(*) from generate_series({first}, {last}) g,
                lateral absurd.spawn_task('bench', 'noop', jsonb_build_object('i', g))"""
    bulk = False

    async def open(self) -> None:
        self.client = _client(self.dsn, lambda _: None)

    async def setup(self) -> None:
        # the schema comes from absurd's own tool
        program, env = Path(sys.executable).parent / "absurdctl", {**os.environ, "PGDATABASE": self.dsn}
        await asyncio.to_thread(subprocess.run, [program, "init"], check=True, env=env)
        await self.open()
        await self.client.create_queue("bench")

    async def enqueue(self, kind: str, number: int, padding: str) -> None:
        await self.client.spawn(kind, {"i": number, "padding": padding}, **_options(kind))

    async def enqueue_many(self, kind: str, numbers: range, padding: str) -> None:
        """Spawn by its SQL function, in one statement: the client has no word for many."""
        options = '{"max_attempts": 2, "retry_strategy": {"kind": "none"}}' if kind == "fail" else "{}"
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            await connection.execute(SPAWN_MANY, (numbers[0], numbers[-1], kind, padding, options))

    async def work(self, number: int, hit: Callable[[int], None], begin: Callable[[], None]) -> None:
        clients = [_client(self.dsn, hit) for _ in range(self.settings["clients"])]
        for client in clients:
            await client._ensure_connected()
        begin()
        workers = (
            client.start_worker(
                worker_id=f"worker {number}.{place}",
                concurrency=self.settings["concurrency"],
                poll_interval=self.settings["poll_interval"],
            )
            for place, client in enumerate(clients)
        )
        await asyncio.gather(*workers)


def _options(kind: str) -> dict[str, Any]:
    return {"max_attempts": 2, "retry_strategy": {"kind": "none"}} if kind == "fail" else {}


def _client(dsn: str, hit: Callable[[int], None]) -> AsyncAbsurd:
    app = AsyncAbsurd(dsn, queue_name="bench")

    async def noop(params: Any, _context: Any) -> None:
        hit(params["i"])

    async def fail(params: Any, context: Any) -> None:
        if fails(params["i"], context.headers.get("attempt", context._task["attempt"])):
            raise RuntimeError("fails once")
        hit(params["i"])

    async def one() -> int:
        return 1

    async def steps(params: Any, context: Any) -> int:
        hit(params["i"])
        return sum([await context.step(f"step {number}", one) for number in range(STEPS)])

    for name, handler in {"noop": noop, "padded": noop, "fail": fail, "steps": steps}.items():
        app.register_task(name, queue="bench")(handler)
    _register_parents(app, hit)
    return app


def _register_parents(app: AsyncAbsurd, hit: Callable[[int], None]) -> None:
    async def child(params: Any, context: Any) -> int:
        await context.emit_event(f"child {params['i']}", params["i"])
        return int(params["i"])

    async def parent(params: Any, context: Any) -> int:
        number = params["i"]

        async def start() -> str:  # in a step, since the handler runs again after the wait
            hit(number)
            return str((await app.spawn("child", {"i": number}))["task_id"])

        await context.step("start child", start)
        return int(await context.await_event(f"child {number}"))

    async def fan(params: Any, context: Any) -> int:
        first = params["i"] * FAN

        async def start() -> int:
            hit(params["i"])
            for number in range(first, first + FAN):
                await app.spawn("child", {"i": number})
            return FAN

        await context.step("start children", start)
        for number in range(first, first + FAN):
            await context.await_event(f"child {number}")
        return FAN

    for name, handler in {"child": child, "parent": parent, "fan": fan}.items():
        app.register_task(name, queue="bench")(handler)


main(Absurd)
