"""Arguments become a payload by parameter name, and a payload becomes arguments."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, Any, TypedDict
from uuid import UUID

import msgspec
import pytest
from pydantic import BaseModel, RootModel

from pgconductor.annotations import admits
from pgconductor.codec import VALUE_BYTES_MAX
from pgconductor.errors import ConfigurationError, DecodeError, EncodeError, is_permanent
from pgconductor.signature import Signature, signature_of, signature_of_reference

if TYPE_CHECKING:
    from collections.abc import Hashable as OnlyForCheckers


@dataclass
class Order:
    id: int
    count: int = 1


class Doc(BaseModel):
    id: int = 0


class Row(TypedDict, total=False):
    id: int


class Pair(msgspec.Struct, array_like=True):
    left: int
    right: int


class Ids(RootModel[list[int]]):
    pass


class Tick:
    pass


class Level(IntEnum):
    LOW = 1


class Name(str):
    __slots__ = ()


async def charge(ctx: Any, order_id: int, *, cents: int, note: str = "none") -> Order: ...  # type: ignore[empty-body]
async def nothing(ctx: Any) -> None: ...
async def whole(ctx: Any, order: Order) -> None: ...
async def defaulted(ctx: Any, row: Row = {"id": 5}) -> None: ...  # noqa: B006
async def mixed(ctx: Any, number: int, doc: Doc, docs: list[Doc] | None = None) -> None: ...
async def leading(ctx: Any, a: int = 1, b: int = 2, /, c: int = 3) -> None: ...
async def ticking(ctx: Any, tick: "Tick | None" = None, x: int = 1) -> None: ...
async def waiting(ctx: Any, tick: Tick) -> None: ...
async def ticking_first(ctx: Any, tick: Tick | None = None, x: int = 1, /) -> None: ...
async def ticking_last(ctx: Any, x: int, tick: Tick, /, y: int = 1) -> None: ...
async def ticking_by_name(ctx: Any, x: int, /, tick: Tick) -> None: ...
async def index(ctx: Any, docs: list[Order]) -> list[bool] | None: ...
async def numbers(ctx: Any, values: list[int]) -> None: ...
async def pair(ctx: Any, pair: Pair) -> None: ...
async def ids(ctx: Any, ids: Ids) -> None: ...
async def untyped(ctx: Any, value: Any, class_: Any = None) -> Any: ...
async def lazily(ctx: "OnlyForCheckers", value: int) -> int: ...  # type: ignore[empty-body]
async def nobody() -> None: ...
async def keyword(*, ctx: Any) -> None: ...
async def several(ctx: Any, *items: int) -> None: ...
async def named(ctx: Any, **items: int) -> None: ...
async def unresolved(ctx: Any, value: "OnlyForCheckers") -> None: ...


def _signature(fn: Callable[..., Any], *, is_batch: bool = False) -> Signature:
    return signature_of(fn, fn.__name__, is_batch=is_batch, is_trigger=lambda kind: admits(kind, (Tick,)))


CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = [
    (charge, (7,), {"cents": 5}, {"order_id": 7, "cents": 5}),
    (charge, (), {"note": "", "cents": 0, "order_id": 0}, {"order_id": 0, "cents": 0, "note": ""}),
    (nothing, (), {}, {}),
    (whole, (Order(3),), {}, {"id": 3, "count": 1}),
    (whole, (), {"order": Order(3)}, {"id": 3, "count": 1}),
    (defaulted, (), {}, {}),
    (defaulted, ({"id": 1},), {}, {"id": 1}),
    (mixed, (1, Doc(id=2)), {}, {"number": 1, "doc": {"id": 2}}),
    (mixed, (1, Doc()), {"docs": [Doc()]}, {"number": 1, "doc": {"id": 0}, "docs": [{"id": 0}]}),
    (leading, (5,), {"c": 4}, {"a": 5, "c": 4}),
    (leading, (5, 6), {}, {"a": 5, "b": 6}),
    (ticking, (), {"x": 2}, {"x": 2}),
    (pair, (Pair(1, 2),), {}, {"pair": [1, 2]}),
    (ids, (Ids([1]),), {}, {"ids": [1]}),
    (untyped, ([1],), {"class_": "x"}, {"value": [1], "class_": "x"}),
    (lazily, (1,), {}, {"value": 1}),
]


@pytest.mark.parametrize(("fn", "args", "kwargs", "document"), CALLS)
def test_call_becomes_an_object_by_parameter_name(
    fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], document: Any
) -> None:
    assert json.loads(_signature(fn).encode_payload(args, kwargs)) == document


@pytest.mark.parametrize(("fn", "args", "kwargs", "document"), CALLS)
def test_payload_calls_the_handler_as_the_caller_did(
    fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], document: Any
) -> None:
    signature = _signature(fn)

    found_args, found_kwargs = signature.decode_payload(signature.encode_payload(args, kwargs))

    called = signature._python.bind(*found_args, **found_kwargs)
    meant = signature._python.bind(*args, **kwargs)
    called.apply_defaults()
    meant.apply_defaults()
    assert called == meant


def test_order_of_keywords_does_not_change_the_payload() -> None:
    signature = _signature(charge)

    assert signature.encode_payload((), {"cents": 5, "order_id": 7}) == signature.encode_payload((7,), {"cents": 5})


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((7,), {}, "task 'charge': missing a required"),
        ((7, 8), {"cents": 5}, "task 'charge': too many positional"),
        ((7,), {"cents": 5, "x": 1}, "task 'charge': got an unexpected keyword argument 'x'"),
        ((7,), {"cents": 5, "order_id": 8}, "task 'charge': multiple values for argument 'order_id'"),
    ],
)
def test_call_that_python_would_refuse_is_refused_with_the_tasks_name(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        _signature(charge).encode_payload(args, kwargs)


def test_wrong_argument_is_named_by_parameter() -> None:
    with pytest.raises(EncodeError) as caught:
        _signature(mixed).encode_payload((1, Doc()), {"docs": [Doc(), 3]})

    assert caught.value.path == "payload.docs[1]"


def test_size_limit_holds_for_all_arguments_together() -> None:
    half = "a" * (VALUE_BYTES_MAX // 2)

    with pytest.raises(EncodeError, match="bytes of JSON"):
        _signature(untyped).encode_payload((half, half), {})


def test_empty_model_is_not_mistaken_for_the_default() -> None:
    with pytest.raises(EncodeError, match="drop the default"):
        _signature(defaulted).encode_payload(({},), {})


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ('{"order_id": 7}', "payload"),
        ('{"order_id": 7, "cents": "5"}', "payload.cents"),
        ('{"order_id": 7, "cents": 5, "more": 1}', "payload"),
        ("[7, 5]", "payload"),
        ("{", "payload"),
        ("null", "payload"),
    ],
)
def test_payload_that_no_longer_fits_is_a_permanent_error(raw: str, path: str) -> None:
    with pytest.raises(DecodeError) as caught:
        _signature(charge).decode_payload(raw)

    assert caught.value.path == path
    assert is_permanent(caught.value)


def test_pydantic_member_that_no_longer_fits_is_named_by_path() -> None:
    with pytest.raises(DecodeError) as caught:
        _signature(mixed).decode_payload('{"number": 1, "doc": {"id": "x"}}')

    assert caught.value.path == "payload.doc.id"


def test_missing_positional_only_argument_takes_its_default() -> None:
    assert _signature(leading).decode_payload('{"b": 9}') == ((1, 9), {})


def test_trigger_parameters_are_kept_out_of_the_payload() -> None:
    assert _signature(ticking).triggers == {"tick": Tick | None}
    assert not _signature(ticking).required_triggers
    assert _signature(waiting).required_triggers == {"tick"}
    assert _signature(waiting).decode_payload("{}") == ((), {})


@pytest.mark.parametrize("fn", [ticking_first, ticking_last])
def test_a_trigger_parameter_that_takes_no_name_is_refused(fn: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"parameter 'tick': .* is passed by name, .*; drop the `/`"):
        _signature(fn)


def test_a_trigger_parameter_behind_positional_ones_is_passed_by_name() -> None:
    signature = _signature(ticking_by_name)

    assert signature.triggers == {"tick": Tick}
    assert signature.decode_payload('{"x":1}') == ((1,), {})


def test_batch_payload_is_one_element() -> None:
    signature = _signature(index, is_batch=True)

    assert signature.encode_payload((Order(1),), {}) == '{"id":1,"count":1}'
    assert signature.decode_element('{"id":1}') == Order(1)
    assert signature.returns.annotation == bool | None


@pytest.mark.parametrize("payload", ['{"order": 7, "cents": 1}', "{}"])
def test_a_payload_of_other_members_is_refused_with_those_that_the_task_takes(payload: str) -> None:
    async def handler(ctx: Any, order_id: int, cents: int = 0) -> None: ...

    with pytest.raises(DecodeError, match=r"payload: .*; task 'handler' takes order_id \(required\), cents$"):
        _signature(handler).decode_payload(payload)


def test_batch_element_that_is_no_model_goes_by_name() -> None:
    signature = _signature(numbers, is_batch=True)

    assert signature.encode_payload((1,), {}) == '{"values":1}'
    assert signature.decode_element('{"values":1}') == 1


@pytest.mark.parametrize("fn", [charge, whole, nothing, waiting])
def test_batch_handler_of_another_shape_is_refused(fn: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"list\[R\]"):
        _signature(fn, is_batch=True)


def test_reference_takes_keywords_or_one_instance() -> None:
    signature = signature_of_reference("charge", Order, int)

    assert signature.encode_payload((), {"id": 3}) == signature.encode_payload((Order(3),), {}) == '{"id":3,"count":1}'
    with pytest.raises(TypeError, match=r"task 'charge': .*idd"):
        signature.encode_payload((), {"idd": 3})


def test_reference_by_dict_takes_any_keywords() -> None:
    assert signature_of_reference("charge", dict, int).encode_payload((), {"a": [1]}) == '{"a":[1]}'


@pytest.mark.parametrize("payload", [int, Pair, Ids, list[int]])
def test_reference_whose_payload_is_no_object_is_refused(payload: Any) -> None:
    with pytest.raises(ConfigurationError, match="is not a JSON object"):
        signature_of_reference("charge", payload, int)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (nobody, "takes no context"),
        (keyword, "takes no context"),
        (several, r"takes \*items"),
        (named, r"takes \*\*items"),
        (unresolved, "'OnlyForCheckers' cannot be resolved .*outside `if TYPE_CHECKING`"),
    ],
)
def test_handler_that_no_payload_fits_is_refused(fn: Any, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        _signature(fn)


@pytest.mark.parametrize("kind", [int, str, dict, list[int], UUID, datetime, Order], ids=str)
def test_a_handler_whose_first_parameter_is_a_value_is_refused(kind: Any) -> None:
    async def handler(first: Any, second: int = 0) -> None: ...

    handler.__annotations__["first"] = kind
    with pytest.raises(ConfigurationError, match=r"first parameter, first: .*, is no context; make `ctx: Context`"):
        _signature(handler)


def test_type_that_cannot_be_stored_is_refused_with_its_parameter() -> None:
    async def handler(ctx: Any, where: complex) -> None: ...

    with pytest.raises(
        ConfigurationError, match="task 'handler': parameter 'where': type complex: it has no JSON form"
    ):
        _signature(handler)


def test_local_class_named_by_a_string_is_found_where_the_handler_uses_it() -> None:
    @dataclass
    class Local:
        id: int

    async def handler(ctx: Any, local: "Local") -> None:
        Local(1)

    assert _signature(handler).decode_payload('{"id":1}') == ((), {"local": Local(1)})


def test_local_class_that_cannot_be_found_is_refused_with_the_remedy() -> None:
    @dataclass
    class Local:
        id: int

    async def handler(ctx: Any, local: "Local") -> None: ...

    with pytest.raises(ConfigurationError, match=r"task 'handler': .*define its class at module level"):
        _signature(handler)


def test_an_argument_that_json_would_leave_out_is_refused() -> None:
    def handler(_ctx: object, a: Any, b: int) -> None: ...

    with pytest.raises(EncodeError) as caught:
        signature_of(handler, "task").encode_payload((msgspec.UNSET, 1), {})
    assert caught.value.path == "payload.a"


def test_arguments_by_position_and_by_name_make_the_same_payload() -> None:
    def handler(_ctx: object, a: int, b: str, c: list[int]) -> None: ...

    signature = signature_of(handler, "task")
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((1, "x", [2]), {}),
        ((1,), {"c": [2], "b": "x"}),
        ((), {"b": "x", "c": [2], "a": 1}),
    ]
    assert {signature.encode_payload(args, kwargs) for args, kwargs in ways} == {'{"a":1,"b":"x","c":[2]}'}


async def unhashable(ctx: Any, number: Annotated[int, ["m"]]) -> None: ...
async def half_by_position(ctx: Any, a: int, /, b: int) -> None: ...
async def plain(ctx: Any, number: int, text: str, is_it: bool) -> None: ...


@pytest.mark.parametrize(
    "args", [(7, "it's \u00e9", True), (-(2**63) + 1, 'q"\\', False), (2**63 - 1, "x" * 1_000, True)]
)
def test_plain_arguments_are_encoded_later_as_they_would_be_at_once(args: tuple[Any, ...]) -> None:
    signature = _signature(plain)
    by_name: dict[str, Any] = dict(zip(("number", "text", "is_it"), args, strict=True))

    assert signature.plain_values(args, {}) == args
    assert signature.plain_values((), by_name) == args
    assert signature.write_plain(args) == signature.encode_payload(args, {})
    assert signature.write_each_plain([args, (1, "", False)]) == [
        signature.encode_payload(each, {}) for each in (args, (1, "", False))
    ]


@pytest.mark.parametrize(
    "args",
    [
        (True, "", True),
        (Level.LOW, "", True),
        (1.0, "", True),
        (2**63, "", True),
        (-(2**63), "", True),
        (1, Name("x"), True),
        (1, "\0", True),
        (1, "a\nb", True),
        (1, "\ud800", True),
        (1, "x" * 1_001, True),
        (1, "", 1),
        (1, ""),
        (1, "", True, 2),
        (1, None, True),
    ],
)
def test_what_is_not_plain_is_left_to_be_encoded_at_once(args: tuple[Any, ...]) -> None:
    assert _signature(plain).plain_values(args, {}) is None


def test_arguments_by_name_can_wait_if_they_are_given_in_order() -> None:
    assert _signature(plain).plain_values((1,), {"text": "", "is_it": True}) is None
    assert _signature(plain).plain_values((), {"text": "", "number": 1, "is_it": True}) is None


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (charge, (7, 5, "x")),  # by name only, and with a default
        (leading, (1, 2, 3)),
        (nothing, ()),
        (unhashable, (7,)),
        (half_by_position, (1, 2)),
    ],
)
def test_arguments_of_other_signatures_are_encoded_at_once(fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    assert _signature(fn).plain_values(args, {}) is None


def test_an_annotation_that_cannot_be_hashed_is_encoded_at_once() -> None:
    assert _signature(unhashable).encode_payload((7,), {}) == '{"number":7}'
