"""Options of a call and of a task: as users write them, and as the rest of the package takes them.

Whatever is written is checked here, once: a call's options when they are set, a task's at registration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from typing import Any, Literal, TypedDict, cast

from typing_extensions import Unpack

from pgconductor.checks import (
    SMALLINT_MAX,
    check_duration,
    check_instant,
    check_integer,
    check_known,
    check_name,
    check_time,
    check_word,
    check_zone,
)
from pgconductor.durations import Duration
from pgconductor.errors import ConfigurationError
from pgconductor.model import (
    Batch,
    Concurrency,
    Cron,
    Invocable,
    RateLimit,
    RetryPolicy,
    Trigger,
    Window,
)

OnDuplicate = Literal["keep", "replace"]
"""What becomes of a call whose `dedupe_key` already has an execution that has not started."""
Executor = Literal["loop", "thread", "process"]
"""Where a handler runs: on the event loop, in a thread, or in a process of its own."""


# ---------------------------------------------------------------- one call


class Options(TypedDict, total=False):
    """How one call is enqueued. Set by `Task.with_options` and `Conductor.invoke`; all optional.

    `dedupe_key` gives equal calls one execution; `priority` runs the higher first; `run_at` or `delay` starts later;
    `throttle` and `debounce` thin out calls per `dedupe_key`; `conn` enqueues inside that connection's transaction.
    """

    dedupe_key: str
    on_duplicate: OnDuplicate
    priority: int
    run_at: datetime
    delay: Duration
    throttle: Duration
    debounce: Duration
    queue: str
    conn: object


@dataclass(frozen=True, slots=True)
class CallOptions:
    """Options as the engine takes them: checked, durations parsed; None is unset."""

    dedupe_key: str | None = None
    on_duplicate: OnDuplicate | None = None
    priority: int | None = None
    run_at: datetime | None = None
    delay: timedelta | None = None
    throttle: timedelta | None = None
    debounce: timedelta | None = None
    queue: str | None = None
    conn: object | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing is set but the queue and the priority."""
        return self is NO_OPTIONS or all(getattr(self, name) is None for name in _NOT_PLAIN)

    def over(self, base: "CallOptions") -> "CallOptions":
        """Return these options, completed by those of `base` that do not contradict them.

        Raises:
            ConfigurationError: The two together are contradictory, as a throttle over `on_duplicate` is.
        """
        if base is self or base is NO_OPTIONS:
            return self
        values = {name: getattr(self, name) for name in _OPTION_NAMES}
        for group in _EXCLUSIVE:
            if all(values[name] is None for name in group):
                values.update((name, getattr(base, name)) for name in group)
        return _consistent(CallOptions(**values), "options")


NO_OPTIONS = CallOptions()
_OPTION_NAMES = tuple(each.name for each in fields(CallOptions))
_NOT_PLAIN = tuple(name for name in _OPTION_NAMES if name not in ("queue", "priority"))
_EXCLUSIVE = (
    ("run_at", "delay"),
    ("throttle", "debounce"),
    *((name,) for name in ("dedupe_key", "on_duplicate", "priority", "queue", "conn")),
)
_OPTION_PARSERS: dict[str, Callable[[Any, str], Any]] = {
    "dedupe_key": check_name,
    "on_duplicate": lambda value, place: check_word(value, place, OnDuplicate),
    "priority": lambda value, place: check_integer(value, place, -SMALLINT_MAX - 1, SMALLINT_MAX),
    "run_at": check_instant,
    "delay": check_duration,
    "throttle": lambda value, place: check_duration(value, place, positive=True),
    "debounce": lambda value, place: check_duration(value, place, positive=True),
    "queue": check_name,
    "conn": lambda value, _: value,
}


