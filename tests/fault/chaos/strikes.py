"""The faults, each a function of the field that it strikes. They are named as the plan names them."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg

from tests.fault.proxy import Rule
from tests.fault.supervisor import Worker, World
from tests.waiting import until

CONCURRENCY = 5
DEATH_SECONDS_MAX = 30.0


class Field:
    """What faults strike: the world, and what has to be lifted again.

    Args:
        world: With its workers up.
        chance: Chooses whom a fault strikes.
    """

    def __init__(self, world: World, chance: random.Random) -> None:
        self.world = world
        self.chance = chance
        self.rules: list[Rule] = []
        self.armed: list[Worker] = []
        self.deaths: list[tuple[float, int]] = []
        """When a worker died, on the wall clock that the server shares, and its process id."""
        self.returns: list[float] = []
        """When the server took connections again."""
        self.problems: list[str] = []
        self._expected: set[int] = set()
        self._buried: set[int] = set()
        self._pending: set[asyncio.Task[None]] = set()

    def start_worker(self, fault: str = "") -> Worker:
        """Start a worker behind the proxy."""
        return self.world.worker(
            fault, through=True, concurrency=CONCURRENCY, module="tests.fault.chaos.tasks", crashes=100
        )

    def living(self) -> list[Worker]:
        """Return the workers that live and wait for no fault of their own."""
        waiting = [worker for worker in self.armed if not worker.faults()]
        return [worker for worker in self.world.workers if worker.process.poll() is None and worker not in waiting]

    def later(self, seconds: float, act: Callable[[], Awaitable[None] | None]) -> None:
        """Do something after a span, or when everything is lifted."""

        async def wait() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(seconds)
            done = act()
            if done is not None:
                await done

        self._pending.add(asyncio.create_task(wait()))

    async def lift(self) -> None:
        """End every fault that lasts; rules of the proxy and armed points stay until they have fired."""
        for task in self._pending:
            task.cancel()
        await asyncio.gather(*self._pending)
        self._pending.clear()
        await asyncio.to_thread(self.world.server.start)
        for worker in self.world.workers:
            worker.go_on()

    def will_die(self, worker: Worker) -> None:
        """Note that a worker's end is no surprise."""
        self._expected.add(worker.pid)

    def tend(self) -> None:
        """Look after the workers: replace who died, let go on who has stopped itself, note who died unasked."""
        for worker in self.world.workers:
            code = worker.process.poll()
            if code is not None and worker.pid not in self._buried:
                self._bury(worker, code)
            elif worker in self.armed and worker.faults() and worker.is_halted:
                self.armed.remove(worker)
                self.later(self.chance.choice([0.3, 3.5]), worker.go_on)

    def _bury(self, worker: Worker, code: int) -> None:
        self._buried.add(worker.pid)
        self.deaths.append((time.time(), worker.pid))
        if worker.pid not in self._expected and not worker.faults() and worker.was_up:
            self.problems.append(f"worker {worker.pid} ended by itself with {code}: {worker.log[-1500:]}")
        if worker in self.armed:
            self.armed.remove(worker)
        if worker.was_up:
            self.start_worker()
        else:
            self._start_again(worker)

    def _start_again(self, worker: Worker) -> None:
        """Do what whoever runs processes does with one that could not start; it stays armed."""

        def start() -> None:
            again = self.start_worker(worker.armed)
            if worker.armed:
                self.armed.append(again)

        self.later(0.5, start)


# ---------------------------------------------------------------- workers


async def kill_worker(field: Field) -> bool:
    if not (living := field.living()):
        return False
    worker = field.chance.choice(living)
    field.will_die(worker)
    worker.kill()
    return True


async def stop_worker(field: Field, seconds: float) -> bool:
    if not (living := field.living()):
        return False
    worker = field.chance.choice(living)
    worker.send(signal.SIGSTOP)
    field.later(seconds, worker.go_on)
    return True


async def restart_worker(field: Field) -> bool:
    if not (living := field.living()):
        return False
    worker = field.chance.choice(living)
    field.will_die(worker)
    worker.go_on()
    worker.send(signal.SIGTERM)
    return True


