"""`conn=`: enqueue inside the transaction of the caller's own connection, whatever library it is of.

All of them can do one thing: send one statement with one text parameter and give back one text. So that is all that
is asked of them: `enqueue`, with the call as JSON. It runs in whatever transaction the connection is in; if that rolls
back, the execution never existed. Nothing is committed, and no setting is changed, here.

Libraries are recognised by the module of the connection's class, and none is imported. Besides the classes themselves,
anything with the same methods is taken: a Django connection proxy, a pool's wrapper of asyncpg.
"""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, TypeAlias

SyncSend: TypeAlias = Callable[[Any, str, str], Any]
AsyncSend: TypeAlias = Callable[[Any, str, str], Awaitable[Any]]

_SUPPORTED: Final = "psycopg, asyncpg, SQLAlchemy or Django connection"


def send_sync(connection: object, statement: str, parameter: str) -> str:
    """Send a statement through a synchronous connection.

    Args:
        connection: Of psycopg, SQLAlchemy or Django; a SQLAlchemy `Session` too.
        statement: With `%s` for its parameter, other percent signs doubled; answers one row of one column.
        parameter: Its parameter.

    Returns:
        The answer, as text.

    Raises:
        TypeError: The connection is asynchronous, or of no known library. Nothing was sent.
    """
    send = _find(connection, _SYNC)
    if send is None:
        raise _refusal(connection, _ASYNC, "is asynchronous", "use `await invoke(...)`")
    return _text(send(connection, statement, parameter))


async def send_async(connection: object, statement: str, parameter: str) -> str:
    """Send a statement through an asynchronous connection.

    Args:
        connection: Of psycopg, asyncpg or SQLAlchemy; an `AsyncSession` too.
        statement: As for `send_sync`.
        parameter: Its parameter.

    Returns:
        The answer, as text.

    Raises:
        TypeError: The connection is synchronous, or of no known library. Nothing was sent.
    """
    send = _find(connection, _ASYNC)
    if send is None:
        raise _refusal(connection, _SYNC, "is synchronous", "use `invoke_sync(...)`")
    return _text(await send(connection, statement, parameter))


def plain_cursor(connection: Any) -> Any:
    """Open a cursor that answers tuples in text and binds on the server, whatever the connection's factories do."""
    import psycopg
    from psycopg.rows import tuple_row

    kind: Any = psycopg.AsyncCursor if isinstance(connection, psycopg.AsyncConnection) else psycopg.Cursor
    return kind(connection, row_factory=tuple_row)


def _psycopg(connection: Any, statement: str, parameter: str) -> Any:
    with plain_cursor(connection) as cursor:
        cursor.execute(statement, (parameter,))
        return cursor.fetchone()[0]


async def _psycopg_async(connection: Any, statement: str, parameter: str) -> Any:
    async with plain_cursor(connection) as cursor:
        await cursor.execute(statement, (parameter,))
        return (await cursor.fetchone())[0]


async def _asyncpg(connection: Any, statement: str, parameter: str) -> Any:
    return await connection.fetchval(_with_marker(statement, "$1"), parameter)


def _django(connection: Any, statement: str, parameter: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(statement, [parameter])
        return cursor.fetchone()[0]


def _sqlalchemy(connection: Any, statement: str, parameter: str) -> Any:
    return connection.execute(_clause(statement), {"call": parameter}).scalar_one()


async def _sqlalchemy_async(connection: Any, statement: str, parameter: str) -> Any:
    return (await connection.execute(_clause(statement), {"call": parameter})).scalar_one()


def _clause(statement: str) -> Any:
    from sqlalchemy import text

    return text(_with_marker(statement.replace(":", "\\:"), ":call"))


def _with_marker(statement: str, marker: str) -> str:
    """Write another marker for the parameter; what was doubled for psycopg stands once."""
    return "%".join(part.replace("%s", marker) for part in statement.split("%%"))


_SYNC: Final[dict[str, SyncSend]] = {
    "psycopg.Connection": _psycopg,
    "sqlalchemy.Connection": _sqlalchemy,
    "sqlalchemy.Session": _sqlalchemy,
    "sqlalchemy.scoped_session": _sqlalchemy,
    "django.BaseDatabaseWrapper": _django,
    "django.ConnectionProxy": _django,
}
_ASYNC: Final[dict[str, AsyncSend]] = {
    "psycopg.AsyncConnection": _psycopg_async,
    "asyncpg.Connection": _asyncpg,
    "asyncpg.PoolConnectionProxy": _asyncpg,
    "sqlalchemy.AsyncConnection": _sqlalchemy_async,
    "sqlalchemy.AsyncSession": _sqlalchemy_async,
    "sqlalchemy.async_scoped_session": _sqlalchemy_async,
}


def _find(connection: object, known: dict[str, Any]) -> Any:
    return next((known[name] for name in _names(connection) if name in known), None)


def _names(connection: object) -> Iterator[str]:
    """Yield the names of the connection's classes as `library.Class`, the most special first."""
    for kind in type(connection).__mro__:
        yield f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def _refusal(connection: object, others: dict[str, Any], fault: str, remedy: str) -> TypeError:
    kind = type(connection)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if _find(connection, others) is not None:
        return TypeError(f"conn= is a {name}, which {fault}; {remedy}")
    return TypeError(f"conn= is a {name}; it must be a {_SUPPORTED}")


def _text(answer: object) -> str:
    return answer if isinstance(answer, str) else bytes(answer).decode()  # type: ignore[call-overload]
