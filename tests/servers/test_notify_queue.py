"""A server whose queue of notifications is full, since some listener sits in a transaction: nobody's call is lost."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from pgconductor import Conductor, Context, schema
from pgconductor.embedded import EmbeddedServer
from tests.conftest import BIN_DIR


def fill(connection: psycopg.Connection[Any]) -> None:
    for _ in range(200):
        connection.execute("select pg_notify('anything', repeat('x', 7900))")


@pytest.fixture(scope="module")
def full() -> Iterator[str]:
    with EmbeddedServer(bin_dir=BIN_DIR, settings={"fsync": "off"}) as server:
        with psycopg.connect(server.dsn, autocommit=True) as admin:
            if admin.info.server_version < 170000:
                pytest.skip("the queue is 8 GiB before Postgres 17, and cannot be made smaller")
            schema.migrate(admin)
            admin.execute("alter system set max_notify_queue_pages = 64")
        server.stop()
        dsn = server.start().dsn
        with psycopg.connect(dsn) as listener, psycopg.connect(dsn, autocommit=True) as other:
            listener.execute("listen anything")
            listener.commit()
            listener.execute("select 1")  # and stays in its transaction
            with pytest.raises(psycopg.errors.ProgramLimitExceeded):
                fill(other)
            yield dsn


async def test_an_invoke_is_stored_when_its_hint_cannot_be_sent(full: str) -> None:
    async with Conductor(full) as app:

        @app.task
        async def add(_: Context, number: int) -> int:
            return number

        await add.invoke(1)  # makes its lane, and so is no plain call
        await app.close()
        run = await add.invoke(2)
        assert await run.state() == "ready"
