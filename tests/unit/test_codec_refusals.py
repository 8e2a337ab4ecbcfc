"""What cannot be stored is refused with the path of the fault and the remedy; the process lives on."""

import collections
import pathlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pytest
from pydantic import BaseModel, ConfigDict, SecretStr

from pgconductor.codec import NAME_BYTES_MAX, VALUE_BYTES_MAX, check_name, codec_for, untyped_codec
from pgconductor.errors import ConfigurationError, DecodeError, EncodeError, is_permanent

NAN = float("nan")


@dataclass
class Item:
    price: float


@dataclass
class Basket:
    items: list[Item]


@dataclass
class Special(Item):
    note: str = ""


@dataclass
class Other:
    price: float


class Row(TypedDict):
    id: int


class Struct(msgspec.Struct):
    prices: dict[str, float]


class Model(BaseModel):
    price: float = 0
    text: str = ""
    inside: Any = None


class Constants(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="constants")
    price: float


class Login(BaseModel):
    password: SecretStr


class Mixed(msgspec.Struct):
    model: Model


class Rude:
    def __repr__(self) -> str:
        raise ValueError("no")

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        raise ValueError("no")

    __hash__ = None  # type: ignore[assignment]


class RudeKey(str):
    __slots__ = ()


def _cycle() -> list[Any]:
    value: list[Any] = []
    value.append({"self": value})
    return value


def _nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


REFUSALS: list[tuple[Any, Any, str, str]] = [
    (Any, {"items": [1, 2, 3, {"price": NAN}]}, "$.items[3].price", "not a JSON number"),
    (Any, float("inf"), "$", "store None or a string"),
    (Basket, Basket([Item(1), Item(NAN)]), "$.items[1].price", "not a JSON number"),
    (Struct, Struct({"a b": NAN}), "$.prices['a b']", "not a JSON number"),
    (Model, Model(price=NAN), "$.price", "not a JSON number"),
    (Constants, Constants(price=NAN), "$.price", "not a JSON number"),
    (list[Model], [Model(), Model(text="\0")], "$[1].text", "U+0000"),
    (float | None, NAN, "$", "not a JSON number"),
    (Any, {"a": "x\0y"}, "$.a", "U+0000"),
    (Any, {"a\0": 1}, "$['a\\x00']", "U+0000"),
    (str, "\ud800", "$", "lone surrogate"),
    (dict[str, int], {"\ud800": 1}, "$['\\ud800']", "lone surrogate"),
    (Any, _cycle(), "$[0].self", "contains itself"),
    (Model, Model(inside=_cycle()), "$.inside[0].self", "contains itself"),
    (Any, {1: "a"}, "$[1]", "annotate"),
    (Any, {(1, 2): "a"}, "$[a tuple]", "use str keys"),
    (dict[int | str, int], {1: 1, "1": 2}, "$[1]", "key"),
    (Any, {"a": (1, 2)}, "$.a", "a tuple comes back as a list; annotate"),
    (Any, [Item(1)], "$[0]", "annotate"),
    (Any, {"a": {1}}, "$.a", "annotate"),
    (Any, b"x", "$", "annotate"),
    (Any, [object()], "$[0]", "convert it"),
    (Any, [Rude()], "$[0]", "convert it"),
    (list[Item], [Item(1), Rude()], "$[1]", "cannot be written"),
    (Any, {"a": RudeKey("x")}, "$.a", "convert it"),
    (list[int], [1, "x"], "$[1]", "Expected `int`, got `str`"),
    (int, True, "$", "Expected `int`"),
    (float, 2**53 + 1, "$", "comes back as"),
    (list[int], (1, 2), "$", "a tuple comes back as a list"),
    (Item, Special(1, "kept?"), "$", "a Special comes back as an Item"),
    (Item, Other(1), "$", "an Other comes back as an Item"),
    (Row, {"id": 1, "more": 2}, "$.more", "no place for it"),
    (Login, Login(password=SecretStr("x")), "$.password", "comes back"),
    (Model, Item(1), "$", "comes back as a Model"),
    (
        datetime,
        datetime(1900, 1, 1, tzinfo=ZoneInfo("Africa/Abidjan")),
        "$",
        "the datetime 1900-01-01 00:00:00-00:16:08 comes",
    ),
]


