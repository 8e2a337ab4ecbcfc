"""What can be stored comes back equal, and as the annotated type."""

import enum
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pytest
from pydantic import BaseModel, EmailStr, Field, RootModel

from pgconductor.codec import VALUE_BYTES_MAX, codec_for
from pgconductor.signature import return_codec_of

T = TypeVar("T")
UserId = NewType("UserId", int)


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


@dataclass
class Item:
    price: float
    tags: list[str] = field(default_factory=list[str])


@dataclass
class Box(Generic[T]):
    content: T


@dataclass
class Tree:
    children: list["Tree"]


@dataclass(eq=False)
class Incomparable:
    items: list[Item]


class Row(TypedDict, total=False):
    id: int


class Point(NamedTuple):
    x: int
    y: int = 0


class Doc(msgspec.Struct, tag=True):
    id: int


class Note(msgspec.Struct, tag=True):
    text: str


class Order(BaseModel):
    id: int
    email: EmailStr = "a@b.example"
    at: datetime | None = None


class Renamed(BaseModel):
    price: Decimal = Field(alias="unitPrice")


class Orders(RootModel[list[Order]]):
    pass


VALUES: list[tuple[Any, Any]] = [
    (int, 0),
    (str, ""),
    (bool, False),
    (list[int], []),
    (dict[str, int], {}),
    (None, None),
    (int, 2**64),
    (int, -(10**100)),
    (float, -0.0),
    (float, 5e-324),
    (tuple[int, str], (1, "a")),
    (tuple[int, ...], (1, 2)),
    (set[int], {1, 2}),
    (frozenset[str], frozenset({"a"})),
    (int | None, None),
    (Literal["a", 3], 3),
    (dict[int, str], {1: "a"}),
    (dict[UUID, date], {UUID(int=7): date(2024, 2, 29)}),
    (Sequence[int], [1]),
    (Mapping[str, int], {"a": 1}),
    (bytes, b"\x00\xff"),
    (datetime, datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
    (datetime, datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin"))),
    (time, time(1, 2, 3, 4)),
    (timedelta, timedelta(microseconds=-1)),
    (Decimal, Decimal("1.10")),
    (Colour, Colour.RED),
    (Level, Level.LOW),
    (UserId, UserId(3)),
    (Annotated[int, "metadata"], 3),
    (Item, Item(1.5, ["a"])),
    (Box[list[Item]], Box([Item(1)])),
    (Tree, Tree([Tree([])])),
    (Row, {"id": 1}),
    (Row, {}),
    (Point, Point(1, 2)),
    (Doc | Note, Note("x")),
    (Order, Order(id=1, at=datetime(2024, 1, 1, tzinfo=UTC))),
    (list[Order] | None, [Order(id=1)]),
    (dict[str, tuple[Order, bytes]], {"a": (Order(id=1), b"\xff")}),
    (Renamed, Renamed(unitPrice=Decimal("1.10"))),
    (Orders, Orders([Order(id=1)])),
]


@pytest.mark.covers("F57")
@pytest.mark.parametrize(
    ("annotation", "value"), VALUES, ids=[f"{kind}-{number}" for number, (kind, _) in enumerate(VALUES)]
)
def test_annotated_value_comes_back_equal_and_of_its_type(annotation: Any, value: Any) -> None:
    codec = codec_for(annotation)

    back = codec.decode(codec.encode(value))

    assert back == value or isinstance(value, datetime)
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "value", [0, "", False, [], {}, None, 1.5, "ü\u2028", [{"a": [1, None, True]}], "\\u0000", 2**70]
)
def test_plain_json_needs_no_annotation(value: Any) -> None:
    codec = codec_for(Any)

    assert codec.decode(codec.encode(value)) == value


def test_instant_in_a_repeated_hour_keeps_its_instant() -> None:
    first = datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))

    back = codec_for(datetime).decode(codec_for(datetime).encode(first))

    assert back.astimezone(UTC) == first.astimezone(UTC)


def test_class_without_equality_is_compared_by_its_fields() -> None:
    codec = codec_for(Incomparable)

    back = codec.decode(codec.encode(Incomparable([Item(1.5)])))

    assert back.items == [Item(1.5)]


def test_store_returns_a_copy_that_equals_what_a_replay_reads() -> None:
    value = {"a": [1]}

    raw, copy = codec_for(dict[str, list[int]]).store(value)

    assert copy == value
    assert copy is not value
    assert raw == b'{"a":[1]}'


@pytest.mark.parametrize("raw", ["[1]", b"[1]", memoryview(b"[1]")])
@pytest.mark.parametrize("annotation", [list[int], list[int] | Order, Any])
def test_every_form_of_text_that_a_driver_returns_is_read(annotation: Any, raw: Any) -> None:
    assert codec_for(annotation).decode(raw) == [1]


@pytest.mark.covers("F59")
def test_value_of_exactly_the_size_limit_is_stored() -> None:
    text = "a" * (VALUE_BYTES_MAX - 2)

    assert len(codec_for(str).encode(text)) == VALUE_BYTES_MAX


BRACKETS: list[list[Any]] = [["["] * 200, [[]] * 200, ["[", {}] * 200, ['"[{'] * 200]


@pytest.mark.parametrize("value", BRACKETS)
def test_brackets_in_text_do_not_count_as_nesting(value: list[Any]) -> None:
    assert codec_for(Any).decode(codec_for(Any).encode(value)) == value


def test_json_with_a_models_alias_is_read_like_its_name() -> None:
    codec = codec_for(Renamed)

    assert codec.decode('{"unitPrice":"2"}') == codec.decode('{"price":"2"}')


def test_codec_is_built_once_per_type() -> None:
    assert codec_for(list[Item]) is codec_for(list[Item])


def test_unhashable_annotation_is_accepted() -> None:
    assert codec_for(Annotated[int, ["unhashable"]]).decode("3") == 3


def _awaits() -> Awaitable[Item]:
    raise NotImplementedError


async def _async() -> "Item":
    raise NotImplementedError


@pytest.mark.parametrize(
    ("fn", "annotation"),
    [
        (_awaits, Item),
        (_async, Item),
        (partial(_async), Item),
        (lambda: 1, Any),
        (len, Any),
        (Item, Item),
        (Item.__init__, type(None)),
    ],
)
def test_codec_of_a_step_is_that_of_what_its_function_returns(fn: Any, annotation: Any) -> None:
    assert return_codec_of(fn) is codec_for(annotation)
