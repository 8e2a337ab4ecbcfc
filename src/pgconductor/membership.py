"""Who this process is to the engine, and for how long it may believe so.

A process holds its leases under a random id, its *boot id*, for as long as its beats are confirmed. Confirmed means: a
beat that *started* at some instant was answered; from that instant, on the monotonic clock, the engine waits for
`expiry` before it gives the process up. A margin before that end the process gives itself up (`is_fenced`): it begins
no step, drops what it runs, and when the database answers again it retires the old id, which returns the work at no
cost, and joins under a new one. So two runs of one execution overlap at most between the lease's end and the old
run's next engine call, which the engine refuses, since the id is part of every lease.
"""

import time
from dataclasses import dataclass
from uuid import uuid4


@dataclass(frozen=True, slots=True)
class Timing:
    """How often a process shows that it lives, and when it counts as dead; in seconds."""

    beat: float = 5.0
    expiry: float = 20.0
    sweep: float = 5.0
    stall_limit: float = 1.0

    @property
    def trust(self) -> float:
        """How long after the start of a confirmed beat the process may still begin steps."""
        return self.expiry * 0.75

    @property
    def sweep_limit(self) -> float:
        """How long a sweep may take: it holds up the next beat, which must be answered before the trust is over."""
        return self.trust - self.beat


class Membership:
    """The process' boot id and whether it still holds. Read from the loop, confirmed from the heartbeat's thread."""

    __slots__ = ("_confirmed_at", "_is_given_up", "id", "timing")

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.id = str(uuid4())
        self._confirmed_at = time.monotonic()
        self._is_given_up = True

    def join(self, id: str, asked_at: float) -> None:
        """Begin to hold an id that was registered; `asked_at` is when the registration was sent."""
        self.id = id
        self._confirmed_at = asked_at
        self._is_given_up = False

    def confirm(self, id: str, asked_at: float) -> None:
        """Note a beat that was answered; one that comes after the trust has ended does not bring it back."""
        if id == self.id and time.monotonic() <= self._confirmed_at + self.timing.trust:
            self._confirmed_at = max(self._confirmed_at, asked_at)

    def give_up(self) -> None:
        """Stop believing in the id before its time is over."""
        self._is_given_up = True

    def is_fenced(self) -> bool:
        """Whether the process can no longer be sure of its leases. Once it is, it stays so until it joins anew.

        Whoever saw it has acted on it: a run that was dropped is settled by nobody, so its lease must not be renewed.
        """
        if time.monotonic() > self._confirmed_at + self.timing.trust:
            self._is_given_up = True
        return self._is_given_up

    def seconds_left(self) -> float:
        """How long the id may still be believed in without another beat."""
        return 0.0 if self._is_given_up else self._confirmed_at + self.timing.trust - time.monotonic()
