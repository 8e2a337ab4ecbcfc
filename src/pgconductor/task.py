"""Tasks and calls: a typed unit of code, and the same with its payload bound. Pure; the conductor does the sending."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, cast

from msgspec import Struct
from typing_extensions import ParamSpec, TypeVar, Unpack

from pgconductor.checks import check_sequence
from pgconductor.errors import ConfigurationError
from pgconductor.options import (
    NO_OPTIONS,
    CallOptions,
    Options,
    TaskConfig,
    parse_options,
)

if TYPE_CHECKING:
    import msgspec

    from pgconductor.codec import Raw
    from pgconductor.run import Run

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Ret = TypeVar("Ret")


class Returns(Protocol):
    """What turns a handler's value into JSON text and back; `codec.Codec` does."""

    def encode(self, value: Any, /) -> str:
        """Return the JSON text, or raise `EncodeError`."""
        ...

    def decode(self, raw: "Raw | msgspec.Raw", where: str = ..., name: str | None = ..., /) -> Any:
        """Return the value, or raise `DecodeError`, which says what the value is."""
        ...

    @property
    def read(self) -> Callable[[Any], Any]:
        """What returns the value, or raises any error."""
        ...


class Payload(Protocol):
    """What turns the arguments of a task into JSON text by parameter name; `codec.Signature` does."""

    def encode_payload(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], /) -> str:
        """Return the JSON text, or raise `EncodeError`, or `TypeError` where Python itself would refuse the call."""
        ...

    def plain_values(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], /) -> tuple[Any, ...] | None:
        """Return the arguments in order if they can be encoded later, by `write_plain`; else None."""
        ...

    def write_plain(self, values: tuple[Any, ...], /) -> str:
        """Return the JSON text of what `plain_values` returned."""
        ...

    def write_each_plain(self, many: Iterable[tuple[Any, ...]], /) -> list[str]:
        """Return the JSON texts of many of them."""
        ...


class Client(Protocol):
    """What sends a call; the conductor does."""

    async def invoke(self, call: "Call[Ret]", /) -> "Run[Ret]":
        """Enqueue the call."""
        ...

    def invoke_sync(self, call: "Call[Ret]", /) -> "Run[Ret]":
        """Enqueue the call from code without an event loop."""
        ...


class Call(Struct, Generic[R_co], gc=False, eq=False):
    """A task with its payload bound: what children, fan-out, bulk enqueue, schedules and assertions are given.

    Made by `Task.bind`. Two calls are equal when their task and payload are. The garbage collector does not follow
    calls, of which a program may hold many thousands: they refer to nothing that refers to them.

    Attributes:
        task: The task's name.
        arguments: As JSON text; or plain values, which become that when somebody asks for the payload.
        signature: What encodes them.
        options: How it is enqueued; these win over the options of `invoke_many`.
        returns: What decodes the result.
        queue: The task's queue; `options.queue` wins.
    """

    task: str
    arguments: str | tuple[Any, ...]
    signature: Payload
    options: CallOptions
    returns: Returns
    queue: str

    @property
    def payload(self) -> str:
        """The arguments, as JSON text."""
        arguments = self.arguments  # once: another thread may be about to write it
        if not isinstance(arguments, str):
            self.arguments = arguments = self.signature.write_plain(arguments)
        return arguments

    def __eq__(self, other: object) -> bool:
        """Compare task and payload."""
        if not isinstance(other, Call):
            return NotImplemented
        return self.task == other.task and self.payload == other.payload

    def __hash__(self) -> int:
        """Agree with equality."""
        return hash((self.task, self.payload))

    def __repr__(self) -> str:
        """Show the task and the beginning of its payload."""
        return f"<Call {self.task} {self.payload[:80]}>"


def payloads_of(calls: Sequence[Call[Any]]) -> list[str]:
    """Return the payloads of calls. Those of one task that are to be encoded yet are encoded together."""
    signature = calls[0].signature
    many = [each.arguments for each in calls if each.signature is signature]
    if len(many) == len(calls) and all(isinstance(arguments, tuple) for arguments in many):
        return signature.write_each_plain(cast("list[tuple[Any, ...]]", many))
    return [each.payload for each in calls]


def check_call(value: object, place: str) -> None:
    """Refuse what is not a call.

    Raises:
        ConfigurationError: It is a task without its arguments, or something else.
    """
    if not isinstance(value, Call):
        reason = f"{value!r:.80} is a task" if isinstance(value, Task) else f"{value!r:.80} is not a call"
        raise ConfigurationError(place, reason, "bind its arguments: task.bind(...)")


def check_calls(values: object, place: str) -> None:
    """Refuse what is not a list of calls.

    Raises:
        ConfigurationError: It is no sequence, or a member is not a call.
    """
    for value in check_sequence(values, place, "calls"):
        if type(value) is not Call:
            check_call(value, place)