def parse_options(place: str, base: CallOptions = NO_OPTIONS, /, **options: Unpack[Options]) -> CallOptions:
    """Check a call's options and lay them over others; an option given as None is unset.

    Args:
        place: Who sets them, such as `task 'charge'`; opens the error message.
        base: Options set before.
        **options: What the user wrote.

    Returns:
        Both together; where they contradict, the new ones hold.

    Raises:
        ConfigurationError: An option is unknown, out of bounds, or contradicts another one given here.
    """
    if not options:  # as most calls come
        return base
    check_known(options, _OPTION_PARSERS, place)
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return base
    parsed = {name: _OPTION_PARSERS[name](value, f"{place}: {name}") for name, value in given.items()}
    for first, second in (("run_at", "delay"), ("throttle", "debounce")):
        if first in parsed and second in parsed:
            raise ConfigurationError(place, f"{first}= and {second}= contradict each other", "give one of them")
    return _consistent(CallOptions(**parsed).over(base), place)


def _consistent(options: CallOptions, place: str) -> CallOptions:
    thinning = options.throttle is not None or options.debounce is not None
    if options.debounce is not None and (options.run_at is not None or options.delay is not None):
        raise ConfigurationError(place, "debounce= sets the start itself", "drop run_at= and delay=")
    if options.on_duplicate is not None and (thinning or options.dedupe_key is None):
        remedy = "drop on_duplicate=" if thinning else "give dedupe_key="
        raise ConfigurationError(place, "on_duplicate= needs a dedupe_key= and no throttle= or debounce=", remedy)
    return options


# ---------------------------------------------------------------- one task


class TaskOptions(TypedDict, total=False):
    """How a task is registered: `@app.task(...)` and `Conductor.create_task`; all optional.

    `max_attempts` counts handler failures only (default 3, 1 to 32,767), `max_crashes` runs lost with their process
    (default 5); `timeout` is how long the handler may run at a stretch, waits not counted; `expires` the time until it
    must have started; `window` local hours such as `("22:00", "06:00", "Europe/Berlin")`; `keep_completed` (default 7
    days) and `keep_failed` (30 days) how long a finished execution stays: a duration, True for ever, False not at all.
    """

    name: str
    queue: str
    on: Trigger | Sequence[Trigger]
    max_attempts: int
    max_crashes: int
    retry: RetryPolicy
    timeout: Duration
    expires: Duration
    concurrency: int | Concurrency | Sequence[Concurrency]
    rate_limit: RateLimit
    window: tuple[str, str] | tuple[str, str, str]
    batch: Batch
    executor: Executor
    keep_completed: Duration | bool
    keep_failed: Duration | bool


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """A task's options, checked and complete. `keep_*`: None keeps for ever, zero removes at once."""

    name: str
    queue: str = "default"
    triggers: tuple[Trigger, ...] = (Invocable(),)
    max_attempts: int = 3
    max_crashes: int = 5
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    timeout: timedelta | None = None
    expires: timedelta | None = None
    concurrency: tuple[Concurrency, ...] = ()
    rate_limit: RateLimit | None = None
    window: Window | None = None
    batch: Batch | None = None
    executor: Executor = "loop"
    keep_completed: timedelta | None = timedelta(days=7)
    keep_failed: timedelta | None = timedelta(days=30)

    @property
    def invocable(self) -> bool:
        """Whether `invoke` may start the task."""
        return any(isinstance(trigger, Invocable) for trigger in self.triggers)


def configure_task(default_name: str, *, is_async: bool, options: TaskOptions | None = None) -> TaskConfig:
    """Check a task's options and complete them.

    Args:
        default_name: The name without `name=`: the function's.
        is_async: Whether the handler is a coroutine function.
        options: What the user wrote; an option given as None is unset.

    Returns:
        The configuration, valid in itself. What needs the handler's signature or the cron parser is checked later.

    Raises:
        ConfigurationError: An option is unknown, out of bounds, or contradicts another. Nothing was registered.
    """
    given = {name: value for name, value in (options or {}).items() if value is not None}
    name = check_name(given.pop("name", default_name), "task: name")
    place = f"task {name!r}"
    check_known(given, _TASK_PARSERS, place)
    parsed = {_FIELDS.get(key, key): _TASK_PARSERS[key](value, f"{place}: {key}") for key, value in given.items()}
    parsed.setdefault("executor", "loop" if is_async else "thread")
    config = TaskConfig(name, **parsed)
    _check_executor(config, place, is_async=is_async)
    return config


