"""A primary and its streaming standby, two real servers, of which the first may be killed and the second promoted."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor import schema
from pgconductor.binaries import find_binaries, readable_binaries, server_account
from pgconductor.embedded import EmbeddedServer, ServerState
from tests import invariants

DATABASE = "app"
_SETTINGS = {"max_connections": "100", "shared_buffers": "32MB", "deadlock_timeout": "100ms"}
_SECONDS_MAX = 30.0


class Pair:
    """Two servers.

    Args:
        primary: It runs, with a database that holds the engine and the audit.
        standby: Follows the primary.
    """

    def __init__(self, primary: EmbeddedServer, standby: EmbeddedServer) -> None:
        self.primary = primary
        self.standby = standby
        states = [_state(server) for server in (primary, standby)]
        self.dsn = make_conninfo(
            states[0].tcp_dsn,
            dbname=DATABASE,
            host=",".join("127.0.0.1" for _ in states),
            port=",".join(str(state.port) for state in states),
        )

    def dsn_of(self, server: EmbeddedServer) -> str:
        """Return the address of the database on one of the two."""
        return make_conninfo(_state(server).tcp_dsn, dbname=DATABASE)

    def wait_for_standby(self) -> None:
        """Let every commit wait until the standby has it too."""
        _ask(self.primary.dsn, "alter system set synchronous_standby_names = '*'")
        _ask(self.primary.dsn, "select pg_reload_conf()")
        _until(lambda: bool(_ask(self.primary.dsn, "select from pg_stat_replication where sync_state = 'sync'")))

    def cut_off_standby(self) -> None:
        """Let the standby have all that is committed now, and nothing of what comes."""
        (now,) = _ask(self.primary.dsn, "select pg_current_wal_insert_lsn()::text")
        _ask(self.primary.dsn, "checkpoint")  # so that the log up to there is written out
        _until(lambda: _ask(self.standby.dsn, f"select pg_last_wal_replay_lsn() >= '{now[0]}'") == [(True,)])
        _ask(self.standby.dsn, "alter system set primary_conninfo = ''")
        _ask(self.standby.dsn, "select pg_reload_conf()")
        _until(lambda: not _ask(self.standby.dsn, "select from pg_stat_wal_receiver where status = 'streaming'"))

    def fail_over(self) -> None:
        """Kill the primary and all its processes, and promote the standby."""
        self.primary.kill()
        assert _ask(self.standby.dsn, "select pg_promote()") == [(True,)]


@contextmanager
def running_pair() -> Generator[Pair]:
    """Start a primary with the engine, and a standby made by pg_basebackup."""
    with EmbeddedServer(settings=_SETTINGS) as primary:
        _ask(primary.dsn, f"create database {DATABASE}")
        with psycopg.connect(make_conninfo(primary.dsn, dbname=DATABASE), autocommit=True) as conn:
            schema.migrate(conn)
            invariants.attach_audit(conn)
        standby = EmbeddedServer(settings=_SETTINGS)
        _copy(primary, standby)
        with standby:
            _until(lambda: bool(_ask(primary.dsn, "select from pg_stat_replication where state = 'streaming'")))
            yield Pair(primary, standby)


def _copy(primary: EmbeddedServer, standby: EmbeddedServer) -> None:
    account = server_account()
    (standby.home / "password").write_text(str(conninfo_to_dict(primary.dsn)["password"]))
    standby.log_file.touch()
    account.own(standby.home / "password")
    account.own(standby.log_file)
    standby.data_dir.mkdir(0o700)
    account.own(standby.data_dir)
    program = readable_binaries(find_binaries(), standby.home, account) / "pg_basebackup"
    where = ("-d", make_conninfo(primary.dsn, dbname="replication"), "-D", standby.data_dir)
    done = account.run(program, *where, "--write-recovery-conf", "--checkpoint=fast", "--no-sync")
    assert done.returncode == 0, done.stderr


def _state(server: EmbeddedServer) -> ServerState:
    state = server.state
    assert state is not None
    return state


def _ask(dsn: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as conn:
        cursor = conn.execute(query.encode())
        return cursor.fetchall() if cursor.description else [()] * max(cursor.rowcount, 0)


def _until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SECONDS_MAX
    while not is_true():
        assert time.monotonic() < deadline, "the servers do not get there"
        time.sleep(0.01)


def has_basebackup() -> bool:
    """Tell whether the programs here can make a standby."""
    return Path(find_binaries(), "pg_basebackup").exists()
