"""procrastinate: a job queue, one job a fetch, LISTEN/NOTIFY wake-up."""

import logging
from collections.abc import Callable
from typing import Any

import procrastinate
from peerscript import Peer, fails, main

logging.disable(logging.CRITICAL)

DONE = "select count(*) from procrastinate_jobs where status = 'succeeded'"
FILL = """
insert into procrastinate_jobs (queue_name, task_name, args{column})
select 'bench', 'noop', jsonb_build_object('i', g, 'padding', ''){value} from generate_series({{first}}, {{last}}) g"""


class Procrastinate(Peer):
    package = "procrastinate"
    table = "procrastinate_jobs"
    done = {"noop": DONE, "padded": DONE, "fail": DONE}
    fill = FILL.format(column="", value="")
    delayed = FILL.format(column=", scheduled_at", value=", now() + interval '1 day'")

    def __init__(self, dsn: str, settings: dict[str, Any]) -> None:
        super().__init__(dsn, settings)
        self.hit: Callable[[int], None] = lambda _: None
        connector = procrastinate.PsycopgConnector(conninfo=dsn, min_size=1, max_size=settings["pool"])
        self.app = procrastinate.App(connector=connector)

        async def noop(i: int, padding: str) -> None:
            self.hit(i)

        async def fail(context: procrastinate.JobContext, i: int, padding: str) -> None:
            if fails(i, context.job.attempts + 1):
                raise RuntimeError("fails once")
            self.hit(i)

        again = procrastinate.RetryStrategy(max_attempts=2, wait=0)
        self.tasks: dict[str, Any] = {
            "noop": self.app.task(noop, name="noop", queue="bench"),
            "padded": self.app.task(noop, name="padded", queue="bench"),
            "fail": self.app.task(fail, name="fail", queue="bench", pass_context=True, retry=again),
        }

    async def open(self) -> None:
        await self.app.open_async()

    async def close(self) -> None:
        await self.app.close_async()

    async def setup(self) -> None:
        await self.open()
        await self.app.schema_manager.apply_schema_async()

    async def enqueue(self, kind: str, number: int, padding: str) -> None:
        await self.tasks[kind].defer_async(i=number, padding=padding)

    async def enqueue_many(self, kind: str, numbers: range, padding: str) -> None:
        await self.tasks[kind].batch_defer_async(*({"i": number, "padding": padding} for number in numbers))

    async def work(self, number: int, hit: Callable[[int], None], begin: Callable[[], None]) -> None:
        await self.open()
        self.hit = hit
        begin()
        await self.app.run_worker_async(queues=["bench"], concurrency=self.settings["concurrency"], wait=True)


main(Procrastinate)
