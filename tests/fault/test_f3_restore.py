"""F3, 42 and 43: databases of other encodings and collations, and those that were restored while work was under way."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgconductor import Conductor, Context, Orchestrator, schema
from pgconductor.binaries import find_binaries
from pgconductor.engine import Engine
from pgconductor.errors import ServerError
from tests.fault.programs import app, gate, program, step, transaction
from tests.fault.supervisor import World
from tests.waiting import until

Create = Callable[[str], str]


@pytest.fixture
def create(server: str) -> Iterator[Create]:
    """`create("encoding 'LATIN1' locale 'C'")` makes a database and returns its address."""
    made: list[str] = []
    with psycopg.connect(server, autocommit=True) as admin:

        def make(options: str) -> str:
            name = f"other_{uuid4().hex[:12]}"
            admin.execute(f"create database {name} {options} template template0".encode())
            made.append(name)
            return make_conninfo(server, dbname=name)

        yield make
        for name in made:
            admin.execute(f"drop database {name} with (force)".encode())


async def echoed(dsn: str, texts: list[str]) -> list[str]:
    """Install the engine, and return what executions make of some texts."""
    async with Conductor(dsn) as conductor:
        await conductor.migrate()

        @conductor.task(max_attempts=1)
        async def echo(ctx: Context, code: list[int]) -> str:
            return await ctx.step("text", lambda: "".join(map(chr, code)))

        runs = [await echo.invoke([ord(each) for each in text]) for text in texts]
        await Orchestrator(conductor).drain()
        return [await run.result(10) for run in runs]


@pytest.mark.covers("F42")
async def test_f3_42_texts_come_back_equal_under_the_c_locale(create: Create) -> None:
    texts = ["plain", "é", "ıİ", "日本", "😀"]
    assert await echoed(create("encoding 'UTF8' locale 'C'"), texts) == texts


@pytest.mark.covers("F42")
def test_f3_42_an_encoding_that_lacks_characters_is_refused_with_the_reason(create: Create) -> None:
    with pytest.raises(ServerError, match=r"LATIN1.*UTF8"):
        schema.migrate(create("encoding 'LATIN1' locale 'C'"))


@pytest.mark.covers("F43")
async def test_f3_43_a_dump_of_work_under_way_is_restored_and_goes_on_with_old_claims_void(
    world: World, tmp_path: Path
) -> None:
    done, run = await program.invoke([step("x")]), await program.invoke([step("a"), gate("g"), transaction("t")])
    world.worker()
    await until(lambda: bool(world.ledger.of("saw", "a")) and world.facts(done.id)[0] == "completed")
    script = dump(world.dsn)
    world.open_gate("g")
    await run.result(30)
    name = f"restored_{uuid4().hex[:12]}"
    world.execute(f"create database {name}")
    other = World(world.server, name, tmp_path / "other", world.proxy)
    try:
        other.execute("drop table effect")
        restore(script, other.dsn)
        with app.bound_to(other.dsn, Engine("pgconductor")):
            later = await program.invoke([step("b")])
            await app.close()
        assert {other.facts(id) for id in (run.id, later.id)} == {("running", 1, 0), ("ready", 1, 0)}
        other.open_gate("g")
        other.worker()
        await other.reaches(run.id, "completed")
        await other.reaches(later.id, "completed")
        assert [other.facts(each.id)[1:] for each in (done, run, later)] == [(1, 0), (1, 1), (1, 0)]
        assert other.one("select count(*) from effect") == 1
        assert other.one("select count(distinct ord) from execution") == 3
    finally:
        other.close()
        world.execute(f"drop database {name} with (force)")


def dump(dsn: str) -> bytes:
    """Return a database as SQL."""
    program = find_binaries() / "pg_dump"
    if not program.exists():
        pytest.skip("this Postgres came without pg_dump")
    return subprocess.run([program, "--dbname", dsn], capture_output=True, check=True).stdout


def restore(script: bytes, dsn: str) -> None:
    """Run a dump in an empty database."""
    options = ["--dbname", dsn, "--quiet", "--set", "ON_ERROR_STOP=1"]
    subprocess.run([find_binaries() / "psql", *options], input=script, capture_output=True, check=True)
