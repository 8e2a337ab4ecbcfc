"""Install, migrate and verify the engine's schema.

The work is a list of steps: make the schema, apply each migration file, re-apply the functions whole when they differ
from what was last applied. **Each step is one transaction** that first takes the installers' lock, then looks again at
what is recorded, then does the first thing that is missing. So it does not matter how many processes install at once,
nor where one of them is killed: the next transaction sees exactly the steps that were committed.

A migration that breaks the workers of the release before says so in its first line, `-- breaking`. Live workers of
other releases are then asked to stop, which they see in their next beat; the migration waits for them, for a minute
unless told otherwise, and is refused if one still lives. Dead ones do not count. Whether any lives is asked once more
in the migration's own transaction, under a lock that keeps new ones out.

No step waits long for a lock, since whatever it waits for, all later queries queue up behind it. It gives up, lets
them pass, and tries again. It gives up before anybody's deadlock timeout has passed: a migration locks several tables,
in an order of its own, while calls of workers hold others, and it is the migration that must give way.

Migrations are append-only and recorded with a checksum. Functions are recorded under version 0, with the release that
they came from: an older process leaves a newer release's functions alone. While the release stays the same, as in
development, functions that are gone from the files are dropped, and those whose shape changed are made anew; between
releases nothing is dropped, because workers of the release before still call it.

It works through a pooler in transaction mode too: the lock and every setting are of their transaction, and nothing is
prepared.

Everything is done as the schema's owner, whoever connects: what a member of the owning role migrates stays that role's,
and so do the functions that run with the owner's rights. A process whose role may not become the owner can still ask
whether there is anything to do, and is refused only if there is.
"""

import asyncio
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.resources
import random
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Any, TypeAlias, cast

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from pgconductor.errors import ConfigurationError, ServerError
from pgconductor.route import STANDBY, STANDBY_REMEDY, connection_string, unreachable
from pgconductor.versions import is_newer

DEFAULT_SCHEMA = "pgconductor"
IDENTIFIER_BYTES_MAX = 63  # Postgres cuts longer names
STOP_SECONDS_MAX = 60.0  # how long workers get to stop before a migration that breaks them

Connection: TypeAlias = psycopg.Connection[Any]
Records: TypeAlias = Mapping[int, "Record"]

_FUNCTIONS = 0  # the version under which the functions are recorded
_LIMITS = """
select set_config('statement_timeout', '0', true), set_config('lock_timeout', cast(greatest(1, least(2000, extract(
  epoch from cast(current_setting('deadlock_timeout') as interval)) * 500))::int as text), true)"""
_LOCK_SECONDS_MAX = 60  # how long a step is tried again
_STOP_POLL_SECONDS = 0.1
_LOCK_KEY = 1002  # no function takes it: a step may be long. Theirs: 0 to 63 trees, 1000 and on the rest
_RESERVED = ("public", "information_schema", "$user")

_BOOTSTRAP = """\
create table if not exists migration (
  version int primary key,
  name text not null,
  checksum text not null,
  release text not null,
  breaking boolean not null,
  applied_at timestamptz not null default clock_timestamp()
);
"""

_LIVE_OTHERS = """
select count(*) from orchestrator
where beat_at > clock_timestamp() - interval '20 seconds' and version <> cast(%s as text)"""

_ASK = """
with asked as (
  update orchestrator set stop_requested_at = clock_timestamp()
  where version <> cast(%s as text) and stop_requested_at is null returning id
)
select string_agg(id::text, ' ') from asked"""

_TAKE_BACK = """
with asked as (
  update orchestrator set stop_requested_at = null
  where version <> cast(%s as text) and stop_requested_at is not null and stopping_at is null returning id
)
select string_agg(id::text, ' ') from asked"""

_GUARD = """\
do $guard$ begin
  if exists (select from orchestrator where beat_at > clock_timestamp() - interval '20 seconds') then
    raise exception 'workers still run: stop them all, then run this script again';
  end if;
end $guard$;
"""

# The owner of what is there already; of nothing yet: of the schema, if it was made for a role that we belong to.
_BECOME_OWNER = """\
do $owner$ begin
  perform set_config('role', pg_get_userbyid(o.owner), true)
  from (select coalesce(
    (select relowner from pg_class where oid = to_regclass('migration')),
    (select nspowner from pg_namespace where nspname = current_schema() and pg_has_role(nspowner, 'member'))
  ) as owner) o
  where pg_get_userbyid(o.owner) <> current_user;
end $owner$;
"""

