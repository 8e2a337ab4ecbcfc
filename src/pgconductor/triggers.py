"""What a trigger hands to a handler: the `Tick`, `Event` or `Change` for the parameter that admits it.

Which one it is, the execution's `trigger_kind` says, written by the engine; the payload is never looked at for it, so
a payload that looks like an event is plain data. A task that was started in another way than the parameter asks for
finds the parameter's default.
"""

from collections.abc import Mapping
from datetime import UTC
from typing import Any, Final, Literal, get_args, get_origin

from msgspec import Raw, Struct
from msgspec.json import Decoder

from pgconductor.annotations import admits, union_members
from pgconductor.claimed import NULL, Claimed, TriggerKind
from pgconductor.codec import UNTYPED, Codec, codec_for
from pgconductor.errors import DecodeError
from pgconductor.model import Change, Event, Operation, Tick

_NOTHING: Final = b"null"


class _Event(Struct):
    name: str
    payload: Raw


class _Change(Struct):
    name: str
    op: Operation
    old: Raw = NULL
    new: Raw = NULL


_KINDS: Final[Mapping[TriggerKind, type]] = {"schedule": Tick, "event": Event, "change": Change}
_tick = Decoder(Tick)
_event = Decoder(_Event)
_change = Decoder(_Change)


def handed_over(
    parameters: Mapping[str, Any], claimed: Claimed, required: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Return the trigger object for each parameter that admits one of the execution's kind.

    Args:
        parameters: The annotations of the handler's trigger parameters, by name.
        claimed: The execution, which a trigger may have started.
        required: The parameters that have no default.

    Returns:
        Keyword arguments; the other trigger parameters are left to their defaults.

    Raises:
        DecodeError: What was stored no longer fits the annotation, as in `Event[Payload]`, or a parameter without a
            default gets nothing, since the execution was started in another way.
    """
    kind = claimed.trigger_kind
    given: dict[str, Any] = {}
    if kind is not None:
        wanted = {name: each for name, each in parameters.items() if admits(each, (_KINDS[kind],))}
        given = {name: _read(kind, bytes(claimed.trigger_data), annotation) for name, annotation in wanted.items()}
    if missing := required - given.keys():
        how = claimed.trigger or "a call"
        raise DecodeError(f"parameter {min(missing)!r}", f"a trigger hands it over, but {how} started this execution")
    return given


def _read(kind: TriggerKind, data: bytes, annotation: Any) -> Tick | Event[Any] | Change[Any]:
    if kind == "schedule":
        tick = _tick.decode(data)
        return Tick(tick.name, tick.scheduled_at.astimezone(UTC))
    codec = _codec_of(annotation, _KINDS[kind])
    if kind == "event":
        event = _event.decode(data)
        return Event(event.name, codec.decode(event.payload, f"event {event.name!r}"))
    change = _change.decode(data)
    return Change(change.name, change.op, _row(codec, change, "old"), _row(codec, change, "new"))


def _row(codec: Codec[Any], change: _Change, which: Literal["old", "new"]) -> Any:
    raw = bytes(change.old if which == "old" else change.new)
    return None if raw == _NOTHING else codec.decode(raw, f"change {change.name!r}: {which}")


def _codec_of(annotation: Any, kind: type) -> Codec[Any]:
    """Return the codec of the `T` in `Event[T]` or `Change[T]`, wherever it stands in the annotation."""
    for member in union_members(annotation):
        if get_origin(member) is kind:
            return codec_for(get_args(member)[0])
    return UNTYPED
