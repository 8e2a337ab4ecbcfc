"""Steps: 2,000 executions of 10, and one execution alone, for the cost of a step when nothing else happens."""

import time

from benchmarks.measure import Sample, Workload, bench, costs, drain, ran_once
from benchmarks.server import Database, Server

EXECUTIONS = 2_000
STEPS = 10
ALONE = 200


async def loaded(server: Server) -> Sample:
    """2,000 executions of 10 steps."""
    async with bench(server) as it:
        await it.app.invoke_many([it.tasks.steps.bind(number, STEPS) for number in range(EXECUTIONS)])
        drained = await drain(it, jobs=EXECUTIONS, executions=EXECUTIONS)
        steps = EXECUTIONS * STEPS
        saved = await it.database.value("select count(*) from pgconductor.step")
        faults = ran_once(drained.runs_of_each) + ([] if saved == steps else [f"{saved} steps are recorded"])
        details = costs(drained, EXECUTIONS) | {
            "statements_per_step": drained.counted.round_trips / steps,
            "steps_per_save": steps / max(1, drained.counted.calls("save")),
        }
        return Sample(steps / drained.seconds, details, faults)


async def alone(server: Server) -> Sample:
    """One execution of 200 steps on an idle worker; beside it, what a bare insert and commit takes."""
    async with bench(server) as it:
        bare = await _bare_commit_ms(it.database)
        await it.tasks.steps.invoke(0, ALONE)
        drained = await drain(it, jobs=1, executions=1)
        details = {
            "round_trips_per_step": drained.counted.calls("save") / ALONE,
            "bare_commit_ms": bare,
            "ms_per_step": drained.seconds * 1000 / ALONE,
        }
        return Sample(drained.seconds * 1000 / ALONE, details, ran_once(drained.runs_of_each))


async def _bare_commit_ms(database: Database) -> float:
    await database.execute("create table bare (id int primary key, value json)")
    began_at = time.perf_counter()
    for number in range(200):
        await database.value("insert into bare values (%s, '1') returning id", number)
    return (time.perf_counter() - began_at) * 1000 / 200


WORKLOADS = [
    Workload("steps", "2,000 executions of 10 steps", "steps/s", loaded),
    Workload("step-alone", "idle: one step, saved", "ms", alone),
]
