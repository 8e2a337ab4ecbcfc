"""What a type annotation says: resolve it, and look at the types inside it. Pure; imports nothing of pydantic."""

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NoReturn, ParamSpec, Union, cast, get_args, get_origin
from weakref import WeakKeyDictionary

import msgspec
import typing_extensions

from pgconductor.errors import ConfigurationError

_NO_TYPE = (Any, object, inspect.Parameter.empty, NoReturn, typing.Never)
_AWAITABLES = (collections.abc.Awaitable, collections.abc.Coroutine)

_returns: WeakKeyDictionary[types.FunctionType, Any] = WeakKeyDictionary()


def is_untyped(annotation: Any) -> bool:
    """Tell whether an annotation says nothing about the value: missing, `Any`, `object`, a bare TypeVar, `NoReturn`."""
    return any(annotation is each for each in _NO_TYPE) or isinstance(annotation, (typing.TypeVar, ParamSpec))


def is_model(annotation: Any) -> bool:
    """Tell whether a type has named fields: dataclass, TypedDict, Struct (but not as an array), attrs, model."""
    kind: Any = _class_of(annotation)
    if kind is None:
        return False
    if issubclass(kind, msgspec.Struct):
        return not kind.__struct_config__.array_like
    if getattr(kind, "__pydantic_root_model__", None) is not None:
        return not kind.__pydantic_root_model__
    return dataclasses.is_dataclass(kind) or typing_extensions.is_typeddict(kind) or hasattr(kind, "__attrs_attrs__")


def admits(annotation: Any, kinds: tuple[type, ...]) -> bool:
    """Tell whether an annotation is one of some classes, or a union that one of them is a member of.

    Args:
        annotation: A resolved annotation, such as `Tick | None` or `Event[Order]`.
        kinds: Classes; generic ones without their arguments.

    Returns:
        True when a value of one of the classes fits; subclasses are not looked for.
    """
    return any(_class_of(member) in kinds for member in union_members(annotation))


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, nested ones unfolded; for any other annotation, itself alone."""
    annotation = _plain(annotation)
    if get_origin(annotation) in {Union, types.UnionType}:
        return tuple(member for each in get_args(annotation) for member in union_members(each))
    return (annotation,)


def uses_pydantic(annotation: Any) -> bool:
    """Tell whether anything of pydantic appears in a type, at any depth.

    Raises:
        ConfigurationError: It appears together with what only msgspec knows, or something neither knows is there.
        NameError: An annotation inside the type names what is not defined.
    """
    nodes = list(_nodes(annotation))
    if not any(_is_pydantic(node) for node in nodes):
        for node in nodes:
            _refuse_unknown(node)
        return False
    struct = next((node for node in nodes if isinstance(node, type) and issubclass(node, msgspec.Struct)), None)
    if struct is not None:
        raise ConfigurationError(
            f"type {describe_type(annotation)}",
            f"it mixes pydantic with the msgspec.Struct {struct.__name__}, and neither library reads both",
            "make the Struct a dataclass",
        )
    return True


def hints_of(fn: Callable[..., Any], place: str) -> dict[str, Any]:
    """Return a function's annotations with the strings among them resolved; one that cannot be becomes an `Unresolved`.

    Names are looked up in the function's module and in the variables it closes over.

    Args:
        fn: A function or method; wrappers made with `functools.wraps` are seen through.
        place: What the function is, such as `task 'charge'`, for a later error.
    """
    target = inspect.unwrap(written_function(fn))
    try:
        return typing.get_type_hints(target, localns=_closure(target), include_extras=True)
    except Exception:  # noqa: BLE001  (an annotation may be any expression)
        return {name: _resolve(target, annotation, place) for name, annotation in _annotations(target, place).items()}


class Unresolved:
    """An annotation that could not be resolved. Harmless until something needs to know what it says."""

    def __init__(self, place: str, text: str, error: BaseException) -> None:
        self._place, self._text, self._error = place, text, error

    def refuse(self) -> NoReturn:
        """Raise the error that names the annotation and the remedy.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            self._place,
            f"the annotation {self._text!r} cannot be resolved ({self._error})",
            "define its class at module level, and import it outside `if TYPE_CHECKING`",
        ) from self._error


