"""What a fake context answers, and what it notes of what it was asked."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast
from uuid import UUID, uuid4

from pgconductor.attempt import inside_step
from pgconductor.codec import Codec, codec_for
from pgconductor.errors import ConductorError, DuplicateStep
from pgconductor.operations import Child
from pgconductor.task import Call


class Asked(NamedTuple):
    """One thing that a handler asked its context for. Equal to the plain tuple.

    Attributes:
        verb: The method: `step`, `invoke`, `sleep`, …
        name: The operation's name; of `emit` the event's, of `cancel` the execution's id.
        value: The arguments of a `step` or `transaction`, those by keyword as a dict at the end; the call, or the list
            of calls, of `invoke`, `invoke_all`, `start`, `schedule`; the `timedelta` of a `sleep`, the instant of a
            `sleep_until`; the children's names of a `wait`; the payload of an `emit`; the reason of a `cancel`.
    """

    verb: str
    name: str
    value: Any = None


class Script:
    """The results that a test gives, and the calls so far. Shared by a fake context and what `step_options` returns.

    Args:
        results: By the operation's name.
        is_cancelled: Whether every operation raises `CancelledError`.
    """

    def __init__(self, results: Mapping[str, Any], *, is_cancelled: bool) -> None:
        self.calls: list[Asked] = []
        self.is_cancelled = is_cancelled
        self._results = dict(results)
        self._names: set[str] = set()
        self._counts: dict[str, int] = {}

    # ------------------------------------------------------------ asking

    def note(self, verb: str, name: str, value: Any = None, *, is_named: bool = True) -> None:
        """Note what was asked, and refuse what a context refuses.

        Raises:
            DuplicateStep: The name was used before.
            ConductorError: It was asked inside a step.
            asyncio.CancelledError: The execution is being cancelled.
        """
        if inside_step.get() is not None:
            raise ConductorError(f"step {inside_step.get()!r} uses its context; move the operation out of the step")
        if self.is_cancelled:
            raise asyncio.CancelledError("the fake execution is being cancelled")
        if is_named and name in self._names:
            raise DuplicateStep(name)
        if is_named:
            self._names.add(name)
        self.calls.append(Asked(verb, name, value))

    def numbered(self, verb: str) -> str:
        """Return the name under which the result of an operation without a name is given: `cancel#1`, `cancel#2`."""
        self._counts[verb] = self._counts.get(verb, 0) + 1
        return f"{verb}#{self._counts[verb]}"

    # ------------------------------------------------------------ answering

    def has(self, name: str) -> bool:
        """Tell whether the test gives a result of that name."""
        return name in self._results

    def given(self, verb: str, name: str, otherwise: str = "") -> Any:
        """Return the result of that name, or raise it if it is an error.

        Raises:
            AssertionError: The test gives none; says what to write.
        """
        if name not in self._results:
            remedy = f"give FakeContext(results={{{name!r}: ...}}), or an exception to raise"
            raise AssertionError(f"{verb} {name!r} has no result: {remedy}{otherwise}")
        return raised_or_returned(self._results[name])

    def optional(self, name: str, default: Any) -> Any:
        """Return the result of that name, or raise it; the default if the test gives none."""
        return raised_or_returned(self._results.get(name, default))

    def of_type(self, type_: Any, verb: str, name: str) -> Any:
        """Return the result of that name as it comes back from the database."""
        return copied(codec_for(type_), self.given(verb, name), f"{verb} {name!r}")

    # ------------------------------------------------------------ children

    def child_value(self, verb: str, name: str, call: Call[Any]) -> Any:
        """Return what a child gives its parent."""
        value = self.given(verb, name)
        return call.returns.decode(call.returns.encode(value))

    def child_values(self, name: str, calls: Sequence[Call[Any]]) -> list[Any]:
        """Return what an `invoke_all` gives: a list of results, of which some may be errors.

        Raises:
            ExceptionGroup: Of the errors in the list.
            AssertionError: There are not as many results as calls.
        """
        if not calls:
            return []
        values = list(self.given("invoke_all", name))
        if len(values) != len(calls):
            raise AssertionError(f"invoke_all {name!r} has {len(calls)} calls, but {len(values)} results are given")
        failures = [value for value in values if isinstance(value, Exception)]
        if failures:
            raise ExceptionGroup(f"{len(failures)} of {len(calls)} children of {name!r} failed", failures)
        return [
            call.returns.decode(call.returns.encode(value)) for call, value in zip(calls, values, strict=True)
        ]  # fmt: skip

    def finished(self, name: str, children: Sequence[Child[Any]], needed: int, timeout: object) -> list[str]:
        """Return which started children a `wait` finds ended: those whose results are given, as many as are needed.

        With a result of the wait's own name, a list of children's names, exactly those.
        """
        if name in self._results:
            return list(self.given("wait", name))
        ended = [child.step for child in children if child.step in self._results]
        if len(ended) < needed and timeout is None:
            missing = next(child.step for child in children if child.step not in self._results)
            self.given("start", missing, f", since wait {name!r} waits for {needed} of {len(children)}")
        return ended[:needed]

    def execution_id(self, key: str) -> UUID:
        """Return an id for something that is created: the one given under the key, or a random one."""
        return cast("UUID", self.optional(key, None) or uuid4())


def raised_or_returned(result: Any) -> Any:
    """Return a result, or raise it if it is an error."""
    if isinstance(result, BaseException):
        raise result
    return result


def copied(codec: Codec[Any], value: Any, place: str) -> Any:
    """Return the value as it comes back from the database."""
    return codec.store(value, place)[1]


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a step was given, as `Asked.value` shows it."""
    return (*args, dict(kwargs)) if kwargs else args