def _check_executor(config: TaskConfig, place: str, *, is_async: bool) -> None:
    if is_async and config.executor == "thread":
        raise ConfigurationError(f"{place}: executor", "an async def runs on the loop", "drop it, or write a plain def")
    if not is_async and config.executor == "loop":
        raise ConfigurationError(
            f"{place}: executor", "a plain def on the loop would block every other task", 'use "thread" or "process"'
        )
    if config.batch is not None and (not is_async or config.executor != "loop"):
        raise ConfigurationError(f"{place}: batch", "a batch handler runs on the loop", "write it as async def")


def _triggers(value: object, place: str) -> tuple[Trigger, ...]:
    triggers = (value,) if isinstance(value, Trigger) else tuple(_items(value, place, "triggers"))
    if not triggers:
        raise ConfigurationError(place, "is empty: nothing would start the task", "give [invocable()]")
    for trigger in triggers:
        if not isinstance(trigger, Trigger):
            raise ConfigurationError(place, f"{trigger!r} is not a trigger", "use invocable, cron, event or table")
    schedules = [trigger.name for trigger in triggers if isinstance(trigger, Cron)]
    if len(set(schedules)) < len(schedules):
        raise ConfigurationError(place, "two schedules have the same name", "give each cron(...) its own name=")
    return cast(tuple[Trigger, ...], triggers)


def _concurrency(value: object, place: str) -> tuple[Concurrency, ...]:
    if isinstance(value, int):
        return (Concurrency(check_integer(value, place, 1, 2_147_483_647)),)
    limits = (value,) if isinstance(value, Concurrency) else tuple(_items(value, place, "limits"))
    for limit in limits:
        if not isinstance(limit, Concurrency):
            raise ConfigurationError(place, f"{limit!r} is not a limit", "use a number or Concurrency(...)")
    keys = [limit.key for limit in cast(tuple[Concurrency, ...], limits)]
    if len(set(keys)) < len(keys):
        raise ConfigurationError(place, "two limits have the same key", "keep the lower one")
    return cast(tuple[Concurrency, ...], limits)


def _window(value: object, place: str) -> Window:
    parts = tuple(_items(value, place, "local times"))
    if len(parts) not in (2, 3):
        raise ConfigurationError(place, f"{value!r} is not a window", 'write ("22:00", "06:00", "Europe/Berlin")')
    start, end = check_time(parts[0], place), check_time(parts[1], place)
    if start == end:
        raise ConfigurationError(place, "starts and ends at the same time", "drop it to be always open")
    return Window(start, end, check_zone(cast(str, parts[2]) if len(parts) == 3 else "UTC", place))


def _kept(value: Duration | bool, place: str) -> timedelta | None:
    if isinstance(value, bool):
        return None if value else timedelta(0)
    return check_duration(value, place)


def _items(value: object, place: str, what: str) -> Sequence[object]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ConfigurationError(place, f"{value!r} is not a sequence of {what}", "give a list")
    return cast(Sequence[object], value)


def _instance(kind: type) -> Callable[[Any, str], Any]:
    def check(value: object, place: str) -> object:
        if not isinstance(value, kind):
            raise ConfigurationError(place, f"{value!r} is not a {kind.__name__}", f"write {kind.__name__}(...)")
        return value

    return check


_FIELDS = {"on": "triggers"}
_TASK_PARSERS: dict[str, Callable[[Any, str], Any]] = {
    "queue": check_name,
    "on": _triggers,
    "max_attempts": lambda value, place: check_integer(value, place, 1, SMALLINT_MAX),
    "max_crashes": lambda value, place: check_integer(value, place, 1, SMALLINT_MAX),
    "retry": _instance(RetryPolicy),
    "timeout": lambda value, place: check_duration(value, place, positive=True),
    "expires": lambda value, place: check_duration(value, place, positive=True),
    "concurrency": _concurrency,
    "rate_limit": _instance(RateLimit),
    "window": _window,
    "batch": _instance(Batch),
    "executor": lambda value, place: check_word(value, place, Executor),
    "keep_completed": _kept,
    "keep_failed": _kept,
}
