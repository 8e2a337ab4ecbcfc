"""A short random run: drawn programs under drawn faults, then calm; everything must end, and every rule hold.

The seed is printed. `PGCONDUCTOR_CHAOS_SEED=123 pytest tests/fault/test_chaos_short.py` draws the same programs and the
same faults again; how they fall against each other is the machine's.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

from pgconductor import ExecutionFailed
from pgconductor.run import Run
from tests.fault.programs import (
    Operation,
    Program,
    child,
    children,
    fail,
    plain_program,
    program,
    sleep,
    step,
    transaction,
)
from tests.fault.supervisor import Worker, World

SECONDS = 8.0
ROOTS = 60
PAUSE_SECONDS = (0.05, 0.6)
SESSIONS = ("claim", "settle", "save", "worker", "heartbeat", "transaction", "listener")
CALLS = ("claim", "settle", "save", "save_transaction", "commit", "beat", "sweep", "retire", "reconcile")
Fault = Callable[[World, random.Random], Coroutine[Any, Any, None]]


async def test_chaos_random_programs_under_random_faults_converge(world: World) -> None:
    seed = int(os.environ.get("PGCONDUCTOR_CHAOS_SEED") or random.SystemRandom().randrange(10**9))
    print(f"PGCONDUCTOR_CHAOS_SEED={seed}")  # noqa: T201 (pytest shows it when the test fails)
    chance = random.Random(seed)  # noqa: S311
    await settle_in(world)
    runs = await invoke_all(chance)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        fault = chance.choice(FAULTS)
        print(f"{deadline - time.monotonic():.2f} s left: {fault.__name__}")  # noqa: T201
        await fault(world, chance)
        await asyncio.sleep(chance.uniform(*PAUSE_SECONDS))  # the schedule's pace; nothing is synchronised by it
    calm(world)
    outcomes = await asyncio.gather(*(run.result(60) for run in runs), return_exceptions=True)
    assert [each for each in outcomes if not isinstance(each, list) and not is_worker_lost(each)] == []


# ---------------------------------------------------------------- programs


def draw_program(chance: random.Random, depth: int = 0) -> Program:
    """Draw a program that completes if no process dies under it too often."""
    return [draw_operation(chance, f"{depth}.{number}", depth) for number in range(chance.randint(1, 5))]


def draw_operation(chance: random.Random, name: str, depth: int) -> Operation:
    verbs = ["step", "step", "transaction", "sleep", "fail"] + ["child", "children"] * (depth < 2)
    verb = chance.choice(verbs)
    if verb == "sleep":
        return sleep(name, chance.uniform(0.01, 1.5))
    if verb == "fail":
        return fail(name, chance.randint(0, 2))
    if verb == "child":
        return child(name, *draw_program(chance, depth + 1))
    if verb == "children":
        return children(name, *(draw_program(chance, depth + 1) for _ in range(chance.randint(1, 4))))
    return step(name) if verb == "step" else transaction(name)


async def invoke_all(chance: random.Random) -> list[Run[list[Any]]]:
    """Enqueue drawn programs, for coroutines and for threads."""
    runs: list[Run[list[Any]]] = []
    for _ in range(ROOTS):
        task = chance.choice([program, plain_program]).with_options(delay=chance.uniform(0, SECONDS / 2))
        runs.append(await task.invoke(draw_program(chance)))
    return runs


def is_worker_lost(outcome: object) -> bool:
    """Tell whether an execution ended because its processes were lost too often, itself or one of its children."""
    return isinstance(outcome, ExecutionFailed) and any(
        name in f"{outcome.error_type} {outcome.remote_traceback}" for name in ("WorkerLost", "ChildFailed")
    )


# ---------------------------------------------------------------- faults


async def settle_in(world: World) -> None:
    """Start the two workers, behind the proxy."""
    for worker in [world.worker(through=True), world.worker(through=True)]:
        await worker.up()


def a_worker(world: World, chance: random.Random) -> Worker:
    """Choose a worker of those that live."""
    return chance.choice([worker for worker in world.workers if worker.process.poll() is None])


async def kill_a_worker(world: World, chance: random.Random) -> None:
    a_worker(world, chance).kill()
    world.worker(through=True)


async def stop_a_worker(world: World, chance: random.Random) -> None:
    worker = a_worker(world, chance)
    await worker.halt()
    asyncio.get_running_loop().call_later(chance.choice([0.3, 1.0, 3.0]), worker.go_on)


async def terminate_sessions(world: World, chance: random.Random) -> None:
    world.terminate(f"pgconductor {chance.choice(SESSIONS)}")


async def kill_postgres(world: World, chance: random.Random) -> None:
    await world.restart_postgres()


async def swallow_a_reply(world: World, chance: random.Random) -> None:
    world.proxy.arm("swallow", chance.choice(CALLS), nth=chance.randint(1, 3))


async def refuse_a_call(world: World, chance: random.Random) -> None:
    world.proxy.arm("refuse", chance.choice(CALLS), nth=chance.randint(1, 3))


async def reset_links(world: World, chance: random.Random) -> None:
    world.proxy.reset(chance.choice(SESSIONS))


async def cut_off_for_a_while(world: World, chance: random.Random) -> None:
    world.proxy.silence(chance.choice(SESSIONS))
    asyncio.get_running_loop().call_later(chance.choice([0.5, 3.0]), world.proxy.heal)


async def slow_down(world: World, chance: random.Random) -> None:
    world.proxy.delay_seconds = chance.choice([0.0, 0.05, 0.2])


FAULTS: list[Fault] = [
    kill_a_worker,
    stop_a_worker,
    terminate_sessions,
    kill_postgres,
    swallow_a_reply,
    swallow_a_reply,
    refuse_a_call,
    reset_links,
    cut_off_for_a_while,
    slow_down,
]


def calm(world: World) -> None:
    """Lift every fault."""
    world.proxy.heal()
    for worker in world.workers:
        worker.go_on()