@pytest.mark.covers("F56", "F57", "F60")
@pytest.mark.parametrize(("annotation", "value", "path", "reason"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusal_names_path_and_remedy(annotation: Any, value: Any, path: str, reason: str) -> None:
    with pytest.raises(EncodeError) as caught:
        codec_for(annotation).encode(value)

    assert caught.value.path == path
    assert reason in caught.value.reason
    assert is_permanent(caught.value)


@pytest.mark.covers("F60")
@pytest.mark.parametrize("levels", [101, 300, 100_000])
@pytest.mark.parametrize("annotation", [Any, Model | Any])
def test_deep_nesting_is_refused_and_not_a_recursion_error(annotation: Any, levels: int) -> None:
    with pytest.raises(EncodeError, match="nested more than 100 levels"):
        codec_for(annotation).encode(_nested(levels))


def test_one_hundred_levels_are_stored() -> None:
    assert codec_for(Any).decode(codec_for(Any).encode(_nested(100))) == _nested(100)


@pytest.mark.covers("F59")
@pytest.mark.parametrize("annotation", [str, Any, str | Model])
def test_one_byte_over_the_limit_is_refused(annotation: Any) -> None:
    with pytest.raises(EncodeError, match=f"{VALUE_BYTES_MAX + 1} bytes of JSON, at most {VALUE_BYTES_MAX}"):
        codec_for(annotation).encode("a" * (VALUE_BYTES_MAX - 1))


@pytest.mark.covers("F59")
def test_size_is_looked_at_before_anything_else() -> None:
    with pytest.raises(EncodeError, match="bytes of JSON") as caught:
        codec_for(Any).encode(["\0" * VALUE_BYTES_MAX])

    assert caught.value.path == "$"


def test_path_begins_with_what_the_caller_names() -> None:
    with pytest.raises(EncodeError, match=r"cannot store step 'load'\.items\[0\]: "):
        codec_for(Any).encode({"items": [NAN]}, "step 'load'")


def test_text_of_an_error_can_itself_be_stored() -> None:
    with pytest.raises(EncodeError) as caught:
        codec_for(Any).encode({"\ud800\0" * 1000: {"\ud800": 1}})

    assert codec_for(str).encode(str(caught.value))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("annotation", "raw", "path"),
    [
        (Basket, '{"items":[{"price":1},{"price":"x"}]}', "payload.items[...].price"),
        (Model, '{"price":"x"}', "payload.price"),
        (list[Model], '[{},{"price":"x"}]', "payload[1].price"),
        (int, "[", "payload"),
        (int, b'"\xff"', "payload"),
        (Any, "[" * 100_000, "payload"),
    ],
)
def test_value_that_no_longer_fits_is_a_permanent_decode_error(annotation: Any, raw: Any, path: str) -> None:
    with pytest.raises(DecodeError) as caught:
        codec_for(annotation).decode(raw, "payload")

    assert caught.value.path in {path, path.replace("[...]", "[1]")}
    assert is_permanent(caught.value)


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (pathlib.Path, "no JSON form"),
        (list[complex], "no JSON form"),
        (collections.deque[int], "no JSON form"),
        (str | UUID, "more than one str-like type"),
        (Item | Other, "more than one dataclass"),
        (Mixed, "mixes pydantic with the msgspec.Struct Mixed"),
    ],
)
def test_type_without_an_exact_form_is_refused_when_its_codec_is_built(annotation: Any, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        codec_for(annotation)


@pytest.mark.parametrize("version", ["1.10.24", "2.9.2", "2.10.6"])
def test_a_pydantic_that_is_too_old_is_refused_with_its_version(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fresh(BaseModel):
        price: float

    monkeypatch.setattr("pydantic.VERSION", version)
    with pytest.raises(ConfigurationError, match=rf'^pydantic {version}: .* 2\.11 .*"pgconductor\[pydantic\]"'):
        codec_for(Fresh)
    monkeypatch.setattr("pydantic.VERSION", "2.11.0b1")
    assert codec_for(Fresh).decode('{"price": 1}') == Fresh(price=1)


def test_the_remedy_is_that_of_who_asks() -> None:
    with pytest.raises(EncodeError, match=r"^cannot store where\.id: .*; write it as text$"):
        untyped_codec("write it as text").encode({"id": UUID(int=7)}, "where")


@pytest.mark.parametrize(
    "name", ["a", "a-b", "a_b", "'; drop table x", "%s", "../x", "größe", "🚀", "x" * NAME_BYTES_MAX]
)
def test_printable_name_is_accepted_unchanged(name: str) -> None:
    assert check_name("step", name) is name


@pytest.mark.covers("F61")
@pytest.mark.parametrize(
    "name", ["", "a\0b", "a\nb", "\ud800", "\u202e", "x" * (NAME_BYTES_MAX + 1), "ü" * 101, 7, None]
)
def test_other_names_are_refused_with_place_and_remedy(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"step name .*use 1 to 200 bytes of printable UTF-8") as caught:
        check_name("step", name)

    assert isinstance(caught.value, ValueError)
    assert codec_for(str).encode(str(caught.value))
