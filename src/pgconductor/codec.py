"""Values to JSON text and back: equal, or refused.

A value that leaves the process (a payload, a step's result, an event) comes back in another one, perhaps days later.
The promise is that it comes back *equal*, or is refused at once with the path of the fault. Rules for single types
("no NaN, no tuple in a list") never hold that promise for all types; one check does:

    encode, decode what came out with the decoder that will read it later, compare with `==`

NaN, which msgspec writes as null, fails it; so do a tuple where the annotation says list, a subclass whose extra
fields its base would drop, two keys that become one, and a secret that pydantic masks. Three things it cannot see are
looked for in the JSON itself: its size, U+0000, which Postgres refuses, and nesting that a deeper stack could not
read back. All of it runs in native code and takes about a microsecond for a small value. What fails goes to
`pgconductor.refusal`, which walks the value in Python and finds the path; it also acquits, since an instant in a
repeated hour and a class without `__eq__` are unequal to their exact copies.

msgspec does the work. A type in which anything of pydantic appears is read and written by pydantic instead, which is
imported only then. Without an annotation the decoder is the plain JSON one, so a tuple or a dataclass is refused, and
the error asks for the annotation. Equal is Python's `==`: a set is written in its own order, an enum member that
equals its string comes back from an unannotated place as the string.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Generic, TypeAlias, cast

import msgspec
from typing_extensions import TypeVar

from pgconductor.annotations import describe_type, is_untyped, uses_pydantic
from pgconductor.errors import ConfigurationError, DecodeError, EncodeError
from pgconductor.refusal import NESTING_MAX, find_difference, find_fault, read_fault

T = TypeVar("T")
Raw: TypeAlias = str | bytes | memoryview
"""JSON text as a database driver hands it over."""

VALUE_BYTES_MAX = 1024 * 1024
"""The most bytes of JSON, in UTF-8, that one payload, result or step may have."""
NAME_BYTES_MAX = 200
"""The most bytes of UTF-8 that the name of a task, queue, step, event or schedule may have."""

_PYDANTIC_MIN = (2, 11)
_BACKSLASH = ord("\\")
_BRACKETS = bytes.maketrans(b"[{]}", b"(())")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)

write_json: Callable[[Any], bytes] = msgspec.json.Encoder().encode
write_lines: Callable[[Iterable[Any]], bytes] = msgspec.json.Encoder().encode_lines
"""Write any value that msgspec knows, without a check of any kind."""


class Codec(Generic[T]):
    """Reads and writes the values of one type. Get it from `codec_for`; it is immutable and safe to share.

    Attributes:
        annotation: The type; `Any` where there was none.
        is_pydantic: Whether pydantic does the work.
        read: As `decode`; its errors do not say what the value is.
    """

    def __init__(
        self,
        annotation: Any,
        dump: Callable[[Any], bytes],
        read: Callable[[Any], T],
        *,
        is_pydantic: bool = False,
        remedy: str = "",
    ) -> None:
        self.annotation = annotation
        self.is_pydantic = is_pydantic
        self._dump = dump
        self.read: Callable[[Any], T] = read
        self._remedy = remedy or f"its annotation is {describe_type(annotation)}: make the two agree"

    def encode(self, value: T, where: str = "$") -> str:
        """Write a value as JSON text that decodes to an equal value.

        Args:
            value: What is to be stored.
            where: What the value is, such as `payload` or `step 'load'`; paths in errors begin with it.

        Returns:
            Compact JSON, at most `VALUE_BYTES_MAX` bytes in UTF-8.

        Raises:
            EncodeError: The value cannot be stored, or would come back changed. Nothing has been stored.
        """
        return self.store(value, where)[0].decode()

    def store(self, value: T, where: str = "$") -> tuple[bytes, T]:
        """Write a value as JSON, and return beside it the copy that every later reader gets.

        The first run of a step goes on with that copy, so that it sees what a replay sees.

        Args:
            value: As for `encode`.
            where: As for `encode`.

        Returns:
            The JSON in UTF-8, and the decoded copy.

        Raises:
            EncodeError: As for `encode`.
        """
        try:
            raw = self._dump(value)
            if is_storable(raw):
                back = self.read(raw)
                if (back == value) is True:
                    return raw, back
        except Exception:  # noqa: BLE001, S110  (the value's own code may raise anything; judged below)
            pass
        return self._judge(value, where)

    def decode(self, raw: Raw | msgspec.Raw, where: str = "$", name: str | None = None) -> T:
        """Read a stored value.

        Args:
            raw: Its JSON; also where it lies, as a part of other JSON.
            where: What the value is, such as `payload`; paths in errors begin with it.
            name: What `where` is called, such as a step's name; written after it.

        Returns:
            The value, of the annotated type.

        Raises:
            DecodeError: The JSON does not fit the type: the code has changed since, or the text came from elsewhere.
        """
        try:
            return self.read(raw)
        except Exception as error:
            raise DecodeError(*read_fault(error, where if name is None else f"{where} {name!r}")) from error

    def _judge(self, value: T, where: str) -> tuple[bytes, T]:
        """Find what is wrong with a value that the fast path did not accept; accept it when nothing is."""
        raw = self._write(value, where)
        fault = find_fault(value, where, self._part_dump)
        if fault:
            raise EncodeError(*fault)
        if not _is_shallow(raw):
            raise EncodeError(where, f"nested more than {NESTING_MAX} levels deep; flatten it")
        back = self._read_back(raw, where)
        try:
            difference = find_difference(value, back, where)
        except RecursionError as error:
            raise EncodeError(*read_fault(error, where)) from None
        if difference:
            raise EncodeError(difference.path, f"{difference.reason}; {self._remedy}")
        return raw, back

    def _write(self, value: T, where: str) -> bytes:
        try:
            raw = self._dump(value)
        except Exception as error:
            fault = _fault_or_too_deep(value, where, self._part_dump) or read_fault(error, where)
            raise EncodeError(*fault) from error
        if len(raw) > VALUE_BYTES_MAX:
            raise too_large(len(raw), where)
        return raw

    def _read_back(self, raw: bytes, where: str) -> T:
        try:
            return self.read(raw)
        except Exception as error:
            path, reason = read_fault(error, where)
            raise EncodeError(path, f"{reason}; {self._remedy}") from error

    @property
    def _part_dump(self) -> Callable[[Any], bytes]:
        if not self.is_pydantic:
            return write_json
        from pydantic_core import to_json

        return to_json


def codec_for(annotation: Any) -> Codec[Any]:
    """Return the codec of a type: built once, then looked up.

    Args:
        annotation: A resolved annotation; `inspect.Parameter.empty`, `Any`, `object` or a bare TypeVar stand for none.

    Returns:
        Its codec.

    Raises:
        ConfigurationError: The type has no exact JSON form that msgspec or pydantic know, or names what is not defined.
    """
    try:
        return _cached_codec(annotation)
    except TypeError:  # unhashable metadata in an Annotated
        return _build_codec(annotation)


def is_storable(raw: bytes) -> bool:
    """Tell whether JSON keeps the limits: its size, no U+0000 in it, and at most `NESTING_MAX` levels.

    A backslash before `u0000` may itself be escaped, so False means: look closer.
    """
    if _BACKSLASH in raw and b"\\u0000" in raw:  # a byte is looked for ten times as fast as a word
        return False
    size = len(raw)
    return size <= NESTING_MAX or (size <= VALUE_BYTES_MAX and _is_shallow(raw))


def too_large(size: int, where: str) -> EncodeError:
    """Return the error for a value of so many bytes of JSON."""
    return EncodeError(
        where, f"{size} bytes of JSON, at most {VALUE_BYTES_MAX} are allowed; store it elsewhere and pass a reference"
    )


def check_name(kind: str, name: str) -> str:
    """Refuse a name that the database, a log line or a terminal could not show.

    Args:
        kind: What it names, for the error: `task`, `queue`, `step`, `event`, `schedule`.
        name: The name.

    Returns:
        The name, unchanged: 1 to `NAME_BYTES_MAX` bytes of printable UTF-8.

    Raises:
        ConfigurationError: It is not such a name.
    """
    reason = _name_reason(name)
    if reason is None:
        return name
    text = name if isinstance(cast("object", name), str) else ""
    place = f"{kind} name {text[:40]!r}" + ("…" if len(text) > 40 else "")
    raise ConfigurationError(place, reason, f"use 1 to {NAME_BYTES_MAX} bytes of printable UTF-8")


def _name_reason(name: object) -> str | None:
    if type(name) is not str:
        return f"a {type(name).__name__} is not a str"
    if not name.isprintable():
        character = next(each for each in name if not each.isprintable())
        return f"it contains U+{ord(character):04X}, which is not printable"
    size = len(name) if name.isascii() else len(name.encode())
    if 0 < size <= NAME_BYTES_MAX:
        return None
    return f"it is {size} bytes long" if size else "it is empty"


def _is_shallow(raw: bytes) -> bool:
    """Tell whether JSON is at most `NESTING_MAX` levels deep, in native code.

    Few brackets settle it. Else only the brackets are kept, and each pass removes the innermost pairs, one level;
    text that contains brackets is taken out first where it gets in the way. Text made to cancel out the brackets
    around it can hide depth; such a value is still stored and read while the stack has room for it.
    """
    if raw.count(b"[") + raw.count(b"{") <= NESTING_MAX:
        return True
    return _cancels_out(raw) or _cancels_out(_STRINGS.sub(b"", raw))


def _cancels_out(raw: bytes) -> bool:
    brackets = raw.translate(_BRACKETS, _NOT_BRACKETS)
    for _ in range(NESTING_MAX):
        if not brackets:
            return True
        brackets = brackets.replace(b"()", b"")
    return not brackets


def _fault_or_too_deep(value: object, where: str, dump: Callable[[Any], bytes]) -> Any:
    try:
        return find_fault(value, where, dump)
    except RecursionError as error:
        return read_fault(error, where)


def _build_codec(annotation: Any) -> Codec[Any]:
    if is_untyped(annotation):
        return UNTYPED
    try:
        if uses_pydantic(annotation):
            return _pydantic_codec(annotation)
        return Codec(annotation, write_json, cast("Callable[[Any], Any]", msgspec.json.Decoder(annotation).decode))
    except ConfigurationError:
        raise
    except NameError as error:
        raise ConfigurationError(
            f"type {describe_type(annotation)}",
            str(error),
            "define that class at module level, and not under TYPE_CHECKING, so that the annotation can be resolved",
        ) from error
    except Exception as error:
        raise ConfigurationError(
            f"type {describe_type(annotation)}", str(error), "use a msgspec.Struct with a tag, or a pydantic model"
        ) from error


_cached_codec: Callable[[Any], Codec[Any]] = lru_cache(maxsize=4096)(_build_codec)


def _check_pydantic() -> None:
    """Refuse a pydantic that cannot read a field by its name and by its alias."""
    from pydantic import VERSION

    if tuple(map(int, VERSION.split(".")[:2])) < _PYDANTIC_MIN:
        raise ConfigurationError(
            f"pydantic {VERSION}", "is too old, at least 2.11 is needed", 'install "pgconductor[pydantic]"'
        )


def _pydantic_codec(annotation: Any) -> Codec[Any]:
    _check_pydantic()
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter

    base64 = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=base64)
    except PydanticUserError:  # a model keeps its own configuration
        adapter = TypeAdapter(annotation)
    adapter.rebuild(raise_errors=True)

    def dump(value: Any) -> bytes:
        raw = adapter.dump_json(value, round_trip=True, by_alias=False, warnings=False)
        if b"NaN" in raw or b"Infinity" in raw:
            msgspec.json.decode(raw)  # a model may be told to write these bare, which is not JSON
        return raw

    def load(raw: Raw) -> Any:
        text = bytes(raw) if isinstance(raw, memoryview | msgspec.Raw) else raw
        return adapter.validate_json(text, by_alias=True, by_name=True)

    return Codec(annotation, dump, load, is_pydantic=True)


def untyped_codec(remedy: str) -> Codec[Any]:
    """Return a codec of what equals its own plain JSON round trip; `remedy` is what errors say of all else."""
    return Codec(Any, write_json, msgspec.json.Decoder().decode, remedy=remedy)


UNTYPED: Codec[Any] = untyped_codec("annotate the parameter or the return value with its type")
"""The codec where there is no annotation: what equals its own plain JSON round trip."""

MISSING = inspect.Parameter.empty
"""Stands for an annotation that was not written."""
