"""SIGTERM and SIGINT, shared by all orchestrators of a process and put back after the last.

The first signal stops them gracefully; the second stops them now. Outside the main thread, and on event loops that
know no signals, nothing is touched.

What runs beside an orchestrator, inside its `async with`, would go on after that, and may wait for what nobody runs any
more. So the signal goes on when all have stopped: to the handler that was there before, such as that of `asyncio.run`
or of a web server; where there was none, what stands inside is cancelled and ends in `SystemExit`.
"""

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Final

log = logging.getLogger("pgconductor.signals")
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
Stop = Callable[[bool], None]
"""Called with whether it is to be done now."""

_stops: list[Stop] = []
_blocks: list["Block"] = []
_before: dict[signal.Signals, Any] = {}
_received: list[signal.Signals] = []


class Block:
    """What runs beside an orchestrator, in the task that entered it; and what to await for the orchestrator's end."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self._task: asyncio.Task[Any] | None = None
        self._signal: signal.Signals | None = None
        self._is_heard = False

    def __enter__(self) -> None:
        """Stand inside from now on."""
        self._task = asyncio.current_task()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stand inside no more; `SystemExit` takes the place of the cancellation by which a signal ended it."""
        task, self._task = self._task, None
        if task is not None and self._signal is not None and kind is asyncio.CancelledError:
            task.uncancel()
            raise SystemExit(128 + self._signal) from None

    @property
    def is_inside(self) -> bool:
        """Whether something stands inside that does not await the end, and so does not know of it."""
        return self._task is not None and not self._is_heard

    def interrupt(self, number: signal.Signals) -> None:
        """Cancel what stands inside."""
        if self._task is not None:
            self._signal = number
            self._task.cancel()

    def __await__(self) -> Generator[Any, Any, None]:
        """Wait for the orchestrator's end, as often as one likes; whoever does so decides what comes after it."""
        self._is_heard = True
        yield from self.ended.wait().__await__()


def subscribe(stop: Stop) -> bool:
    """Have `stop` called at a signal; returns whether signals can be heard here."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if not _before and not _install(asyncio.get_running_loop()):
        return False
    _stops.append(stop)
    return True


def unsubscribe(stop: Stop, block: Block) -> None:
    """Hear no more; the last one puts back what was there before, and lets a signal go on to it."""
    if stop not in _stops:
        return
    _stops.remove(stop)
    _blocks.append(block)
    if not _stops:
        loop = asyncio.get_running_loop()
        for number, handler in _before.items():
            with contextlib.suppress(NotImplementedError, RuntimeError):
                loop.remove_signal_handler(number)
            signal.signal(number, handler)
        _before.clear()
        if _received:
            loop.call_soon(_pass_on, _received[-1], tuple(_blocks))
        _received.clear()
        _blocks.clear()


def _pass_on(number: signal.Signals, blocks: tuple[Block, ...]) -> None:
    inside = [block for block in blocks if block.is_inside]
    handler = signal.getsignal(number)
    if inside and callable(handler):
        signal.raise_signal(number)
    elif handler is signal.SIG_DFL:
        for block in inside:
            block.interrupt(number)


def _install(loop: asyncio.AbstractEventLoop) -> bool:
    for number in SIGNALS:
        handler = signal.getsignal(number)
        try:
            loop.add_signal_handler(number, _on_signal, number)
        except (NotImplementedError, RuntimeError, ValueError):
            return False
        _before[number] = handler if handler is not None else signal.SIG_DFL
    return True


def _on_signal(number: signal.Signals) -> None:
    is_now = bool(_received)
    _received.append(number)
    log.info("%s: stopping %s", signal.Signals(number).name, "now" if is_now else "gracefully; once more to stop now")
    for stop in tuple(_stops):
        stop(is_now)
