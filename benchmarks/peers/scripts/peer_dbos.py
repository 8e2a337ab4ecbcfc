"""dbos: durable workflows; a thread polls the queue, workflows run on its thread pool."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dbos import DBOS, DBOSClient
from peerscript import Peer, main

logging.disable(logging.CRITICAL)

STEPS = 10
FAN = 1_000
QUEUES = ("bench", "children")
POLL_SECONDS = 0.1
CLIENT_THREADS = 8
DONE = "select count(*) from dbos.workflow_status where name = '{kind}' and status = 'SUCCESS'"
COPY = """
with one as (select * from dbos.workflow_status where name = 'noop' limit 1),
  made as (
    insert into dbos.workflow_status select (jsonb_populate_record(null::dbos.workflow_status, to_jsonb(one) ||
      jsonb_build_object('workflow_uuid', 'noop-' || g))).* from one, generate_series({first}, {last}) g
    returning workflow_uuid)
insert into dbos.workflow_input select (jsonb_populate_record(null::dbos.workflow_input, to_jsonb(i) ||
  jsonb_build_object('workflow_uuid', made.workflow_uuid))).*
from made, one join dbos.workflow_input i on i.workflow_uuid = one.workflow_uuid"""
hits: list[Callable[[int], None]] = []


def _number() -> int:
    return int(str(DBOS.workflow_id).rpartition("-")[2])


@DBOS.workflow(name="noop")
def noop() -> None:
    hits[0](_number())


@DBOS.workflow(name="padded")
def padded(padding: str) -> None:
    hits[0](_number())


@DBOS.step(name="one")
def one() -> int:
    return 1


@DBOS.workflow(name="steps")
def steps() -> int:
    hits[0](_number())
    return sum(one() for _ in range(STEPS))


@DBOS.workflow(name="child")
def child(number: int) -> int:
    return number


@DBOS.workflow(name="parent")
def parent() -> int:
    number = _number()
    hits[0](number)
    handle = DBOS.enqueue_workflow("children", child, number)
    result: int = handle.get_result(polling_interval_sec=POLL_SECONDS)
    if result != number:
        raise RuntimeError("the value of a child did not come back")
    return result


@DBOS.workflow(name="fan")
def fan() -> int:
    hits[0](_number())
    first = _number() * FAN
    handles = [DBOS.enqueue_workflow("children", child, number) for number in range(first, first + FAN)]
    return sum(handle.get_result(polling_interval_sec=POLL_SECONDS) >= first for handle in handles)


class Dbos(Peer):
    package = "dbos"
    table = "dbos.workflow_status"
    # a workflow is not retried as a whole: only its steps are
    done = {kind: DONE.format(kind=kind) for kind in ("noop", "padded", "steps", "parent", "fan")}
    fill = COPY
    bulk = False

    def url(self) -> str:
        return self.dsn.replace("postgresql://", "postgresql+psycopg://")

    async def open(self) -> None:
        self.client = DBOSClient(system_database_url=self.url())
        self.threads = ThreadPoolExecutor(CLIENT_THREADS)

    async def setup(self) -> None:
        await asyncio.to_thread(self.launch, 0)

    def launch(self, number: int) -> None:
        DBOS(
            config={
                "name": "bench",
                "system_database_url": self.url(),
                "sys_db_pool_size": self.settings["pool"],
                "application_version": "bench",
                "log_level": "CRITICAL",
                "executor_id": f"worker {number}",
            }
        )
        DBOS.launch()
        for queue in QUEUES:
            DBOS.register_queue(
                queue,
                worker_concurrency=self.settings["worker_concurrency"],
                polling_interval_sec=self.settings["polling_interval"],
                on_conflict="always_update",
            )

    def _enqueue(self, kind: str, number: int, padding: str) -> None:
        options: Any = {"queue_name": "bench", "workflow_name": kind, "workflow_id": f"{kind}-{number}"}
        arguments = (padding,) if kind == "padded" else ()
        self.client.enqueue({**options, "app_version": "bench"}, *arguments)

    async def enqueue(self, kind: str, number: int, padding: str) -> None:
        self._enqueue(kind, number, padding)

    async def enqueue_many(self, kind: str, numbers: range, padding: str) -> None:
        """Enqueue from several threads: there is no word for many."""
        await asyncio.to_thread(list, self.threads.map(lambda number: self._enqueue(kind, number, padding), numbers))

    async def work(self, number: int, hit: Callable[[int], None], begin: Callable[[], None]) -> None:
        hits.append(hit)
        begin()
        await asyncio.to_thread(self.launch, number)
        await asyncio.to_thread(threading.Event().wait)


if __name__ == "__main__":
    main(Dbos)