_REVOKE = """\
do $revoke$
declare
  v_type regtype;
begin
  execute format('revoke all on schema %1$I from public; revoke all on all tables in schema %1$I from public;'
    'revoke all on all sequences in schema %1$I from public; revoke all on all routines in schema %1$I from public',
    current_schema());
  for v_type in
    select t.oid from pg_type t join pg_namespace n on n.oid = t.typnamespace
    where n.nspname = current_schema() and t.typelem = 0 and has_type_privilege('public', t.oid, 'usage')
  loop
    execute format('revoke all on type %s from public', v_type);
  end loop;
end $revoke$;
"""


@dataclass(frozen=True)
class Record:
    """What was applied to a schema, as its `migration` table tells."""

    version: int
    checksum: str
    release: str
    breaking: bool


@dataclass(frozen=True)
class Step:
    """One transaction of an installation."""

    title: str
    script: str
    record: Record | None = None
    name: str = ""

    @property
    def is_breaking(self) -> bool:
        """Whether workers of other releases must have stopped before it."""
        return self.record is not None and self.record.breaking


class _OthersLive(Exception):
    """A worker of another release appeared between the wait and the migration."""


def migrate(
    target: str | Connection, schema: str = DEFAULT_SCHEMA, *, wait_seconds: float = STOP_SECONDS_MAX
) -> list[str]:
    """Bring the schema to this release; nothing happens if it is there.

    Args:
        target: An address, or a connection outside any transaction.
        schema: The engine's schema; any name of at most 63 bytes that is the engine's alone.
        wait_seconds: How long workers of other releases get to stop before a migration that breaks them.

    Returns:
        What was done, one line a transaction; empty if there was nothing to do.

    Raises:
        ConfigurationError: The schema's name cannot be used. Nothing was done.
        ServerError: The server or the schema does not fit, workers that a migration would break did not stop in time,
            or a lock was not to be had for a minute. What was committed stays; run it again.
    """
    done: list[str] = []
    with _session(target, schema) as conn, _with_remedy(conn, schema):
        deadline = time.monotonic() + _LOCK_SECONDS_MAX
        patience = time.monotonic() + wait_seconds
        while steps := pending(_recorded(conn, schema)):
            try:
                if steps[0].is_breaking:
                    _stop_others(conn, schema, steps[0], patience)
                done += _apply_next(conn, schema)
                if steps[0].is_breaking:  # who was starting meanwhile, and got in behind the migration
                    _ask_to_stop(conn, schema)
            except _OthersLive:
                continue
            except (errors.LockNotAvailable, errors.DeadlockDetected) as error:
                if time.monotonic() > deadline:
                    raise ServerError(f"no lock for {_LOCK_SECONDS_MAX} s: {error}", "run it again") from error
                time.sleep(random.uniform(0.02, 0.2))  # noqa: S311 - so that installers do not march in step
    return done


async def migrate_async(dsn: str, schema: str = DEFAULT_SCHEMA) -> list[str]:
    """Do as `migrate` in a thread, on a connection of its own."""
    return await asyncio.to_thread(migrate, dsn, schema)


def plan(target: str | Connection, schema: str = DEFAULT_SCHEMA) -> list[str]:
    """Return what `migrate` would do, one line a transaction, without doing it."""
    with _session(target, schema) as conn, _with_remedy(conn, schema):
        steps = pending(_recorded(conn, schema))
        return [step.title + (_told_live(conn, schema) if step.is_breaking else "") for step in steps]


def is_current(conn: Connection, schema: str = DEFAULT_SCHEMA) -> bool:
    """Tell, with one query, whether this release can work on the schema as it is.

    Raises:
        ServerError: It never can: the schema belongs to a release that broke with this one.
    """
    return not pending(_recorded(conn, schema))


def sql(schema: str = DEFAULT_SCHEMA, since: int = 0) -> str:
    """Return the script that does the same by hand, in one transaction; for psql and other clients.

    Args:
        schema: The engine's schema.
        since: The last migration that the schema has; 0 installs all.
    """
    check_schema_name(schema)
    steps = [step for step in pending(None) if not (step.record and 0 < step.record.version <= since)]
    parts = [
        "begin read write;",
        f"create schema if not exists {_quoted(schema)};",
        f"set local search_path to {_path(schema)};",
        _BECOME_OWNER.rstrip(),
        "set local check_function_bodies to off;",
        *(f"-- {step.title}\n{_guard(step, since)}{step.script}{_record_script(step)}" for step in steps),
        _REVOKE + "commit;",
    ]
    return "\n".join(parts) + "\n"