def check_task(value: object, place: str) -> None:
    """Refuse what is not a task.

    Raises:
        ConfigurationError: It is something else.
    """
    if not isinstance(value, Task):
        raise ConfigurationError(place, f"{value!r:.80} is not a task", "give what @app.task made")


class Task(Generic[P, R]):
    """A named, typed unit of code with options. Made by `Conductor.task`, `create_task` and `define_task`.

    Attributes:
        name: Unique in its deployment; the function's name unless given.
        queue: Where its executions wait for a worker.
        config: Its options, checked and complete.
        fn: The handler; None when the task is only a reference.
        payload: What encodes its arguments.
        returns: What encodes and decodes its result.
        options: What its calls carry.
    """

    name: str
    queue: str
    config: TaskConfig
    fn: Callable[..., Any] | None
    payload: Payload
    returns: Returns
    options: CallOptions
    _client: Client

    def __init__(
        self, fn: Callable[..., Any] | None, config: TaskConfig, *, payload: Payload, returns: Returns, client: Client
    ) -> None:
        if fn is not None:
            functools.update_wrapper(cast("Callable[..., Any]", self), fn)
        self.fn = fn
        self.config = config
        self.name = config.name
        self.queue = config.queue
        self.payload = payload
        self.returns = returns
        self.options = NO_OPTIONS
        self._client = client

    def __call__(self, ctx: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call the bare function, without Postgres; for unit tests.

        Args:
            ctx: A context, such as `pgconductor.testing.FakeContext`.
            *args: As the handler takes them.
            **kwargs: As the handler takes them.

        Returns:
            What the function returns; for an `async def`, something to await.

        Raises:
            ConfigurationError: The task is a reference made by `define_task`; its code is elsewhere.
        """
        if self.fn is None:
            raise ConfigurationError(f"task {self.name!r}", "is a reference without code", "invoke it instead")
        return self.fn(ctx, *args, **kwargs)

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Bind the arguments into a call, which can be sent later, in bulk, on a schedule or as a child.

        Where all parameters are plain, arguments are checked here and encoded when the call is sent: a handler that
        runs again binds again for each child that it has had, and sends none of these.

        Args:
            *args: As the handler takes them after its context; of a batch task, one element.
            **kwargs: As the handler takes them.

        Returns:
            The call, with this task's options.

        Raises:
            TypeError: The arguments do not fit the handler's parameters.
            EncodeError: A value cannot be stored.
        """
        signature = self.payload
        values = signature.plain_values(args, kwargs)
        arguments = signature.encode_payload(args, kwargs) if values is None else values
        return Call(self.name, arguments, signature, self.options, self.returns, self.queue)

    async def invoke(self, *args: P.args, **kwargs: P.kwargs) -> "Run[R]":
        """Enqueue one execution and return a handle on it once it is stored.

        Args:
            *args: As for `bind`.
            **kwargs: As for `bind`.

        Returns:
            A handle; with `dedupe_key` or `throttle`, possibly on an earlier execution.

        Raises:
            TypeError: The arguments do not fit, or `conn=` is a synchronous connection. Nothing was enqueued.
            EncodeError: A value cannot be stored. Nothing was enqueued.
            NotInvocable: `invocable()` is not among the task's triggers. Nothing was enqueued.
        """
        return await self._client.invoke(self.bind(*args, **kwargs))

    def invoke_sync(self, *args: P.args, **kwargs: P.kwargs) -> "Run[R]":
        """Enqueue one execution from code without an event loop; otherwise as `invoke`.

        Args:
            *args: As for `bind`.
            **kwargs: As for `bind`.

        Returns:
            A handle; read it with `result_sync`.

        Raises:
            TypeError: The arguments do not fit, or `conn=` is an asynchronous connection. Nothing was enqueued.
            EncodeError: A value cannot be stored. Nothing was enqueued.
            NotInvocable: `invocable()` is not among the task's triggers. Nothing was enqueued.
        """
        return self._client.invoke_sync(self.bind(*args, **kwargs))

    def with_options(self, **options: Unpack[Options]) -> "Task[P, R]":
        """Return the same task with options for its calls; this one stays as it is.

        Args:
            **options: As `Options` lists them; laid over those set before.

        Returns:
            A task that shares everything else.

        Raises:
            ConfigurationError: An option is unknown, out of bounds, or contradicts another.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.options = parse_options(f"task {self.name!r}", self.options, **options)
        return other

    def __repr__(self) -> str:
        """Show the name and the queue."""
        return f"<Task {self.name} queue={self.queue}>"


def runs_on_loop(task: Task[..., Any]) -> bool:
    """Tell whether a task's handler is a coroutine; else it runs in a thread."""
    if task.config.executor != "process":
        return task.config.executor == "loop"
    return inspect.iscoroutinefunction(task.fn) or inspect.iscoroutinefunction(type(task.fn).__call__)
