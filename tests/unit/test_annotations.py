"""What a function returns, where its annotations are strings."""

import typing
from typing import Any

import pytest

from pgconductor.annotations import return_type
from pgconductor.errors import ConfigurationError


class Tool:
    async def look_up(self, key: "str") -> "Tool":
        return self


def count() -> "int":
    return 1


def test_a_function_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved: list[Any] = []
    resolve = typing.get_type_hints

    def counting(target: Any, **options: Any) -> dict[str, Any]:
        resolved.append(target)
        return resolve(target, **options)

    monkeypatch.setattr(typing, "get_type_hints", counting)
    for _ in range(3):
        assert return_type(count) is int
        assert return_type(Tool().look_up) is Tool
    assert resolved == [count, Tool.look_up]


def test_what_cannot_be_resolved_yet_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def later() -> None: ...

    later.__annotations__["return"] = "_Later"
    with pytest.raises(ConfigurationError):
        return_type(later)
    monkeypatch.setitem(globals(), "_Later", int)
    assert return_type(later) is int


def test_a_callable_that_cannot_be_remembered_is_resolved_each_time() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __init__(self) -> None:
            self.__annotations__ = {"return": "int"}

        def __call__(self) -> None: ...

    assert return_type(Unhashable()) is int
