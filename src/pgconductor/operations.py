"""What the async and the plain context share: the facts of a run, its logger, and started children."""

import logging
import random
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from datetime import datetime
from functools import cached_property
from threading import Thread
from threading import enumerate as enumerate_threads
from typing import TYPE_CHECKING, Any, Generic, NoReturn, cast
from uuid import UUID

import psycopg
from typing_extensions import TypeVar

from pgconductor import checks
from pgconductor.attempt import inside_step
from pgconductor.checks import SMALLINT_MAX, check_function, check_integer, check_sequence, check_text
from pgconductor.durations import Duration, seconds
from pgconductor.engine import Ended
from pgconductor.errors import ConductorError, ConfigurationError, Fail, Retry
from pgconductor.logs import shown
from pgconductor.model import RetryPolicy, State
from pgconductor.run import Run
from pgconductor.task import Call, Task

if TYPE_CHECKING:
    from pgconductor.attempt import Attempt

R_co = TypeVar("R_co", covariant=True)
D = TypeVar("D", default=None)
T = TypeVar("T")

ONCE = RetryPolicy()
_chance = random.Random()  # noqa: S311
STEP_THREAD = "pgconductor step"
"""The name of the threads of steps that have a timeout."""


class StepOptions:
    """How the steps of one context are run: how often, how far apart and how long."""

    __slots__ = ("max_attempts", "retry", "timeout")

    def __init__(
        self, retry: RetryPolicy | None = None, max_attempts: int = 1, timeout: Duration | None = None
    ) -> None:
        if retry is not None and not isinstance(cast("object", retry), RetryPolicy):
            raise ConfigurationError("step_options: retry", f"{retry!r} is not a RetryPolicy", "write RetryPolicy(...)")
        self.retry = retry or ONCE
        self.max_attempts = check_integer(max_attempts, "step_options: max_attempts", 1, SMALLINT_MAX)
        self.timeout = None if timeout is None else seconds(timeout, "step_options: timeout", positive=True)


PLAIN = StepOptions()


def is_final(error: Exception, policy: RetryPolicy) -> bool:
    """Tell whether a step that failed so is not to be tried again within the attempt."""
    return isinstance(error, Fail | Retry) or policy.gives_up_on(error)


def run_in_own_thread(fn: Callable[[], T]) -> "Future[T]":
    """Run a step that has a timeout in a thread of its own, since it may outlive its handler; nothing joins it.

    The threads for handlers are as many as the slots: one that waited there for a second one could wait for ever.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    context = copy_context()

    def run() -> None:
        try:
            result = context.run(call_plainly, fn)
        except BaseException as error:  # noqa: BLE001 (the future carries it to whoever waits)
            future.set_exception(error)
        else:
            future.set_result(result)

    Thread(target=run, name=STEP_THREAD, daemon=True).start()
    return future


def has_step_threads() -> bool:
    """Tell whether the thread of a step that had a timeout still runs."""
    return any(thread.name == STEP_THREAD for thread in enumerate_threads())


def call_plainly(fn: Callable[[], T]) -> T:
    """Call a function whose error a future is to carry; no future takes a `StopIteration`."""
    try:
        return fn()
    except StopIteration as error:
        raise RuntimeError("the function raised StopIteration") from error


class RunLogger(logging.LoggerAdapter[logging.Logger]):
    """Put the ids of the run on every line, and drop the lines that an earlier run has written."""

    def __init__(self, attempt: "Attempt") -> None:
        super().__init__(logging.getLogger(f"pgconductor.task.{attempt.task.name}"), {})
        self._attempt = attempt

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802  (the standard library's name)
        """Say no while the run is where an earlier one has been."""
        return not self._attempt.journal.is_replaying and super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Merge the ids with what the line brings itself."""
        kwargs["extra"] = {**self._attempt.log_ids(), **(kwargs.get("extra") or {})}
        return msg, kwargs


