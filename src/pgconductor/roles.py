"""The script that makes the four roles of an engine; what each may do is told in `sql/functions/90_rights.sql`."""

from dataclasses import dataclass
from typing import Final

from pgconductor.errors import ConfigurationError
from pgconductor.queries import quote
from pgconductor.schema import DEFAULT_SCHEMA, IDENTIFIER_BYTES_MAX, check_schema_name

KINDS: Final = ("owner", "worker", "enqueuer", "reader")

_SCRIPT: Final = """\
-- The roles of the engine in schema {title}. Run it after `pgconductor migrate`, as a superuser, or as a
-- role that owns the schema, may create roles, and may create in the database. Safe to repeat, and while workers run.
begin;
set local client_min_messages to warning;
do {tag} begin
{creations}
  if not (select rolsuper from pg_roles where rolname = current_user) then
    grant {owner_name} to current_user;
  end if;
end {tag};
do {tag} begin
  -- owner: has the schema and all that is in it, and migrates
  perform {schema}.hand_over({owner});
  -- worker: what orchestrators call and operators do, and all of the two below
  perform {schema}.grant_rights('worker', {worker});
  -- enqueuer: starts executions, emits events, asks after an execution whose id it knows
  perform {schema}.grant_rights('enqueuer', {enqueuer});
  -- reader: the public views, the reports, why_not_running
  perform {schema}.grant_rights('reader', {reader});
end {tag};
commit;
"""

_CREATION: Final = """\
  if not exists (select from pg_roles where rolname = {literal}) then
    create role {name} nologin;
  end if;"""


@dataclass(frozen=True)
class Names:
    """What the roles are called; none of them may log in, until somebody says so."""

    owner: str
    worker: str
    enqueuer: str
    reader: str

    def __post_init__(self) -> None:
        """Refuse names that Postgres cannot take, and one name for two roles."""
        names = [getattr(self, kind) for kind in KINDS]
        for kind, name in zip(KINDS, names, strict=True):
            _check_name(kind, name)
            if names.count(name) > 1:
                raise ConfigurationError(f"--{kind} {name!r}", "is the name of two roles", "give each its own")


def names_for(schema: str, **given: str | None) -> Names:
    """Return the names of an engine's roles: those given, and otherwise the schema's with the kind behind it.

    Args:
        schema: The engine's schema.
        **given: Names by kind; None is not given.

    Returns:
        Four names.

    Raises:
        ConfigurationError: A name cannot be a role's.
    """
    return Names(**{kind: given.get(kind) or f"{schema}_{kind}" for kind in KINDS})


def roles_sql(names: Names, schema: str = DEFAULT_SCHEMA) -> str:
    """Return the script that makes the roles, for psql and other clients; one transaction.

    Args:
        names: What to call them; those that exist are used as they are.
        schema: Where the engine is.

    Returns:
        SQL.

    Raises:
        ConfigurationError: The schema's name cannot be used.
    """
    check_schema_name(schema)
    every = {kind: getattr(names, kind) for kind in KINDS}
    return _SCRIPT.format(
        title=quote(schema).encode("unicode_escape").decode(),  # in a comment, which a line break would end
        schema=quote(schema),
        creations="\n".join(_CREATION.format(literal=_literal(n), name=quote(n)) for n in every.values()),
        owner_name=quote(names.owner),
        tag=_tag(schema, *every.values()),
        **{kind: _literal(name) for kind, name in every.items()},
    )


def _check_name(kind: str, name: str) -> None:
    place, size = f"--{kind} {name!r}", len(name.encode(errors="replace"))
    if not 1 <= size <= IDENTIFIER_BYTES_MAX:
        raise ConfigurationError(
            place, f"a role's name has 1 to {IDENTIFIER_BYTES_MAX} bytes, this has {size}", "shorten it"
        )
    if not name.isprintable():
        raise ConfigurationError(place, "is not printable", "use letters, digits and _")
    if name in ("public", "none") or name.startswith("pg_"):
        raise ConfigurationError(place, "is reserved by Postgres", "choose another name")


def _tag(*names: str) -> str:
    """Return a dollar quote that none of the names ends."""
    length = next(length for length in range(1, 66) if not any(f"${'r' * length}$" in name for name in names))
    return f"${'r' * length}$"


def _literal(text: str) -> str:
    """Write a string of SQL, whatever `standard_conforming_strings` is."""
    quoted = "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
    return f"E{quoted}" if "\\" in text else quoted
