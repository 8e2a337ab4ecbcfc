"""Two more floors: the engine's own claim and settle with no worker and no handler, and pgbench."""

import asyncio
import re
import tempfile
import time
from pathlib import Path

from benchmarks.claims import Claims
from benchmarks.measure import NotAvailableError, Sample, Workload, bench
from benchmarks.server import Server
from benchmarks.workloads.drain import fill
from benchmarks.workloads.floors import BATCH, TABLE
from pgconductor.binaries import find_binaries

ROWS = 40_000
PGBENCH_SECONDS = 4
INSERT = """insert into q (payload) values ('{"i": 1}');"""


async def claim_and_settle(server: Server) -> Sample:
    """Claim and settle with the engine's functions, a batch at a time."""
    async with bench(server) as it:
        await fill(it, ROWS)
        await it.resume()
        await it.database.settle_down()
        claims = Claims(it, batch=BATCH)
        await claims.join()
        done, began_at = 0, time.perf_counter()
        while ids := await claims.take():
            await claims.complete(ids)
            done += len(ids)
        seconds = time.perf_counter() - began_at
        left = await it.database.value("select count(*) from pgconductor.execution where outcome is null")
    return Sample(done / seconds, faults=[] if left == 0 else [f"{left} executions are not settled"])


async def insert_by_pgbench(server: Server) -> Sample:
    """Insert and commit row by row with pgbench, one client, prepared."""
    program = find_binaries() / "pgbench"
    if not program.exists():
        raise NotAvailableError("there is no pgbench beside this Postgres")
    async with server.database() as database:
        for statement in filter(str.strip, TABLE.split(";\n")):
            await database.execute(statement)
        await database.execute("checkpoint")
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
            script.write(INSERT)
            script.flush()
            options = ("-n", "-M", "prepared", "-c", "1", "-T", str(PGBENCH_SECONDS), "-f", script.name)
            return Sample(await _transactions_a_second(program, *options, database.dsn))


async def _transactions_a_second(program: Path, *arguments: str) -> float:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(program, *arguments, stdout=pipe, stderr=pipe)
    output, errors = await process.communicate()
    found = re.search(rb"tps = ([\d.]+) \(without", output)
    if found is None:
        raise RuntimeError(f"pgbench left with {process.returncode}: {errors.decode()}")
    return float(found[1])


WORKLOADS = [
    Workload("floor-engine", "floor: the engine's claim and settle, batches of 200", "rows/s", claim_and_settle),
    Workload("floor-pgbench", "floor: pgbench, insert and commit row by row", "rows/s", insert_by_pgbench),
]
