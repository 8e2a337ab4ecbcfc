"""A task binds arguments into calls; a call carries all that sending it takes."""

import json
import timeit
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, cast

import msgspec
import pytest

from pgconductor import Conductor, Context
from pgconductor.codec import Raw
from pgconductor.errors import ConfigurationError, EncodeError
from pgconductor.options import NO_OPTIONS, configure_task
from pgconductor.task import Call, Task


class Echo:
    """Stands for the signature, the codec and the client."""

    def __init__(self) -> None:
        self.sent: list[Call[Any]] = []

    def encode_payload(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], /) -> str:
        return json.dumps([list(args), dict(kwargs)])

    def plain_values(self, _args: tuple[Any, ...], _kwargs: Mapping[str, Any], /) -> tuple[Any, ...] | None:
        return None

    def write_plain(self, values: tuple[Any, ...], /) -> str:
        raise NotImplementedError

    def write_each_plain(self, many: Iterable[tuple[Any, ...]], /) -> list[str]:
        raise NotImplementedError

    def encode(self, value: Any, /) -> str:
        return json.dumps(value)

    def read(self, raw: Raw | msgspec.Raw, /) -> Any:
        return json.loads(raw if isinstance(raw, str) else bytes(raw))

    def decode(self, raw: Raw | msgspec.Raw, _where: str = "$", _name: str | None = None, /) -> Any:
        return self.read(raw)

    async def invoke(self, call: Call[Any], /) -> Any:
        self.sent.append(call)

    def invoke_sync(self, call: Call[Any], /) -> Any:
        self.sent.append(call)


async def charge(ctx: str, order_id: int, *, cents: int = 1) -> str:
    """Charge a card."""
    return f"{ctx} {order_id} {cents}"


def task_of(echo: Echo) -> Task[..., Any]:
    config = configure_task("charge", is_async=True, options={"queue": "money"})
    return Task(charge, config, payload=echo, returns=echo, client=echo)


def test_bound_call_carries_name_payload_and_queue() -> None:
    echo = Echo()
    call = task_of(echo).bind(7, cents=5)

    assert (call.task, call.payload, call.queue) == ("charge", '[[7], {"cents": 5}]', "money")
    assert call.options is NO_OPTIONS
    assert call.returns is echo


async def test_invoke_sends_the_call() -> None:
    echo = Echo()

    await task_of(echo).invoke(7, cents=5)
    task_of(echo).invoke_sync(7, cents=5)

    assert echo.sent == [task_of(echo).bind(7, cents=5)] * 2


def test_options_travel_with_the_call_and_leave_the_task_as_it_was() -> None:
    task = task_of(Echo())

    call = task.with_options(priority=3).with_options(delay="1m", priority=4).bind(7)

    assert (call.options.priority, call.options.delay) == (4, timedelta(minutes=1))
    assert task.options is NO_OPTIONS


def test_unknown_option_is_refused() -> None:
    wrong: Any = {"prio": 1}

    with pytest.raises(ConfigurationError, match="task 'charge': unknown option 'prio'"):
        task_of(Echo()).with_options(**wrong)


async def test_task_called_is_the_bare_function() -> None:
    assert await task_of(Echo())("ctx", 7, cents=5) == "ctx 7 5"


def test_task_looks_like_its_function() -> None:
    task: Any = task_of(Echo())

    assert (task.__name__, task.__doc__, task.__wrapped__) == ("charge", "Charge a card.", charge)
    assert repr(task) == "<Task charge queue=money>"


def test_reference_has_no_code_to_call() -> None:
    echo = Echo()
    reference: Task[..., Any] = Task(
        None, configure_task("far", is_async=True), payload=echo, returns=echo, client=echo
    )

    with pytest.raises(ConfigurationError, match="reference without code"):
        reference("ctx")


def test_calls_are_equal_when_task_and_payload_are() -> None:
    task = task_of(Echo())

    assert task.bind(7) == task.with_options(priority=3).bind(7)
    assert task.bind(7) != task.bind(8)
    assert task.bind(7) != "charge"
    assert len({task.bind(7), task.bind(7)}) == 1


def test_binding_itself_costs_microseconds() -> None:
    class Free(Echo):
        def encode_payload(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], /) -> str:
            return "{}"

    task = task_of(Free())

    assert min(timeit.repeat(lambda: task.bind(7, cents=5), number=1000, repeat=5)) / 1000 < 20e-6


def test_a_call_of_plain_arguments_is_encoded_when_somebody_asks() -> None:
    app = Conductor[None]("postgresql:///nowhere")

    @app.task()
    async def double(ctx: Context, number: int) -> int:
        return 2 * number

    call = double.bind(7)
    kinds = [type(call.arguments)]
    assert call == double.bind(number=7) != double.bind(8)
    assert [*kinds, type(call.arguments)] == [tuple, str]
    assert call.payload == '{"number":7}'
    assert hash(call) == hash(double.bind(7))
    assert repr(double.bind(7)) == '<Call double {"number":7}>'
    with pytest.raises(EncodeError):
        double.bind(cast("Any", "seven"))
    with pytest.raises(TypeError, match="double"):
        cast("Any", double).bind(1, 2)
