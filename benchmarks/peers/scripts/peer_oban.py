"""oban (the Python port): a job queue on psycopg; claims up to its queue's limit, acknowledges before each fetch."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, ClassVar

import oban.schema
import uvloop
from oban import Oban, worker
from peerscript import Peer, main

logging.disable(logging.CRITICAL)

DONE = "select count(*) from oban_jobs where state = 'completed'"
FILL = """
insert into oban_jobs (state, queue, worker, args{column})
select '{state}', 'bench', '__main__.Noop', jsonb_build_object('i', g){value}
from generate_series({{first}}, {{last}}) g"""


@worker(queue="bench")
class Noop:
    hit: ClassVar[Callable[[int], None]]

    async def process(self, job: Any) -> None:
        Noop.hit(job.args["i"])


class ObanPeer(Peer):
    package = "oban"
    table = "oban_jobs"
    done = {"noop": DONE, "padded": DONE}  # a failed job waits for its backoff and for the stager
    fill = FILL.format(column="", state="available", value="")
    delayed = FILL.format(column=", scheduled_at", state="scheduled", value=", now() + interval '1 day'")

    async def open(self) -> None:
        self.pool = await Oban.create_pool(self.dsn, min_size=1, max_size=self.settings["pool"])
        self.client = Oban(pool=self.pool)

    async def close(self) -> None:
        await self.pool.close()

    async def setup(self) -> None:
        await self.open()
        await oban.schema.install(self.pool)

    async def enqueue(self, kind: str, number: int, padding: str) -> None:
        await self.client.enqueue(Noop.new({"i": number, "padding": padding}))

    async def enqueue_many(self, kind: str, numbers: range, padding: str) -> None:
        await self.client.enqueue_many([Noop.new({"i": number, "padding": padding}) for number in numbers])

    async def work(self, number: int, hit: Callable[[int], None], begin: Callable[[], None]) -> None:
        await self.open()
        Noop.hit = staticmethod(hit)
        runner = Oban(pool=self.pool, queues={"bench": self.settings["limit"]})
        begin()
        await runner.start()
        await asyncio.Event().wait()


main(ObanPeer, uvloop.run)
