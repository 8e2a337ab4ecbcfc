"""What is measured of a peer: the same work, clock and checks as of ours. Each takes a peer and returns a sample."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from benchmarks.fleet import Fleet
from benchmarks.measure import NotAvailableError, Sample, quantiles, ran_once, until_done
from benchmarks.peers.peer import Peer
from benchmarks.workloads import beside, content, drain, enqueue, latency, steady
from benchmarks.workloads.children import FAN, FANS, PARENTS
from benchmarks.workloads.steps import EXECUTIONS, STEPS

Measure = Callable[[Peer], Awaitable[Sample]]

MARKS_SECONDS_MAX = 3.0
LEAST_JOBS = 1
DURABLE_PART = 4  # the durable peers, of which the fastest is a twentieth as fast, do a quarter of what ours does
PAUSE_SECONDS = 1.5


async def enqueue_single(peer: Peer) -> Sample:
    """Enqueue one by one, each awaited."""
    count = _part(peer, enqueue.SINGLE)
    async with peer.database() as database:
        return Sample(count / await peer.enqueue(database, "noop", count, how="one"))


async def enqueue_bulk(peer: Peer) -> Sample:
    """Enqueue many at once."""
    if not peer.about["bulk"]:
        raise NotAvailableError("n/a")
    count = _part(peer, enqueue.BULK)
    async with peer.database() as database:
        return Sample(count / await peer.enqueue(database, "noop", count))


def drained(kind: str, jobs: int, *, workers: int = 1, size: int = 0, per_job: int = 1) -> Measure:
    """Return the measure of a drain; `per_job` is what a job counts for, such as its steps."""

    async def measure(peer: Peer) -> Sample:
        count = _part(peer, jobs)
        done = peer.done(kind, count)
        async with peer.database() as database:
            await peer.enqueue(database, kind, count, size=size)
            await database.settle_down()
            async with peer.gate(database) as gate, peer.workers(database, workers, count) as fleet:
                fleet.go()
                opened_at = await gate.open(workers)
                await until_done(database, fleet, count, done)
                finished_at = time.time()
                runs, _ = await _marks(fleet)
        rate = count * per_job / (finished_at - opened_at)
        return Sample(rate, {"jobs": float(count)}, ran_once(runs))

    return measure


async def idle_latency(peer: Peer) -> Sample:
    """Enqueue one every 50 ms beside an idle worker."""
    count = latency.WARM_UP + latency.COUNT
    async with peer.database() as database, peer.workers(database, 1, count) as fleet:
        fleet.go()
        await asyncio.sleep(PAUSE_SECONDS)
        sent_at = await peer.latency(database, count, latency.GAP_SECONDS)
        await until_done(database, fleet, count, peer.done("noop", count))
        runs, began_at = await _marks(fleet)
    waits = [began - sent for began, sent in zip(began_at, sent_at, strict=True)][latency.WARM_UP :]
    details = quantiles(waits)
    return Sample(details["p50_ms"], details, ran_once(runs))


async def steady_load(peer: Peer) -> Sample:
    """Find the peak of enqueueing and running at once, and run at shares of it."""

    async def once(count: int, rate: float) -> steady.Waits:
        async with peer.database() as database, peer.workers(database, 1, count) as fleet:
            fleet.go()
            await asyncio.sleep(PAUSE_SECONDS)
            sent_at = await peer.produce(database, count, rate)
            await until_done(database, fleet, count, peer.done("noop", count))
            await _marks(fleet)
            return steady.Waits(sent_at, fleet)

    return await steady.measure(once, _part(peer, steady.PEAK_JOBS))


def beside_many(field: str) -> Measure:
    """Return the measure of a drain of the first jobs beside a million that are ready (`fill`) or delayed."""

    async def measure(peer: Peer) -> Sample:
        empty = await _first(peer, None)
        full = await _first(peer, field)
        return Sample(full / empty, {"empty_per_s": empty, "beside_per_s": full})

    return measure


async def _first(peer: Peer, field: str | None) -> float:
    """Return jobs a second of the first ones; those of a backlog are ready too, and may be among them."""
    first = _part(peer, beside.COUNT)
    count = first + beside.MILLION if field else first
    async with peer.database() as database:
        await peer.enqueue(database, "noop", first)
        if field:
            await peer.fill(database, field, first, beside.MILLION, beside.CHUNK)
        await database.settle_down()
        async with peer.gate(database) as gate, peer.workers(database, 1, count) as fleet:
            fleet.go()
            opened_at = await gate.open(1)
            await until_done(database, fleet, first, "select true")
            runs, began_at = await _marks(fleet, first)
    if max(runs) > 1:
        raise RuntimeError("jobs ran twice")
    return first / (sorted(at for at in began_at if at)[first - 1] - opened_at)


async def _marks(fleet: Fleet, count: int | None = None) -> tuple[list[int], list[float]]:
    """Return how often and when each job ran; a worker that is not of Python writes its marks a moment later."""
    deadline = time.monotonic() + MARKS_SECONDS_MAX
    while True:
        runs = fleet.seen.runs_of_each()
        if sum(map(bool, runs)) >= (count or len(runs)) or time.monotonic() > deadline:
            return runs, fleet.seen.began_at()
        await asyncio.sleep(0.05)


def _part(peer: Peer, count: int) -> int:
    return max(min(count, LEAST_JOBS), int(count * peer.share))


MEASURES: dict[str, Measure] = {
    "enqueue": enqueue_single,
    "enqueue-bulk": enqueue_bulk,
    "drain-1": drained("noop", drain.COUNT),
    "drain-2": drained("noop", drain.COUNT, workers=2),
    "drain-long-1": drained("noop", drain.LONG),
    "drain-long-2": drained("noop", drain.LONG, workers=2),
    "latency": idle_latency,
    "steady": steady_load,
    "parents": drained("parent", PARENTS // DURABLE_PART),
    "fan-out": drained("fan", FANS, per_job=FAN),
    "steps": drained("steps", EXECUTIONS // DURABLE_PART, per_job=STEPS),
    "failing": drained("fail", content.FAILING),
    "payload-1k": drained("padded", content.SMALL, size=content.SMALL_BYTES),
    "payload-100k": drained("padded", content.LARGE, size=content.LARGE_BYTES),
    "beside-ready": beside_many("fill"),
    "beside-delayed": beside_many("delayed"),
}
