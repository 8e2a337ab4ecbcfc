"""What limits, windows and pauses cost those who have none.

`flow-drain`: a queue's unlimited executions beside a limited task that is full, against the same without it.
`flow-held`: a claim beside rows that may not run, which were all enqueued before: of a task whose window is closed, of
a paused queue, of a full task, and of a task that the process does not know; as a multiple of what it costs without.
`flow-admit`: a thousand executions of as many keys, through their limit.
"""

import os

from benchmarks.claims import BATCH, Claims, claim_ms, register_task
from benchmarks.measure import Bench, Sample, Workload, bench, drain, ran_once
from benchmarks.server import Server
from benchmarks.tasks import QUEUE

COUNT = 10_000
HELD = int(os.environ.get("BENCH_HELD", "100000"))


async def _fill(it: Bench, count: int) -> None:
    for start in range(1, count, 5_000):
        await it.app.invoke_many([it.tasks.noop.bind(number) for number in range(start, min(count, start + 5_000))])


async def _hold(it: Bench, task: str, count: int, queue: str = QUEUE) -> None:
    """Enqueue executions of a task by name."""
    await it.database.value(
        "select length(cast(pgconductor.enqueue((select json_agg(json_build_object('id', pgconductor.uuid7(), "
        "'task', %s::text, 'queue', %s::text, 'payload', json_build_object('key', g))) "
        "from generate_series(1, %s) g)) as text))",
        task,
        queue,
        count,
    )


async def _seconds(server: Server, *, limited: bool) -> tuple[float, list[str]]:
    async with bench(server) as it:
        await it.tasks.noop.invoke(0)
        if limited:
            await register_task(it, "limited", limit=1)
            await it.database.value("select cast(pgconductor.set_limit('limited', 0) as text)")
            await _hold(it, "limited", COUNT)
        await _fill(it, COUNT)
        # what is limited cannot run, so it is not waited for
        drained = await drain(it, jobs=COUNT, executions=COUNT)
        return drained.seconds, ran_once(drained.runs_of_each)


async def run_drain(server: Server) -> Sample:
    """Return the speed beside a limited task as a share of the speed without it."""
    alone, faults = await _seconds(server, limited=False)
    beside, more = await _seconds(server, limited=True)
    return Sample(alone / beside, {"alone_per_s": COUNT / alone, "beside_per_s": COUNT / beside}, faults + more)


async def run_held(server: Server) -> Sample:
    """Return what a claim costs beside rows that may not run, as a multiple of what it costs without."""
    async with bench(server) as it:
        empty = await claim_ms(it)
    async with bench(server) as it:
        await register_task(it, "full", limit=1)
        await it.database.value("select cast(pgconductor.set_limit('full', 0) as text)")
        for name, queue in (("full", QUEUE), ("closed", QUEUE), ("foreign", QUEUE), ("paused", "paused")):
            await _hold(it, name, HELD, queue)
        await it.app.pause("paused")
        await it.database.execute(
            "update pgconductor.task set window_zone = 'UTC', "
            "window_start = (now() at time zone 'UTC' + interval '2 h')::time, "
            "window_end = (now() at time zone 'UTC' + interval '3 h')::time where name = 'closed'"
        )
        claims = Claims(it, (QUEUE, "paused"), ("noop", "closed", "full", "paused"))
        held = await claim_ms(it, claims)
    return Sample(held / empty, {"empty_ms": empty, "held_ms": held, "rows_of_each_kind": float(HELD)})


async def run_admit(server: Server) -> Sample:
    """Return the milliseconds in which a thousand keyed executions pass their limit."""
    async with bench(server) as it:
        await register_task(it, "keyed", queue="keyed", limit=1, key="key")
        await _hold(it, "keyed", 1_000, "keyed")
        await it.database.settle_down()
        claims = Claims(it, ("keyed",), ("keyed",))
        await claims.join()
        return Sample(await claims.milliseconds(1_000 // BATCH, warm_up=0) * 1_000 / BATCH)


WORKLOADS = [
    Workload("flow-drain", "drain 10,000 beside a full limited task, against without", "times", run_drain),
    Workload("flow-held", "a claim of 100 beside rows that may not run, against none", "times", run_held),
    Workload("flow-admit", "claim 1,000 executions of 1,000 keys with a limit each", "ms", run_admit),
]
