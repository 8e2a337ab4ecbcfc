"""The example type-checks under both checkers, with errors on the lines marked `# refused` only."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = str(ROOT / "src")
EXAMPLE = ROOT / "examples" / "orders.py"
INFERENCE = Path(__file__).with_name("inference.py")

Checker = Callable[[Path], dict[int, str]]


def errors_of_mypy(file: Path) -> dict[int, str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", file.name]
    environment = {**os.environ, "MYPYPATH": SOURCES}
    report = subprocess.run(command, cwd=file.parent, env=environment, capture_output=True, text=True, check=False)
    assert report.returncode in (0, 1), report.stdout + report.stderr
    found = re.findall(rf"^{re.escape(file.name)}:(\d+): error: (.*)$", report.stdout, re.MULTILINE)
    return {int(line): message for line, message in found}


def errors_of_pyright(file: Path) -> dict[int, str]:
    settings = {"include": [file.name], "extraPaths": [SOURCES], "typeCheckingMode": "strict", "pythonVersion": "3.11"}
    (file.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(file.parent)]
    report = subprocess.run(command, capture_output=True, text=True, check=False)
    assert report.returncode in (0, 1), report.stdout + report.stderr
    found = json.loads(report.stdout)["generalDiagnostics"]
    return {each["range"]["start"]["line"] + 1: each["message"] for each in found if each["severity"] == "error"}


@pytest.fixture(params=[errors_of_mypy, errors_of_pyright], ids=["mypy", "pyright"])
def checker(request: pytest.FixtureRequest) -> Checker:
    chosen: Checker = request.param
    return chosen


def test_example_is_refused_on_the_marked_lines_only(checker: Checker, tmp_path: Path) -> None:
    lines = EXAMPLE.read_text().splitlines()
    marked = [number for number, line in enumerate(lines, 1) if "# refused" in line]
    copy = tmp_path / "orders.py"
    copy.write_text(EXAMPLE.read_text())

    errors = checker(copy)

    assert sorted(errors) == marked, errors


def test_types_are_inferred_as_written(checker: Checker, tmp_path: Path) -> None:
    copy = tmp_path / "inference.py"
    copy.write_text(INFERENCE.read_text())

    errors = checker(copy)

    assert not errors
