"""What the documentation shows is run: the blocks of a page make a program, and what it prints is what the page says.

    ```python run        a part of the page's program, which is run as `python shop.py`
    ```python test       a part of the page's tests, which are run by pytest beside it
    ```toml test         in docs/guide/testing.md: the configuration of all these tests
    ```text output       what the program prints

Other blocks are not Python.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TESTING = ROOT / "docs/guide/testing.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)#]+)")


def blocks(page: Path, info: str) -> str:
    """Return the blocks of one kind, one after the other."""
    return "\n\n".join(each["text"] for each in BLOCK.finditer(page.read_text()) if each["info"].strip() == info)


def having(info: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, info)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run(folder: Path, database: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PGCONDUCTOR_URL": database, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("page", having("python run"), ids=name)
def test_the_program_of_a_page_runs(page: Path, database: str, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(blocks(page, "python run"))

    done = run(tmp_path, database, "shop.py")

    assert done.returncode == 0, done.stderr
    if shown := blocks(page, "text output"):
        assert done.stdout == shown


@pytest.mark.parametrize("page", having("python test"), ids=name)
def test_the_tests_of_a_page_pass(page: Path, database: str, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(blocks(page, "python run"))
    (tmp_path / "test_shop.py").write_text(blocks(page, "python test"))
    (tmp_path / "pyproject.toml").write_text(blocks(TESTING, "toml test"))

    done = run(tmp_path, database, "-m", "pytest", "-q", "-p", "no:cacheprovider")

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_python_is_shown_that_is_not_run(page: Path) -> None:
    kinds = {match["info"].strip() for match in BLOCK.finditer(page.read_text())}
    assert kinds <= {"", "python run", "python test", "text output"} | ({"toml test"} if page == TESTING else set())


@pytest.mark.parametrize("page", [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [match["target"] for match in LINK.finditer(page.read_text())]
    assert [each for each in targets if not (page.parent / each).exists()] == []
