"""Releases of the package beside each other: copies with a version and migrations of their own, and their processes."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import DictRow, dict_row

from tests.waiting import until

ROOT = Path(__file__).parents[2]
APP = Path(__file__).parent / "worker_app.py"

EXPAND = """\
-- Adds, and takes nothing away.
create table more (id int primary key, note text);
alter table execution add column more int;
alter table task add column more text default 'nothing';
"""
BREAK = "-- breaking\n-- The release before cannot work on this.\nalter table execution add column less int;\n"
FUNCTION = """\
-- more: a function that only the newer release has.
create or replace function more() returns int language sql volatile set search_path from current as $$ select 1 $$;
"""


class Release:
    """A release of the package: this one, or a copy of it made to look like the next."""

    def __init__(self, path: Path | None, dsn: str, home: Path) -> None:
        self.path = path
        self._dsn = dsn
        self._home = home
        self._processes: list[Process] = []

    @property
    def _environment(self) -> dict[str, str]:
        environment = os.environ | {"PGCONDUCTOR_URL": self._dsn}
        environment.pop("PYTHONPATH", None)
        return environment | ({"PYTHONPATH": str(self.path)} if self.path else {})

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `pgconductor` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "pgconductor", *arguments],
            cwd=self._home,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def worker(self) -> "Process":
        """Start a worker process."""
        log = self._home / f"worker-{self.path is None}-{len(self._processes)}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, str(APP)], cwd=self._home, env=self._environment, stdout=output, stderr=output
            )
        self._processes.append(Process(popen, log, self._dsn))
        return self._processes[-1]

    def end(self) -> None:
        """Kill what still runs."""
        for each in self._processes:
            each.popen.kill()
            each.popen.wait()


class Process:
    """A worker process."""

    def __init__(self, popen: "subprocess.Popen[bytes]", log: Path, dsn: str) -> None:
        self.popen = popen
        self._log = log
        self._dsn = dsn

    @property
    def log(self) -> str:
        """What it has written."""
        return self._log.read_text(errors="replace")

    async def up(self) -> "Process":
        """Wait until the database knows it."""
        await until(self._is_known)
        return self

    def _is_known(self) -> bool:
        assert self.popen.poll() is None, self.log
        return bool(rows(self._dsn, "select 1 from workers where pid = %s", self.popen.pid))

    async def ended(self) -> int:
        """Wait for its end; return its exit code."""
        await until(lambda: self.popen.poll() is not None)
        return self.popen.returncode

    async def stopped(self) -> int:
        """Stop it gracefully; return its exit code."""
        self.popen.send_signal(signal.SIGTERM)
        return await self.ended()


def next_release(home: Path, migration: str, version: str = "99.0.0") -> Path:
    """Copy the package, with one more migration and one more function, as a later version of it."""
    path = home / "next"
    shutil.copytree(ROOT / "src" / "pgconductor", path / "pgconductor", ignore=shutil.ignore_patterns("__pycache__"))
    (path / "pgconductor/sql/migrations/0900_next.sql").write_text(migration)
    (path / "pgconductor/sql/functions/99_more.sql").write_text(FUNCTION)
    facts = path / f"pgconductor-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pgconductor\nVersion: {version}\n")
    return path


def rows(dsn: str, query: str, *parameters: object) -> list[dict[str, Any]]:
    """Ask the database."""
    options = "-c search_path=pgconductor,pg_temp"
    with psycopg.Connection[DictRow].connect(dsn, autocommit=True, row_factory=dict_row, options=options) as conn:
        return conn.execute(query.encode(), parameters or None).fetchall()
