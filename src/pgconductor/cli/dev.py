"""`pgconductor dev`: a worker that starts again when the code changes, and goes when the command goes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import click

from pgconductor import embedded
from pgconductor.cli.session import Settings, pass_settings
from pgconductor.cli.text import console, line, marked, redacted_dsn

STOP_SECONDS_MAX: Final = 40
LOOK_SECONDS: Final = 0.05
SIGNALS: Final = [each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP")]
"""What ends the command. A terminal that closes sends SIGHUP; Windows has none."""


@click.command()
@click.argument("application", metavar="MODULE:APP")
@click.option("--reload/--no-reload", default=True, show_default=True, help="Start again when a Python file changes.")
@click.option("--concurrency", default=10, show_default=True, type=click.IntRange(1, 10_000), help="Of each queue.")
@pass_settings
def dev(settings: Settings, application: str, reload: bool, concurrency: int) -> None:
    """Develop: start Postgres, install the engine, run a worker, and start it again when the code changes."""
    dsn = settings.dsn
    console().print(marked("●", "green", f"Postgres  {redacted_dsn(dsn)}"), soft_wrap=True)
    command = [sys.executable, "-m", "pgconductor", "worker", application, "--concurrency", str(concurrency)]
    worker = _Worker(command, os.environ | {"PGCONDUCTOR_URL": dsn})
    worker.heed_signals()
    if reload:
        _run_with_reload(worker)
    else:
        raise SystemExit(_run(worker))


class _Worker:
    """The worker's process, one at a time. The first signal ends it gracefully, the second now.

    Args:
        command: Starts it.
        environment: Its variables.

    Attributes:
        ending: Set by the first signal.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.ending = threading.Event()
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def heed_signals(self) -> None:
        """Let signals end the worker before us; one that is ignored, as SIGHUP under nohup, stays so."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda _number, _frame: self._end())

    def start(self) -> None:
        """Start it in a session of its own, so that Ctrl-C reaches it through us alone."""
        self._process = subprocess.Popen(self._command, env=self._environment, start_new_session=True)

    def is_running(self) -> bool:
        """Tell whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> int:
        """Let it finish what it can; return its exit code, also if it had ended before."""
        if self._process is None:
            return 0
        self._process.terminate()
        try:
            return self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _end(self) -> None:
        if self.ending.is_set() and self._process is not None:
            self._process.terminate()  # once more, which tells a worker to stop now
        self.ending.set()


def _run(worker: _Worker) -> int:
    worker.start()
    try:
        while worker.is_running() and not worker.ending.is_set():
            time.sleep(LOOK_SECONDS)
    finally:
        code = worker.stop()
    return code


def _run_with_reload(worker: _Worker) -> None:
    try:
        from watchfiles import PythonFilter, watch
    except ImportError as error:
        raise click.ClickException('install "pgconductor[dev]" for reloading, or give --no-reload') from error
    out = console()
    worker.start()
    try:
        root, stop = embedded.project_root(), worker.ending
        for changes in watch(root, watch_filter=PythonFilter(), raise_interrupt=False, stop_event=stop):
            names = ", ".join(sorted({Path(path).name for _, path in changes}))
            out.print(marked("↻", "yellow", f"{line(names, 100)} changed, starting again"))
            worker.stop()
            worker.start()
    finally:
        worker.stop()
