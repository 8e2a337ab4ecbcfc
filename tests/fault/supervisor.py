"""One test's world: a database on a server that may be killed, worker processes, their faults and their ledgers.

Workers are started, stopped and killed by the process id of the process that this started, never by name. Nothing here
waits for a span of time: it waits for a condition, and fails when that does not come about in a time which no healthy
run needs.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow, dict_row

from pgconductor.embedded import EmbeddedServer
from pgconductor.membership import Timing
from tests import invariants
from tests.fault import programs
from tests.fault.ledger import Ledger
from tests.fault.proxy import Proxy
from tests.fault.worker_app import UP
from tests.waiting import until

ROOT = Path(__file__).parents[2]
TIMING = Timing(beat=0.2, expiry=2.0, sweep=0.2)
SLOWER = Timing(beat=0.5, expiry=6.0, sweep=0.5)
"""Where a lease is to outlast what a busy machine does to it: a pause, or the time between two tries to connect."""
_OWN_OPTIONS = "-c search_path=pgconductor,public -c statement_timeout=0 -c lock_timeout=0"
"""Of the sessions of the tests themselves, which are spared what a test has set for those of its database."""
_PROXIED = {"sslmode": "disable", "gssencmode": "disable"}


class Worker:
    """A worker process."""

    def __init__(
        self, world: "World", process: "subprocess.Popen[bytes]", log: Path, fault_log: Path, armed: str = ""
    ) -> None:
        self.process = process
        self.armed = armed
        self._world = world
        self._log = log
        self._fault_log = fault_log

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text(errors="replace")

    @property
    def was_up(self) -> bool:
        """Whether it has ever started to the end: one that starts while the server is away leaves, as it should."""
        return UP in self.log

    def faults(self) -> list[str]:
        """Return the names of the faults that have struck it."""
        lines = self._fault_log.read_text().splitlines() if self._fault_log.exists() else []
        return [line.split()[0] for line in lines]

    def send(self, number: signal.Signals) -> None:
        """Send it a signal: SIGSTOP and SIGCONT make a zombie of it, SIGTERM stops it gracefully."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()

    async def up(self) -> "Worker":
        """Wait until the database knows it and it has started to the end."""
        await until(lambda: self._is_known() and self.was_up)
        return self

    async def ended(self) -> int:
        """Wait until the process has ended; return its exit code."""
        await until(lambda: self.process.poll() is not None)
        return self.process.returncode

    async def struck(self, point: str) -> None:
        """Wait until the armed fault has killed it, and have it declared dead at once, not after its lease.

        A fault that never fires fails the test.
        """
        code = await self.ended()
        assert (self.faults(), code) == ([point], -signal.SIGKILL), self.log[-3000:]
        await self._world.declared_dead(self.pid)

    async def halted(self, point: str) -> None:
        """Wait until the armed fault has stopped it, as SIGSTOP does."""
        await until(lambda: self.faults() == [point] and self.is_halted)

    async def halt(self) -> None:
        """Stop it with SIGSTOP, wherever it stands."""
        self.send(signal.SIGSTOP)
        await until(lambda: self.is_halted)

    def go_on(self) -> None:
        """Let it go on."""
        self.send(signal.SIGCONT)

    def terminate(self) -> None:
        """Ask it to stop gracefully."""
        self.send(signal.SIGTERM)

    async def stopped(self) -> int:
        """Stop it gracefully; return its exit code."""
        self.terminate()
        return await self.ended()

    @property
    def is_halted(self) -> bool:
        """Whether it stands where SIGSTOP left it."""
        return _state_of(self.pid) == "T"

    @property
    def boot_id(self) -> str | None:
        """The id under which the database knows it now."""
        return self._world.boot_id_of(self.pid)

    async def rejoined(self, old_id: str | None) -> None:
        """Wait until it has noticed that it lost its leases, and works under another id."""
        await until(lambda: self.boot_id not in (None, old_id))

    def _is_known(self) -> bool:
        assert self.process.poll() is None, self.log[-3000:]
        return self.boot_id is not None


