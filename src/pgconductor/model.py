"""The values that describe work: policies, limits, triggers, events. Frozen, checked when made, free of I/O.

What comes after this module may rely on them. Each refusal is a `ConfigurationError` that names the place and what to
write instead.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Any, Generic, Literal, cast

from typing_extensions import TypeVar

from pgconductor.checks import (
    INT_MAX,
    check_duration,
    check_integer,
    check_name,
    check_names,
    check_number,
    check_optional_text,
    check_payload_path,
    check_text,
    check_word,
    check_zone,
)
from pgconductor.durations import Duration
from pgconductor.errors import ConfigurationError, Retry, errors_in

E = TypeVar("E")
E_co = TypeVar("E_co", covariant=True)

Operation = Literal["insert", "update", "delete"]
"""What happened to a row."""
State = Literal["scheduled", "ready", "running", "waiting", "completed", "failed", "cancelled"]
"""Where an execution stands; the last three are terminal."""
CatchUp = Literal["skip", "latest", "all"]
"""Which missed ticks of a schedule run."""

BATCH_SIZE_MAX = 10_000

# ---------------------------------------------------------------- policies and limits


@dataclass(frozen=True, slots=True, init=False)
class RetryPolicy:
    """Decide how long to wait after a failed attempt, and which errors end the execution at once.

    Args:
        first: The wait after the first failed attempt; more than zero, at most `max`.
        factor: What each further wait is multiplied by; at least 1.
        max: The longest wait.
        jitter: The share of a wait, 0 to 1, that chance may take off it, so that failures spread and no wait is
            longer than announced.
        delays: The waits one by one instead of `first`, `factor` and `max`; the last repeats.
        give_up_on: Errors, with their subclasses, that leave no further attempt.

    Raises:
        ConfigurationError: A value is out of bounds.

    Source: exponential backoff with jitter, https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    first: timedelta
    factor: float
    max: timedelta
    jitter: float
    delays: tuple[timedelta, ...]
    give_up_on: tuple[type[Exception], ...]

    def __init__(
        self,
        *,
        first: Duration = 15,
        factor: float = 2,
        max: Duration = 7200,
        jitter: float = 0.1,
        delays: Sequence[Duration] | None = None,
        give_up_on: Sequence[type[Exception]] = (),
    ) -> None:
        place = "RetryPolicy"
        longest = check_duration(max, f"{place}: max", positive=True)
        shortest = check_duration(first, f"{place}: first", positive=True)
        if shortest > longest:
            raise ConfigurationError(f"{place}: first", f"{first!r} is longer than max={max!r}", "raise max=")
        object.__setattr__(self, "first", shortest)
        object.__setattr__(self, "factor", check_number(factor, f"{place}: factor", 1, 1_000))
        object.__setattr__(self, "max", longest)
        object.__setattr__(self, "jitter", check_number(jitter, f"{place}: jitter", 0, 1))
        object.__setattr__(self, "delays", _delays(delays, f"{place}: delays"))
        object.__setattr__(self, "give_up_on", _error_types(give_up_on, f"{place}: give_up_on"))

    def delay(self, attempt_number: int, rng: random.Random) -> float:
        """Return how long to wait after a failed attempt.

        Args:
            attempt_number: Which attempt failed, from 1.
            rng: Where chance comes from.

        Returns:
            Seconds, between `(1 - jitter)` times the wait and the wait.
        """
        if self.delays:
            wait = self.delays[min(attempt_number, len(self.delays)) - 1].total_seconds()
        else:
            wait = self._exponential(attempt_number)
        return wait * (1 - self.jitter * rng.random())

    def gives_up_on(self, error: BaseException) -> bool:
        """Tell whether an error leaves no further attempt by this policy; a group does if all of it does."""
        members = errors_in(error)
        return isinstance(error, self.give_up_on) or (bool(members) and all(map(self.gives_up_on, members)))

    def _exponential(self, attempt_number: int) -> float:
        longest = self.max.total_seconds()
        try:
            return min(longest, self.first.total_seconds() * float(self.factor) ** (attempt_number - 1))
        except OverflowError:
            return longest


