"""An app of its own for each test, on a fresh database, and workers for it in this process."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from pgconductor import Conductor, Orchestrator
from pgconductor.client import LoopClient

Working = Callable[..., AbstractAsyncContextManager[Orchestrator]]


@pytest.fixture
async def app(database: str) -> AsyncIterator[Conductor[None]]:
    """A conductor of the fresh database."""
    async with Conductor(database) as conductor:
        yield conductor


def client_of(app: Conductor[None]) -> LoopClient:
    """Return what the conductor does on this event loop."""
    return app._clients.here()


@pytest.fixture
def working(app: Conductor[None]) -> Working:
    """`async with working():` runs workers for the app's tasks."""

    @asynccontextmanager
    async def work(**options: Any) -> AsyncGenerator[Orchestrator]:
        orchestrator = Orchestrator(app, **options)
        await orchestrator.start()
        try:
            yield orchestrator
        finally:
            await orchestrator.stop(grace=5)

    return work
