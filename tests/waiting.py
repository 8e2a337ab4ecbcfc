"""Wait for what is to become true. No test waits for a span of time."""

import asyncio
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any

import psycopg

SECONDS_MAX = 60.0


async def until(is_true: Callable[[], bool | Awaitable[bool]], seconds_max: float = SECONDS_MAX) -> None:
    """Return when the condition holds; fail when it does not within a time that no healthy run needs."""
    async with asyncio.timeout(seconds_max):
        while True:
            answer = is_true()
            if await answer if isawaitable(answer) else answer:
                return
            await asyncio.sleep(0.01)


async def until_row(db: psycopg.Connection[Any], query: str, *parameters: object) -> None:
    """Wait until a query has a row."""
    await until(lambda: bool(db.execute(query.encode(), parameters).fetchall()))
