"""Where Postgres is, as far as users say it."""

import os
from typing import Final, cast

import psycopg
from psycopg.conninfo import conninfo_to_dict

from pgconductor.errors import ConfigurationError

VARIABLES: Final = ("PGCONDUCTOR_URL", "DATABASE_URL")


def check_address(dsn: object, place: str) -> None:
    """Refuse what no connection can be made of; a password that stands in it is not repeated.

    Raises:
        ConfigurationError: It is no text, empty, or written as no address of Postgres is.
    """
    try:
        conninfo_to_dict(cast("str", dsn) or "=")
    except (psycopg.ProgrammingError, AttributeError, TypeError):
        raise ConfigurationError(
            place, "is not the address of a Postgres", 'write "postgresql://user@host/database"'
        ) from None


def address_of_environment() -> str | None:
    """Return what the first of `PGCONDUCTOR_URL` and `DATABASE_URL` says that is set; None if neither is.

    Raises:
        ConfigurationError: It is written as no address of Postgres is.
    """
    for name in VARIABLES:
        if address := os.environ.get(name):
            check_address(address, name)
            return address
    return None
