"""chancy: a job queue; polls, or is notified, for up to `concurrency` jobs; writes results in timed batches."""

import asyncio
import logging
import sys
from collections.abc import Callable
from typing import Any

from chancy import Chancy, Job, Queue, Worker, job
from peerscript import Peer, main

logging.disable(logging.CRITICAL)
sys.modules["peer_chancy"] = sys.modules["__main__"]  # jobs are found by import path

DONE = "select count(*) from chancy_jobs where state = 'succeeded'"
COPY = """
insert into chancy_jobs select (jsonb_populate_record(null::chancy_jobs, to_jsonb(one) || jsonb_build_object(
  'id', gen_random_uuid(), 'kwargs', jsonb_build_object('i', g, 'padding', ''){value}))).*
from generate_series({{first}}, {{last}}) g, (select * from chancy_jobs limit 1) one"""
hits: list[Callable[[int], None]] = []


@job(queue="bench")
async def noop(*, i: int, padding: str) -> None:
    hits[0](i)


class ChancyPeer(Peer):
    package = "chancy"
    table = "chancy_jobs"
    done = {"noop": DONE, "padded": DONE}  # the backoff of a failed job is whole seconds, with jitter
    fill = COPY.format(value="")
    delayed = COPY.format(value=", 'scheduled_at', now() + interval '1 day'")

    async def open(self) -> None:
        log = logging.getLogger("chancy")
        self.app = await Chancy(self.dsn, log=log, max_connection_pool_size=self.settings["pool"]).__aenter__()

    async def close(self) -> None:
        await self.app.__aexit__(None, None, None)

    async def setup(self) -> None:
        await self.open()
        await self.app.migrate()
        await self.app.declare(self.queue(), upsert=True)

    def queue(self) -> Queue:
        return Queue(
            "bench",
            concurrency=self.settings["concurrency"],
            executor=Chancy.Executor.Async,
            polling_interval=self.settings["polling_interval"],
            eager_polling=True,
        )

    async def enqueue(self, kind: str, number: int, padding: str) -> None:
        await self.app.push(_job(number, padding))

    async def enqueue_many(self, kind: str, numbers: range, padding: str) -> None:
        async for _ in self.app.push_many([_job(number, padding) for number in numbers], batch_size=len(numbers)):
            pass

    async def work(self, number: int, hit: Callable[[int], None], begin: Callable[[], None]) -> None:
        await self.open()
        hits.append(hit)
        await self.app.declare(self.queue(), upsert=True)
        worker = Worker(self.app)
        worker.send_outgoing_interval = self.settings["send_outgoing_interval"]
        begin()
        async with worker:
            await worker.wait_for_shutdown()


def _job(number: int, padding: str) -> Job:
    wrapped: Any = noop
    return wrapped.job.with_kwargs(i=number, padding=padding)


if __name__ == "__main__":
    main(ChancyPeer, asyncio.run)
