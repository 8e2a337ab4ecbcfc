"""The child process of isolated.py: one run at a time, over its own connection to the database."""

import asyncio
import importlib
import os
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, ClassVar, Final, cast

import msgspec

from pgconductor import logs
from pgconductor.attempt import Attempt
from pgconductor.conductor import Conductor
from pgconductor.engine import Engine
from pgconductor.errors import ConductorError, StaleLease
from pgconductor.host import ProcessHost
from pgconductor.isolated import LINE_BYTES_MAX, Answer, Control, Home, Message, Start, Up, as_line
from pgconductor.membership import Timing
from pgconductor.operations import has_step_threads
from pgconductor.session import Session
from pgconductor.stored_error import error_to_json
from pgconductor.threads import Threads
from pgconductor.written import Completion, Operation, SavedStep

ORDERLY_SECONDS: Final = 1.0
"""How long the event loop has to end by itself when the parent is gone, with what it has to close."""
SCRIPT = "__pgconductor_child__"
"""The `__name__` of a script that is run for its definitions."""
_STOP_SIGNALS: Final[dict[signal.Signals, Any]] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
"""What asks a process to stop, and what it does to others."""


class _Identity:
    """The boot id of the process whose leases are used; it is that process which confirms them."""

    def __init__(self, timing: Timing) -> None:
        self.id = ""
        self.timing = timing

    def is_fenced(self) -> bool:
        return False


class _DirectSaver:
    """Stores a step or operation by itself."""

    def __init__(self, session: Session, engine: Engine, identity: _Identity) -> None:
        self._session = session
        self._engine = engine
        self._identity = identity

    def add(self, item: SavedStep | Operation) -> "asyncio.Task[None]":
        return asyncio.ensure_future(self._save(item))

    async def _save(self, item: SavedStep | Operation) -> None:
        steps = [item] if isinstance(item, SavedStep) else []
        operations = [item] if isinstance(item, Operation) else []
        saved = await self._session.run(self._engine.save(self._identity.id, steps, operations))
        if saved is None or saved.lost:
            raise StaleLease


class _ChildAttempt(Attempt):
    """A run that tells when its handler has returned and steps which it left behind still run."""

    __slots__ = ("on_rest",)
    is_alone: ClassVar[bool] = True
    on_rest: Callable[[], None]

    async def _finish_work(self) -> None:
        if not (self._is_left or self.is_over()):
            self.on_rest()
        await super()._finish_work()


class _Runner:
    """Serves the parent: reads its messages, keeps the current run."""

    def __init__(
        self, app: Conductor[Any], host: ProcessHost, identity: _Identity, threads: Threads,
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
    ) -> None:  # fmt: skip
        self._app = app
        self._host = host
        self._identity = identity
        self._threads = threads
        self._reader = reader
        self._writer = writer
        self._attempt: Attempt | None = None
        self._running: asyncio.Task[None] | None = None
        self._decoder = msgspec.json.Decoder(Message)

    async def serve(self) -> None:
        """Serve until the parent is gone, and with it every lease."""
        while line := await self._reader.readline():
            message = self._decoder.decode(line)
            if isinstance(message, Start):
                self._begin(message)
            else:
                self._control(message)

    def _begin(self, start: Start) -> None:
        """Make the run at once, so that what the parent sends next finds it."""
        self._identity.id = self._host.orchestrator_id = start.orchestrator_id
        task = self._app.tasks.get(start.task)
        if task is None or task.fn is None:
            self._send(Answer(error=f"its module defines no task {start.task!r} when it is imported"))
            return
        self._attempt = attempt = _ChildAttempt(start.claimed, start.token, task, start.queue, self._host)
        attempt.on_rest = lambda: self._send(Answer(goes_on=True))
        self._running = asyncio.create_task(self._run(attempt))

    def _control(self, message: Control) -> None:
        if self._attempt is None:
            return
        if message.action == "cancel":
            self._attempt.request_cancel()
        elif message.action == "release":
            self._attempt.request_release()
        else:
            self._attempt.abandon()

    async def _run(self, attempt: Attempt) -> None:
        try:
            settlement = await attempt.run()
        finally:
            self._attempt = None
        answer = Answer(spent=self._threads.is_busy or has_step_threads())
        if isinstance(settlement, Completion):
            answer.completion = settlement
        elif settlement is not None:
            settlement.cached = False
            answer.outcome = settlement
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        self._writer.write(as_line(answer))