async def arm_worker(field: Field, point: str, action: str, nth: int) -> bool:
    worker = field.start_worker(f"{point}:{action}:{nth}")
    field.armed.append(worker)
    await kill_worker(field)
    return True


# ---------------------------------------------------------------- the server


async def kill_server(field: Field) -> bool:
    await asyncio.to_thread(field.world.server.kill)
    return await _start(field)


async def kill_postmaster(field: Field) -> bool:
    await _end(field, signal.SIGKILL)
    return await _start(field)


async def stop_server_fast(field: Field) -> bool:
    await _end(field, signal.SIGINT)
    return await _start(field)


async def stop_server_at_once(field: Field) -> bool:
    await _end(field, signal.SIGQUIT)
    return await _start(field)


async def stop_server_smart(field: Field) -> bool:
    """Let nobody in any more for a while; those inside are put out then."""
    state = field.world.server.state
    assert state is not None
    os.kill(state.pid, signal.SIGTERM)
    await asyncio.sleep(0.7)  # the shutdown waits for sessions that do not end by themselves
    await _end(field, signal.SIGINT)
    return await _start(field)


async def kill_backend(field: Field) -> bool:
    """Kill one session's process: the server ends all others, and recovers by itself."""
    pid = _a_backend(field)
    if pid is None:
        return False
    os.kill(pid, signal.SIGKILL)
    await until(lambda: _answers(field.world), DEATH_SECONDS_MAX)
    field.returns.append(time.time())
    return True


async def freeze_backend(field: Field, seconds: float) -> bool:
    """Stop one session's process, whatever locks it holds."""
    pid = _a_backend(field)
    if pid is None:
        return False
    os.kill(pid, signal.SIGSTOP)

    def thaw() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    field.later(seconds, thaw)
    return True


async def terminate_backends(field: Field, session: str) -> bool:
    return field.world.terminate(f"pgconductor {session}") > 0


async def _end(field: Field, number: signal.Signals) -> None:
    state = field.world.server.state
    if state is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.pid, number)
        await until(lambda: field.world.server.state is None, DEATH_SECONDS_MAX)


async def _start(field: Field) -> bool:
    await asyncio.to_thread(field.world.server.start)
    field.returns.append(time.time())
    return True


def _a_backend(field: Field) -> int | None:
    found = field.world.rows(
        "select pid from pg_stat_activity where datname = current_database() and application_name like 'pgconductor %%'"
        " order by pid"
    )
    return field.chance.choice(found)["pid"] if found else None


def _answers(world: World) -> bool:
    try:
        with psycopg.connect(world.dsn, connect_timeout=2) as conn:
            conn.execute("select 1")
    except psycopg.OperationalError:
        return False
    return True


# ---------------------------------------------------------------- the network


async def reset_links(field: Field, session: str) -> bool:
    found = field.world.proxy.chosen(session)
    field.world.proxy.reset(session)
    return bool(found)


async def half_open(field: Field, session: str) -> bool:
    found = field.world.proxy.chosen(session)
    for link in found:
        link.half_open()
    return bool(found)


async def black_hole(field: Field, session: str, seconds: float) -> bool:
    field.world.proxy.silence(session)
    field.later(seconds, lambda: field.world.proxy.unsilence(session))
    return True


async def latency(field: Field, delay: float, seconds: float) -> bool:
    field.world.proxy.delay_seconds = delay
    field.later(seconds, lambda: _set(field, delay_seconds=0.0))
    return True


async def refuse_connections(field: Field, seconds: float) -> bool:
    field.world.proxy.is_refusing = True
    field.world.proxy.reset(field.chance.choice(["", "claim", "heartbeat"]))
    field.later(seconds, lambda: _set(field, is_refusing=False))
    return True


async def arm_proxy(field: Field, action: Any, call: str, nth: int) -> bool:
    field.rules.append(field.world.proxy.arm(action, call, nth))
    return True


def _set(field: Field, **values: Any) -> None:
    for name, value in values.items():
        setattr(field.world.proxy, name, value)
