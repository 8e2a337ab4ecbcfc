"""`executor="process"`: a handler in a process of its own, so that it may use a core, leak or crash.

A child process serves one run at a time. It is sent what was claimed, runs the same `Attempt` as any worker does, over
a database connection of its own, and sends back the outcome, which is settled with all the others. Both directions
carry one JSON message a line; nothing is pickled, and the child finds the task by importing the module that defines
it. A child that dies during a run costs that execution one crash, unless this process is stopping; one whose handler
outlives its run is replaced.

**Who ends whom.** A handler may block its loop, and then nothing that runs there, be it the task's timeout, a cancel or
the news that this process is gone, reaches it. So this process counts, too: a run that has not answered a few seconds
after its timeout, or after it was told of a cancel, loses its process. And a thread of each child does nothing but wait
for the end of a pipe that this process alone holds open, its *lifeline*, and exits with it.

**A child's first word** is that it serves: its module is imported, its lifespan open. One that cannot come so far says
why, or just ends. That is no crash, since the handler was not called: the execution goes back for a while, at no cost.

**Signals.** A terminal and an init system send the signals of a stop to children, too. Those leave them to this
process, which tells each run to leave at its next operation, and ends the children when it ends.
"""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections import deque
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal
from weakref import WeakSet

import msgspec
from msgspec import Raw, Struct

from pgconductor import logs
from pgconductor.attempt import Attempt
from pgconductor.claimed import Claimed
from pgconductor.errors import AttemptTimeout, ConductorError, ConfigurationError, EncodeError
from pgconductor.membership import Timing
from pgconductor.stored_error import error_from_json, error_to_json
from pgconductor.written import Completion, Outcome

log = logging.getLogger("pgconductor.isolated")
LINE_BYTES_MAX = 256 * 1024 * 1024
CRASH_SECONDS: Final = 1.0
"""How long an execution goes back when its process has died under it first; each further time twice as long."""
START_RETRY_SECONDS: Final = 5.0
"""How long an execution goes back when its process cannot start."""
END_SECONDS_MAX: Final = 1.0
"""How long the end of a process is waited for that says nothing any more."""
MARGIN_SECONDS: Final = 5.0
"""How long after its task's timeout a run may take to say so, before its process is ended."""
CANCEL_SECONDS: Final = 10.0
"""How long a run that is told of a cancel may take to leave, before its process is ended."""
_lifelines: Final[WeakSet[FileIO]] = WeakSet()
"""What this process holds open for its children to live."""


class Home(Struct):
    """Where a child finds the database and the code, and how it logs.

    `main_path`: the script, where the module is `__main__`. `log_setup`: None, where that is the code's own affair.
    """

    dsn: str
    schema: str
    module: str
    main_path: str | None
    search_path: list[str]
    timing: Timing
    log_setup: logs.LogSetup | None


class Start(Struct, tag="start"):
    """Run this."""

    claimed: Claimed
    token: int
    task: str
    queue: str
    orchestrator_id: str


class Control(Struct, tag="control"):
    """Tell the run something."""

    action: Literal["cancel", "release", "abandon"]


class Up(Struct):
    """The first word of a process: it serves. `error`: why it cannot, as errors are stored; it ends."""

    error: str | None = None


class Answer(Struct):
    """What became of the run.

    `spent`: its handler still runs, the process is of no further use. `goes_on`: this is not it yet; the handler has
    returned, and steps that it left behind have as long as it had.
    """

    completion: Completion | None = None
    outcome: Outcome | None = None
    error: str | None = None
    spent: bool = False
    goes_on: bool = False


Message = Start | Control
_encode = msgspec.json.Encoder().encode
_answer = msgspec.json.Decoder(Answer)
_up = msgspec.json.Decoder(Up)


def as_line(message: "Message | Home | Up | Answer") -> bytes:
    """Write a message. Values go along as they are stored: JSON has line feeds between its tokens alone."""
    return _encode(message).replace(b"\n", b" ") + b"\n"


class _StartFailed(Exception):
    """A process has never come to serve. `stored`: why, as errors are stored."""

    def __init__(self, stored: str) -> None:
        super().__init__(stored)
        self.stored = stored


