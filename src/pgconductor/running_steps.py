"""The steps whose code runs in this process, or that pause between two tries.

What runs is not recorded: a step is written when it has ended, and not at all where it fails. So that people can see
which step an execution has been in for so long, and what its last try ended with, a process tells with its beats those
that have lasted for more than a moment. Nothing else relies on it.
"""

import time
from typing import Final, NamedTuple

from msgspec import Struct

from pgconductor.stored_error import headline

TOLD_SECONDS: Final = 1.0
"""How long the code of a step has run before it is told of."""
TOLD_MAX: Final = 50
"""The most that are told of, those first that have lasted longest."""

Key = tuple[str, str]
"""The execution and the step's name."""


class FailedTry(NamedTuple):
    """The last try of a step that failed, when its pause ends, and how many tries there are."""

    number: int
    most: int
    error: str
    next_at: float


class RunningStep(Struct, array_like=True, frozen=True):
    """What is told of one step.

    Attributes:
        execution_id: Whose it is.
        step: Its name.
        seconds: How long this try of its code has run; None: it pauses.
        number: Which try that is, or which one has failed.
        most: How many tries there are; None where none has failed yet.
        error: What the last try ended with.
        next_in: In how many seconds the next try begins, while it pauses.
    """

    execution_id: str
    step: str
    seconds: float | None
    number: int = 1
    most: int | None = None
    error: str | None = None
    next_in: float | None = None


class RunningSteps:
    """Knows them. Safe to use from any thread.

    Args:
        pauses: Whether steps pause between their tries; tests have another clock.
    """

    def __init__(self, *, pauses: bool = True) -> None:
        self._pauses = pauses
        self._began: dict[Key, float] = {}
        self._failed: dict[Key, FailedTry] = {}

    def begin(self, key: Key) -> None:
        """A try of a step begins."""
        self._began[key] = time.monotonic()

    def end(self, key: Key) -> None:
        """It has ended, in whatever way."""
        self._began.pop(key, None)
        if self._failed:
            self._failed.pop(key, None)

    def pause(self, key: Key, number: int, most: int, error: Exception, seconds: float) -> float:
        """It has failed, and is tried again; returns how long to pause before that."""
        pause = seconds if self._pauses else 0.0
        self._failed[key] = FailedTry(number, most, headline(error), time.monotonic() + pause)
        return pause

    def told(self) -> list[RunningStep] | None:
        """Return what a beat tells: None where there is nothing."""
        if self.is_empty:
            return None
        now = time.monotonic()
        long = sorted((since, key) for key, since in list(self._began.items()) if now - since >= TOLD_SECONDS)
        told = [_running(key, now - since, self._failed.get(key)) for since, key in long]
        for key, failed in list(self._failed.items()):
            if failed.next_at > now:
                told.append(_pausing(key, failed, now))
            elif key not in self._began:  # its run was left in the pause
                self._failed.pop(key, None)
        return told[:TOLD_MAX] or None

    @property
    def is_empty(self) -> bool:
        """Whether no step runs or pauses."""
        return not self._began and not self._failed


def _running(key: Key, seconds: float, failed: FailedTry | None) -> RunningStep:
    if failed is None:
        return RunningStep(*key, seconds)
    return RunningStep(*key, seconds, failed.number + 1, failed.most, failed.error)


def _pausing(key: Key, failed: FailedTry, now: float) -> RunningStep:
    return RunningStep(*key, None, failed.number, failed.most, failed.error, failed.next_at - now)
