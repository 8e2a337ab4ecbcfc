"""Named points at which a test may make a process die, hang or fail.

A point is a no-op unless the environment armed it before the process imported this module:

    PGCONDUCTOR_FAULT="after_claim_reply:kill:2,before_settle:raise"     point:action[:at the n-th hit, default 1]
    PGCONDUCTOR_FAULT_LOG=faults.txt                                     a line for each fault that fired

Actions: `kill` sends SIGKILL to the process itself, `stop` SIGSTOP (it goes on where it stood after SIGCONT), `hang`
stops the thread for ever, `raise` raises `InjectedFault`, `exit` leaves without clean-up. A test asserts on the log, so
that a fault which never fired is no silent success.
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import NoReturn

_VARIABLE = "PGCONDUCTOR_FAULT"
_LOG_VARIABLE = "PGCONDUCTOR_FAULT_LOG"


class InjectedFault(Exception):
    """Raised by a fault point armed with `raise`."""


class _Armed:
    """One armed point and how many hits are left until it acts."""

    def __init__(self, name: str, action: str, hit: int) -> None:
        self.name = name
        self.act = _ACTIONS[action]
        self.left = hit
        self._lock = threading.Lock()

    def strike(self) -> None:
        with self._lock:
            self.left -= 1
            if self.left != 0:
                return
        _record(self.name)
        self.act(self.name)


def _record(name: str) -> None:
    path = os.environ.get(_LOG_VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as log:  # noqa: PTH123 (one write that must not import anything)
            log.write(f"{name} {os.getpid()}\n")
            log.flush()
            os.fsync(log.fileno())


def _kill(_name: str) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL returned")


def _stop(_name: str) -> None:
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # to this thread, so that it is not a moment late


def _hang(_name: str) -> NoReturn:
    while True:
        signal.pause()


def _raise(name: str) -> NoReturn:
    raise InjectedFault(name)


def _exit(_name: str) -> NoReturn:
    os._exit(3)


_ACTIONS: dict[str, Callable[[str], None]] = {
    "kill": _kill,
    "stop": _stop,
    "hang": _hang,
    "raise": _raise,
    "exit": _exit,
}


def _parse(text: str) -> dict[str, _Armed]:
    armed: dict[str, _Armed] = {}
    for part in filter(None, text.split(",")):
        name, action, *hit = part.strip().split(":")
        armed[name] = _Armed(name, action, int(hit[0]) if hit else 1)
    return armed


_armed = _parse(os.environ.get(_VARIABLE, ""))


def _strike(name: str) -> None:
    point = _armed.get(name)
    if point is not None:
        point.strike()


def _pass(_name: str) -> None:
    """Do nothing; what `fault` is in production."""


fault: Callable[[str], None] = _strike if _armed else _pass
"""Mark a point where a fault may strike. Its name says what has and has not happened yet."""
