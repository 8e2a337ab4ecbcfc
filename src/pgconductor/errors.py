"""Every error of pgconductor, in one tree.

```
Exception
├── ConductorError                      all that the library raises
│   ├── ExecutionFailed                 a result was asked for; the execution had failed
│   │   └── ChildFailed                 the same, seen by its parent at the invoke line
│   │       ├── ChildCancelled          the child was cancelled
│   │       └── ChildTimeout            the child did not end in time
│   ├── ExecutionCancelled              a result was asked for; the execution had been cancelled
│   ├── ExecutionNotFound               no such execution, or retention has removed it
│   ├── AttemptTimeout                  the task's own `timeout=` passed
│   ├── Expired                         not started within the task's `expires=`
│   ├── WorkerLost                      the crash budget is used up
│   ├── WaitTimeout                     no event came within `wait_for(timeout=)`
│   ├── DuplicateStep                   one name for two steps of a run
│   ├── StepMismatch                    a recorded name is now used for another kind of step
│   ├── DepthExceeded                   children of children beyond 100 levels
│   ├── TooMany                         more steps or children than one execution may have
│   ├── EncodeError                     a value that cannot be stored
│   ├── DecodeError                     a stored value that no longer fits its type
│   ├── UnknownTask                     a task that nobody registered
│   ├── NotInvocable                    a task without `invocable()` among its triggers
│   ├── ConfigurationError (ValueError) an option, trigger or signature refused at registration
│   ├── ServerError                     the Postgres server cannot be used as it is
│   ├── StaleLease                      internal: the right to settle was lost to another worker
│   └── EngineError                     an SQLSTATE of class PC without a class of its own
├── Fail                                raised by a handler: permanent, no more attempts
└── Retry                               raised by a handler: try again after this long
BaseException
├── Suspend                             internal: the run is parked; unwinds the handler
└── Crash                               internal: the run is dropped as if its process had died
```

The engine's SQL functions raise in SQLSTATE class `PC`, with the facts as a JSON object in DETAIL; `engine_error` turns
such a report into the class registered for its code. Every error can be copied and pickled.
"""

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, ClassVar, Self, TypeVar, cast
from uuid import UUID

from pgconductor.durations import Duration, format_duration, parse_duration

_Error = TypeVar("_Error", bound="ConductorError")
NO_ID = UUID(int=0)
"""Stands for an execution id that the raiser did not know."""


class ConductorError(Exception):
    """The root of everything that pgconductor raises by itself. Catch it to tell the library's errors from your own."""

    sqlstate: ClassVar[str | None] = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies and pickles restore the fields without calling the subclass's own `__init__`."""
        return (_restore, (type(self), self.args, self.__dict__))

    @classmethod
    def from_engine(cls, message: str, facts: Mapping[str, Any]) -> Self:
        """Build the error from an engine function's report, without deriving the message again."""
        return _restore(cls, (message,), {name: _fact(name, value) for name, value in facts.items()})


class ExecutionFailed(ConductorError):
    """The execution whose result was asked for failed for good.

    Attributes:
        execution_id: The failed execution.
        task: Its task's name.
        message: The message of the error that it failed with.
        error_type: That error's class: the bare name for builtins, `module.Class` otherwise.
        remote_traceback: The traceback as text, from the process that ran it; empty where there was none.
    """

    execution_id: UUID = NO_ID
    task: str = ""
    message: str = ""
    error_type: str = ""
    remote_traceback: str = ""

    def __init__(
        self,
        message: str = "",
        *,
        execution_id: UUID = NO_ID,
        task: str = "",
        error_type: str = "",
        remote_traceback: str = "",
    ) -> None:
        self.message = message
        self.execution_id = execution_id
        self.task = task
        self.error_type = error_type
        self.remote_traceback = remote_traceback
        super().__init__(self._render())

    def _render(self) -> str:
        kind = f"{self.error_type}: " if self.error_type else ""
        return f"task {self.task!r} failed: {kind}{self.message} (execution {self.execution_id})"


class ChildFailed(ExecutionFailed):
    """The child failed for good; raised at the line of the parent that waits for it. `execution_id` is the child's.

    Uncaught, it fails the parent at once, without further attempts.
    """

    def _render(self) -> str:
        return f"Child execution failed: {self.message}"


class ChildCancelled(ChildFailed):
    """The child was cancelled; raised at the line of the parent that waits for it. `message` is the reason."""

    def _render(self) -> str:
        return f"Child execution cancelled: {self.message}" if self.message else "Child execution cancelled"


