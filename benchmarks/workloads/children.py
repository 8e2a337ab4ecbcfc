"""Parents and children: many parents with one, one parent with many in a row, one with many at once."""

from benchmarks.measure import Sample, Workload, bench, costs, drain, ran_once
from benchmarks.server import Server

PARENTS = 4_000
IN_A_ROW = 1_000
FANS, FAN = 10, 1_000
AT_ONCE = 10_000


async def parents(server: Server) -> Sample:
    """4,000 parents, each of which invokes a child and returns its value."""
    async with bench(server) as it:
        runs = await it.app.invoke_many([it.tasks.parent.bind(number) for number in range(PARENTS)])
        drained = await drain(it, jobs=PARENTS, executions=2 * PARENTS)
        faults = ran_once(drained.runs_of_each)
        if await runs[7].result() != 7:
            faults.append("the value of a child did not come back")
        return Sample(PARENTS / drained.seconds, costs(drained, PARENTS), faults)


async def in_a_row(server: Server) -> Sample:
    """A parent that invokes 1,000 children, one after the other."""
    async with bench(server) as it:
        run = await it.tasks.sequential.invoke(IN_A_ROW)
        drained = await drain(it, jobs=IN_A_ROW, executions=IN_A_ROW + 1)
        began = drained.began_at
        details = {
            "first_100_seconds": began[100] - began[0],
            "last_100_seconds": began[-1] - began[-101],
            "last_to_first": (began[-1] - began[-101]) / (began[100] - began[0]),
        } | costs(drained, IN_A_ROW)
        faults = ran_once(drained.runs_of_each)
        if await run.result() != sum(range(IN_A_ROW)):
            faults.append("the sum is wrong")
        return Sample(IN_A_ROW / drained.seconds, details, faults)


async def at_once(server: Server) -> Sample:
    """A parent that invokes 10,000 children with one `invoke_all`; it runs twice, before and after."""
    async with bench(server) as it:
        run = await it.tasks.fan_out.invoke(AT_ONCE)
        drained = await drain(it, jobs=AT_ONCE + 2, executions=AT_ONCE + 1)
        parent_runs = drained.runs_of_each[AT_ONCE]
        faults = ran_once(drained.runs_of_each[:AT_ONCE])
        if parent_runs != 2:
            faults.append(f"the parent ran {parent_runs} times, not twice")
        if await run.result() != sum(range(AT_ONCE)):
            faults.append("the sum is wrong")
        details = costs(drained, AT_ONCE) | {"parent_runs": float(parent_runs)}
        return Sample(AT_ONCE / drained.seconds, details, faults)


async def fans(server: Server) -> Sample:
    """Ten parents with 1,000 children each, invoked at once; the children of all have numbers of their own."""
    async with bench(server) as it:
        runs = await it.app.invoke_many([it.tasks.fan.bind(number, FAN) for number in range(FANS)])
        drained = await drain(it, jobs=FANS * FAN, executions=FANS * FAN + FANS)
        faults = ran_once(drained.runs_of_each)
        if await runs[0].result() != sum(range(FAN)):
            faults.append("the sum is wrong")
        return Sample(FANS * FAN / drained.seconds, costs(drained, FANS * FAN), faults)


WORKLOADS = [
    Workload("fan-out", "10 parents with 1,000 children each", "children/s", fans, long=True),
    Workload("parents", "4,000 parents with one child each", "parents/s", parents),
    Workload("in-a-row", "1 parent with 1,000 children in a row", "children/s", in_a_row),
    Workload("invoke-all", "1 parent with an invoke_all of 10,000", "children/s", at_once),
]
