"""Schedules as they cross the border to the database, and what a process computes of them. Pure.

A schedule is a row: expression, zone, policy, task and payload. The database knows instants only. It hands out the
schedules that are due, with the instant up to which their ticks are decided and with its own clock; `plan` answers with
the ticks to run and the next one.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final

from msgspec import Raw, Struct

from pgconductor.checks import check_name, check_text
from pgconductor.errors import ConfigurationError
from pgconductor.model import CatchUp, Cron
from pgconductor.task import Call, Task, check_call
from pgconductor.ticks import due_ticks, recurrence

ERROR_LENGTH_MAX: Final = 400
_REFUSED: Final = ("conn", "dedupe_key", "on_duplicate", "throttle", "debounce", "run_at", "delay")


class NewSchedule(Struct, omit_defaults=True):
    """A schedule as code wants it to be; no payload is an empty one."""

    task: str
    name: str
    expr: str
    zone: str
    catch_up: CatchUp
    queue: str | None = None
    priority: int = 0
    payload: Raw | None = None


class DueSchedule(Struct):
    """A schedule that is to be looked at. `decided_at`: up to where its ticks are dealt with; `now`: by whose clock."""

    id: int
    revision: int
    expr: str
    zone: str
    catch_up: CatchUp
    decided_at: datetime
    now: datetime


class FiredSchedule(Struct, omit_defaults=True):
    """What was computed of a due schedule: the ticks to run, and when to look again; never, for None."""

    id: int
    revision: int
    until: datetime
    slots: list[datetime]
    next_at: datetime | None = None
    error: str | None = None


class Fired(Struct):
    """What firing schedules set in motion, and which are due still."""

    queues: list[int]
    next_due: float | None = None
    due: list[DueSchedule] | None = None


class FiredNow(Struct):
    """The executions that a person has started from schedules."""

    ids: list[str]
    queues: list[int]


def plan(due: DueSchedule) -> FiredSchedule:
    """Compute what is to happen to a due schedule.

    Returns:
        Its ticks up to now and the next one. Where this process cannot read the schedule, the reason instead.
    """
    try:
        when = recurrence(due.expr, due.zone)
    except ConfigurationError as error:
        return FiredSchedule(due.id, due.revision, due.now, [], error=str(error)[:ERROR_LENGTH_MAX])
    slots = due_ticks(when, due.decided_at, due.now, due.catch_up)
    # the clock may have been put back: nothing up to decided_at is looked at again
    next_at = when.next_after(max(due.decided_at, due.now))
    return FiredSchedule(due.id, due.revision, due.now, slots, next_at)


def declared_schedules(tasks: Iterable[Task[..., Any]]) -> list[NewSchedule]:
    """Return the schedules that the triggers of tasks declare."""
    return [
        NewSchedule(task.name, trigger.name, trigger.expr, trigger.tz, trigger.catch_up)
        for task in tasks
        for trigger in task.config.triggers
        if isinstance(trigger, Cron)
    ]


def schedule_of(name: str, call: Call[Any], cron: str, zone: str) -> NewSchedule:
    """Return the schedule that a handler asks for.

    Raises:
        ConfigurationError: The name, the expression or the zone cannot be used, or the call has options that say when
            or whether it runs.
    """
    place = f"schedule {check_name(name, 'schedule: name')!r}"
    check_call(call, place)
    recurrence(check_text(cron, f"{place}: cron"), zone)
    for option in _REFUSED:
        if getattr(call.options, option) is not None:
            raise ConfigurationError(f"{place}: {option}", "cannot be given to a schedule", "drop it")
    options = call.options
    payload = Raw(call.payload.encode())
    return NewSchedule(
        call.task, name, cron, zone, "latest", queue=options.queue, priority=options.priority or 0, payload=payload
    )
