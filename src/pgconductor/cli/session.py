"""What the commands share: where the database is, one client a command, durations, and JSON on request."""

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import click
import msgspec

from pgconductor import embedded
from pgconductor.address import check_address
from pgconductor.client import LoopClient
from pgconductor.conductor import Conductor
from pgconductor.durations import parse_duration
from pgconductor.engine import Engine
from pgconductor.errors import ConductorError

T = TypeVar("T")
SCHEMA: Final = "pgconductor"
"""What `--schema` is where it is not given."""
ASIDE_SECONDS: Final = 2.0
"""How long a command waits for what it tells beside its answer."""
_UNPRINTABLE = re.compile(r"[^ -~\n]")


@dataclass
class Settings:
    """The options before the command."""

    given_dsn: str | None
    schema: str

    @property
    def dsn(self) -> str:
        """Where the database is; may start the development server."""
        if self.given_dsn:
            check_address(self.given_dsn, "--dsn")
        return embedded.resolve_dsn(self.given_dsn, _tell_of_start)

    @property
    def engine(self) -> Engine:
        """Builds the queries."""
        return Engine(self.schema)

    def ask(self, work: Callable[[LoopClient, Engine], Awaitable[T]]) -> T:
        """Do something with a client, then close it."""
        return asyncio.run(self.ask_here(work))

    async def ask_here(self, work: Callable[[LoopClient, Engine], Awaitable[T]]) -> T:
        """Do so on the running event loop."""
        client = LoopClient(self.engine, self._address, self._migrate)
        try:
            return await work(client, self.engine)
        finally:
            await client.close()

    async def ask_aside(self, work: Callable[[LoopClient, Engine], Awaitable[T]], seconds: float | None) -> T | None:
        """Do so where the command can do without: None where that is refused, or takes longer than so many seconds."""
        with contextlib.suppress(ConductorError, TimeoutError):
            async with asyncio.timeout(seconds):
                return await self.ask_here(work)
        return None

    def conduct(self, work: Callable[[Conductor], Awaitable[T]]) -> T:
        """Do something with a conductor, then close it."""
        _ = self.dsn  # tells of the development server if it starts here

        async def session() -> T:
            async with Conductor(self.given_dsn, schema=self.schema) as app:
                return await work(app)

        return asyncio.run(session())

    async def _address(self) -> str:
        return await asyncio.to_thread(lambda: self.dsn)

    async def _migrate(self) -> bool:
        return False


def _tell_of_start(server: embedded.ServerState) -> None:
    click.echo(f"started a Postgres of this project's own, in {server.data_dir}", err=True)


def duration(text: str) -> timedelta:
    """Read a length of time, such as `30s`.

    Raises:
        click.BadParameter: It is none.
    """
    return _duration(text, positive=False)


def duration_above_zero(text: str) -> timedelta:
    """Do as `duration`, and refuse zero."""
    return _duration(text, positive=True)


def _duration(text: str, *, positive: bool) -> timedelta:
    try:
        return parse_duration(text, positive=positive)
    except ValueError as error:
        reason, _, _ = str(error).removeprefix("duration: ").partition("; ")
        raise click.BadParameter(f"{reason}; write it as 250ms, 30s, 15m, 1h30m or 2d") from error


pass_settings = click.make_pass_decorator(Settings)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(value: Any) -> None:
    """Print a value as indented JSON, in which all that a terminal could obey is escaped."""
    click.echo(_UNPRINTABLE.sub(_escaped, msgspec.json.format(msgspec.json.encode(value), indent=2).decode()))


def _escaped(found: re.Match[str]) -> str:
    """Write a character as JSON can, too: JSON itself only demands it of those below the space."""
    char = found[0]
    return char if char.isprintable() else json.dumps(char)[1:-1]
