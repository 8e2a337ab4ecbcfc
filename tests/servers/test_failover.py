"""The primary is killed under load and its standby promoted; workers and clients go on by themselves."""

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow

from pgconductor import Conductor, Context, ExecutionNotFound, Orchestrator, schema
from pgconductor.embedded import EmbeddedServer
from pgconductor.engine import Engine
from pgconductor.errors import ServerError
from pgconductor.membership import Timing
from tests import invariants
from tests.fault import programs
from tests.fault.programs import Program, app, children, gate, program, sleep, step, transaction
from tests.fault.proxy import Proxy
from tests.fault.supervisor import World
from tests.servers.pair import Pair, has_basebackup, running_pair
from tests.sql.support import claim_one, complete, enqueue, register, session
from tests.waiting import until

pytestmark = pytest.mark.skipif(not has_basebackup(), reason="these Postgres programs lack pg_basebackup")
WORK: Program = [step("a"), transaction("t"), sleep("nap", 0.05), children("c", [step("x")], [step("y")]), step("b")]
TIMING = Timing(beat=0.5, expiry=6.0, sweep=0.5)


@pytest.fixture
def pair() -> Generator[Pair]:
    with running_pair() as running:
        yield running


@asynccontextmanager
async def world_of(pair: Pair, home: Path, dsn: str) -> AsyncGenerator[World]:
    """Make a world whose workers and clients know both servers."""
    made = World(pair.primary, "app", home, Proxy("127.0.0.1", 1))
    made.dsn = dsn
    try:
        with programs.app.bound_to(dsn, Engine("pgconductor")):
            yield made
            await programs.app.close()
    finally:
        made.close()
        print(made.logs())  # noqa: T201 (pytest shows it when the test fails)


def standby_first(pair: Pair) -> str:
    ports = [server.state.port for server in (pair.standby, pair.primary) if server.state]
    return make_conninfo(pair.dsn, port=",".join(map(str, ports)))


def steps_of(world: World, id: UUID) -> list[str]:
    return [row["name"] for row in world.rows("select name from steps where execution_id = %s order by name", id)]


@pytest.mark.covers("F32", "F33")
async def test_after_a_failover_to_a_synchronous_standby_nothing_is_lost(pair: Pair, tmp_path: Path) -> None:
    pair.wait_for_standby()
    async with world_of(pair, tmp_path, standby_first(pair)) as world:
        for worker in [world.worker(timing=TIMING), world.worker(timing=TIMING)]:
            await worker.up()
        runs = await app.invoke_many([program.bind(WORK) for _ in range(60)])
        await until(lambda: len(world.rows("select from execution where outcome is not null")) > 20)
        switching = asyncio.create_task(asyncio.to_thread(pair.fail_over))
        runs += await asyncio.gather(*(program.invoke(WORK) for _ in range(20)))
        await switching
        await asyncio.gather(*(run.result(60) for run in runs))
        assert [worker.process.poll() for worker in world.workers] == [None, None]
        assert {world.facts(run.id) for run in runs} == {("completed", 1, 0)}
        assert world.one("select count(*) from public.effect") == 80
        await world.converges()


@pytest.mark.covers("F32")
async def test_after_a_failover_to_an_asynchronous_standby_the_tail_is_done_again(pair: Pair, tmp_path: Path) -> None:
    async with world_of(pair, tmp_path, pair.dsn) as world:
        held = await program.invoke(
            [step("a"), gate("one"), step("b"), transaction("t"), gate("two"), transaction("u")]
        )
        ended = await program.invoke([gate("one"), step("a")])
        await world.worker(timing=TIMING).up()
        await until(lambda: bool(world.ledger.of("saw", "a", str(held.id))))
        await until(lambda: world.execution(ended.id)["state"] == "running")
        await asyncio.to_thread(pair.cut_off_standby)
        world.open_gate("one")
        await until(lambda: steps_of(world, held.id) == ["a", "b", "t"])
        assert len(await ended.result(30)) == 2
        tail = await program.invoke([step("a")])
        await asyncio.to_thread(pair.fail_over)
        world.open_gate("two")
        await asyncio.gather(held.result(60), ended.result(60))
        assert steps_of(world, held.id) == ["a", "b", "t", "u"]
        assert world.one("select count(*) from public.effect") == 2
        assert {world.facts(run.id) for run in (held, ended)} == {("completed", 1, 0)}
        assert world.ledger.runs("b") == 2
        with pytest.raises(ExecutionNotFound):
            await tail.state()
        check_quiescent(world)


def check_quiescent(world: World) -> None:
    with psycopg.connect(world.dsn, autocommit=True, target_session_attrs="read-write") as conn:
        invariants.check_quiescent(conn)


@pytest.mark.covers("F32")
def test_a_claim_number_that_is_issued_twice_is_fenced_by_the_boot_id(pair: Pair) -> None:
    one, other = uuid4(), uuid4()
    with session(pair.dsn_of(pair.primary)) as before:
        for each in (one, other):
            register(before, "work", worker=each)
        id = enqueue(before)
        pair.cut_off_standby()
        assert claim_one(before, token=7, worker=one) == id
    pair.fail_over()
    with session(pair.dsn_of(pair.standby)) as after:
        assert claim_one(after, token=7, worker=other) == id
        assert complete(after, id, token=7, worker=one)["lost"] == [id]
        assert state_of(after, id) == "running"
        assert not complete(after, id, token=7, worker=other).get("lost")
        assert state_of(after, id) == "completed"
        invariants.check_invariants(after)


def state_of(db: psycopg.Connection[DictRow], id: str) -> str:
    row = db.execute("select state from executions where id = %s", [id]).fetchone()
    return str(row and row["state"])


@pytest.fixture
def standby() -> Generator[str]:
    """The address of a standby without a primary, that has the engine."""
    with EmbeddedServer(settings={"fsync": "off"}) as server:
        schema.migrate(server.dsn)
        server.stop()
        (server.data_dir / "standby.signal").touch()
        server.start()
        yield server.dsn


@pytest.mark.covers("F33")
@pytest.mark.parametrize("attrs", [None, "read-write"])
async def test_a_read_only_standby_is_named_as_such(standby: str, attrs: str | None) -> None:
    async with Conductor(make_conninfo(standby, target_session_attrs=attrs)) as conductor:

        @conductor.task
        async def work(ctx: Context) -> None: ...

        with pytest.raises(ServerError, match=r"read-only standby.*name all servers"):
            await work.invoke()
        with pytest.raises(ServerError, match=r"read-only standby.*name all servers"):
            await Orchestrator(conductor).start()
