"""What claims have left out of executions, and runs need: loaded when they begin, for all of a process together.

So a claim stays small, whatever stands in the queue, and delays nothing else; and what is large is in this process only
while it runs.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pgconductor.batcher import Batcher
from pgconductor.claimed import NULL, Claimed, Loaded, Missing
from pgconductor.errors import ConductorError
from pgconductor.memos import Memos
from pgconductor.session import Session

if TYPE_CHECKING:
    from pgconductor.engine import Engine

LOADED_AT_ONCE_MAX: Final = 16


class _Request:
    """A run that waits."""

    def __init__(self, missing: Missing) -> None:
        self.missing = missing
        self.loaded: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()


class Loader:
    """Loads, in one statement for as many runs as wait for it.

    Args:
        session: Where to ask.
        engine: Builds the query.
    """

    def __init__(self, session: Session, engine: "Engine") -> None:
        self._session = session
        self._engine = engine
        self._batcher: Batcher[_Request] = Batcher(
            "load", self._send, self._reject, lambda _: 0, items_max=LOADED_AT_ONCE_MAX
        )

    async def load(self, missing: Missing) -> Loaded:
        """Return what is missing; nothing of it where the execution is gone."""
        request = _Request(missing)
        self._batcher.add(request)
        return await request.loaded

    async def close(self) -> None:
        """Load nothing more."""
        await self._batcher.close()

    async def _send(self, batch: Sequence[_Request]) -> None:
        waiting = [request for request in batch if not request.loaded.done()]
        if waiting:
            found = await self._session.run(self._engine.load_executions([request.missing for request in waiting]))
            for request in waiting:
                if not request.loaded.done():
                    request.loaded.set_result(found.get(request.missing.id) or Loaded())

    def _reject(self, refused: _Request, error: Exception) -> None:
        if not refused.loaded.done():
            refused.loaded.set_exception(error)


def missing_of(claimed: Claimed, memos: Memos | None) -> Missing | None:
    """Return what a run of a claimed execution has to load; None if it has all that it begins with.

    Args:
        claimed: The execution.
        memos: Those that this process has kept of it.
    """
    with_input, steps = claimed.payload == NULL, claimed.steps
    if type(steps) is not int:
        since = 0 if claimed.cached and memos is None else None
    else:
        since = steps if memos is not None else 0
    return Missing(claimed.id, with_input, since) if with_input or since is not None else None


def complete(claimed: Claimed, memos: Memos | None, loaded: Loaded) -> Memos:
    """Add what was loaded to an execution, and return its memos.

    Raises:
        ConductorError: The execution is gone.
    """
    if claimed.payload == NULL:
        if loaded.payload is None:
            raise ConductorError(f"execution {claimed.id} is gone; it was claimed, and nothing of it is left to load")
        claimed.payload, claimed.trigger_data = loaded.payload, loaded.trigger_data
    memos = memos or Memos.of(claimed.steps)
    memos.merge(loaded.steps)
    return memos