class _Child:
    """One child process, the pipe to it, and its lifeline."""

    def __init__(
        self, process: asyncio.subprocess.Process, lifeline: FileIO,
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
    ) -> None:  # fmt: skip
        self.process = process
        self.reader = reader
        self.writer = writer
        self.is_ended = False
        self._lifeline = lifeline
        self._is_up = False

    def send(self, message: Message | Home) -> None:
        self.writer.write(as_line(message))

    async def begin(self, order: bytes) -> None:
        """Have one run begun, a `Start` as JSON.

        Raises:
            _StartFailed: The process has never come so far.
        """
        self.writer.write(order)
        if not self._is_up:
            await self._come_up()

    async def answer(self) -> Answer | None:
        """Return what the process says of the run; None when it has died under it."""
        line = await self._hear()
        return _answer.decode(line) if line else None

    async def _come_up(self) -> None:
        line = await self._hear()
        if not line:
            raise _StartFailed(error_to_json(ConductorError("its process ended before it could serve")))
        error = _up.decode(line).error
        if error is not None:
            raise _StartFailed(error)
        self._is_up = True

    async def _hear(self) -> bytes:
        """Return the next line; an empty one when the process has ended, be it in the midst of a line."""
        with contextlib.suppress(ConnectionError):
            line = await self.reader.readline()
            if line.endswith(b"\n"):
                return line
        return b""

    async def how_it_ended(self) -> str:
        """Say how the process ended, if it has."""
        try:
            code = await asyncio.wait_for(self.process.wait(), END_SECONDS_MAX)
        except TimeoutError:
            return "it answers no more"
        return f"exit code {code}" if code >= 0 else f"signal {-code}"

    def kill(self) -> None:
        self.is_ended = True
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.writer.close()
        self._lifeline.close()


class Processes:
    """The child processes of one orchestrator, started when needed and kept.

    Args:
        dsn: For the children's own connections.
        schema: The engine's schema.
        timing: Of the orchestrator.
    """

    def __init__(self, dsn: str, schema: str, timing: Timing) -> None:
        self._dsn = dsn
        self._schema = schema
        self._timing = timing
        self._idle: dict[str, deque[_Child]] = {}
        self._all: set[_Child] = set()

    async def take(self, module: str) -> _Child:
        """Return an idle child that has imported a module, or start one."""
        idle = self._idle.setdefault(module, deque())
        while idle:
            child = idle.pop()
            if child.process.returncode is None:
                return child
            self.discard(child)  # it died while it had nothing to do: that is no run's crash
        return await self._start(module)

    def give_back(self, module: str, child: _Child) -> None:
        """Keep a child for the next run."""
        self._idle[module].append(child)

    def discard(self, child: _Child) -> None:
        """End a child."""
        self._all.discard(child)
        child.kill()

    async def close(self) -> None:
        """End all children."""
        children = list(self._all)
        for child in children:
            self.discard(child)
        for child in children:
            await child.process.wait()

    async def _start(self, module: str) -> _Child:
        search_path = [each or os.getcwd() for each in sys.path]  # noqa: PTH109
        home = Home(self._dsn, self._schema, *locate(module), search_path, self._timing, logs.told)
        (ours, theirs), (lifeline, its_end) = socket.socketpair(), _open_lifeline()
        with theirs, its_end:
            passed = [theirs.fileno(), its_end.fileno()]
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "pgconductor.isolated_child", *map(str, passed),
                pass_fds=passed, stdin=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES_MAX)
        child = _Child(process, lifeline, reader, writer)
        self._all.add(child)
        child.send(home)
        return child


def _open_lifeline() -> tuple[FileIO, FileIO]:
    """Return the end of a pipe that only this process holds, and the one for a child to wait at."""
    its_end, lifeline = os.pipe()
    opened = FileIO(lifeline, "wb")
    _lifelines.add(opened)
    return opened, FileIO(its_end, "rb")


def _drop_lifelines() -> None:
    """Let a copy of this process, which may outlive it, keep no child alive."""
    for lifeline in list(_lifelines):
        lifeline.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_drop_lifelines)


def locate(module: str) -> tuple[str, str | None]:
    """Return how another process can import a module: its name, or for a script, its path.

    Raises:
        ConfigurationError: It has no file: it was typed into an interpreter.
    """
    if module != "__main__":
        return module, None
    main: ModuleType = sys.modules["__main__"]
    if main.__spec__ is not None:
        return main.__spec__.name, None
    path = getattr(main, "__file__", None)
    if path is None:
        raise ConfigurationError('executor="process"', "its task is defined interactively", "put it into a module")
    return module, str(Path(path).resolve())


