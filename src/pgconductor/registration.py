"""From a handler and its options to a task: everything that can be wrong is found here, at import time."""

import inspect
import logging
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, Final, get_origin

from pgconductor.annotations import admits, describe_type, hints_of, written_function
from pgconductor.checks import check_function
from pgconductor.errors import ConfigurationError
from pgconductor.events import check_columns, check_fields
from pgconductor.model import Change, Cron, Event, Invocable, OnChange, OnEvent, Tick, Trigger
from pgconductor.options import TaskConfig, TaskOptions, configure_task
from pgconductor.signature import Signature, signature_of, signature_of_reference
from pgconductor.task import Client, Task
from pgconductor.ticks import recurrence
from pgconductor.written import LimitRow, TaskRow

log = logging.getLogger("pgconductor.registration")
_KINDS: Final[dict[type[Trigger], type]] = {Cron: Tick, OnEvent: Event, OnChange: Change}
_HANDED_OVER: Final = (Tick, Event, Change)
_CONTEXTS: Final = {"Context": "an async def", "SyncContext": "a plain def", "BatchContext": "a batch handler"}


def make_task(fn: Callable[..., Any], options: TaskOptions, client: Client) -> Task[..., Any]:
    """Check a handler and its options, and make the task.

    Raises:
        ConfigurationError: An option, the signature, or the two together cannot work. Nothing was registered.
    """
    check_function(fn, "task: handler")
    written = written_function(fn)
    name = getattr(fn, "__name__", "") or getattr(written, "__name__", "")
    if name == "<lambda>" and "name" not in options:
        raise ConfigurationError("task: name", "a lambda has none", "give name=")
    config = configure_task(name, is_async=_is_async(fn), options=options)
    _check_kind(written, config)
    _check_batch(config)
    signature = signature_of(
        fn, config.name, is_batch=config.batch is not None, is_trigger=lambda kind: admits(kind, _HANDED_OVER)
    )
    for trigger in config.triggers:
        _check_trigger(trigger, config, signature)
    _check_schedules(config)
    return Task(fn, config, payload=signature, returns=signature.returns, client=client)


def make_reference(name: str, payload: type[Any], returns: Any, queue: str, client: Client) -> Task[..., Any]:
    """Make a task that stands for code that is elsewhere.

    Raises:
        ConfigurationError: The name, the queue or one of the types cannot be used.
    """
    config = configure_task(name, is_async=True, options=TaskOptions(queue=queue))
    signature = signature_of_reference(config.name, payload, returns)
    return Task(None, config, payload=signature, returns=signature.returns, client=client)


def task_row(task: Task[..., Any]) -> TaskRow:
    """Return what the database must know of a task."""
    config, window = task.config, task.config.window
    return TaskRow(
        config.name,
        config.queue,
        config.max_attempts,
        config.max_crashes,
        keep_completed=_kept_seconds(config.keep_completed),
        keep_failed=_kept_seconds(config.keep_failed),
        expires=None if config.expires is None else config.expires.total_seconds(),
        window_start=None if window is None else window.start.isoformat(),
        window_end=None if window is None else window.end.isoformat(),
        window_zone=None if window is None else window.tz,
        limits=_limits(config),
    )


def _kept_seconds(kept: timedelta | None) -> float:
    return -1.0 if kept is None else kept.total_seconds()


def _limits(config: TaskConfig) -> list[LimitRow]:
    limits = [LimitRow("concurrency", each.key, each.limit) for each in config.concurrency]
    rate = config.rate_limit
    if rate is not None:
        limits.append(LimitRow("rate", rate.key, rate.limit, rate.per.total_seconds()))
    return limits


def _is_async(fn: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(written_function(fn))


def _check_kind(fn: Callable[..., Any], config: TaskConfig) -> None:
    """Refuse a generator, and a handler whose context is annotated as one that it will not be given."""
    place = f"task {config.name!r}"
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise ConfigurationError(place, "the handler is a generator", "return the result instead of yielding")
    given = "BatchContext" if config.batch is not None else "Context" if _is_async(fn) else "SyncContext"
    annotated = next((hint for hint in hints_of(fn, place).values() if _context_name(hint) in _CONTEXTS), None)
    if annotated is not None and _context_name(annotated) != given:
        raise ConfigurationError(
            f"{place}: its context", f"{_CONTEXTS[given]} is given a {given}, no {_context_name(annotated)}",
            f"annotate it {given}",
        )  # fmt: skip


def _context_name(annotation: Any) -> str:
    """Return the name of one of our classes; this module stands below those of the contexts, and knows no more."""
    kind = get_origin(annotation) or annotation
    return kind.__name__ if isinstance(kind, type) and kind.__module__.startswith("pgconductor.") else ""


def _check_trigger(trigger: Trigger, config: TaskConfig, signature: Signature) -> None:
    """Refuse a handler with a required parameter that one of its triggers cannot fill."""
    place = f"task {config.name!r}"
    kind = _KINDS.get(type(trigger))
    for name in sorted(signature.required_triggers):
        annotation = signature.triggers[name]
        if kind is None or not admits(annotation, (kind,)):
            raise ConfigurationError(
                f"{place}: parameter {name!r}",
                f"it takes {describe_type(annotation)}, which {_described(trigger)} does not bring",
                f"give it a default, as in `{name}: {describe_type(annotation)} | None = None`",
            )
    if isinstance(trigger, OnEvent):
        check_fields(trigger, signature.triggers, place)
    if isinstance(trigger, OnChange):
        check_columns(trigger, signature.triggers, place)
    if isinstance(trigger, Invocable):
        return
    for parameter in signature.parameters:
        if parameter.default is inspect.Parameter.empty:
            raise ConfigurationError(
                f"{place}: parameter {parameter.name!r}",
                f"{_described(trigger)} brings no payload to fill it",
                "give it a default, or start the task by invoke alone",
            )


def _check_schedules(config: TaskConfig) -> None:
    """Refuse expressions that cannot be read or never fire."""
    for trigger in config.triggers:
        if isinstance(trigger, Cron):
            recurrence(trigger.expr, trigger.tz)


def _check_batch(config: TaskConfig) -> None:
    """Refuse what brings no payload, all but an invocation, as the start of a task that takes batches of payloads."""
    for trigger in config.triggers if config.batch is not None else ():
        if not isinstance(trigger, Invocable):
            raise ConfigurationError(
                f"task {config.name!r}: {_as_written(trigger)}",
                f"{_described(trigger)} brings no payload for a batch",
                "let it start another task, which invokes this one",
            )


def _as_written(trigger: Trigger) -> str:
    match trigger:
        case Cron():
            return f"cron({trigger.expr!r})"
        case OnEvent():
            return f"event({trigger.event.name!r})"
        case OnChange():
            return f"table({trigger.table!r}, {trigger.op!r})"
        case _:
            return "on"


def _described(trigger: Trigger) -> str:
    names: dict[type[Trigger], str] = {
        Invocable: "an invocation",
        Cron: "a schedule",
        OnEvent: "an event",
        OnChange: "a row change",
    }
    return names.get(type(trigger), "the trigger")


def warn_of_removed(deployment: str, what: str, labels: Iterable[str] | None) -> None:
    """Log what the start of a deployment has removed, since its code does not declare it."""
    if gone := sorted(set(labels or ())):
        log.warning(
            "%s are removed, which the code that starts as %r does not declare: %.300s; if another service does, give"
            " each a name of its own: Conductor(name=...)",
            what,
            deployment,
            ", ".join(gone),
        )
