"""A task's arguments to its payload and back.

A payload is a JSON object. Most tasks' is one member per parameter, positional ones too: `charge.bind(7, cents=5)` is
`{"order_id": 7, "cents": 5}`, so that SQL, a schedule and code that has since reordered its parameters all mean the
same. A single parameter that is a model (dataclass, TypedDict, Struct, attrs, pydantic) is the whole payload instead:
`index.bind(Doc(id=1))` is `{"id": 1}`.

Parameters left out are not stored; the handler's own defaults fill them when it runs. A member that no parameter has
is refused at both ends, as Python refuses an unexpected keyword. Parameters for trigger objects (`Tick`, `Event`,
`Change`) are not part of the payload: they are named in `triggers`, for the caller to fill. A batch task's payload is
one element of its list: whole if the element is a model, else `{"<parameter>": element}`.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast, get_args, get_origin

import msgspec

from pgconductor.annotations import Unresolved, describe_type, hints_of, is_model, return_type, union_members
from pgconductor.codec import (
    UNTYPED,
    VALUE_BYTES_MAX,
    Codec,
    Raw,
    codec_for,
    is_storable,
    too_large,
    write_json,
    write_lines,
)
from pgconductor.errors import ConfigurationError, DecodeError, EncodeError
from pgconductor.refusal import read_fault

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments, without the context."""

_EMPTY = inspect.Parameter.empty
_PAYLOAD = "payload"

_PLAIN_MAX = 100  # together with _TEXT_MAX, less than VALUE_BYTES_MAX
_TEXT_MAX = 1_000
_INT_BITS = 64


class Parameter(NamedTuple):
    """One parameter of a handler that the payload carries."""

    name: str
    codec: Codec[Any]
    default: Any
    is_positional_only: bool