def _guard(step: Step, since: int) -> str:
    """Return what keeps a script by hand from breaking workers, where there can be any."""
    return _GUARD if step.is_breaking and since > 0 else ""


def pending(records: Records | None) -> list[Step]:
    """Return the steps that are missing where this is recorded; None is a schema that does not exist yet.

    Raises:
        ServerError: What is recorded cannot be brought to this release.
    """
    first = [] if records is not None else [Step("create the schema", _BOOTSTRAP)]
    records = records or {}
    _check_records(records)
    steps = first + [step for step in _migrations() if cast("Record", step.record).version not in records]
    applied, functions = records.get(_FUNCTIONS), _functions()
    ours = cast("Record", functions.record)
    if applied is None or (applied.checksum != ours.checksum and not is_newer(applied.release, _release())):
        steps.append(functions)
    return steps


def check_schema_name(schema: str) -> str:
    """Refuse names that Postgres cannot take, and schemas that are never the engine's alone.

    Raises:
        ConfigurationError: It is such a name.
    """
    place = f"schema {schema!r}"
    if not isinstance(cast("object", schema), str):
        raise ConfigurationError(place, "a schema's name is a text", 'write schema="pgconductor"')
    size = len(schema.encode(errors="replace"))
    if not 1 <= size <= IDENTIFIER_BYTES_MAX:
        raise ConfigurationError(place, f"a schema's name has 1 to {IDENTIFIER_BYTES_MAX} bytes, this has {size}")
    if "\0" in schema or any("\ud800" <= char <= "\udfff" for char in schema):
        raise ConfigurationError(place, "Postgres stores neither NUL nor lone surrogates")
    if schema in _RESERVED or schema.startswith("pg_"):
        raise ConfigurationError(place, "the engine needs a schema of its own", "choose another name")
    return schema


def check_server(conn: Connection) -> None:
    """Refuse servers on which the engine cannot work.

    Raises:
        ServerError: The version, the encoding or the role of the server is not supported.
    """
    version = conn.info.server_version // 10_000
    if not 15 <= version <= 18:
        raise ServerError(f"this is Postgres {version}", "use Postgres 15 to 18")
    encoding = conn.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        reason = f"the database's encoding is {encoding}, which cannot hold every text that JSON can"
        raise ServerError(reason, "create the database with encoding 'UTF8'")
    if _row(conn, "select pg_is_in_recovery()")[0]:
        raise ServerError(STANDBY, STANDBY_REMEDY)


# ---------------------------------------------------------------- one step


def _apply_next(conn: Connection, schema: str) -> list[str]:
    """Do the first missing step in one transaction. Returns its title; nothing if another installer was faster."""
    with conn.transaction():
        _enter_to_write(conn, schema)
        _row(conn, "select pg_advisory_xact_lock(hashtext(%s), %s)", schema, _LOCK_KEY)
        records = _recorded(conn, schema)
        steps = pending(records)
        if not steps:
            return []
        step = steps[0]
        if step.record is None:
            _claim_schema(conn, schema)
        elif step.is_breaking:
            _execute(conn, "lock table orchestrator in share row exclusive mode")
            if _row(conn, _LIVE_OTHERS, _release())[0]:
                raise _OthersLive
        if step.record is not None and step.record.version == _FUNCTIONS:
            _apply_functions(conn, schema, step.script, (records or {}).get(_FUNCTIONS))
        else:
            _execute(conn, step.script)
        _execute(conn, _record_script(step) + _REVOKE)
    return [step.title]


def _claim_schema(conn: Connection, schema: str) -> None:
    """Make the schema. One that an administrator made for us will do, one that others use will not."""
    if not _row(conn, "select exists (select from pg_namespace where nspname = %s)", schema)[0]:
        _execute(conn, f"create schema {_quoted(schema)}")
    relations = """
        select exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = %s)"""
    if _row(conn, relations, schema)[0]:
        raise ServerError(f"the schema {schema!r} has tables that are not the engine's", "choose another schema")


def _stop_others(conn: Connection, schema: str, step: Step, until: float) -> None:
    """Ask live workers of other releases to stop, those that start meanwhile too, and wait until none is left."""
    while True:
        _ask_to_stop(conn, schema)
        count = _live_others(conn, schema)
        if not count:
            return
        if time.monotonic() > until:
            _ask_to_stop(conn, schema, please=False)
            reason = f"{step.title}: {count} workers of another release have not stopped"
            raise ServerError(reason, "stop or upgrade them, then run it again")
        time.sleep(_STOP_POLL_SECONDS)