def delay_after(error: BaseException, policy: RetryPolicy, attempt_number: int, rng: random.Random) -> float:
    """Return how many seconds to wait after an error: what a `Retry` asks, the most in a group, else the policy's."""
    asked = _asked_delay(error)
    return policy.delay(attempt_number, rng) if asked is None else asked


def _asked_delay(error: BaseException) -> float | None:
    if isinstance(error, Retry):
        return error.after.total_seconds()
    return max((asked for each in errors_in(error) if (asked := _asked_delay(each)) is not None), default=None)


@dataclass(frozen=True, slots=True, init=False)
class Batch:
    """Hand several payloads of a task to one call of its handler.

    Args:
        size: The most payloads of one call; 1 to 10,000.
        timeout: How long the first of them waits for more.

    Raises:
        ConfigurationError: A value is out of bounds.
    """

    size: int
    timeout: timedelta

    def __init__(self, size: int, timeout: Duration) -> None:
        object.__setattr__(self, "size", check_integer(size, "Batch: size", 1, BATCH_SIZE_MAX))
        object.__setattr__(self, "timeout", check_duration(timeout, "Batch: timeout"))


@dataclass(frozen=True, slots=True, init=False)
class Concurrency:
    """Hold how many executions of a task run at once, over all workers. A parked execution does not count.

    Args:
        limit: The most that run at once; at least 1.
        key: A payload path such as `"tenant.id"`: the limit holds for each of its values by itself.

    Raises:
        ConfigurationError: A value is out of bounds.
    """

    limit: int
    key: str | None

    def __init__(self, limit: int, *, key: str | None = None) -> None:
        object.__setattr__(self, "limit", check_integer(limit, "Concurrency: limit", 1, INT_MAX))
        object.__setattr__(self, "key", check_payload_path(key, "Concurrency: key"))


@dataclass(frozen=True, slots=True, init=False)
class RateLimit:
    """Hold how many executions of a task start within a period, over all workers.

    Args:
        limit: The most that start within a period; at least 1.
        per: The period; more than zero.
        key: A payload path such as `"tenant.id"`: the limit holds for each of its values by itself.

    Raises:
        ConfigurationError: A value is out of bounds.
    """

    limit: int
    per: timedelta
    key: str | None

    def __init__(self, limit: int, per: Duration, *, key: str | None = None) -> None:
        object.__setattr__(self, "limit", check_integer(limit, "RateLimit: limit", 1, INT_MAX))
        object.__setattr__(self, "per", check_duration(per, "RateLimit: per", positive=True))
        object.__setattr__(self, "key", check_payload_path(key, "RateLimit: key"))


@dataclass(frozen=True, slots=True)
class Window:
    """The local hours in which a task may run; an `end` before `start` is on the next day."""

    start: time
    end: time
    tz: str


# ---------------------------------------------------------------- events and what a handler receives


@dataclass(frozen=True, slots=True)
class EventDef(Generic[E]):
    """Name a kind of event and the type of its payload. Made by `Conductor.event`."""

    name: str
    payload: type[E]


def check_event(value: object, place: str) -> None:
    """Refuse what is not a kind of event.

    Raises:
        ConfigurationError: It is a name, or something else.
    """
    if not isinstance(value, EventDef):
        raise ConfigurationError(
            place, f"{value!r:.80} is not an event definition", "pass what app.event(...) returned"
        )


@dataclass(frozen=True, slots=True)
class Event(Generic[E_co]):
    """Carry an event to a handler that it started. Annotate a parameter `Event[Payload]` to receive it."""

    name: str
    payload: E_co


@dataclass(frozen=True, slots=True)
class Change(Generic[E_co]):
    """Carry a row change to a handler that it started. Annotate a parameter `Change[Row]` to receive it.

    `name` is such as `public.contact.insert`; `old` is None for an insert, `new` for a delete.
    """

    name: str
    op: Operation
    old: E_co | None
    new: E_co | None


@dataclass(frozen=True, slots=True)
class Tick:
    """Carry a schedule's tick to a handler that it started. Annotate a parameter `Tick` to receive it.

    `name` is the schedule's; `scheduled_at` is the instant that was due, aware, in UTC.
    """

    name: str
    scheduled_at: datetime


# ---------------------------------------------------------------- triggers