class RunFacts(Generic[D]):
    """The facts of a run that every context tells."""

    _attempt: "Attempt"

    def __init__(self, attempt: "Attempt") -> None:
        self._attempt = attempt

    @property
    def deps(self) -> D:
        """What the conductor's `lifespan` or `context` provides."""
        return cast("D", self._attempt.host.deps)

    @cached_property
    def execution_id(self) -> UUID:
        """The execution's id, the same in every run."""
        return UUID(self._attempt.claimed.id)

    @cached_property
    def parent_id(self) -> UUID | None:
        """The execution that waits for this one; None for a root."""
        parent = self._attempt.claimed.parent_id
        return None if parent is None else UUID(parent)

    @cached_property
    def root_id(self) -> UUID:
        """The topmost execution of the tree; its own id for a root."""
        claimed = self._attempt.claimed
        return UUID(claimed.root_id or claimed.id)

    @property
    def task(self) -> str:
        """The task's name."""
        return self._attempt.task.name

    @property
    def queue(self) -> str:
        """The queue that the execution was claimed from."""
        return self._attempt.queue

    @property
    def attempt(self) -> int:
        """Which try this is, from 1; a resume is not a new one."""
        return self._attempt.claimed.failures + 1

    @property
    def trigger(self) -> str:
        """What started the execution: `invoke`, a schedule's name, an event's name or `schema.table.op`."""
        return self._attempt.claimed.trigger or "invoke"

    @cached_property
    def logger(self) -> "logging.LoggerAdapter[Any]":
        """A logger that puts the run's ids on every line and does not repeat lines when the handler runs again."""
        return RunLogger(self._attempt)

    def _pause_after(self, step: str, number: int, options: StepOptions, error: Exception) -> float:
        """Log a try of a step that failed, and return how long to pause before the next one."""
        attempt = self._attempt
        key, wanted = (attempt.claimed.id, step), options.retry.delay(number, _chance)
        pause = attempt.host.steps.pause(key, number, options.max_attempts, error, wanted)
        said = "%s: step %r failed, try %d of %d; again in %.3gs"
        told = (attempt.label, step, number, options.max_attempts, pause)
        self.logger.warning(said, *told, exc_info=shown(error))
        return pause

    @property
    def cancelled(self) -> bool:
        """Whether the end of this execution was requested; the next operation raises `CancelledError`."""
        return self._attempt.cancelled


class _NotHere:
    """Stands for the client inside a handler: a child is not waited for on the worker."""

    async def wait_for_end(self, execution_id: UUID, timeout: Duration | None) -> Ended:
        _refuse(execution_id, timeout)

    def wait_for_end_sync(self, execution_id: UUID, timeout: Duration | None) -> Ended:
        _refuse(execution_id, timeout)

    async def state_of(self, execution_id: UUID) -> State:
        _refuse(execution_id)

    async def cancel(self, execution: UUID, /, *, reason: str) -> bool:
        _refuse(execution, reason)


def _refuse(*_: object) -> NoReturn:
    raise ConductorError("a child has no state inside its parent: await it, or use ctx.wait and ctx.cancel")


class Child(Run[R_co], Generic[R_co]):
    """A started child. Inside the parent, `await ctx.wait(...)` or `await child.result()` parks it."""

    __slots__ = ("call", "detached", "owner", "step")

    def __init__(self, id: str, step: str, call: Call[R_co], owner: Any, *, detached: bool) -> None:
        super().__init__(id, call.returns, _NotHere())
        self.step = step
        self.call = call
        self.owner = owner
        self.detached = detached

    async def result(self, timeout: Duration | None = None) -> R_co:
        """Park until the child has ended, and return its value.

        Args:
            timeout: How long to wait, on the database's clock; the child goes on afterwards.

        Returns:
            What the child returned.

        Raises:
            ChildFailed: It failed for good; `ChildCancelled`: it was cancelled.
            TimeoutError: It has not ended in time.
        """
        return cast("R_co", await self.owner.child_result(self, timeout))

    def result_sync(self, timeout: Duration | None = None) -> R_co:
        """Do the same from a plain `def` handler."""
        return cast("R_co", self.owner.child_result(self, timeout))

    async def cancel(self, reason: str = "") -> bool:
        """Ask for the child's end; see `Context.cancel`. In a plain `def` handler use `ctx.cancel(child.id)`."""
        return bool(await self.owner.cancel(self.id, reason))