class ChildTimeout(ChildFailed):
    """The child did not end within the invocation's `timeout`; raised at the line of the parent that waits for it.

    Uncaught, the parent's attempt fails and follows its retry policy; the retry invokes afresh.

    Attributes:
        timeout: The time allowed, from the invocation, on the database clock.
    """

    timeout: timedelta = timedelta(0)

    def __init__(self, timeout: Duration, *, execution_id: UUID = NO_ID, task: str = "") -> None:
        self.timeout = parse_duration(timeout)
        super().__init__(
            f"timed out after {format_duration(self.timeout)}",
            execution_id=execution_id,
            task=task,
            error_type=error_type_of(self),
        )

    def _render(self) -> str:
        return f"Child execution {self.message}"


class ExecutionCancelled(ConductorError):
    """The execution was cancelled, or stands under an ancestor that was.

    Attributes:
        execution_id: The cancelled execution.
        task: Its task's name.
        reason: The reason given to `cancel`.
    """

    sqlstate = "PC001"
    execution_id: UUID = NO_ID
    task: str = ""
    reason: str = ""

    def __init__(self, reason: str = "", *, execution_id: UUID = NO_ID, task: str = "") -> None:
        self.reason = reason
        self.execution_id = execution_id
        self.task = task
        super().__init__(f"execution {execution_id} was cancelled" + (f": {reason}" if reason else ""))


class ExecutionNotFound(ConductorError):
    """No execution has this id: it never existed, or retention has removed it.

    Attributes:
        execution_id: The id asked for.
    """

    sqlstate = "PC002"
    execution_id: UUID = NO_ID

    def __init__(self, execution_id: UUID = NO_ID) -> None:
        self.execution_id = execution_id
        super().__init__(
            f"no execution {execution_id}: it never existed, or retention removed it; "
            "set keep_completed= or keep_failed= on the task to keep it longer"
        )


class AttemptTimeout(ConductorError):
    """One run of the handler took longer than the task's `timeout=`. Counts as a failed attempt.

    Attributes:
        task: The task's name.
        timeout: The running time allowed.
        step: The step that ran over its own timeout, or None when it was the task's.
    """

    task: str = ""
    timeout: timedelta = timedelta(0)
    step: str | None = None

    def __init__(self, task: str, timeout: Duration, *, step: str | None = None) -> None:
        self.task = task
        self.timeout = parse_duration(timeout)
        self.step = step
        what = f"task {task!r}" if step is None else f"step {step!r} of task {task!r}"
        super().__init__(f"{what} ran longer than its timeout of {format_duration(timeout)}; raise timeout= or do less")


class Expired(ConductorError):
    """The execution had not started within the task's `expires=`; it failed without running.

    Attributes:
        execution_id: The expired execution.
        task: Its task's name.
        expires: The time allowed between its due instant and its start.
    """

    execution_id: UUID = NO_ID
    task: str = ""
    expires: timedelta = timedelta(0)

    def __init__(self, task: str, expires: Duration, *, execution_id: UUID = NO_ID) -> None:
        self.task = task
        self.expires = parse_duration(expires)
        self.execution_id = execution_id
        super().__init__(
            f"task {task!r} was not started within {format_duration(expires)}; add workers or raise expires="
        )


class WorkerLost(ConductorError):
    """The execution's process died under it too often; the crash budget `max_crashes=` is used up.

    Attributes:
        execution_id: The lost execution.
        task: Its task's name.
        crash_count: How many of its runs were lost with their process.
    """

    execution_id: UUID = NO_ID
    task: str = ""
    crash_count: int = 0

    def __init__(self, task: str, crash_count: int, *, execution_id: UUID = NO_ID) -> None:
        self.task = task
        self.crash_count = crash_count
        self.execution_id = execution_id
        super().__init__(
            f"task {task!r} lost its worker process {crash_count} times; look for exhausted memory or a native crash, "
            "or raise max_crashes="
        )


class WaitTimeout(ConductorError):
    """No matching event came within `ctx.wait_for(timeout=)`. Memoized: every resume meets it again.

    Attributes:
        step: The name of the wait.
        timeout: The time allowed, on the database clock.
    """

    step: str = ""
    timeout: timedelta = timedelta(0)

    def __init__(self, step: str, timeout: Duration) -> None:
        self.step = step
        self.timeout = parse_duration(timeout)
        super().__init__(f"wait {step!r} timed out after {format_duration(timeout)}")


