"""Find where, and say why, a value cannot be stored.

The codec's fast path only answers yes or no, in native code. This is its slow half, run for a value that got a no: it
walks the Python value and names the first fault by its path, such as `$.items[3].price`. Both walks go at most
`NESTING_MAX` levels deep, trust no `__eq__`, `__repr__` or `__str__` of the value's own, and return None when they
find nothing.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, NamedTuple, cast
from uuid import UUID

NESTING_MAX = 100
"""Levels of lists and objects in one stored value; the parsers of pydantic and of other languages end soon after."""
PATH_CHARACTERS_MAX = 300

_SHOWN = {int, float, str, datetime, date, time, timedelta, Decimal, UUID}
_SETS: tuple[type, ...] = (set, frozenset)
_TOO_DEEP = f"nested more than {NESTING_MAX} levels deep; flatten it, or store it elsewhere and pass a reference"
_AT_PATH = re.compile(r"^(?P<reason>.*) - at `(?:key in )?\$?(?P<path>.*)`$", re.DOTALL)


class Fault(NamedTuple):
    """One reason why a value cannot be stored or read, and the place in the value that it speaks of."""

    path: str
    reason: str


def find_fault(value: object, path: str, dump: Callable[[Any], bytes]) -> Fault | None:
    """Return the first part of a value that has no exact JSON form at all.

    Args:
        value: What was to be stored.
        path: Where the value itself stands; the fault's path begins with it.
        dump: The encoder that refused it, asked again for each part.

    Returns:
        The fault, or None when each part can be stored taken alone.
    """
    return _fault(value, path, dump, set())


def _fault(value: object, path: str, dump: Callable[[Any], bytes], above: set[int]) -> Fault | None:
    parts = _parts_of(value)
    if parts is None:
        reason = _leaf_reason(value, dump)
        return Fault(_short(path), reason) if reason else None
    if id(value) in above:
        return Fault(_short(path), "it contains itself; store ids instead of references that go in a circle")
    if len(above) >= NESTING_MAX:
        return Fault(_short(path), _TOO_DEEP)
    above.add(id(value))
    for key, suffix, part in parts:
        reason = None if key is None else _key_reason(key, dump)
        fault = Fault(_short(path + suffix), reason) if reason else _fault(part, path + suffix, dump, above)
        if fault:
            return fault
    above.discard(id(value))
    return None


def find_difference(sent: object, back: object, path: str) -> Fault | None:
    """Return the first part of a value that its JSON gives back as something else.

    Stands in for `==` where that cannot be trusted: classes without `__eq__`, and instants in a repeated hour, which
    Python calls unequal to the same instant in another zone.

    Args:
        sent: What was to be stored.
        back: What its JSON decodes to.
        path: Where the value itself stands.

    Returns:
        The fault, without a remedy, or None when the two are equal.
    """
    if _is_equal(sent, back):
        return None
    ours, theirs = _parts_of(sent), _parts_of(back)
    if ours is None or theirs is None or type(sent) is not type(back) or isinstance(sent, _SETS):
        return Fault(_short(path), f"{describe(sent)} comes back as {describe(back)}")
    restored = {(key, suffix): part for key, suffix, part in theirs}
    count = 0
    for key, suffix, part in ours:
        count += 1
        if (key, suffix) not in restored:
            return Fault(_short(path + suffix), _lost_reason(key, part))
        fault = find_difference(part, restored[key, suffix], path + suffix)
        if fault:
            return fault
    return None if count == len(restored) else Fault(_short(path), f"{describe(sent)} comes back with parts added")


def read_fault(error: BaseException, path: str) -> Fault:
    """Turn a decoder's refusal into a fault: msgspec's `... - at `$.a`` or the first of pydantic's errors."""
    if isinstance(error, RecursionError):
        return Fault(_short(path), _TOO_DEEP)
    errors = getattr(error, "errors", None)
    if callable(errors):
        with contextlib.suppress(Exception):
            first = cast("list[dict[str, Any]]", errors(include_url=False, include_context=False, include_input=False))[
                0
            ]
            return Fault(_short(path + "".join(map(_suffix, first["loc"]))), str(first["msg"]))
    match = _AT_PATH.match(text_of(error))
    if match:
        return Fault(_short(path + match["path"]), match["reason"])
    return Fault(_short(path), text_of(error))


