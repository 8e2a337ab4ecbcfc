"""pgqueuer: a job queue on asyncpg; batched claim, batched completion (row deleted, log row written)."""

import logging
from collections.abc import Callable
from datetime import timedelta

import asyncpg
import uvloop
from peerscript import Peer, fails, main
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.errors import RetryRequested
from pgqueuer.models import Job
from pgqueuer.queries import Queries

logging.disable(logging.CRITICAL)

DONE = "select {count} - count(*) from pgqueuer"
FILL = """
insert into pgqueuer (priority, entrypoint, payload, status{column})
select 0, 'noop', convert_to(g::text, 'UTF8'), 'queued'{value} from generate_series({{first}}, {{last}}) g"""


class Pgqueuer(Peer):
    package = "pgqueuer"
    table = "pgqueuer"
    done = {"noop": DONE, "padded": DONE, "fail": DONE}
    fill = FILL.format(column="", value="")
    delayed = FILL.format(column=", execute_after", value=", now() + interval '1 day'")

    async def open(self) -> None:
        self.connection = await asyncpg.connect(self.dsn)
        self.queries = Queries(AsyncpgDriver(self.connection))

    async def close(self) -> None:
        await self.connection.close()

    async def setup(self) -> None:
        await self.open()
        await self.queries.install()

    async def enqueue(self, kind: str, number: int, padding: str) -> None:
        await self.queries.enqueue(kind, f"{number} {padding}".encode())

    async def enqueue_many(self, kind: str, numbers: range, padding: str) -> None:
        payloads: list[bytes | None] = [f"{number} {padding}".encode() for number in numbers]
        await self.queries.enqueue([kind] * len(payloads), payloads, [0] * len(payloads))

    async def work(self, number: int, hit: Callable[[int], None], begin: Callable[[], None]) -> None:
        await self.open()
        app = PgQueuer(AsyncpgDriver(self.connection))

        async def noop(job: Job) -> None:
            hit(int((job.payload or b"").split()[0]))

        async def fail(job: Job) -> None:
            job_number = int((job.payload or b"").split()[0])
            if fails(job_number, job.attempts + 1):
                raise RetryRequested(delay=timedelta(0))
            hit(job_number)

        app.entrypoint("noop")(noop)
        app.entrypoint("padded")(noop)
        app.entrypoint("fail")(fail)
        begin()
        await app.run(batch_size=self.settings["batch_size"])


main(Pgqueuer, uvloop.run)
