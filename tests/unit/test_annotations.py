"""What a function returns, where its annotations are strings."""

import gc
import typing
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest

from pgconductor.annotations import return_type
from pgconductor.errors import ConfigurationError


class Tool:
    async def look_up(self, key: "str") -> "Tool":
        return self


def _module_function(returns: str) -> Callable[..., Any]:
    """Return a function as a module defines them, that no test has seen before."""
    functions: dict[str, Any] = {"Tool": Tool}
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