class DuplicateStep(ConductorError):
    """A run used the same name for two of its steps, waits or invocations. A permanent failure.

    Attributes:
        step: The name used twice.
    """

    sqlstate = "PC010"
    step: str = ""

    def __init__(self, step: str) -> None:
        self.step = step
        super().__init__(
            f"step name {step!r} is used twice in one run; give each step its own name, in a loop f'{step}-{{i}}'"
        )


class StepMismatch(ConductorError):
    """A name recorded for one kind of step, or for one child task, is now used for another.

    Attributes:
        step: The name.
        recorded: What the stored outcome belongs to, such as `invoke of 'charge'`.
        found: What the code asks for now.
    """

    sqlstate = "PC004"
    step: str = ""
    recorded: str = ""
    found: str = ""

    def __init__(self, step: str, recorded: str, found: str) -> None:
        self.step = step
        self.recorded = recorded
        self.found = found
        super().__init__(
            f"step {step!r} was recorded as {recorded} and is now {found}; "
            "give the changed step a new name, so that running executions keep their history"
        )


class DepthExceeded(ConductorError):
    """A child would stand more than 100 levels below its root. A permanent failure.

    Attributes:
        task: The child task that was not started.
        depth_max: The limit.
    """

    sqlstate = "PC005"
    task: str = ""
    depth_max: int = 100

    def __init__(self, task: str = "", depth_max: int = 100) -> None:
        self.task = task
        self.depth_max = depth_max
        super().__init__(
            f"cannot start child {task!r}: maximum depth of {depth_max} reached; "
            "end the recursion, or start it detached to begin a new tree"
        )


class TooMany(ConductorError):
    """An execution asked for more steps or children than one may have. A permanent failure.

    Attributes:
        what: `steps` or `children`.
        limit: The most that one execution may have.
    """

    sqlstate = "PC006"
    what: str = ""
    limit: int = 0

    def __init__(self, what: str, limit: int) -> None:
        self.what = what
        self.limit = limit
        super().__init__(f"more than {limit} {what} in one execution; split the work over child executions")


class EncodeError(ConductorError):
    """A value cannot be stored. A permanent failure of the execution that produced it, and of that one alone.

    Attributes:
        path: Where in the value, such as `step 'load'.items[3].price`.
        reason: What is wrong there, and what to do.
    """

    sqlstate = "PC007"
    path: str = ""
    reason: str = ""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"cannot store {path or 'the value'}: {reason}")


class DecodeError(ConductorError):
    """A stored value no longer fits the type that the code gives it. A permanent failure.

    Attributes:
        path: Where in the value, such as `payload.order_id`.
        reason: What is wrong there.
    """

    path: str = ""
    reason: str = ""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"cannot read {path or 'the value'}: {reason}")


class UnknownTask(ConductorError):
    """No task of this name is registered.

    Attributes:
        task: The name asked for.
    """

    sqlstate = "PC008"
    task: str = ""

    def __init__(self, task: str) -> None:
        self.task = task
        super().__init__(f"unknown task {task!r}; register it with @app.task, or refer to it with app.define_task")


class NotInvocable(ConductorError):
    """The task is started by its triggers only; `invocable()` is not among them. Nothing was enqueued.

    Attributes:
        task: The task's name.
    """

    sqlstate = "PC009"
    task: str = ""

    def __init__(self, task: str) -> None:
        self.task = task
        super().__init__(f"task {task!r} cannot be invoked; add invocable() to its on=[...]")


class ConfigurationError(ConductorError, ValueError):
    """An option, trigger or signature was refused. Nothing was registered.

    Attributes:
        place: What was refused, such as `task 'charge': max_attempts=`.
        reason: What is wrong with it.
        remedy: What to write instead.
    """

    sqlstate = "PC003"
    place: str = ""
    reason: str = ""
    remedy: str = ""

    def __init__(self, place: str, reason: str, remedy: str = "") -> None:
        self.place = place
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"{place}: {reason}" + (f"; {remedy}" if remedy else ""))


class ServerError(ConductorError):
    """The Postgres server cannot be used as it is: not found, not reachable, too old, not migrated, or not startable.

    Attributes:
        reason: What is wrong.
        remedy: What to do about it.
    """

    sqlstate = "PC011"
    reason: str = ""
    remedy: str = ""

    def __init__(self, reason: str, remedy: str = "") -> None:
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"{reason}; {remedy}" if remedy else reason)


