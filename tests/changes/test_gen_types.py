"""The classes that are written for tables are valid, formatted, and read the rows exactly as they arrive."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from pgconductor.cli import main
from pgconductor.codec import codec_for
from tests.changes.support import changes, follow, on
from tests.sql.support import Db

TABLES = r'''
    create domain public.positive as int not null check (value > 0);
    create type public.mood as enum ('glad');
    create type public.pair as (a int);
    create table public.contact (
      id int primary key, big bigint not null, email text, ratio float8 not null, price numeric(10, 2) not null,
      active boolean not null, data jsonb, extra json not null, key uuid, born date, seen_at timestamptz not null,
      made_at timestamp, at_hour time, tags text[] not null, grid int[][], mood public.mood, moods public.mood[],
      amount public.positive, pair public.pair, span interval, bytes bytea);
    create view public.contact_view as select id, email from public.contact;
    create table public."order line" ("order-id" int, "class" text, "int" int, note text, "__x" int, "1st" int,
      "order_id" int, "list" int, "say ""hi""" text, "ﬁ" int, "a\b" date, "date" date, later date);
    create table public.order_line (id int);
    create table public."any" (id int);
    create table public.nothing ();
    create table public.parts (id int) partition by range (id);
    create table public.parts_1 partition of public.parts for values from (0) to (9);
'''


def gen(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--dsn", dsn, "gen", "types", *arguments], catch_exceptions=False)


def load(source: str) -> ModuleType:
    module = ModuleType("rows")
    sys.modules["rows"] = module
    exec(compile(source, "rows.py", "exec"), vars(module))  # noqa: S102 - what was just generated
    return module


@pytest.fixture
def source(database: str, db: Db) -> str:
    db.execute("set search_path to public")
    for statement in TABLES.split(";\n"):
        db.execute(statement.encode())
    db.execute("set search_path to pgconductor, pg_temp")
    result = gen(database)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_types_are_those_in_which_values_arrive(source: str) -> None:
    start = source.index("@dataclass\nclass Contact:")
    contact = source[start : source.index("\n\n\n", start)]

    assert contact.splitlines()[4:] == [
        "    id: int", "    big: int", "    email: str | None", "    ratio: float", "    price: Decimal",
        "    active: bool", "    data: Any", "    extra: Any", "    key: UUID | None", "    born: dt.date | None",
        "    seen_at: dt.datetime", "    made_at: dt.datetime | None", "    at_hour: dt.time | None",
        "    tags: list[str | None]", "    grid: list[list[int | None]] | None", "    mood: str | None",
        "    moods: list[str | None] | None", "    amount: int", "    pair: str | None", "    span: str | None",
        "    bytes: str | None",
    ]  # fmt: skip


def test_rows_are_read_into_the_classes(database: str, db: Db, source: str) -> None:
    contact = [
        name.strip().split(":")[0] for name in source.split("class Contact:")[1].partition("\n\n\n")[0].split("\n")[3:]
    ]
    follow(database, on("insert", *contact), on("insert", "order-id", "class", table='public."order line"'))
    db.execute("""
        insert into public.contact values (1, 2, null, 0.5, 9.90, true, '[1]', 'null', gen_random_uuid(), '2024-02-29',
          now(), now(), '12:30', '{a,null}', '{{1,2}}', 'glad', '{glad}', 5, row(1), '1 day', '\\x00')""")
    db.execute("""insert into public."order line" ("order-id", "class") values (7, 'a')""")
    rows = load(source)

    (change,) = changes(db)
    row = codec_for(rows.Contact).decode(msgspec.json.encode(change["new"]))
    assert (row.id, row.email, row.data, row.tags, row.grid, row.amount) == (1, None, [1], ["a", None], [[1, 2]], 5)
    assert (row.born.day, row.at_hour.hour, row.seen_at.utcoffset().total_seconds()) == (29, 12, 0)
    odd = dict.fromkeys((n for n in db_names(db)), None) | {"order-id": 7, "class": "a"}
    assert codec_for(rows.OrderLine).decode(msgspec.json.encode(odd)).order_id_2 == 7


def db_names(db: Db) -> list[str]:
    query = """select attname from pg_attribute where attrelid = 'public."order line"'::regclass and attnum > 0"""
    return [row["attname"] for row in db.execute(query).fetchall()]


def test_names_are_valid_and_distinct_and_partitions_are_left_out(source: str) -> None:
    rows = load(source)
    classes = {name for name, value in vars(rows).items() if isinstance(value, type) and value.__module__ == "rows"}

    assert classes == {"AnyRow", "Contact", "ContactView", "Nothing", "OrderLine", "OrderLine_2", "Parts"}
    assert "# left out, since msgspec reads no member of this name: 'say \"hi\"'" in source
    names = rows.OrderLine.__struct_fields__
    assert len(names) == len(set(names)) == 11
    assert {"class_", "int_", "list_", "order_id", "order_id_2", "_x", "_1st", "date"} <= set(names)


def test_the_output_is_as_ruff_formats_it_passes_mypy_and_stays_the_same(
    database: str, source: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.py"
    result = gen(database, "-o", str(file))

    assert result.exit_code == 0
    assert file.read_text() == source
    for command in (["ruff", "format", "--isolated", "--diff"], ["ruff", "check", "--isolated"], ["mypy", "--strict"]):
        done = subprocess.run(
            [sys.executable, "-m", *command, str(file)], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_tables_are_chosen_by_name_and_missing_ones_named(database: str, source: str) -> None:
    chosen = gen(database, "--table", "contact_view", "--table", "parts_1").stdout

    assert chosen.count("@dataclass\nclass ") == 2
    missing = gen(database, "--table", "contact", "--table", "nobody")
    assert missing.exit_code == 1
    assert "schema public has no table nobody" in missing.stderr
    assert gen(database, "--schema", "nowhere").exit_code == 1


def test_lines_that_are_too_long_are_left_alone_by_the_formatter(database: str, db: Db, tmp_path: Path) -> None:
    long, odd = "c" * 63, "o-" * 31
    db.execute(f'create table public.wide ("{long}" text[], "{odd}" timestamptz[], plain int)'.encode())
    file = tmp_path / "rows.py"
    gen(database, "-o", str(file))

    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--isolated", "--diff", str(file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_json_describes_the_rows(database: str, db: Db) -> None:
    db.execute("create table public.contact (id int primary key)")
    found: Any = msgspec.json.decode(gen(database, "--json").stdout)

    column = {"name": "id", "type": "int4", "dimensions": 0, "nullable": False}
    assert found == [{"name": "contact", "columns": [column]}]
