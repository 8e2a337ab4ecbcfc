"""One environment a peer, in `.peers/` of the repository: a virtual environment, or a folder of node modules.

BENCH_PEERS_HOME names another place, which several checkouts can share.

An environment that stands and is of the pinned versions is left as it is. One that cannot be made does not end a run:
the peer is shown as not measured, with the reason.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HOME = Path(os.environ.get("BENCH_PEERS_HOME") or ROOT / ".peers").absolute()
SCRIPTS = Path(__file__).parent / "scripts"
PEERS = Path(__file__).parent / "peers.toml"
INSTALL_SECONDS_MAX = 600
OLDEST_PYTHON = "3.11"


class SetupError(Exception):
    """A peer's environment cannot be made here; the message is the reason."""


@dataclass(frozen=True)
class Package:
    """A peer as `peers.toml` tells of it."""

    name: str
    packages: Sequence[str]
    script: str
    settings: Mapping[str, Any]
    python: str = OLDEST_PYTHON
    share: float = 1.0
    env: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def home(self) -> Path:
        """Its environment."""
        return HOME / self.name

    @property
    def is_node(self) -> bool:
        """Whether it is of the npm registry."""
        return self.script.endswith(".mjs")

    @property
    def command(self) -> list[str]:
        """What runs its script."""
        return ["node" if self.is_node else str(self.home / "bin" / "python"), str(SCRIPTS / self.script)]


def read_packages() -> list[Package]:
    """Return all peers."""
    return [Package(name, **fields) for name, fields in tomllib.loads(PEERS.read_text()).items()]


def ensure(package: Package) -> None:
    """Make the environment, unless it stands.

    Raises:
        SetupError: It cannot be made; what there is of it is made again the next time.
    """
    stamp = package.home / "installed.json"
    wanted = json.dumps([*package.packages, package.python])
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(package.home, ignore_errors=True)
    package.home.mkdir(parents=True)
    for command in _node_commands(package) if package.is_node else _python_commands(package):
        _run(command, package.home)
    stamp.write_text(wanted)


def _python_commands(package: Package) -> Iterator[Sequence[str | Path]]:
    python = package.home / "bin" / "python"
    yield [find_python(package.python), "-m", "venv", package.home]
    yield [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *package.packages]


def _node_commands(package: Package) -> Iterator[Sequence[str | Path]]:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise SetupError(f"needs {program}")
    (package.home / "package.json").write_text('{"private": true}')
    yield ["npm", "install", "--no-audit", "--no-fund", "--save-exact", *package.packages]


def find_python(oldest: str) -> str:
    """Return an interpreter that is new enough: ours, one on PATH, or one of pyenv or uv.

    Raises:
        SetupError: There is none.
    """
    at_least = tuple(map(int, oldest.split(".")))
    if sys.version_info[:2] >= at_least:
        return sys.executable
    for candidate in _pythons():
        if _is_python(candidate, at_least):
            return candidate
    raise SetupError(f"needs Python {oldest}")


def _pythons() -> Iterator[str]:
    names = [f"python3.{minor}" for minor in (13, 12, 14)]
    yield from filter(None, map(shutil.which, names))
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from map(str, sorted(pyenv.glob("3.*/bin/python")))
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python"))
    yield from map(str, sorted(uv.glob("*/bin/python3")))


def _is_python(candidate: str, at_least: tuple[int, ...]) -> bool:
    """Ask the interpreter itself: a name on PATH proves nothing."""
    code = f"import sys, venv, ensurepip; sys.exit(sys.version_info[:2] < {at_least!r})"
    return subprocess.run([candidate, "-c", code], capture_output=True, check=False).returncode == 0


def _run(command: Sequence[str | Path], cwd: Path) -> None:
    limit = INSTALL_SECONDS_MAX
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=limit, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"{command[0]}: {error}") from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise SetupError(f"{Path(command[0]).name} left with {done.returncode}: {last[0][:200]}")