@dataclass(frozen=True, slots=True)
class Trigger:
    """Say what starts a task. Made by `invocable`, `cron`, `event` and `table`."""


@dataclass(frozen=True, slots=True)
class Invocable(Trigger):
    """The task may be invoked."""


@dataclass(frozen=True, slots=True)
class Cron(Trigger):
    """The task is started on a schedule. The expression is checked by the registry, which can read it."""

    expr: str
    name: str
    tz: str
    catch_up: CatchUp


@dataclass(frozen=True, slots=True)
class OnEvent(Trigger):
    """The task is started by an event."""

    event: EventDef[Any]
    fields: tuple[str, ...] | None
    where: str | None


@dataclass(frozen=True, slots=True)
class OnChange(Trigger):
    """The task is started by a row change."""

    table: str
    op: Operation
    columns: tuple[str, ...]
    when: str | None


def invocable() -> Trigger:
    """Let a task be invoked. The only trigger of a task that names none."""
    return Invocable()


def cron(expr: str, *, name: str | None = None, tz: str = "UTC", catch_up: CatchUp = "latest") -> Trigger:
    """Start a task on a schedule, once per tick however many orchestrators run.

    Args:
        expr: Five fields, six with seconds first, or `@hourly`, `@daily`, `@weekly`, `@monthly`, `@yearly`.
        name: What `Tick.name` says, to tell several schedules of a task apart; the expression unless given.
        tz: The IANA zone whose clock the fields mean.
        catch_up: What becomes of ticks that fell while nothing ran: none, the latest, or all of them run.

    Raises:
        ConfigurationError: The expression is empty or too long, the zone unknown, or `catch_up` another word.
    """
    place = f"cron({expr!r})"
    check_text(expr, place)
    shown = expr if name is None else name
    return Cron(
        expr,
        check_name(shown, f"{place}: name"),
        check_zone(tz, f"{place}: tz"),
        check_word(catch_up, f"{place}: catch_up", CatchUp),
    )


def event(e: EventDef[Any], *, fields: Sequence[str] | None = None, where: str | None = None) -> Trigger:
    """Start a task by every event of a kind.

    Args:
        e: The kind of event, from `Conductor.event`.
        fields: The top-level fields of the payload to hand on; all of them unless given.
        where: A jsonpath predicate over the payload, such as `$.cents > 1000`, evaluated in the database.

    Raises:
        ConfigurationError: `e` is not an event definition, or `fields` is empty or repeats a name.
    """
    check_event(e, "event()")
    place = f"event({e.name!r})"
    chosen = None if fields is None else check_names(fields, f"{place}: fields")
    return OnEvent(e, chosen, check_optional_text(where, f"{place}: where"))


def table(name: str, op: Operation, *, columns: Sequence[str], when: str | None = None) -> Trigger:
    """Start a task by every change of a table's rows, in the transaction that makes the change.

    Args:
        name: The table as SQL writes it, with its schema: `public.contact`.
        op: `insert`, `update` or `delete`.
        columns: The columns to hand on; at least one.
        when: The native trigger condition over `old` and `new`, evaluated with the writer's rights.

    Raises:
        ConfigurationError: A name is empty or too long, `columns` empty or repeating, or `op` another word.
    """
    place = f"table({name!r})"
    check_name(name, place)
    checked = check_names(columns, f"{place}: columns")
    return OnChange(
        name, check_word(op, f"{place}: op", Operation), checked, check_optional_text(when, f"{place}: when")
    )


def _delays(values: Sequence[Duration] | None, place: str) -> tuple[timedelta, ...]:
    if values is None:
        return ()
    if isinstance(values, str) or not isinstance(cast(object, values), Sequence) or not values:
        raise ConfigurationError(place, f"{values!r} is not a list of waits", 'give at least one, as ["1s", "1m"]')
    return tuple(check_duration(value, place) for value in values)


def _error_types(values: object, place: str) -> tuple[type[Exception], ...]:
    types = (values,) if not isinstance(values, Sequence) else tuple(cast(Sequence[object], values))
    for each in types:
        if not isinstance(each, type) or not issubclass(each, Exception):
            raise ConfigurationError(place, f"{each!r} is not an exception class", "give classes such as ValueError")
    return cast(tuple[type[Exception], ...], types)
