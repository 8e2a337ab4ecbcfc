"""The plugin as other projects meet it: in both modes of pytest-asyncio, under xdist, and not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

APPLICATION = """
from pgconductor import Conductor, Context

app = Conductor()

@app.task
async def double(ctx: Context, number: int) -> int:
    await ctx.sleep("think", "1h")
    return await ctx.step("double", lambda: number * 2)
"""

SETTINGS = """
[pytest]
filterwarnings = error
asyncio_default_fixture_loop_scope = function
"""

TEST = """
import pytest
from application import app, double

@pytest.mark.asyncio
@pytest.mark.parametrize("number", range({count}))
async def test_double(conductor_test, number):
    t = await conductor_test(app)
    run = await double.invoke(number)
    await t.advance(hours=1)
    assert await run.result() == number * 2
"""


def run_pytest(folder: Path, *arguments: str) -> str:
    """Run pytest in a project of its own, on this session's server, and return what it printed."""
    (folder / "application.py").write_text(APPLICATION)
    (folder / "pytest.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=100)
    return done.stdout + done.stderr


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_both_modes_of_pytest_asyncio_will_do(tmp_path: Path, mode: str) -> None:
    (tmp_path / "test_it.py").write_text(TEST.format(count=2))
    assert "2 passed" in run_pytest(tmp_path, f"--asyncio-mode={mode}")


def test_a_loop_of_the_whole_session_will_do(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        TEST.format(count=2).replace("mark.asyncio", 'mark.asyncio(loop_scope="session")')
    )
    assert "2 passed" in run_pytest(tmp_path)


def test_parallel_processes_share_server_and_template(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TEST.format(count=6))
    assert "6 passed" in run_pytest(tmp_path, "-n", "3")


def test_a_crash_that_never_came_is_an_error(tmp_path: Path) -> None:
    test = TEST.format(count=1).replace("await t.advance(hours=1)", 'await t.crash_after(run, step="double"); return')
    (tmp_path / "test_it.py").write_text(test)
    output = run_pytest(tmp_path)
    assert "1 passed, 1 error" in output
    assert "is waiting, and did not crash: it never saved 'double'; it has recorded:" in output


def test_what_the_lifespan_raises_at_its_end_is_an_error(tmp_path: Path) -> None:
    test = TEST.format(count=1).replace("from application import app, double", """
from contextlib import asynccontextmanager
from pgconductor import Conductor
from application import double

@asynccontextmanager
async def lifespan():
    yield
    raise OSError("the deps do not close")

app = Conductor(lifespan=lifespan)
""").replace("run = await", "return\n    run = await")  # fmt: skip
    (tmp_path / "test_it.py").write_text(test)
    output = run_pytest(tmp_path)
    assert "1 passed, 1 error" in output
    assert "OSError: the deps do not close" in output


def test_the_kit_is_imported_by_those_who_use_it_only(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("""
import sys

def test_nothing_is_imported():
    assert not [name for name in sys.modules if name.startswith("pgconductor.testing")]
""")
    assert "1 passed" in run_pytest(tmp_path)


def test_a_server_is_started_for_a_session_and_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PGCONDUCTOR_TEST_DSN", "PGCONDUCTOR_TEST_HOME", "PGCONDUCTOR_URL", "DATABASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "pyproject.toml").write_text("")  # the root of a project without a development server
    test = TEST.format(count=1).replace("import pytest", "import os, pathlib, pytest", 1)
    test += "    pathlib.Path('home').write_text(os.environ['PGCONDUCTOR_TEST_HOME'])\n    assert str(t.dsn)\n"
    (tmp_path / "test_it.py").write_text(test)

    assert "1 passed" in run_pytest(tmp_path)
    assert not Path((tmp_path / "home").read_text()).exists()
