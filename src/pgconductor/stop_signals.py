"""SIGTERM and SIGINT, shared by all orchestrators of a process and put back after the last.

The first signal stops them gracefully; the second stops them now. Outside the main thread, and on event loops that
know no signals, nothing is touched.
"""

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable
from typing import Any, Final

log = logging.getLogger("pgconductor.signals")
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
Stop = Callable[[bool], None]
"""Called with whether it is to be done now."""

_stops: list[Stop] = []
_before: dict[signal.Signals, Any] = {}
_received_count = 0


def subscribe(stop: Stop) -> bool:
    """Have `stop` called at a signal; returns whether signals can be heard here."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if not _before and not _install(asyncio.get_running_loop()):
        return False
    _stops.append(stop)
    return True


def unsubscribe(stop: Stop) -> None:
    """Hear no more; the last one puts back what was there before."""
    global _received_count  # noqa: PLW0603 (signals are the process')
    if stop not in _stops:
        return
    _stops.remove(stop)
    if not _stops:
        _received_count = 0
        loop = asyncio.get_running_loop()
        for number, handler in _before.items():
            with contextlib.suppress(NotImplementedError, RuntimeError):
                loop.remove_signal_handler(number)
            signal.signal(number, handler)
        _before.clear()


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
    global _received_count  # noqa: PLW0603
    _received_count += 1
    is_now = _received_count > 1
    log.info("%s: stopping %s", signal.Signals(number).name, "now" if is_now else "gracefully; once more to stop now")
    for stop in tuple(_stops):
        stop(is_now)
