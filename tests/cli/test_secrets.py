"""Secrets of an address: not printed, and not on the command line of another program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo
from psycopg.pq import Conninfo

from pgconductor.address import VARIABLES
from pgconductor.cli.text import SECRETS, redacted, redacted_dsn
from tests.cli.test_cli import command, run

CANARY = "canary-4f1b"
KNOWN = sorted(SECRETS & {option.keyword.decode() for option in Conninfo.get_defaults()})
"""Those that the libpq here takes; an older one has fewer."""
PSQL = """\
#!/bin/sh
echo "arguments: $*"
echo "password: $PGPASSWORD"
"""


@pytest.mark.parametrize("key", sorted(SECRETS))
def test_a_secret_is_taken_out_of_any_text(key: str) -> None:
    for text in (f"host=h {key}={CANARY} user=u", f"{key} = 'a {CANARY}'", f"postgresql://h/db?{key}={CANARY}"):
        assert CANARY not in redacted(f"cannot use {text} now")


@pytest.mark.parametrize("key", KNOWN)
def test_a_secret_is_no_part_of_an_address_that_is_shown(key: str) -> None:
    shown = redacted_dsn(f"host=h port=5433 user=u dbname=d {key}={CANARY}")

    assert CANARY not in shown
    assert {"host=h", "port=5433", "user=u", "dbname=d"} <= set(shown.split())


def test_of_an_address_only_the_place_is_shown() -> None:
    shown = redacted_dsn(f"host=h user=u password=p options='-c app.key={CANARY}' application_name={CANARY}")

    assert set(shown.split()) == {"host=h", "user=u", "password=***"}


@pytest.mark.parametrize("key", [key for key in KNOWN if key != "password"])
def test_no_command_prints_a_secret(database: str, key: str) -> None:
    dsn = make_conninfo(database, **{key: CANARY})

    for arguments in (["status"], ["doctor"], ["doctor", "--json"], ["migrate", "--plan"]):
        assert CANARY not in run(dsn, *arguments).output


# ---------------------------------------------------------------- psql


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A `PATH` with a psql that tells what it was given."""
    program = tmp_path / "psql"
    program.write_text(PSQL)
    program.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def psql(path: str, dsn: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(dsn, "db", "psql", "--", *arguments), env=os.environ | {"PATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_psql_gets_the_password_where_nobody_sees_it(path: str) -> None:
    result = psql(path, f"host=h user=u password={CANARY} sslmode=require", "-c", "select 1")

    assert result.stdout.splitlines() == [
        "arguments: user=u host=h sslmode=require -c select 1", f"password: {CANARY}",
    ]  # fmt: skip


@pytest.mark.parametrize("key", [key for key in KNOWN if key != "password"])
def test_psql_is_not_given_what_everybody_would_see(path: str, key: str) -> None:
    result = psql(path, f"host=h user=u {key}={CANARY}")

    assert (result.returncode, result.stdout) == (1, "")
    assert f"every user of the machine would see {key}" in result.stderr
    assert CANARY not in result.stderr


@pytest.mark.parametrize("address", [f"postgresql+psycopg://u:{CANARY}@h/d", f"postgres//u:{CANARY}@h/d"])
@pytest.mark.parametrize("words", [["doctor"], ["runs", "list"], ["worker", "examples.orders:app"], ["migrate"]])
@pytest.mark.parametrize("way", ["PGCONDUCTOR_URL", "DATABASE_URL", "--dsn"])
def test_a_wrong_address_is_refused_by_the_name_of_where_it_came_from_and_not_repeated(
    address: str, words: list[str], way: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    options = ["--dsn", address] if way == "--dsn" else []
    done = subprocess.run(
        [sys.executable, "-m", "pgconductor", *options, *words], capture_output=True, text=True, check=False,
        env=environment | ({} if options else {way: address}),
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert f"{way}: is not the address of a Postgres" in " ".join(said.split())
    assert CANARY not in said
    assert done.returncode != 0
