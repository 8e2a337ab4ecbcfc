"""Runs the invariants in snapshots, again and again, while everything else goes on, and keeps who was who."""

import threading
from collections import defaultdict
from typing import Self

import psycopg

from tests import invariants

PAUSE_SECONDS = 0.15


class Watcher:
    """A thread with a session of its own, which no fault is aimed at but the server's own end.

    Args:
        dsn: The database under test.
    """

    def __init__(self, dsn: str) -> None:
        self.passes = 0
        self.violation: str | None = None
        self.boot_ids: dict[int, set[str]] = defaultdict(set)
        """The ids under which the database knew each process."""
        self._dsn = dsn
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(PAUSE_SECONDS) and self.violation is None:
            try:
                self._watch()
            except psycopg.OperationalError:
                continue  # the server is away, which is what it is here for
            except AssertionError as error:
                self.violation = str(error)

    def _watch(self) -> None:
        options = "-c application_name=watcher"
        with psycopg.connect(self._dsn, autocommit=True, connect_timeout=5, options=options) as conn:
            while not self._is_over.wait(PAUSE_SECONDS):
                for id, pid in conn.execute("select id::text, pid from pgconductor.orchestrator").fetchall():
                    self.boot_ids[pid].add(id)
                invariants.check_invariants(conn)
                self.passes += 1
