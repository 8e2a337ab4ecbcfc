"""What a function returns, where its annotations are strings."""

import gc
import typing
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Optional, cast

import pytest

from pgconductor import Conductor, Context
from pgconductor.annotations import hints_of, return_type, written_function
from pgconductor.codec import codec_for
from pgconductor.errors import ConfigurationError
from pgconductor.signature import return_codec_of


class Tool:
    async def look_up(self, key: "str") -> "Tool":
        return self


@dataclass
class Order:
    id: int


def _module_function(returns: str) -> Callable[..., Any]:
    """Return a function as a module defines them, that no test has seen before."""
    functions: dict[str, Any] = {"Tool": Tool, "Order": Order}
    exec(f"def count() -> {returns!r}: ...", functions)  # noqa: S102
    return cast("Callable[..., Any]", functions["count"])


def test_a_function_of_a_module_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved: list[Any] = []
    resolve = typing.get_type_hints

    def counting(target: Any, **options: Any) -> dict[str, Any]:
        resolved.append(target)
        return resolve(target, **options)

    monkeypatch.setattr(typing, "get_type_hints", counting)
    count = _module_function("int")
    for _ in range(3):
        assert return_type(count) is int
    assert resolved == [count]
    assert return_type(Tool().look_up) is return_type(Tool().look_up) is Tool


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (list["Order"], list[Order]),
        (Optional["Order"], Order | None),
        (dict[str, list["Order"]] | None, dict[str, list[Order]] | None),
        (Awaitable["Order"], Order),
        (Awaitable[list["Order"]], list[Order]),
        (Annotated[list["Order"], "kept"], Annotated[list[Order], "kept"]),
        (Literal["Order"], Literal["Order"]),
    ],
)
def test_a_name_inside_a_type_is_resolved(written: Any, meant: Any) -> None:
    count = _module_function("int")
    count.__annotations__["return"] = written

    assert return_type(count) == meant
    assert return_codec_of(count).annotation == codec_for(meant).annotation


def test_types_that_name_nothing_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> dict[str, Any]:
        raise AssertionError("each run of a step would look it up")

    monkeypatch.setattr(typing, "get_type_hints", refuse)
    for written in (int, Order, None, Any, list[int], dict[str, Order] | None, Annotated[Order, "a word"]):
        count = _module_function("int")
        count.__annotations__["return"] = written
        assert return_type(count) == (type(None) if written is None else written)


@dataclass
class Priced:
    """Its fields are annotated, and so is what it does when it is called."""

    cents: int
    item: str = ""

    async def __call__(self, ctx: Context, count: int) -> list["Order"]:
        return [Order(self.cents)] * count


def test_an_object_that_is_called_is_annotated_by_what_it_does() -> None:
    assert return_type(Priced(5)) == list[Order]
    assert hints_of(Priced(5), "task 'priced'") == {"ctx": Context, "count": int, "return": list[Order]}


def test_a_handler_with_annotated_fields_is_asynchronous_as_it_is_written() -> None:
    task = Conductor().create_task(Priced(5), name="priced")

    assert task.config.executor == "loop"
    assert task.bind(3).payload == '{"count":3}'


def test_a_function_of_a_run_is_not_kept_by_what_it_returns() -> None:
    def local() -> Callable[..., Any]:
        class Sum:
            @staticmethod
            def compute() -> "Sum":
                return Sum()

        return Sum.compute

    compute = local()
    assert return_type(compute).__name__ == "Sum"
    alive = weakref.ref(compute)
    del compute
    gc.collect()
    assert alive() is None


def test_what_cannot_be_resolved_yet_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    later = _module_function("_Later")
    with pytest.raises(ConfigurationError):
        return_type(later)
    monkeypatch.setitem(later.__globals__, "_Later", int)
    assert return_type(later) is int


def test_a_callable_that_cannot_be_remembered_is_resolved_each_time() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __init__(self) -> None:
            self.__annotations__ = {"return": "int"}

        def __call__(self) -> None: ...

    assert return_type(Unhashable()) is int


@dataclass
class Fields:
    count: str


@dataclass
class Heir(Fields):
    async def __call__(self, number: int) -> list[int]:
        return [number]


class Passing:
    """Passes on whatever it is asked for, as some decorators do."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fn, name)

    def __call__(self, *args: Any) -> Any:
        return self._fn(*args)


def total(numbers: list[int]) -> int:
    return sum(numbers)


def test_the_annotations_of_fields_are_not_those_of_a_call() -> None:
    assert return_type(Heir("a")) == list[int]
    assert written_function(Passing(total)).__annotations__ == total.__annotations__
    assert return_type(Passing(total)) is int
