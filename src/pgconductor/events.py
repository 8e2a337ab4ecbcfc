"""Events as code writes them: what is emitted, what is waited for, and which tasks they start."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar, cast, get_args, get_origin

import msgspec
from msgspec import Raw, Struct

from pgconductor.annotations import admits, describe_type, is_model, is_untyped, union_members
from pgconductor.codec import codec_for, untyped_codec
from pgconductor.errors import ConfigurationError
from pgconductor.ids import new_id
from pgconductor.model import Change, Event, EventDef, OnChange, OnEvent, check_event
from pgconductor.task import Task

E = TypeVar("E")

_WHERE: Final = untyped_codec("write it as the payload's JSON has it, such as `str(order.id)`")


class NewEvent(Struct):
    """One event to emit."""

    id: str
    name: str
    payload: Raw


class Subscription(Struct):
    """A task that an event starts: with these fields of its payload, where a jsonpath predicate holds."""

    task: str
    event: str
    fields: tuple[str, ...] | None
    where: str | None


class Emitted(Struct):
    """Which queues have work that events started, and whether somebody waits for such events."""

    queues: list[int]
    awaited: bool


def new_event(event: EventDef[E], payload: E) -> NewEvent:
    """Return what is to be stored of an event, under an id of its own.

    Raises:
        ConfigurationError: It is not a kind of event.
        EncodeError: The payload cannot be stored, or is not what the event carries.
    """
    check_event(event, "emit")
    raw = codec_for(event.payload).encode(payload, f"event {event.name!r}")
    return NewEvent(new_id(), event.name, Raw(raw.encode()))


def encode_where(name: str, where: Mapping[str, Any]) -> Raw:
    """Return what an event's payload must contain, as JSON.

    Raises:
        ConfigurationError: It is not a dict.
        EncodeError: A value in it has no exact JSON form.
    """
    if not isinstance(cast("object", where), dict):
        raise ConfigurationError(f"wait_for {name!r}: where", f"{where!r} is not a dict", 'write {"order_id": 7}')
    return Raw(_WHERE.encode(where, f"wait_for {name!r}: where").encode())


def subscriptions_of(tasks: Iterable[Task[..., Any]]) -> list[Subscription]:
    """Return what the tasks' event triggers declare."""
    return [
        Subscription(task.name, trigger.event.name, trigger.fields, trigger.where)
        for task in tasks
        for trigger in task.config.triggers
        if isinstance(trigger, OnEvent)
    ]


def check_fields(trigger: OnEvent, parameters: Mapping[str, Any], place: str) -> None:
    """Refuse a selection of fields that the event does not carry, or from which a parameter's type cannot be built.

    Args:
        trigger: The trigger.
        parameters: The annotations of the handler's trigger parameters, by name.
        place: The task, for the error.

    Raises:
        ConfigurationError: It is such a selection.
    """
    if trigger.fields is None:
        return
    place = f"{place}: event({trigger.event.name!r}): fields"
    members = _members(trigger.event.payload)
    carried = trigger.fields if members is None else [member.names[0] for member in members]
    unknown = [name for name in trigger.fields if name not in carried]
    if unknown:
        raise ConfigurationError(place, f"{unknown[0]!r} is not a field of the event's payload", "check its spelling")
    _refuse_missing(trigger.fields, parameters, Event, place)


def check_columns(trigger: OnChange, parameters: Mapping[str, Any], place: str) -> None:
    """Refuse a selection of columns from which a parameter's type cannot be built; as `check_fields`."""
    _refuse_missing(trigger.columns, parameters, Change, f"{place}: table({trigger.table!r}, {trigger.op!r}): columns")


def _refuse_missing(given: Sequence[str], parameters: Mapping[str, Any], holder: type, place: str) -> None:
    for name, annotation in parameters.items():
        for kind in _carried_types(annotation, holder):
            required = [member.names for member in _members(kind) or () if member.is_required]
            missing = [names[0] for names in required if not set(names) & set(given)]
            if missing:
                raise ConfigurationError(
                    place,
                    f"parameter {name!r} takes {describe_type(annotation)}, which needs {missing[0]!r} too",
                    f"give it too, or annotate the parameter with a type of the given {place.rpartition(' ')[2]}",
                )


def _carried_types(annotation: Any, holder: type) -> list[Any]:
    """Return the `T` of each `Event[T]`, or `Change[T]`, in an annotation."""
    if not admits(annotation, (holder,)):
        return []
    found = [get_args(member)[0] for member in union_members(annotation) if get_origin(member) is holder]
    return [kind for kind in found if not is_untyped(kind)]


class _Member(NamedTuple):
    """A field of a model: the names under which it is read, first the one under which it is written."""

    names: tuple[str, ...]
    is_required: bool


def _members(kind: Any) -> list[_Member] | None:
    """Return a model's fields as its JSON has them; None for what has no fields."""
    plain: Any = get_origin(kind) or kind
    if not is_model(kind):
        return None
    fields: Mapping[str, Any] | None = getattr(plain, "model_fields", None)
    if fields is not None:
        return [
            _Member((name, *_aliases(field.validation_alias)), field.is_required()) for name, field in fields.items()
        ]
    info: Any = msgspec.inspect.type_info(kind)
    return [_Member((field.encode_name,), field.required) for field in info.fields]


def _aliases(alias: Any) -> list[str]:
    """Return the members of an object that pydantic reads a field from: of a path the first, of choices each."""
    tops = [getattr(each, "path", [each])[0] for each in getattr(alias, "choices", [alias])]
    return [top for top in tops if isinstance(top, str)]