def members_of(name: str, children: Sequence[Child[Any]], count: int | None) -> tuple[list[str], int]:
    """Check what a wait is given; return the children's step names and how many have to end.

    Raises:
        ValueError: `count` is not between 1 and the number of children, or a child is given twice.
        ConfigurationError: A child is detached, or is none.
    """
    for child in check_sequence(children, f"wait {name!r}", "children"):
        if not isinstance(child, Child):
            raise ConfigurationError(f"wait {name!r}", f"{child!r:.80} is not a child", "give what ctx.start returned")
    needed = len(children) if count is None else count
    if children and (not isinstance(cast("object", needed), int) or not 1 <= needed <= len(children)):
        raise ValueError(f"wait {name!r}: count must be from 1 to {len(children)}, not {needed!r}")
    for child in children:
        if child.detached:
            raise ConfigurationError(f"wait {name!r}", f"child {child.step!r} is detached", "start it attached")
    steps = [child.step for child in children]
    if len(set(steps)) < len(steps):
        twice = next(step for step in steps if steps.count(step) > 1)
        raise ValueError(f"wait {name!r}: child {twice!r} is given twice")
    return steps, needed


def partition(children: Sequence[Child[R_co]], done: Sequence[str]) -> tuple[list[Child[R_co]], list[Child[R_co]]]:
    """Split children into those that have ended and the others, in their order."""
    ended = set(done)
    return [each for each in children if each.step in ended], [each for each in children if each.step not in ended]


def check_step_function(fn: object, place: str, *, is_plain: bool = False) -> None:
    """Refuse what a step cannot run. A task is called by its context, which a step has none of to give."""
    if isinstance(fn, Task):
        raise ConfigurationError(place, f"{fn!r} is a task", "invoke it: ctx.invoke(name, task.bind(...))")
    check_function(fn, place, is_plain=is_plain)


def check_reason(reason: str) -> str:
    """Accept a reason for a cancel, or none."""
    return check_text(reason, "cancel: reason", 100_000)[:1000] if reason else ""


def check_instant(name: str, at: datetime) -> datetime:
    """Refuse an instant without a time zone."""
    return checks.check_instant(at, f"sleep_until {name!r}: at")


def not_yet(verb: str, *_: object) -> ConductorError:
    """Return the error for an operation that this version does not have."""
    return ConductorError(f"ctx.{verb} is not available in this version")


class Marked:
    """Refuse operations of the context while a step's own code runs; make an error of what would be no failure of it.

    An attempt to end the process, raised in a task beside the handler's own, would pass through the event loop and end
    everything; psycopg's `Rollback` would leave a transaction without a value.
    """

    __slots__ = ("_entered", "_name")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._entered = inside_step.set(self._name)

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        inside_step.reset(self._entered)
        if isinstance(error, SystemExit | KeyboardInterrupt | psycopg.Rollback):
            raise ConductorError(f"step {self._name!r} raised {type(error).__name__}: {error}") from error


class Trying(Marked):
    """Do so for one try of a step of a run, which its process tells of while it lasts."""

    __slots__ = ("_key", "_steps")

    def __init__(self, attempt: "Attempt", name: str) -> None:
        super().__init__(name)
        self._key = (attempt.claimed.id, name)
        self._steps = attempt.host.steps

    def __enter__(self) -> None:
        self._entered = inside_step.set(self._name)
        self._steps.begin(self._key)

    def __exit__(self, type_: object, error: BaseException | None, traceback: object) -> None:
        self._steps.end(self._key)
        super().__exit__(type_, error, traceback)