def _is_conductor(value: object) -> bool:
    return isinstance(value, Conductor)


def find_app(module: Mapping[str, Any], schema: str) -> Conductor[Any]:
    """Return the conductor that a module defines or imports."""
    apps: list[Conductor[Any]] = [value for value in module.values() if _is_conductor(value)]
    for app in apps:
        if app.schema == schema:
            return app
    raise LookupError("the module of the task has no conductor of this schema among its names")


def _load(home: Home) -> Conductor[Any]:
    sys.path[:] = home.search_path
    if home.main_path is not None:
        return find_app(runpy.run_path(home.main_path, run_name=SCRIPT), home.schema)
    return find_app(vars(importlib.import_module(home.module)), home.schema)


async def _main(descriptor: int) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor), limit=LINE_BYTES_MAX)
    home = msgspec.json.decode(await reader.readline(), type=Home)
    if home.log_setup is not None:
        logs.set_up(home.log_setup)
    async with AsyncExitStack() as stack:
        try:
            app = _load(home)
            app.use_address(home.dsn)
            deps = await stack.enter_async_context(app.lifespan_context())
        except BaseException as error:  # noqa: BLE001 (a module that is imported may even exit)
            await _say_why(writer, error)
            return
        writer.write(as_line(Up()))
        await _serve(home, app, deps, reader, writer)


async def _say_why(writer: asyncio.StreamWriter, error: BaseException) -> None:
    """Tell the parent why nothing can be served here."""
    failure = ConductorError("its process could not start")
    failure.__cause__ = error
    writer.write(as_line(Up(error_to_json(failure))))
    writer.close()
    await writer.wait_closed()


async def _serve(
    home: Home, app: Conductor[Any], deps: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    identity, threads = _Identity(home.timing), Threads(4)
    session = Session(home.dsn, "pgconductor isolated")
    saver = _DirectSaver(session, app.engine, identity)
    host = ProcessHost(home.dsn, app.engine, cast("Any", identity), cast("Any", saver), session, threads, deps)
    await _Runner(app, host, identity, threads, reader, writer).serve()


def _outlive_stops() -> None:
    """Leave it to the parent when this process ends.

    By handlers: what is ignored instead stays so in the programs that a task starts, which it may want to terminate.
    """
    for number in _STOP_SIGNALS:
        signal.signal(number, _stay)
    os.register_at_fork(after_in_child=_heed_stops)


def _stay(*_: object) -> None:
    """Do nothing."""


def _heed_stops() -> None:
    """Let a process that a task has forked be stopped again."""
    for number, usual in _STOP_SIGNALS.items():
        if signal.getsignal(number) is _stay:
            signal.signal(number, usual)


def _end_with_parent(lifeline: int) -> None:
    """Exit when the parent is gone, and every lease with it, though a handler blocks the loop.

    Not while it is in code that does not give up the interpreter: then the engine refuses what it still does.
    """
    os.set_inheritable(lifeline, False)
    threading.Thread(target=_wait_for_end, args=[lifeline], name="pgconductor lifeline", daemon=True).start()


def _wait_for_end(lifeline: int) -> None:
    os.read(lifeline, 1)  # nothing is ever written
    time.sleep(ORDERLY_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    _outlive_stops()
    _end_with_parent(int(sys.argv[2]))
    asyncio.run(_main(int(sys.argv[1])))
    os._exit(0)  # threads of handlers that outlived their run must not keep the process
