"""Whatever value is generated, it comes back equal or is refused; nothing else can happen."""

import json
import math
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pgconductor.codec import Codec, codec_for
from pgconductor.errors import EncodeError
from pgconductor.refusal import NESTING_MAX
from pgconductor.signature import signature_of
from pgconductor.stored_error import error_from_json, error_to_json

pytestmark = pytest.mark.property


@dataclass
class Record:
    number: int
    text: str
    parts: dict[str, list[float]]
    inner: "Record | None" = None


class Model(BaseModel):
    number: int
    at: datetime
    amounts: list[Decimal]
    inner: "Model | None" = None


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | text,
    lambda inner: st.lists(inner) | st.dictionaries(text, inner),
)
naive = st.datetimes()
instants = naive | st.datetimes(datetime(1980, 1, 1), timezones=st.timezones())  # noqa: DTZ001
decimals = st.decimals(allow_nan=False, allow_infinity=False)
records = st.recursive(
    st.none(), lambda inner: st.builds(Record, st.integers(), text, st.dictionaries(text, st.lists(finite)), inner)
)
models = st.recursive(
    st.none(),
    lambda inner: st.builds(Model, number=st.integers(), at=instants, amounts=st.lists(decimals), inner=inner),
)
anything: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | instants
    | decimals
    | st.uuids(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers() | st.none(), inner),
)
TYPED: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers()),
    (float, finite),
    (str, text),
    (bytes, st.binary()),
    (date, st.dates()),
    (time, st.times()),
    (timedelta, st.timedeltas()),
    (UUID, st.uuids()),
    (Decimal, decimals),
    (set[int], st.sets(st.integers())),
    (tuple[str, bool | None], st.tuples(text, st.none() | st.booleans())),
    (dict[int, bytes], st.dictionaries(st.integers(), st.binary())),
    (Record | None, records),
]


@given(plain)
def test_plain_json_comes_back_equal_without_an_annotation(value: Any) -> None:
    codec = codec_for(Any)

    assert codec.decode(codec.encode(value)) == value


@pytest.mark.parametrize(("annotation", "values"), TYPED, ids=[str(kind) for kind, _ in TYPED])
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(data=st.data())
def test_annotated_value_comes_back_equal(annotation: Any, values: st.SearchStrategy[Any], data: st.DataObject) -> None:
    value = data.draw(values)
    codec = codec_for(annotation)

    assert codec.decode(codec.encode(value)) == value


def _stored_or_refused(codec: Codec[Any], value: Any) -> tuple[str | None, EncodeError | None]:
    try:
        return codec.encode(value), None
    except EncodeError as error:
        return None, error


@pytest.mark.covers("F57")
@pytest.mark.parametrize("annotation", [Any, list[Any], Record | None, float, dict[str, int], Model | None])
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(value=anything | records | models | finite)
def test_any_value_is_stored_exactly_or_refused(annotation: Any, value: Any) -> None:
    codec: Codec[Any] = codec_for(annotation)

    raw, error = _stored_or_refused(codec, value)

    if raw is None:
        assert error is not None
        assert error.path.startswith("$")
    else:
        json.loads(raw, parse_constant=pytest.fail)
        assert "\\u0000" not in raw.replace("\\\\", "")
        assert codec.decode(raw) == value or codec.encode(codec.decode(raw)) == raw


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(models)
def test_model_comes_back_equal_as_far_as_pydantic_can_tell(value: Model | None) -> None:
    codec = codec_for(Model | None)

    assert codec.encode(codec.decode(codec.encode(value))) == codec.encode(value)


@given(st.lists(st.floats(), min_size=1))
def test_float_that_is_no_number_is_always_found(values: list[float]) -> None:
    first = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)

    _, error = _stored_or_refused(codec_for(list[float]), values)

    assert (error and error.path) == (None if first is None else f"$[{first}]")


@given(st.integers(1, 2 * NESTING_MAX), st.booleans(), text)
def test_nesting_is_accepted_up_to_the_limit_and_not_beyond(levels: int, is_object: bool, leaf: str) -> None:
    value: Any = leaf
    for _ in range(levels):
        value = {"[{": value, "]": [0] * 60} if is_object else [value, "]", "}"]

    raw, _ = _stored_or_refused(codec_for(Any), value)

    assert (raw is not None) == (levels + is_object <= NESTING_MAX)


@given(st.integers(), text, plain)
def test_arguments_come_back_equal_by_name(number: int, name: str, rest: Any) -> None:
    async def handler(ctx: Any, number: int, name: str = "", *, rest: Any = None) -> None: ...

    signature = signature_of(handler, "handler")

    raw = signature.encode_payload((number, name), {"rest": rest})

    assert signature.decode_payload(raw) == ((), {"number": number, "name": name, "rest": rest})


@given(st.text(), st.lists(st.text(), max_size=3))
def test_any_error_text_can_be_stored_and_shown(message: str, causes: list[str]) -> None:
    error = ValueError(message)
    for cause in causes:
        outer = RuntimeError(cause)
        outer.__cause__, error = error, outer  # type: ignore[assignment]

    stored = error_from_json(error_to_json(error))

    assert codec_for(str).encode(stored.render())


async def _handler(ctx: Any, number: int, text: str, is_it: bool) -> None: ...


@given(st.integers(), st.text(st.characters(exclude_categories=())), st.booleans())
def test_arguments_that_are_encoded_later_are_encoded_as_they_would_be_at_once(
    number: int, text: str, is_it: bool
) -> None:
    signature = signature_of(_handler, "handler")
    args = number, text, is_it

    is_plain = -(2**63) < number < 2**63 and text.isprintable() and len(text) <= 1_000
    assert signature.plain_values(args, {}) == (args if is_plain else None)
    if is_plain:
        assert signature.write_plain(args) == signature.encode_payload(args, {})
        assert signature.write_each_plain([args] * 2) == [signature.encode_payload(args, {})] * 2
