"""From calls and their options to the rows that are enqueued."""

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

from msgspec import Raw

from pgconductor.errors import ConfigurationError, EncodeError, NotInvocable
from pgconductor.ids import new_id, new_ids
from pgconductor.logs import current_run
from pgconductor.options import NO_OPTIONS, CallOptions
from pgconductor.task import Call, Task, check_call, payloads_of
from pgconductor.written import AlikeExecutions, NewExecution

BYTES_MAX: Final = 256 * 1024 * 1024
log = logging.getLogger("pgconductor.calls")


class CallPlan:
    """How the calls of one `invoke` or `invoke_many` are enqueued.

    Args:
        base: The options given there; a call's own win.
        tasks: The tasks that the conductor has registered, by name.

    Attributes:
        conn: The caller's connection, once the calls are known.
    """

    def __init__(self, base: CallOptions, tasks: Mapping[str, Task[..., Any]]) -> None:
        self.conn = base.conn
        self._base = base
        self._tasks = tasks
        self._places: list[int] | None = None

    def row(self, call: Call[Any]) -> NewExecution:
        """Make the row of the only call.

        Raises:
            NotInvocable: `invocable()` is not among the task's triggers.
            ConfigurationError: It is not a call.
        """
        check_call(call, "invoke")
        self._check_task(call.task)
        options = self._merged(call.options)
        self.conn = options.conn
        _warn_if_repeated(call.task, options)
        return _new_execution(new_id(), call, options)

    def rows(self, calls: Sequence[Call[Any]]) -> list[NewExecution]:
        """Make the rows of calls; a later `replace` of a key takes the place of an earlier call with that key.

        Raises:
            NotInvocable: As for `row`.
            ConfigurationError: They name different connections.
            EncodeError: The payloads are too large together.
        """
        for name in {call.task for call in calls}:
            self._check_task(name)
        merged = {id(call.options): call.options for call in calls}
        options = {key: self._merged(each) for key, each in merged.items()}
        self._check_connections(list(options.values()))
        for task, key in {(call.task, id(call.options)) for call in calls}:
            _warn_if_repeated(task, options[key])
        ids = new_ids(len(calls))
        rows = [_new_execution(id_, call, options[id(call.options)]) for id_, call in zip(ids, calls, strict=True)]
        _check_size(call.payload for call in calls)
        return self._fold(rows) if any(each.dedupe_key is not None for each in options.values()) else rows

    def alike(self, calls: Sequence[Call[Any]]) -> AlikeExecutions | None:
        """Gather calls that differ in nothing but their payloads; None if they differ otherwise, or are not plain.

        Raises:
            NotInvocable: As for `row`.
            EncodeError: The payloads are too large together.
        """
        task, own = calls[0].task, calls[0].options
        options = self._merged(own)
        if not options.is_plain or not all(call.options is own and call.task == task for call in calls):
            return None
        self._check_task(task)
        payloads = payloads_of(calls)
        _check_size(payloads)
        _warn_if_repeated(task, options)
        return AlikeExecutions(new_ids(len(calls)), task, options.queue, options.priority or 0, payloads)

    def spread(self, ids: list[str]) -> list[str]:
        """Return the ids of all calls from those of the rows."""
        return ids if self._places is None else [ids[place] for place in self._places]

    def _check_task(self, name: str) -> None:
        task = self._tasks.get(name)
        if task is not None and not task.config.invocable:
            raise NotInvocable(name)

    def _merged(self, own: CallOptions) -> CallOptions:
        return self._base if own is NO_OPTIONS else own.over(self._base)

    def _check_connections(self, options: list[CallOptions]) -> None:
        connections = {id(each.conn): each.conn for each in options}
        if len(connections) > 1:
            raise ConfigurationError("invoke_many", "the calls name different connections", "give conn= once")
        self.conn = next(iter(connections.values()), None)

    def _fold(self, rows: list[NewExecution]) -> list[NewExecution]:
        """Give calls with the same task and key one row: of the first, with the content of the last that replaces."""
        place_of: dict[tuple[str, str | None], int] = {}
        folded: list[NewExecution] = []
        self._places = []
        for row in rows:
            key = (row.task, row.dedupe_key)
            is_deduped = row.dedupe_key is not None and row.throttle is None and row.debounce is None
            place = place_of.get(key) if is_deduped else None
            if place is None:
                place = len(folded)
                folded.append(row)
                if is_deduped:
                    place_of[key] = place
            elif row.replace:
                row.id = folded[place].id
                folded[place] = row
            self._places.append(place)
        return folded


def _warn_if_repeated(task: str, options: CallOptions) -> None:
    """Warn of a call from a handler, since it is made again whenever the handler runs again."""
    run = current_run.get()
    if run is None or run.closed or options.dedupe_key is not None or options.conn is not None:
        return
    ids = run.log_ids()
    if ids["step"] is None:
        _warn_of_repetition(ids["task"], task)


@functools.cache  # so that a pair is told once
def _warn_of_repetition(caller: str, called: str) -> None:
    log.warning(
        "the handler of task %r enqueues %r outside a step: each resume and each retry of it will do so again; "
        "use ctx.start, or give a dedupe_key",
        caller,
        called,
    )


def _check_size(payloads: Iterable[str]) -> None:
    size = sum(map(len, payloads))
    if size > BYTES_MAX:
        raise EncodeError("payload", f"{size} bytes in one statement, at most {BYTES_MAX} are allowed; send parts")


def _new_execution(id: str, call: Call[Any], options: CallOptions) -> NewExecution:
    if options is NO_OPTIONS:
        return NewExecution(id, call.task, Raw(call.payload))
    return NewExecution(
        id,
        call.task,
        Raw(call.payload),
        queue=options.queue,
        priority=options.priority or 0,
        run_at=options.run_at,
        delay=_seconds(options.delay),
        dedupe_key=options.dedupe_key,
        replace=options.on_duplicate == "replace",
        throttle=_seconds(options.throttle),
        debounce=_seconds(options.debounce),
    )


def _seconds(duration: timedelta | None) -> float | None:
    return None if duration is None else duration.total_seconds()
