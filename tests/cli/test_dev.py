"""`pgconductor dev`, a process with a worker of its own: its worker ends when it does, and as a worker ought to."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import answer, command
from tests.waiting import until

APPLICATION = """
import asyncio
from pathlib import Path
from pgconductor import Conductor, Context

app = Conductor()
HERE = Path(__file__).parent

async def wait() -> None:
    (HERE / "started").touch()
    while not (HERE / "gate").exists():
        await asyncio.sleep(0.01)

@app.task
async def linger(ctx: Context) -> None:
    await ctx.step("wait", wait)
    await ctx.sleep("rest", "1h")
"""
MODES = ["--reload", "--no-reload"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(APPLICATION)
    return tmp_path


@contextlib.contextmanager
def inherited(handler: Any, *numbers: signal.Signals) -> Generator[None]:
    """Let processes that are started now ignore these signals, or not, whatever the tests themselves run under."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, each)


@contextlib.contextmanager
def developing(database: str, folder: Path, mode: str) -> Generator["subprocess.Popen[str]"]:
    """Run `dev` until its worker has greeted; at the end, nothing of it is left."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command(database, "dev", "shop:app", mode), cwd=folder, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as dev:  # fmt: skip
        try:
            read_to(dev, "● worker")
            yield dev
        finally:
            dev.kill()
            for each in answer(database, "workers", "list"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each["pid"], signal.SIGKILL)


def read_to(dev: "subprocess.Popen[str]", words: str) -> None:
    """Read what it prints, up to a line with these words."""
    assert dev.stdout is not None
    lines: list[str] = []
    for line in dev.stdout:
        lines.append(line)
        if words in line:
            return
    raise AssertionError(f"it never said {words!r}: {''.join(lines)}")


def lingering(database: str, folder: Path) -> str:
    """Start an execution, and return its id when it is in the midst of its step."""
    id = str(answer(database, "invoke", "linger")["id"])
    asyncio.run(until((folder / "started").exists))
    return id


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_the_worker_finish_its_step(
    database: str, folder: Path, mode: str, number: signal.Signals
) -> None:
    with inherited(signal.default_int_handler, *SIGNALS), developing(database, folder, mode) as dev:
        id = lingering(database, folder)
        dev.send_signal(number)
        read_to(dev, "stopping gracefully")
        (folder / "gate").touch()

        assert dev.wait(60) == 0
        assert answer(database, "workers", "list") == []
        found = answer(database, "runs", "show", id)
        assert found["run"]["crashes"] == 0
        assert found["steps"][0]["name"] == "wait"


@pytest.mark.parametrize("mode", MODES)
def test_a_second_signal_stops_the_worker_now(database: str, folder: Path, mode: str) -> None:
    with developing(database, folder, mode) as dev:
        id = lingering(database, folder)
        dev.terminate()
        read_to(dev, "stopping gracefully")
        dev.terminate()
        read_to(dev, "stopping now")

        assert dev.wait(60) == 0
        assert answer(database, "workers", "list") == []
        assert answer(database, "runs", "show", id)["run"]["crashes"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_hang_up_that_is_ignored_ends_nothing(database: str, folder: Path, mode: str) -> None:
    (folder / "gate").touch()
    with inherited(signal.SIG_IGN, signal.SIGHUP), developing(database, folder, mode) as dev:
        dev.send_signal(signal.SIGHUP)
        lingering(database, folder)

        assert dev.poll() is None
        dev.terminate()
        assert dev.wait(60) == 0


def test_changed_code_starts_the_worker_again(database: str, folder: Path) -> None:
    with developing(database, folder, "--reload") as dev:
        (folder / "shop.py").write_text(APPLICATION + "\n")
        read_to(dev, "↻ shop.py changed, starting again")
        read_to(dev, "● worker")

        dev.terminate()
        assert dev.wait(60) == 0


def test_without_reloading_it_ends_as_its_worker_ends(database: str, folder: Path) -> None:
    (folder / "shop.py").write_text("")
    result = subprocess.run(
        command(database, "dev", "shop:app", "--no-reload"), cwd=folder, capture_output=True, text=True, check=False
    )

    assert result.returncode == 2
    assert "is not a Conductor" in result.stderr