class IsolatedAttempt(Attempt):
    """A run whose handler is in a child process."""

    __slots__ = ("_child", "_end", "_is_overdue", "_processes", "_timer")

    def __init__(self, processes: Processes, *args: Any) -> None:
        super().__init__(*args)
        self._processes = processes
        self._child: _Child | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_overdue = False
        self._end = ""

    async def run(self) -> Completion | Outcome | None:
        """Have the handler run in a child process; see `Attempt.run`."""
        logs.current_run.set(self)
        if self.is_over():
            return self.unstarted()
        module = str(getattr(self.task.fn, "__module__", "__main__"))
        try:
            order = self._order()
            child = await self._processes.take(module)
        except (ConfigurationError, EncodeError) as error:
            return self._failed(error)
        if self.is_over() or self._leaving:  # told so while the process started
            self._processes.give_back(module, child)
            return self.unstarted()
        self._child = child
        answer: Answer | None = None
        try:
            await child.begin(order)
            answer = await self._wait_for_answer(child)
            self._end = "" if answer else await child.how_it_ended()
        except _StartFailed as failure:
            return self._not_started(failure)
        finally:
            self._child = None
            self._stop_timer()
            if answer is None or answer.spent or child.is_ended:
                self._processes.discard(child)
            else:
                self._processes.give_back(module, child)
        return self._outcome(answer)

    async def _wait_for_answer(self, child: _Child) -> Answer | None:
        """Return what became of the run; None when its process has died, or was ended for not answering in time."""
        timeout = self.task.config.timeout
        while True:
            if timeout is not None and not self.cancelled:
                self._allow(timeout.total_seconds(), MARGIN_SECONDS)
            answer = await child.answer()
            if answer is None or not answer.goes_on:
                return answer

    def _order(self) -> bytes:
        """Write what the process is told.

        Raises:
            EncodeError: It is more than the process reads at once.
        """
        # with the memos that this process kept: the child has none, and loads nothing
        claimed = msgspec.structs.replace(self.claimed, steps=self.journal.memos.rows())
        order = as_line(Start(claimed, self.token, self.task.name, self.queue, self.host.orchestrator_id))
        if len(order) >= LINE_BYTES_MAX:
            raise EncodeError(
                "what a run begins with",
                f"its payload and recorded values take {len(order)} bytes, at most {LINE_BYTES_MAX} go to a process of"
                " its own; record less, or drop executor=",
            )
        return order

    def _outcome(self, answer: Answer | None) -> Completion | Outcome | None:
        if self.exit == "abandoned":
            return None
        if answer is None:
            return self._ended()
        if answer.error is not None:
            return self._failed(ConductorError(f"it could not run in a process of its own: {answer.error}"))
        return answer.completion or answer.outcome

    def _ended(self) -> Outcome | None:
        """Return what is to be settled of a run whose process has ended under it."""
        timeout = self.task.config.timeout
        if self._is_overdue and timeout is not None and not self.is_over():
            return self._failed(AttemptTimeout(self.task.name, timeout))
        return self.leave(self.exit or "released") if self._was_to_leave else self._crashed()

    @property
    def _was_to_leave(self) -> bool:
        """Whether the run was to be left, so that it costs nothing when its process ends."""
        return self.is_over() or self._leaving

    def _not_started(self, failure: _StartFailed) -> Outcome | None:
        if self._was_to_leave:
            return self.unstarted()
        text = error_from_json(failure.stored).render()
        log.error("%s: its process could not start; again in %gs\n%s", self.label, START_RETRY_SECONDS, text)
        stored = Raw(failure.stored.encode())
        return Outcome(self.claimed.id, self.token, "unstarted", error=stored, delay=START_RETRY_SECONDS)

    def _crashed(self) -> Outcome:
        count = self.claimed.crashes + 1
        most = self.task.config.max_crashes
        delay = CRASH_SECONDS * 2 ** min(count - 1, 6)
        again = f"; again in {delay:g}s" if count < most else ""
        log.error("%s: its process died (%s), crash %d of %d%s", self.label, self._end, count, most, again)
        return Outcome(self.claimed.id, self.token, "crashed", delay=delay)

    # ------------------------------------------------------------ how long it may take

    def _allow(self, seconds: float, margin: float) -> None:
        """End the process unless it answers within a time and a margin.

        Half of the margin begins when this loop comes to the end of the rest: where something blocks this loop, what
        the process has answered in time is still to be read.
        """
        self._stop_timer()
        self._timer = self.host.loop.call_later(seconds + margin / 2, self._allow_last, margin / 2)

    def _allow_last(self, seconds: float) -> None:
        self._timer = self.host.loop.call_later(seconds, self._end_process)

    def _end_process(self) -> None:
        if self._child is not None:
            what = "a cancel" if self.cancelled else "its timeout"
            log.warning("%s: its process does not answer to %s, and is ended", self.label, what)
            self._is_overdue = True
            self._child.kill()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    # ------------------------------------------------------------ from outside

    def request_cancel(self) -> None:
        """Pass the request on; a process that does not heed it is ended."""
        if self.cancelled:
            return
        self.cancelled = True
        if self._child is not None:
            self._tell("cancel")
            self._allow(0, CANCEL_SECONDS)

    def request_release(self, *, hard: bool = False) -> None:
        """Pass the request on; with `hard`, end the process."""
        self._leaving = True
        if not hard:
            self._tell("release")
            return
        self._hard = True
        if self._child is not None:
            self.exit = "released"
            self._child.kill()

    def abandon(self) -> None:
        """End the process: the lease is lost."""
        self.exit = "abandoned"
        if self._child is not None:
            self._child.kill()

    def _tell(self, action: Literal["cancel", "release", "abandon"]) -> None:
        if self._child is not None:
            self._child.send(Control(action))