class World:
    """What a test acts on.

    Args:
        server: May be killed and started again.
        database: The name of a migrated database with the audit.
        home: For ledgers and logs.
        proxy: Stands between workers and server where they are asked to go `through` it.
    """

    def __init__(self, server: EmbeddedServer, database: str, home: Path, proxy: Proxy) -> None:
        self.server = server
        self.proxy = proxy
        self.dsn = make_conninfo(server.dsn, dbname=database)
        self.proxied_dsn = make_conninfo(
            _tcp_dsn(server), dbname=database, host="127.0.0.1", port=str(proxy.port), **_PROXIED
        )
        self.workers: list[Worker] = []
        self._home = home
        self._connection: psycopg.Connection[DictRow] | None = None
        (home / "ledger").mkdir(parents=True)
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            conn.execute(programs.EFFECTS.encode())

    # ------------------------------------------------------------ processes

    def worker(
        self, fault: str = "", *, through: bool = False, concurrency: int = 10, timing: Timing = TIMING,
        module: str | None = None, crashes: int | None = None, dsn: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Worker:  # fmt: skip
        """Start a worker process.

        Args:
            fault: Armed in it, as `PGCONDUCTOR_FAULT`.
            through: Whether its connections go through the proxy.
            concurrency: How many executions it runs at once.
            timing: Its heartbeat's.
            module: Imported in it; may add tasks to those of the programs.
            crashes: How many of them an execution of a program survives, if not as many as by default.
            dsn: Another address than that of the world.
            environment: What it has besides, such as a clock that is wrong.
        """
        number = len(self.workers)
        log, fault_log = self._home / f"worker-{number}.log", self._home / f"faults-{number}.txt"
        variables = {
            **os.environ,
            "PGCONDUCTOR_URL": dsn or (self.proxied_dsn if through else self.dsn),
            "PGCONDUCTOR_FAULT": fault,
            "PGCONDUCTOR_FAULT_LOG": str(fault_log),
            programs.LEDGER: str(self._home / "ledger"),
            **(environment or {}),
        }
        if crashes is not None:
            variables[programs.CRASHES] = str(crashes)
        options = {"concurrency": concurrency, "beat": timing.beat, "expiry": timing.expiry, "sweep": timing.sweep}
        command = [sys.executable, "-m", "tests.fault.worker_app", json.dumps(options), *([module] if module else [])]
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=output, stderr=output)
        self.workers.append(Worker(self, process, log, fault_log, fault))
        return self.workers[-1]

    async def restart_postgres(self) -> None:
        """Kill the server and all its processes, and start it again."""
        await asyncio.to_thread(self.server.kill)
        await asyncio.to_thread(self.server.start)

    def open_gate(self, name: str) -> None:
        """Let the programs that stand at a gate go on."""
        (self._home / "ledger" / f"{name}.open").touch()

    @property
    def ledger(self) -> Ledger:
        """What all processes have written so far."""
        return Ledger.read(self._home / "ledger")

    # ------------------------------------------------------------ the database

    def rows(self, query: str, *parameters: object) -> list[DictRow]:
        """Ask the database; once more if the server has been away."""
        try:
            return self._ask(query, parameters)
        except psycopg.OperationalError:
            return self._ask(query, parameters)

    def _ask(self, query: str, parameters: tuple[object, ...]) -> list[DictRow]:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.Connection[DictRow].connect(
                self.dsn, autocommit=True, row_factory=dict_row, options=_OWN_OPTIONS
            )
        return self._connection.execute(query.encode(), parameters).fetchall()

    def execute(self, script: str) -> None:
        """Run statements that give no rows, such as those that change the database itself."""
        with psycopg.connect(self.dsn, autocommit=True, options=_OWN_OPTIONS) as conn:
            for statement in script.split(";"):
                conn.execute(statement.encode())

    def one(self, query: str, *parameters: object) -> Any:
        """Ask for one value."""
        found = self.rows(query, *parameters)
        assert len(found) == 1, found
        return next(iter(found[0].values()))

    def execution(self, id: UUID) -> DictRow:
        """Return what `executions` shows of an execution."""
        return self.rows("select * from executions where id = %s", id)[0]

    def facts(self, id: UUID) -> tuple[str, int, int]:
        """Return an execution's state, attempt and crashes."""
        row = self.execution(id)
        return row["state"], row["attempt"], row["crashes"]

    def children_of(self, id: UUID) -> list[DictRow]:
        """Return the children of an execution."""
        return self.rows("select * from executions where parent_id = %s order by created_at, id", id)

    def moves(self, id: UUID, state: str) -> int:
        """Return how often an execution has come to be in a state."""
        query = "select 1 from audit.history where execution_id = %s and op = 'move' and to_state = %s"
        return len(self.rows(query, id, state))

    async def reaches(self, id: UUID, state: str) -> None:
        """Wait until an execution is in a state."""
        await until(lambda: self.execution(id)["state"] == state)

    def terminate(self, application: str) -> int:
        """Terminate the sessions of an application name; return how many there were."""
        found = self.rows(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and application_name = %s",
            application,
        )
        return len(found)

    def boot_id_of(self, pid: int) -> str | None:
        """Return the id under which the database knows a process."""
        found = self.rows("select id::text from workers where pid = %s", pid)
        return found[0]["id"] if found else None

    async def declared_dead(self, pid: int) -> None:
        """Have everybody taken for dead until a process is that has ended.

        Once may not be enough: its last beat or sweep may be under way in its session, and a sweep waits for nobody.
        """
        await until(lambda: bool(self.rows("select sweep('0 seconds')")) and self.boot_id_of(pid) is None)

    # ------------------------------------------------------------ the end

    async def converges(self, seconds_max: float = 60.0) -> None:
        """Wait until everything has ended, stop the workers, and hold what is left to the invariants and the ledger."""
        await until(lambda: not self.rows("select 1 from execution where outcome is null limit 1"), seconds_max)
        self.proxy.heal()
        for worker in self.workers:
            worker.go_on()
            worker.send(signal.SIGTERM)
        for worker in self.workers:
            await worker.ended()
        with psycopg.connect(self.dsn, autocommit=True, options=_OWN_OPTIONS) as conn:
            invariants.check_quiescent(conn)
        self.ledger.check(self.rows)

    def close(self) -> None:
        """Kill what is left."""
        for worker in self.workers:
            worker.kill()
        if self._connection is not None:
            self._connection.close()

    def logs(self) -> str:
        """Return the ends of all logs, for a failed test."""
        return "\n".join(f"--- worker {worker.pid}\n{worker.log[-4000:]}" for worker in self.workers)


def _state_of(pid: int) -> str:
    found = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip()[:1]


def _tcp_dsn(server: EmbeddedServer) -> str:
    state = server.state
    assert state is not None
    return state.tcp_dsn
