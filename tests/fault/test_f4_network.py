"""F4, 44, 46 and 49: connections that are slow, cut or silent, and hosts and passwords that change."""

import asyncio
import os
import socket
import time
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgconductor.membership import Timing
from pgconductor.route import Route
from pgconductor.session import BACKOFF_SECONDS_FIRST
from tests.fault.programs import Program, app, child, gate, program, sleep, step, transaction
from tests.fault.supervisor import SLOWER, World
from tests.waiting import until

UNHARMED = ("completed", 1, 0)
PAUSES = 5
LEAST_SECONDS = sum(BACKOFF_SECONDS_FIRST * 2**n / 2 for n in range(PAUSES))
"""What back-off puts at least between the first of some tries and the last; more on a busy machine, never less."""
WORK: Program = [step("a"), transaction("t"), sleep("nap", 0.05), child("c", step("x")), step("b")]


async def tries_of(world: World, session: str, since: float) -> list[float]:
    """Wait until a session has been refused some times, and return when it came from an instant on."""

    def found() -> list[float]:
        return [at for at, application in world.proxy.opened if at > since and application == f"pgconductor {session}"]

    await until(lambda: len(found()) > PAUSES)
    return found()[: PAUSES + 1]


@pytest.mark.covers("F44")
async def test_f4_44_a_peer_that_is_gone_is_given_up_by_the_kernel_within_some_seconds(world: World) -> None:
    async with await Route(world.proxied_dsn, "a test").connect(psycopg.AsyncConnection[Any]) as conn:
        with socket.socket(fileno=os.dup(conn.fileno())) as end:
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            keepalive = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            assert [end.getsockopt(socket.IPPROTO_TCP, option) for option in keepalive] == [5, 2, 3]


@pytest.mark.covers("F44")
async def test_f4_44_a_slow_connection_loses_and_doubles_nothing(world: World) -> None:
    world.proxy.delay_seconds = 0.2
    runs = await app.invoke_many([program.bind(WORK) for _ in range(5)])
    world.worker(through=True, timing=Timing(beat=1.0, expiry=6.0, sweep=1.0))
    await asyncio.gather(*(run.result(60) for run in runs))
    assert {world.facts(run.id) for run in runs} == {UNHARMED}
    assert world.one("select count(*) from effect") == 5


@pytest.mark.covers("F44")
async def test_f4_44_connections_cut_again_and_again_lose_and_double_nothing(world: World) -> None:
    runs = await app.invoke_many([program.bind(WORK) for _ in range(20)])
    world.worker(through=True)
    world.worker(through=True)
    cut_count = 0
    while cut_count < 40 and world.rows("select 1 from execution where outcome is null limit 1"):
        links = world.proxy.chosen("settle") + world.proxy.chosen("save") + world.proxy.chosen("claim")
        cut_count += len(links)
        for link in links:
            link.reset()
        await asyncio.sleep(0.05)  # not to synchronise: a pace of cuts that leaves the workers some time
    assert cut_count >= 5
    await asyncio.gather(*(run.result(60) for run in runs))
    assert {world.facts(run.id) for run in runs} == {UNHARMED}
    assert world.one("select count(*) from effect") == 20


@pytest.mark.covers("F44", "F46")
async def test_f4_46_half_of_the_workers_cut_off_for_longer_than_a_lease_are_replaced_and_fenced(world: World) -> None:
    work = [step("a"), gate("g"), transaction("t"), step("b")]
    cut_off = [await world.worker(through=True, concurrency=3).up() for _ in range(2)]
    old_ids = [worker.boot_id for worker in cut_off]
    runs = await app.invoke_many([program.bind(work) for _ in range(6)])
    await until(lambda: len(world.ledger.of("saw", "a")) == 6)
    world.proxy.silence()
    others = [world.worker(concurrency=3) for _ in range(2)]
    await until(lambda: len(world.ledger.of("began", "")) >= 12)
    world.open_gate("g")
    await asyncio.gather(*(run.result(60) for run in runs))
    world.proxy.heal()
    for worker, old_id in zip(cut_off, old_ids, strict=True):
        await worker.rejoined(old_id)
    assert {world.facts(run.id)[:2] for run in runs} == {("completed", 1)}
    assert world.one("select count(*) from effect") == 6
    assert {line.pid for line in world.ledger.of("ran", "b")} == {worker.pid for worker in others}
    assert world.ledger.runs("a") == 6


@pytest.mark.covers("F49")
async def test_f4_49_a_dead_host_before_the_living_one_is_passed_over(world: World) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # it never listens, and keeps the port from others who would
        hosts, ports = "127.0.0.1,127.0.0.1", f"{deaf.getsockname()[1]},{world.proxy.port}"
        run = await program.invoke(WORK)
        world.worker(dsn=make_conninfo(world.proxied_dsn, host=hosts, port=ports))
        await run.result(30)
    assert world.facts(run.id) == UNHARMED


@pytest.mark.covers("F49")
async def test_f4_49_no_lease_is_lost_where_connecting_takes_longer_than_from_beat_to_beat(world: World) -> None:
    beating = "select pid from pg_stat_activity where application_name = 'pgconductor heartbeat'"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and says nothing, for 2 s
        hosts, ports = "127.0.0.1,127.0.0.1", f"{silent.getsockname()[1]},{world.proxy.port}"
        dsn = make_conninfo(world.proxied_dsn, host=hosts, port=ports, connect_timeout=2)
        worker = await world.worker(dsn=dsn, timing=SLOWER).up()
        await until(lambda: bool(world.rows(beating)))
        up_at = world.one("select clock_timestamp()")
        await until(lambda: bool(world.rows("select 1 from orchestrator where beat_at > %s", up_at)))
        old_id, old_pid = worker.boot_id, world.rows(beating)[0]["pid"]
        world.rows("select pg_terminate_backend(%s)", old_pid)
        await until(lambda: [row["pid"] for row in world.rows(beating)] not in ([], [old_pid]))
        connected_at = world.one("select clock_timestamp()")
        await until(lambda: bool(world.rows("select 1 from orchestrator where beat_at > %s", connected_at)))
    assert worker.boot_id == old_id


@pytest.mark.covers("F49")
async def test_f4_49_a_password_that_was_changed_is_told_and_work_goes_on_when_it_is_put_right(world: World) -> None:
    role = f"worker_{uuid4().hex[:12]}"
    world.execute(f"create role {role} login superuser password 'first'")
    run = await program.invoke([step("a"), gate("g"), transaction("t")])
    worker = world.worker(dsn=make_conninfo(world.proxied_dsn, user=role, password="first"))
    await until(lambda: bool(world.ledger.of("saw", "a")))
    world.execute(f"alter role {role} password 'second'")
    changed_at = time.monotonic()
    for session in ("claim", "save"):
        assert world.terminate(f"pgconductor {session}") == 1
    world.open_gate("g")
    await until(lambda: "password authentication failed" in worker.log)
    for session in ("claim", "transaction"):
        first, *_, last = await tries_of(world, session, since=changed_at)
        assert last - first >= LEAST_SECONDS
    world.execute(f"alter role {role} password 'first'")
    await run.result(30)
    assert world.facts(run.id) == UNHARMED
    with psycopg.connect(world.dsn) as conn:
        assert conn.execute("select count(*) from public.effect").fetchone() == (1,)