def _live_others(conn: Connection, schema: str) -> int:
    """Count the workers of other releases that show signs of life; none where there is no engine yet."""
    try:
        with conn.transaction():
            _enter(conn, schema)
            return int(_row(conn, _LIVE_OTHERS, _release())[0])
    except errors.UndefinedTable:
        return 0


def _told_live(conn: Connection, schema: str) -> str:
    """Say how many a breaking migration would wait for, to those who may know."""
    try:
        return f"; {_live_others(conn, schema)} live now"
    except errors.InsufficientPrivilege:
        return ""


def _ask_to_stop(conn: Connection, schema: str, *, please: bool = True) -> None:
    """Ask workers of other releases to stop, or take the request back; a hint makes them look at once."""
    with conn.transaction():
        _enter_to_write(conn, schema)
        asked = _row(conn, _ASK if please else _TAKE_BACK, _release())[0]
        if asked and please:
            _row(conn, "select pg_notify(%s, left(%s, 7900))", schema, f"told {asked}")


def _apply_functions(conn: Connection, schema: str, script: str, last: Record | None) -> None:
    """Create or replace all functions and views; inside one release, drop what is not in the files any more."""
    same_release = last is not None and last.release == _release()
    before = _routines(conn, schema)
    _execute(conn, "set local check_function_bodies to off")
    try:
        with conn.transaction():
            _execute(conn, script)
    except (errors.InvalidFunctionDefinition, errors.InvalidTableDefinition):
        if not same_release:
            raise
        granted = _granted_roles(conn)
        _drop_routines(conn, before)
        _drop_views(conn, schema)
        _execute(conn, script)
        for kind, role in granted:
            _row(conn, "select grant_rights(%s, %s)", kind, role)
    after = _routines(conn, schema)
    if same_release:
        _drop_routines(conn, [each for each in after if each in before])
    _validate_routines(conn, schema)


def _granted_roles(conn: Connection) -> list[tuple[Any, ...]]:
    """Return (kind, role) of those who may call functions that are about to be dropped."""
    if _row(conn, "select to_regprocedure('granted_roles()')")[0] is None:
        return []
    return conn.cursor(row_factory=tuple_row).execute("select kind, role from granted_roles()").fetchall()


def _routines(conn: Connection, schema: str) -> list[tuple[Any, ...]]:
    """Return (signature, version of its catalog row): a routine that was created or replaced has a new version."""
    query = """
        select p.oid::regprocedure::text, p.xmin::text
        from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname = %s"""
    return conn.cursor(row_factory=tuple_row).execute(query, (schema,), prepare=False).fetchall()


def _drop_routines(conn: Connection, routines: list[tuple[Any, ...]]) -> None:
    if routines:
        _execute(conn, f"drop routine {', '.join(signature for signature, *_ in routines)}")


def _drop_views(conn: Connection, schema: str) -> None:
    query = "select string_agg(format('%%I', viewname), ', ') from pg_views where schemaname = %s"
    if views := _row(conn, query, schema)[0]:
        _execute(conn, f"drop view {views}")


def _validate_routines(conn: Connection, schema: str) -> None:
    """Check every body, now that all functions exist; the languages' own validators do it."""
    _execute(conn, "set local check_function_bodies to on")
    query = """
        select case l.lanname when 'sql' then fmgr_sql_validator(p.oid)::text else plpgsql_validator(p.oid)::text end
        from pg_proc p join pg_namespace n on n.oid = p.pronamespace join pg_language l on l.oid = p.prolang
        where n.nspname = %s and l.lanname in ('sql', 'plpgsql')"""
    conn.execute(query, (schema,), prepare=False)


def _record_script(step: Step) -> str:
    if (record := step.record) is None:
        return ""
    return f"""\
insert into migration (version, name, checksum, release, breaking)
values ({record.version}, '{step.name}', '{record.checksum}', '{record.release}', {str(record.breaking).lower()})
on conflict (version) do update
set checksum = excluded.checksum, release = excluded.release, applied_at = clock_timestamp();
"""  # noqa: S608 - our own files' names and checksums


# ---------------------------------------------------------------- what is recorded, and what ought to be


def _recorded(conn: Connection, schema: str) -> Records | None:
    """Return what was applied; None where nothing of ours exists."""
    query = f"select version, checksum, release, breaking from {_quoted(schema)}.migration"  # noqa: S608 - quoted
    try:
        with conn.transaction():
            rows = conn.cursor(row_factory=tuple_row).execute(_encoded(conn, query), prepare=False).fetchall()
    except (errors.UndefinedTable, errors.InvalidSchemaName):
        return None
    return {row[0]: Record(*row) for row in rows}