class StaleLease(ConductorError):
    """Internal: the lease was lost; whatever this run still produces is dropped, and another worker has the execution.

    Attributes:
        execution_id: The execution.
    """

    sqlstate = "PC012"
    execution_id: UUID = NO_ID

    def __init__(self, execution_id: UUID = NO_ID) -> None:
        self.execution_id = execution_id
        super().__init__(f"the lease on execution {execution_id} was lost; its work goes on elsewhere")


class EngineError(ConductorError):
    """An engine function refused for a reason that has no class of its own.

    Attributes:
        code: The SQLSTATE, of class `PC`.
        facts: What the function reported.
    """

    code: str = ""
    facts: Mapping[str, Any]

    def __init__(self, message: str, *, code: str, facts: Mapping[str, Any] | None = None) -> None:
        self.code = code
        self.facts = facts or {}
        super().__init__(message)


class Suspend(BaseException):
    """Internal: the run is parked. Unwinds the handler past every `except Exception`; `finally` blocks run.

    Code that swallows it is detected by the driver, which knows that it threw it.
    """


class Crash(BaseException):
    """Internal: drop the run as if its process had died. Thrown by the testing kit at a named point."""


class Fail(Exception):
    """Raise it in a handler to fail the execution for good, whatever attempts are left."""


class Retry(Exception):
    """Raise it in a handler to end this attempt and try again after a while. Counts as an attempt.

    Args:
        after: How long to wait, instead of the retry policy's delay.
        message: What is shown as the attempt's error.

    Raises:
        ValueError: `after` is not a duration.
    """

    after: timedelta
    message: str

    def __init__(self, after: Duration, message: str = "") -> None:
        self.after = parse_duration(after, "Retry: after")
        self.message = message
        super().__init__(after, message)

    def __str__(self) -> str:
        """Say the message, else the delay."""
        return self.message or f"retry after {format_duration(self.after)}"


BY_SQLSTATE: Mapping[str | None, type[ConductorError]] = {
    error.sqlstate: error
    for error in (
        ExecutionCancelled,
        ExecutionNotFound,
        DuplicateStep,
        StepMismatch,
        DepthExceeded,
        TooMany,
        EncodeError,
        UnknownTask,
        NotInvocable,
        ConfigurationError,
        ServerError,
        StaleLease,
    )
}
"""The class for each SQLSTATE that the engine raises; the same codes head the SQL functions."""


def engine_error(sqlstate: str, message: str, detail: str | None = None) -> ConductorError:
    """Return the error that an engine function reported.

    Args:
        sqlstate: Five characters of class `PC`.
        message: The report's primary message; becomes `str()` of the error.
        detail: A JSON object with the error's fields by name; absent or other text when there are none.

    Returns:
        An instance of the class registered for the code, else an `EngineError`.
    """
    facts = _facts(detail)
    error = BY_SQLSTATE.get(sqlstate)
    return error.from_engine(message, facts) if error else EngineError(message, code=sqlstate, facts=facts)


def error_type_of(error: BaseException) -> str:
    """Name an error's class as it is stored: the bare name for builtins, `module.Class` otherwise."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def errors_in(error: BaseException) -> tuple[BaseException, ...]:
    """Return what a group holds; an error that is no group holds nothing."""
    is_group = isinstance(error, BaseExceptionGroup)
    return cast("BaseExceptionGroup[BaseException]", error).exceptions if is_group else ()


_PERMANENT = (Fail, ChildFailed, EncodeError, DecodeError, DuplicateStep, DepthExceeded, TooMany)


def is_permanent(error: BaseException) -> bool:
    """Tell whether an error that leaves a handler ends the execution, whatever attempts are left.

    A `ChildTimeout` is not permanent; a group is when all of it is.
    """
    if members := errors_in(error):
        return all(map(is_permanent, members))
    return isinstance(error, _PERMANENT) and not isinstance(error, ChildTimeout)


def _facts(detail: str | None) -> dict[str, Any]:
    try:
        facts = json.loads(detail or "{}")
    except ValueError:
        return {}
    return cast("dict[str, Any]", facts) if isinstance(facts, dict) else {}


def _fact(name: str, value: Any) -> Any:
    return UUID(value) if name.endswith("_id") and isinstance(value, str) else value


def _restore(kind: type[_Error], args: tuple[Any, ...], fields: Mapping[str, Any]) -> _Error:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error