def written_function(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function whose annotations hold for a callable: that inside a partial, `__call__` of an object."""
    while hasattr(fn, "func") and hasattr(fn, "keywords"):
        fn = cast("Any", fn).func
    if type(fn) is types.FunctionType:
        return fn
    found = getattr(fn, "__annotations__", None)
    kind: type[Any] = type(fn)
    is_of_class = any(found is vars(base).get("__annotations__") for base in kind.__mro__)  # they speak of fields
    is_annotated = isinstance(fn, type) or (found is not None and not is_of_class)
    if not is_annotated and hasattr(type(fn).__call__, "__annotations__"):
        return type(fn).__call__
    return fn


def return_type(fn: Callable[..., Any]) -> Any:
    """Return the resolved type of what a callable returns, `inspect.Parameter.empty` where it does not say.

    For an async function, and for one annotated to return an awaitable, that is the type of what is awaited. A class
    returns itself; `functools.partial` and callable objects are seen through.

    Raises:
        ConfigurationError: The annotation cannot be resolved.
    """
    fn = written_function(fn)
    if isinstance(fn, type):
        return fn if fn.__module__ != "builtins" else inspect.Parameter.empty
    written = getattr(fn, "__annotations__", {}).get("return", inspect.Parameter.empty)
    if _has_text(written):
        written = _written_return(fn)
    if written is None:
        return type(None)
    return get_args(written)[-1] if get_origin(written) in _AWAITABLES else written


def _has_text(annotation: Any) -> bool:
    """Tell whether an annotation is a string, or one stands for a type inside it, as in `list["Order"]`."""
    if annotation is None or isinstance(annotation, type) or get_origin(annotation) is Literal:
        return False
    if isinstance(annotation, str | typing.ForwardRef):
        return True
    return any(_has_text(each) for each in getattr(annotation, "__args__", ()))


def _written_return(fn: Callable[..., Any]) -> Any:
    """Resolve a return annotation with a string in it; of a module's function only once, since each run of a step asks.

    A function that a handler defines is another one in each run, and so may be the class that it returns.
    """
    fn = getattr(fn, "__func__", fn)
    if not isinstance(fn, types.FunctionType) or "<locals>" in fn.__qualname__:
        return _resolved_return(fn)
    found = _returns.get(fn)
    if found is None:
        found = _returns[fn] = _resolved_return(fn)
    return found


def _resolved_return(fn: Callable[..., Any]) -> Any:
    name = getattr(fn, "__qualname__", "callable")
    found = hints_of(fn, f"function {name}").get("return", inspect.Parameter.empty)
    if isinstance(found, Unresolved):
        found.refuse()
    return found


def describe_type(annotation: Any) -> str:
    """Write an annotation as it stands in code, cut to 200 characters."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation.__qualname__
    return str(annotation).replace("typing.", "")[:200]


def _plain(annotation: Any) -> Any:
    """Take off `Annotated`, `Final`, NewType and `type X = ...`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = annotation.__origin__
        elif hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        elif hasattr(annotation, "__value__") and not isinstance(annotation, type):
            annotation = annotation.__value__
        else:
            return annotation


def _class_of(annotation: Any) -> type[Any] | None:
    annotation = _plain(annotation)
    kind = get_origin(annotation) or annotation
    return kind if isinstance(kind, type) else None


def _nodes(annotation: Any) -> Iterator[Any]:
    """Yield each type inside a type, itself included, and each piece of metadata; a class once."""
    seen: set[int] = set()
    pending: list[Any] = [annotation]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, type) and get_origin(node) is None:
            if id(node) in seen:
                continue
            seen.add(id(node))
        pending.extend(_inside(node))


def _inside(node: Any) -> Iterator[Any]:
    plain = _plain(node)
    if plain is not node:
        yield plain
        yield from getattr(node, "__metadata__", ())
    elif get_origin(node) in {Union, types.UnionType}:
        yield from get_args(node)
    elif get_origin(node) is not None:
        yield get_origin(node)
        yield from () if get_origin(node) is Literal else get_args(node)
    elif _has_fields(node) and not _is_pydantic(node):
        yield from typing.get_type_hints(node, include_extras=True).values()


def _has_fields(node: Any) -> bool:
    return is_model(node) or (isinstance(node, type) and (hasattr(node, "_fields") or issubclass(node, msgspec.Struct)))


def _is_pydantic(node: Any) -> bool:
    if hasattr(node, "__get_pydantic_core_schema__") or hasattr(node, "__pydantic_core_schema__"):
        return True
    return type(node).__module__.partition(".")[0] == "pydantic"


def _refuse_unknown(node: Any) -> None:
    if not isinstance(node, type) or node is object or get_origin(node) is not None or _has_fields(node):
        return
    if isinstance(msgspec.inspect.type_info(node), msgspec.inspect.CustomType):
        raise ConfigurationError(
            f"type {describe_type(node)}",
            "it has no JSON form",
            "use a builtin, dataclass, TypedDict, NamedTuple, msgspec.Struct or pydantic model, and convert",
        )


def _annotations(fn: Any, place: str) -> dict[str, Any]:
    try:
        return dict(fn.__annotations__)
    except NameError as error:  # evaluated on first use since Python 3.14
        Unresolved(place, str(error.name), error).refuse()


def _closure(fn: Any) -> dict[str, Any]:
    names = getattr(getattr(fn, "__code__", None), "co_freevars", ())
    found: dict[str, Any] = {}
    for name, cell in zip(names, getattr(fn, "__closure__", None) or (), strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    return found


def _resolve(fn: Any, annotation: Any, place: str) -> Any:
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    scope = getattr(fn, "__globals__", {})
    try:
        return typing.get_type_hints(holder, scope, _closure(fn), include_extras=True)["it"]
    except Exception as error:  # noqa: BLE001  (an annotation may be any expression)
        return Unresolved(place, str(annotation), error)
