"""What is printed and logged: nothing that a terminal obeys, no line that was not one, no password."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor import Conductor, Context, Orchestrator
from pgconductor.cli import main
from pgconductor.cli.text import redacted
from pgconductor.logs import JsonFormatter
from tests.security.hostile import HOSTILE, is_storable
from tests.sql.support import Db, claim_one, enqueue, register, settle

CANARY = "canary-4f1b-hunter2"
EVIL = "".join(text for text in HOSTILE if is_storable(text) and len(text) < 40)


def output(dsn: str, *arguments: str) -> str:
    done = CliRunner().invoke(main, ["--dsn", dsn, *arguments])
    assert done.exit_code in (0, 1), done.output
    return done.output


# ---------------------------------------------------------------- terminals


@pytest.fixture
def evil(database: str, db: Db) -> str:
    """An execution with hostile text wherever text can be, and an event and a queue of such names."""
    name, text = "\u202e[red]evil\u200b", "\x1b[31m\x9b2J\u202e\rred\n"  # a name has no control characters
    id = enqueue(db, name, payload={"x": EVIL}, dedupe_key=text, trigger=text)
    register(db, name, max_attempts=1)
    claim_one(db)
    error = {"type": text, "message": EVIL, "traceback": [{"file": text, "line": 1, "function": text}]}
    settle(db, {"id": id, "outcome": "failed", "error": error})
    enqueue(db, name, queue=f"q{name}")
    db.execute("select emit(%s, %s::jsonb)", (name, json.dumps({EVIL: EVIL})))
    db.execute("select schedule(%s, %s, '0 0 1 1 *')", (name, name))
    return id


@pytest.mark.covers("F91")
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_nothing_that_is_stored_reaches_the_terminal_as_it_is(database: str, evil: str, form: list[str]) -> None:
    commands = [["runs", "list"], ["runs", "show", evil], ["runs", "why", evil], ["status"], ["doctor"]]
    commands += [[each, "list"] for each in ("queues", "tasks", "schedules", "events", "workers")]
    for command in commands:
        shown = output(database, *command, *form)
        assert {char for char in shown if not char.isprintable()} <= {"\n"}, command


@pytest.mark.covers("F91")
def test_json_holds_what_was_stored(database: str, evil: str) -> None:
    assert json.loads(output(database, "runs", "show", evil, "--json"))["run"]["payload"] == {"x": EVIL}


@pytest.mark.covers("F91", "F94")
@pytest.mark.parametrize("text", ["\x1b[31m", "a\nerror: forged", "\x9b2J", "\u202e"])
def test_errors_show_hostile_arguments_escaped(database: str, text: str) -> None:
    shown = output(database, "tasks", "limit", "--", text, "1")
    assert {char for char in shown if not char.isprintable()} <= {"\n"}


# ---------------------------------------------------------------- logs


@pytest.mark.covers("F94")
async def test_a_log_line_of_hostile_text_stays_a_line(database: str) -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Keep()
    handler.setFormatter(JsonFormatter())
    logging.getLogger("pgconductor").addHandler(handler)
    app = Conductor(database)

    @app.task(max_attempts=1)
    async def work(ctx: Context, text: str) -> None:
        ctx.logger.warning("said %s", text, extra={"more": text})
        raise ValueError(text)

    await app.invoke(work.bind(text=EVIL))
    await Orchestrator(app).drain()
    await app.close()
    logging.getLogger("pgconductor").removeHandler(handler)

    assert any("said" in line for line in lines)
    for line in lines:
        assert json.loads(line)
        assert line.isprintable()


# ---------------------------------------------------------------- passwords


@pytest.mark.covers("F93")
@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://user:{CANARY}@host/db",
        f"postgresql://user:a@{CANARY}@host/db",
        f"postgresql://user:{CANARY}/@host/db",
        f"postgresql://host/db?user=u&password={CANARY}",
        f"host=h password={CANARY} user=u",
        f"host=h password='a {CANARY}' user=u",
        f"host=h sslpassword={CANARY} sslkey=x",
        f"PGPASSWORD={CANARY} psql",
    ],
)
def test_a_password_is_taken_out_of_any_text(text: str) -> None:
    assert CANARY not in redacted(f"cannot use {text} now")


@pytest.mark.covers("F93")
@pytest.mark.parametrize("change", [{}, {"password": CANARY}, {"port": "1"}, {"dbname": "none"}, {"user": "nobody"}])
def test_no_command_prints_the_password(database: str, evil: str, change: dict[str, str]) -> None:
    dsn = make_conninfo(database, connect_timeout=2, **change)
    password = str(conninfo_to_dict(dsn)["password"])
    for command in (["status"], ["doctor"], ["doctor", "--json"], ["runs", "list"], ["migrate", "--plan"], ["roles"]):
        assert password not in output(dsn, *command), command


APP = """
import asyncio, os, subprocess, sys
from pgconductor import Conductor, Context, Orchestrator

app = Conductor()

@app.task(executor="process", max_attempts=1)
async def look(ctx: Context) -> str:
    seen = subprocess.run(["ps", "-eo", "sid,args"], capture_output=True, text=True, check=True).stdout
    own = {str(os.getsid(pid)) for pid in (os.getpid(), os.getppid())}  # others may run tests at the same time
    return "\\n".join(line for line in seen.splitlines() if line.split()[0] in own)

@app.task(max_attempts=1)
async def fail(ctx: Context) -> None:
    password = app.dsn
    raise RuntimeError("it failed")

async def main() -> None:
    runs = [await app.invoke(look.bind()), await app.invoke(fail.bind())]
    await Orchestrator(app).drain()
    print(await runs[0].result(timeout="20s"), app, repr(app.tasks), runs)
    await app.close()

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.covers("F93")
def test_no_process_title_log_or_stored_error_holds_the_password(database: str, db: Db, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("import logging; logging.basicConfig(level=logging.DEBUG)\n" + APP)
    password = str(conninfo_to_dict(database)["password"])
    environment = {"PGCONDUCTOR_URL": database, "PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "shop.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        start_new_session=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "isolated_child" in done.stdout
    assert f"{sys.executable} shop.py" in done.stdout
    assert password not in done.stdout + done.stderr
    stored = db.execute("select executions::text as text from executions").fetchall()
    assert len(stored) == 2
    assert all(password not in row["text"] for row in stored)
    shown = db.execute("select string_agg(application_name || query, ' ') as text from pg_stat_activity").fetchone()
    assert shown is not None
    assert password not in shown["text"]