def _check_records(records: Records) -> None:
    known = {record.version: (step, record) for step in _migrations() if (record := step.record)}
    for version, record in records.items():
        step, ours = known.get(version, (None, record))
        if step is not None and record.checksum != ours.checksum:
            reason = f"{step.title}: the file differs from what was applied here"
            raise ServerError(reason, "migrations never change; in development, drop the schema and install again")
        if step is None and record.breaking:
            reason = f"the schema was migrated by release {record.release}, with which {_release()} cannot work"
            raise ServerError(reason, "upgrade pgconductor in this process")


def last_migration() -> int:
    """Return the number of the last migration that this release knows."""
    return max(step.record.version for step in _migrations() if step.record)


@functools.cache
def _migrations() -> tuple[Step, ...]:
    return tuple(_migration(file) for file in _files("migrations"))


def _migration(file: Traversable) -> Step:
    """Read a migration; its first line says so if old workers cannot work on what it leaves."""
    name, script = file.name.removesuffix(".sql"), file.read_text("utf-8")
    breaking = script.startswith("-- breaking\n")
    record = Record(int(name.partition("_")[0]), _checksum(script), _release(), breaking)
    title = f"apply migration {name}" + (", after workers of other releases have stopped" if breaking else "")
    return Step(title, script, record, name)


@functools.cache
def _functions() -> Step:
    files = _files("functions")
    script = "".join(file.read_text("utf-8") for file in files)
    record = Record(_FUNCTIONS, _checksum(script), _release(), breaking=False)
    return Step(f"apply functions ({len(files)} files)", script, record, "functions")


def _files(directory: str) -> list[Traversable]:
    folder = importlib.resources.files("pgconductor") / "sql" / directory
    return sorted((each for each in folder.iterdir() if each.name.endswith(".sql")), key=lambda each: each.name)


def _checksum(script: str) -> str:
    return hashlib.sha256(script.encode()).hexdigest()


@functools.cache
def _release() -> str:
    return importlib.metadata.version("pgconductor")


# ---------------------------------------------------------------- talking to the server


@contextlib.contextmanager
def _session(target: str | Connection, schema: str) -> Generator[Connection]:
    check_schema_name(schema)
    if isinstance(target, str):
        with _connect(target) as conn:
            check_server(conn)
            yield conn
    elif target.info.transaction_status != TransactionStatus.IDLE:
        raise ServerError("the connection is inside a transaction", "commit first: each step is one of its own")
    else:
        with target.transaction():
            check_server(target)
        yield target


def _connect(dsn: str) -> Connection:
    """Connect to the primary of the address. Each transaction says what it needs, leave to write included."""
    try:
        return psycopg.connect(connection_string(dsn, "pgconductor migrate", with_options=False), autocommit=True)
    except psycopg.OperationalError as error:
        raise unreachable(error) from error


@contextlib.contextmanager
def _with_remedy(conn: Connection, schema: str) -> Generator[None]:
    """Say what a role without rights can do about it."""
    try:
        yield
    except errors.InsufficientPrivilege as error:
        message = error.diag.message_primary
        raise ServerError(
            f"schema {schema!r} is not at this release, or not open to role {conn.info.user!r}, which may not change "
            f"it ({message})",
            "run `pgconductor migrate` as a role that owns the schema; `pgconductor roles --sql` lets others in",
        ) from error


def _enter_to_write(conn: Connection, schema: str) -> None:
    """Begin a transaction that may write, whatever the role's defaults are, and waits long for no lock; then enter."""
    _execute(conn, "set transaction isolation level read committed, read write")
    _row(conn, _LIMITS)
    _enter(conn, schema)


def _enter(conn: Connection, schema: str) -> None:
    """Look into the schema until the transaction ends, as its owner."""
    _execute(conn, f"set local search_path to {_path(schema)}")
    _execute(conn, _BECOME_OWNER)


def _execute(conn: Connection, script: str) -> None:
    conn.execute(_encoded(conn, script), prepare=False)


def _row(conn: Connection, query: str, *values: object) -> tuple[Any, ...]:
    cursor = conn.cursor(row_factory=tuple_row).execute(_encoded(conn, query), values or None, prepare=False)
    row = cursor.fetchone()
    return cast("tuple[Any, ...]", row)


def _encoded(conn: Connection, text: str) -> bytes:
    """Return text as a query; psycopg takes a str only if it is a literal, and ours come from files."""
    return text.encode(conn.info.encoding)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _path(schema: str) -> str:
    return f"{_quoted(schema)}, pg_temp"
