"""A PgBouncer in transaction mode before a server of the tests."""

import contextlib
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor.binaries import server_account

PROGRAM = Path("/usr/sbin/pgbouncer")
MISSING = "" if PROGRAM.exists() else f"{PROGRAM} is not installed (Debian: pgbouncer)"
START_SECONDS_MAX = 20.0
_PORTS = range(10_000, 20_000)  # apart from those of embedded servers, and of connections going out
_PORT_TRIES_MAX = 5
REFUSING = "extra_float_digits"
IGNORING = "extra_float_digits,options"
_SETTINGS = """\
[databases]
* = host={host} port={port}
[pgbouncer]
pool_mode = transaction
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users.txt
admin_users = {user}
logfile = {folder}/pgbouncer.log
pidfile = {folder}/pgbouncer.pid
ignore_startup_parameters = {ignored}
default_pool_size = {pool_size}
max_client_conn = 200
"""


class PortTaken(Exception):
    """Somebody else listens on the port."""


class Pooler:
    """A running PgBouncer.

    Args:
        server: The address of the server, as a user that it lets in.
        folder: For its files; given away to the user that it runs as, since it refuses root.
        ignored: What it drops in silence of what connections ask for at their start; it refuses the rest.
        pool_size: How many sessions it keeps with the server.
    """

    def __init__(self, server: str, folder: Path, ignored: str, pool_size: int) -> None:
        self._given = {key: str(value) for key, value in conninfo_to_dict(server).items()}
        self._folder = folder
        self.log_file = folder / "pgbouncer.log"
        self._process = self._start_on_a_free_port(ignored, pool_size)

    def address(self, database: str) -> str:
        """Return the address of a database through the pooler."""
        return make_conninfo(
            host="127.0.0.1", port=self._port, dbname=database, user=self._given["user"],
            password=self._given["password"],
        )  # fmt: skip

    def ask(self, command: str) -> list[tuple[object, ...]]:
        """Run a command of its console."""
        with psycopg.connect(self.address("pgbouncer"), autocommit=True) as console:
            return psycopg.ClientCursor(console).execute(command.encode()).fetchall()

    def restart(self) -> None:
        """Kill it and start it again on the same port."""
        self._process.kill()
        self._process.wait(10)
        self._process = self._start()

    def stop(self) -> None:
        """End it at once, whoever is connected."""
        self._process.terminate()
        self._process.wait(10)

    def _write(self, ignored: str, pool_size: int) -> None:
        settings = _SETTINGS.format(
            **{key: self._given[key] for key in ("host", "port", "user")},
            listen_port=self._port, folder=self._folder, ignored=ignored, pool_size=pool_size,
        )  # fmt: skip
        (self._folder / "pgbouncer.ini").write_text(settings)
        (self._folder / "users.txt").write_text(f'"{self._given["user"]}" "{self._given["password"]}"\n')
        account = server_account()
        for path in (self._folder, *self._folder.iterdir()):
            account.own(path)

    def _start_on_a_free_port(self, ignored: str, pool_size: int) -> "subprocess.Popen[bytes]":
        """Start it; on another port if somebody takes the port between the look and the start."""
        for _ in range(_PORT_TRIES_MAX):
            self._port = _free_port()
            self._write(ignored, pool_size)
            with contextlib.suppress(PortTaken):
                return self._start()
        raise PortTaken(f"{_PORT_TRIES_MAX} ports, one after the other")

    def _start(self) -> "subprocess.Popen[bytes]":
        account, logged = server_account(), self._log()
        process = subprocess.Popen(
            [PROGRAM, "-q", self._folder / "pgbouncer.ini"],
            user=account.uid,
            group=account.gid,
            extra_groups=None if account.uid is None else [],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_SECONDS_MAX
        while f"listening on 127.0.0.1:{self._port}" not in self._log()[len(logged) :]:
            if process.poll() is not None:
                raise PortTaken if "in use" in self._log() else AssertionError(self._log())
            assert time.monotonic() < deadline, "pgbouncer does not answer"
            time.sleep(0.02)
        return process

    def _log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""


@contextlib.contextmanager
def pooled(server: str, *, ignored: str = REFUSING, pool_size: int = 5) -> Generator[Pooler]:
    """Run a PgBouncer for the length of a block."""
    with tempfile.TemporaryDirectory(prefix="pgconductor-pooler-", dir="/tmp") as folder:
        pooler = Pooler(server, Path(folder), ignored, pool_size)
        try:
            yield pooler
        finally:
            pooler.stop()


def _free_port() -> int:
    """Return a port on which nobody listens now."""
    while True:
        port = secrets.choice(_PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