class Signature:
    """How one task's arguments become its payload and back. Built once, at registration; immutable.

    Attributes:
        task: The task's name, for errors.
        parameters: What the payload carries, in order.
        triggers: The resolved annotations of the parameters for trigger objects, by name.
        required_triggers: Those among them without a default.
        returns: The codec of the result; of one element of it for a batch task.
        is_whole: Whether the payload is the single parameter's own JSON.
        is_batch: Whether the payload is one element of the handler's list.
    """

    def __init__(
        self,
        task: str,
        parameters: tuple[Parameter, ...],
        *,
        python: inspect.Signature,
        returns: Codec[Any],
        triggers: Mapping[str, Any] | None = None,
        required_triggers: frozenset[str] = frozenset(),
        is_batch: bool = False,
        is_whole: bool = False,
    ) -> None:
        self.task = task
        self.parameters = parameters
        self.triggers = triggers or {}
        self.required_triggers = required_triggers
        self.returns = returns
        self.is_batch = is_batch
        self.is_whole = is_whole or (len(parameters) == 1 and is_model(parameters[0].codec.annotation))
        self._python = python
        self._has_positional_only = any(parameter.is_positional_only for parameter in parameters)
        self._names = frozenset(parameter.name for parameter in parameters)
        self._required = frozenset(parameter.name for parameter in parameters if parameter.default is _EMPTY)
        self._positional = tuple(each.name for each in python.parameters.values() if each.kind is not each.KEYWORD_ONLY)
        self._writers = tuple(
            (each.name, write_json(each.name) + b":", each.codec.store, f"{_PAYLOAD}.{each.name}")
            for each in parameters
        )
        self._has_plain_fields = all(
            each.default is _EMPTY and not each.is_positional_only and not each.codec.is_pydantic for each in parameters
        )
        self._document = _document_type(parameters, kw_only=not self._has_plain_fields)
        self._read = cast("Callable[[Any], Any]", msgspec.json.Decoder(self._document).decode)
        self._is_document = (
            self._has_plain_fields
            and not self.is_whole
            and self._positional == tuple(parameter.name for parameter in parameters)
        )
        kinds = tuple(parameter.codec.annotation for parameter in parameters)
        is_plain = all(kind is int or kind is str or kind is bool for kind in kinds)
        self._plain_kinds = kinds if is_plain and self._is_document and 0 < len(kinds) <= _PLAIN_MAX else None

    def encode_payload(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Write the arguments of one call as its payload.

        Args:
            args: Positional arguments, without the context and the trigger objects.
            kwargs: Keyword arguments.

        Returns:
            A JSON object, at most `VALUE_BYTES_MAX` bytes in UTF-8; its members stand in the order of the parameters,
            however they were passed.

        Raises:
            TypeError: The arguments do not fit the signature; the message is Python's, with the task's name.
            EncodeError: An argument cannot be stored; the path begins with `payload`.
        """
        if not (args or kwargs or self._required):
            return "{}"
        if self._is_document and (document := self._write_document(args, kwargs)):
            return document.decode()
        bound = self._bind(args, kwargs)
        if self.is_whole and bound:
            return self._encode_whole(*bound.values()).decode()
        members: list[bytes] = []
        for name, key, store, where in self._writers:
            if name in bound:
                members.append(key + store(bound[name], where)[0])
        document = b"{" + b",".join(members) + b"}"
        if len(document) > VALUE_BYTES_MAX:
            raise too_large(len(document), _PAYLOAD)
        return document.decode()

    def plain_values(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Return the arguments of a call in order, if nobody can change them and `write_plain` can encode each.

        Small integers, booleans and printable text that is not long can. To look at that costs half of what encoding
        does. None says nothing about the others.
        """
        kinds = self._plain_kinds
        if kinds is None:
            return None
        if kwargs:
            if args or tuple(kwargs) != self._positional:
                return None
            args = tuple(kwargs.values())
        if len(args) != len(kinds):
            return None
        index = 0
        for value in args:
            kind = kinds[index]
            if type(value) is not kind:
                return None
            if kind is int:
                if value.bit_length() >= _INT_BITS:
                    return None
            elif kind is str and not (value.isprintable() and len(value) <= _TEXT_MAX):  # no U+0000, no surrogates
                return None
            index += 1  # noqa: SIM113  (an enumerate would take as long as all the rest)
        return args

    def write_plain(self, values: tuple[Any, ...]) -> str:
        """Write what `plain_values` returned as the payload."""
        return write_json(self._document(*values)).decode()

    def write_each_plain(self, many: Iterable[tuple[Any, ...]]) -> list[str]:
        """Do as `write_plain` for many calls; together they take half as long."""
        lines = write_lines([self._document(*values) for values in many])
        return lines.decode().split("\n")[:-1]

    def decode_payload(self, raw: Raw) -> Arguments:
        """Read a payload as the arguments that the handler is called with.

        Args:
            raw: A JSON object. `{}` and `null` mean: no arguments.

        Returns:
            Positional arguments (of positional-only parameters) and keyword arguments; those not in the payload are
            left to the handler's defaults. For a batch task, the element under its parameter's name.

        Raises:
            DecodeError: It no longer fits the signature; the path begins with `payload`.
        """
        if not self._required and raw in _NOTHING:
            return (), {}
        if self.is_whole:
            return self._split({self.parameters[0].name: self.parameters[0].codec.decode(raw, _PAYLOAD)})
        try:
            document = self._read(raw)
        except Exception as error:
            path, reason = read_fault(error, _PAYLOAD)
            raise DecodeError(path, f"{reason}; {self._takes()}" if path == _PAYLOAD else reason) from error
        if self._has_plain_fields:
            return (), msgspec.structs.asdict(document)
        return self._split(self._read_members(document))

    def _takes(self) -> str:
        """Say which members a payload has to have, and which it may have."""
        names = [f"{each.name} (required)" if each.default is _EMPTY else each.name for each in self.parameters]
        return f"task {self.task!r} takes {', '.join(names) or 'no arguments'}"

    def decode_element(self, raw: Raw) -> Any:
        """Read a batch task's payload as one element of the handler's list.

        Raises:
            DecodeError: As for `decode_payload`.
        """
        args, kwargs = self.decode_payload(raw)
        return args[0] if args else kwargs[self.parameters[0].name]

    def _write_document(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | None:
        """Write all arguments at once, as `Codec.store` does with one; None says: look at each, to find the fault."""
        try:
            document = self._document(*args, **kwargs)
            raw = write_json(document)
            return raw if is_storable(raw) and self._read(raw) == document else None
        except Exception:  # noqa: BLE001  (whatever it is, it comes again where it can be named)
            return None

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = dict(zip(self._positional, args, strict=False))
        if not kwargs and len(args) == len(self.parameters) == len(bound):
            return bound
        fits = len(args) <= len(self._positional) and kwargs.keys() <= self._names and bound.keys().isdisjoint(kwargs)
        bound.update(kwargs)
        if fits and self._required <= bound.keys() and not self._has_positional_only:
            return bound
        try:
            return self._python.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"task {self.task!r}: {error}") from None

    def _encode_whole(self, value: Any) -> bytes:
        """Write the model; refuse one that looks like no argument at all where that would mean another value."""
        (parameter,) = self.parameters
        raw, back = parameter.codec.store(value, _PAYLOAD)
        if not raw.startswith(b"{"):
            raise EncodeError(_PAYLOAD, "it must be a JSON object; give the parameter a type that is written as one")
        if raw == b"{}" and parameter.default is not _EMPTY and parameter.default != back:
            raise EncodeError(
                _PAYLOAD, f"it is empty, which stands for the default of {parameter.name!r}; drop the default"
            )
        return raw

    def _read_members(self, document: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for parameter in self.parameters:
            value = getattr(document, parameter.name)
            if value is msgspec.UNSET:
                continue
            if parameter.codec.is_pydantic:
                value = parameter.codec.decode(bytes(value), f"{_PAYLOAD}.{parameter.name}")
            found[parameter.name] = value
        return found

    def _split(self, found: dict[str, Any]) -> Arguments:
        """Take positional-only parameters out of the keywords; a gap before one that is given takes its default."""
        if not self._has_positional_only:
            return (), found
        leading = [parameter for parameter in self.parameters if parameter.is_positional_only]
        while leading and leading[-1].name not in found:
            leading.pop()
        return tuple(found.pop(each.name, each.default) for each in leading), found


_NOTHING = ("{}", b"{}", "null", b"null")


def signature_of(
    fn: Callable[..., Any], task: str, *, is_batch: bool = False, is_trigger: Callable[[Any], bool] = lambda _: False
) -> Signature:
    """Read a handler's signature.

    Args:
        fn: The handler; its first parameter is the context.
        task: The task's name, for errors.
        is_batch: Whether it takes a list of payloads and returns a list of results, or None.
        is_trigger: Tells from a resolved annotation whether the parameter takes a trigger object.

    Returns:
        The signature.

    Raises:
        ConfigurationError: There is no context parameter, `*args` or `**kwargs` are taken, a trigger object is taken
            by position only, a type cannot be stored, or an annotation cannot be resolved.
    """
    place = f"task {task!r}"
    hints = hints_of(fn, place)
    declared = _declared(fn, hints, place)
    triggers = {each.name: hints[each.name] for each in declared if is_trigger(hints.get(each.name, _EMPTY))}
    _refuse_positional_only([each for each in declared if each.name in triggers], place)
    kept = [each for each in declared if each.name not in triggers]
    types = {each.name: _resolved(hints.get(each.name, _EMPTY)) for each in kept}
    returns = return_type(fn)
    if is_batch:
        types, returns = _element_types(types, returns, place)
    return Signature(
        task,
        tuple(_parameter(each, types[each.name], place) for each in kept),
        python=inspect.Signature([each.replace(annotation=_EMPTY) for each in kept]),
        returns=_codec(returns, f"{place}: its result"),
        triggers=triggers,
        required_triggers=frozenset(each.name for each in declared if each.name in triggers and each.default is _EMPTY),
        is_batch=is_batch,
    )


def signature_of_reference(task: str, payload: Any, returns: Any) -> Signature:
    """Make the signature of a task known only by its payload's type: it takes one instance of that type.

    Args:
        task: The task's name, for errors.
        payload: A model, or `dict` for any JSON object.
        returns: The type of its result.

    Returns:
        The signature. Its `encode_payload` takes one instance, or the fields of one as keywords.

    Raises:
        ConfigurationError: Values of the payload type are not JSON objects, or one of the types cannot be stored.
    """
    place = f"task {task!r}"
    if not is_model(payload) and (get_origin(payload) or payload) is not dict:
        raise ConfigurationError(
            f"{place}: payload=",
            f"{describe_type(payload)} is not a JSON object",
            "use a dataclass, TypedDict or model",
        )
    only = inspect.Parameter(_PAYLOAD, inspect.Parameter.POSITIONAL_ONLY)
    parameter = _parameter(only, payload, place)
    result = _codec(returns, f"{place}: its result")
    return _Reference(task, (parameter,), python=inspect.Signature([only]), returns=result, is_whole=True)


class _Reference(Signature):
    """The signature behind `define_task`: one instance of the payload type, or its fields as keywords."""

    def encode_payload(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        if not args:
            args, kwargs = (self._instance(kwargs),), {}
        (value,) = self._bind(args, kwargs).values()
        return self._encode_whole(value).decode()

    def _instance(self, kwargs: Mapping[str, Any]) -> Any:
        kind: Any = self.parameters[0].codec.annotation
        try:
            return kind(**kwargs)
        except (TypeError, ValueError) as error:
            raise TypeError(f"task {self.task!r}: {error}") from error


def return_codec_of(fn: Callable[..., Any]) -> Codec[Any]:
    """Return the codec for what a step's function returns; the untyped one where it is not annotated.

    Raises:
        ConfigurationError: The annotation cannot be resolved, or its type cannot be stored.
    """
    written = return_type(fn)
    return UNTYPED if written is _EMPTY else codec_for(written)


def _document_type(parameters: tuple[Parameter, ...], *, kw_only: bool) -> type[Any]:
    """Make the struct that a payload by name is read as; pydantic's members are left raw for pydantic."""
    fields: list[tuple[str, Any, Any]] = []
    for each in parameters:
        kind: Any = msgspec.Raw if each.codec.is_pydantic else each.codec.annotation
        default = msgspec.NODEFAULT if each.default is _EMPTY else msgspec.UNSET
        fields.append((each.name, kind, default))
    return msgspec.defstruct("Payload", fields, kw_only=kw_only, forbid_unknown_fields=True, gc=False)  # short-lived


def _declared(fn: Callable[..., Any], hints: Mapping[str, Any], place: str) -> list[inspect.Parameter]:
    remedy = "make `ctx: Context` its first parameter"
    declared = list(inspect.signature(fn).parameters.values())
    if not declared or declared[0].kind not in {declared[0].POSITIONAL_ONLY, declared[0].POSITIONAL_OR_KEYWORD}:
        raise ConfigurationError(place, "the handler takes no context", remedy)
    if _is_value(hints.get(declared[0].name, _EMPTY)):
        raise ConfigurationError(place, f"the handler's first parameter, {declared[0]}, is no context", remedy)
    for each in declared:
        if each.kind in {each.VAR_POSITIONAL, each.VAR_KEYWORD}:
            raise ConfigurationError(
                place, f"the handler takes {each}, which no payload can name", "take a dict or list parameter instead"
            )
    return declared[1:]


def _is_value(annotation: Any) -> bool:
    """Tell what is certainly a value's type, and so no context's: those that the standard library has, and models."""
    kind = get_origin(annotation) or annotation
    if not isinstance(kind, type) or kind is object:
        return False
    return kind.__module__ in {"builtins", "datetime", "decimal", "uuid"} or is_model(kind)


def _refuse_positional_only(triggers: list[inspect.Parameter], place: str) -> None:
    for each in triggers:
        if each.kind is each.POSITIONAL_ONLY:
            raise ConfigurationError(
                f"{place}: parameter {each.name!r}",
                "what a trigger brings is passed by name, and a parameter before the `/` takes none",
                "drop the `/`",
            )


def _parameter(declared: inspect.Parameter, annotation: Any, place: str) -> Parameter:
    codec = _codec(annotation, f"{place}: parameter {declared.name!r}")
    return Parameter(declared.name, codec, declared.default, declared.kind is declared.POSITIONAL_ONLY)


def _codec(annotation: Any, place: str) -> Codec[Any]:
    try:
        return codec_for(annotation)
    except ConfigurationError as error:
        raise ConfigurationError(place, f"{error.place}: {error.reason}", error.remedy) from error


def _resolved(annotation: Any) -> Any:
    if isinstance(annotation, Unresolved):
        annotation.refuse()
    return annotation


def _element_types(types: Mapping[str, Any], returns: Any, place: str) -> tuple[dict[str, Any], Any]:
    remedy = "write `async def handler(ctx: BatchContext, items: list[T]) -> list[R] | None`"
    if len(types) != 1:
        raise ConfigurationError(place, f"a batch handler takes one list, not {len(types)} parameters", remedy)
    ((name, annotation),) = types.items()
    if get_origin(annotation) is not list:
        raise ConfigurationError(place, f"the annotation of {name!r} is not a list[...]", remedy)
    results = [each for each in union_members(returns) if each is not type(None)]
    if results and results[0] is not _EMPTY and (len(results) > 1 or get_origin(results[0]) is not list):
        raise ConfigurationError(
            place, f"it returns {describe_type(returns)}, which is not a list[...] or None", remedy
        )
    element = get_args(results[0])[0] if results and results[0] is not _EMPTY else _EMPTY
    if len(results) < len(union_members(returns)):
        element = None if element is _EMPTY else element | None  # no list: everybody's result is None
    return {name: get_args(annotation)[0]}, element
