"""Producing jobs at a pace. Plain Python without a dependency, since the scripts of the peers use it too."""

import asyncio
import time
from collections.abc import Awaitable, Callable

TICK_SECONDS = 0.01
BATCH = 100

Enqueue = Callable[[range], Awaitable[object]]


async def produce(count: int, rate: float, enqueue: Enqueue) -> list[float]:
    """Enqueue jobs, those that are due together, and return when each was begun to be, as `time.time()` tells.

    Args:
        count: How many.
        rate: Jobs a second; 0 enqueues a hundred at a time, as fast as that goes.
        enqueue: Enqueues the jobs of these numbers.
    """
    sent_at: list[float] = []
    began_at = time.time()
    while len(sent_at) < count:
        due = len(sent_at) + BATCH if not rate else int((time.time() - began_at) * rate) + 1
        numbers = range(len(sent_at), min(due, count))
        if numbers:
            sent_at += [time.time()] * len(numbers)
            await enqueue(numbers)
        if rate:
            await asyncio.sleep(max(0.0, TICK_SECONDS - (time.time() - began_at) % TICK_SECONDS))
    return sent_at