def describe(value: object) -> str:
    """Name a value for an error message: its type, and itself where that is short and safe to print."""
    kind = type(value).__name__
    if value is None or isinstance(value, bool):
        return str(value)
    if type(value) in _SHOWN and len(str(value)) <= 40:
        return f"the {kind} {value if type(value) is not str else repr(value)}"
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def text_of(error: BaseException) -> str:
    """Return `str(error)`, or the name of its class where that raises or is empty."""
    try:
        return str(error) or type(error).__name__
    except Exception:  # noqa: BLE001  (the value's own code may raise anything)
        return type(error).__name__


def _is_equal(sent: object, back: object) -> bool:
    try:
        if (sent == back) is True:
            return True
        if isinstance(sent, datetime) and isinstance(back, datetime):
            return sent.astimezone(UTC) == back.astimezone(UTC) if sent.tzinfo and back.tzinfo else False
    except Exception:  # noqa: BLE001  (the value's own code may raise anything)
        return False
    return False


def _parts_of(value: object) -> Iterator[tuple[object, str, object]] | None:
    """Return (key of a dict, path suffix, part) of each part of a container or record; None for a leaf."""
    if isinstance(value, dict):
        return ((key, _suffix(key), part) for key, part in cast("dict[object, object]", value).items())
    fields = _fields_of(value)
    if fields is not None:
        return ((None, f".{name}", getattr(value, name, None)) for name in fields)
    if isinstance(value, (list, tuple, set, frozenset)):
        return ((None, f"[{index}]", part) for index, part in enumerate(cast("list[object]", value)))
    return None


def _fields_of(value: Any) -> tuple[str, ...] | None:
    kind = cast("Any", type(value))
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    for attribute in ("__struct_fields__", "_fields", "__pydantic_fields__"):
        names = getattr(kind, attribute, None)
        if names is not None and (attribute != "_fields" or issubclass(kind, tuple)):
            extra = getattr(value, "__pydantic_extra__", None) or ()
            return (*names, *extra)
    attributes = getattr(kind, "__attrs_attrs__", None)
    return None if attributes is None else tuple(attribute.name for attribute in attributes)


def _leaf_reason(value: object, dump: Callable[[Any], bytes]) -> str | None:
    reason = _text_reason(value) if isinstance(value, str) else None
    if reason:
        return reason
    if isinstance(value, float) and not math.isfinite(value):
        return f"{float(value)} is not a JSON number; store None or a string instead"
    try:
        dump(value)
    except Exception as error:  # noqa: BLE001  (the value's own code may raise anything)
        return f"{describe(value)} cannot be written as JSON ({text_of(error)}); convert it to a type that can"
    return None


def _text_reason(text: str) -> str | None:
    if "\0" in text:
        return "it contains U+0000, which Postgres cannot hold; remove it, or store bytes"
    try:
        text.encode()
    except UnicodeError:
        return "it contains a lone surrogate, which is not valid Unicode; repair the text, or store bytes"
    return None


def _lost_reason(key: object, part: object) -> str:
    if key is not None and not isinstance(key, str):
        return f"{describe(key)}, as the key of a JSON object, comes back as something else"
    return f"{describe(part)} does not come back: its type has no place for it"


def _key_reason(key: object, dump: Callable[[Any], bytes]) -> str | None:
    if isinstance(key, str):
        reason = _text_reason(key)
        return reason and f"a key is wrong: {reason}"
    try:
        dump({key: None})
    except Exception:  # noqa: BLE001  (the value's own code may raise anything)
        return f"{describe(key)} cannot be the key of a JSON object; use str keys"
    return None


def _suffix(key: object) -> str:
    if isinstance(key, str) and key.isidentifier() and key.isascii() and len(key) <= 60:
        return f".{key}"
    if isinstance(key, str):
        return f"[{key[:60]!r}…]" if len(key) > 60 else f"[{key!r}]"
    return f"[{key!r}]" if type(key) in {int, float, bool} else f"[{describe(key)}]"


def _short(path: str) -> str:
    if len(path) <= PATH_CHARACTERS_MAX:
        return path
    half = PATH_CHARACTERS_MAX // 2
    return f"{path[:half]}…{path[-half:]}"
