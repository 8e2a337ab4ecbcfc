"""The page `docs/internals/faults.md`: each line with its tests and what became of them when they ran last."""

from collections.abc import Mapping

from tests.catalogue.lines import LINES, Line
from tests.catalogue.markers import ROOT, tests_of

PAGE = ROOT / "docs" / "internals" / "faults.md"
NOT_RUN = "not run"
PASSED = "passed"
_HEAD = """# Faults

Written by `make faults`; not to be edited. It runs every test that names a line of the catalogue with
`@pytest.mark.covers(...)`. A line has passed when it has a test and all its tests have passed.

{told}
"""
_TABLE = "\n## {group}\n\n| | fault | expected | tests | last result |\n|---|---|---|---|---|\n"


def survived(results: Mapping[str, str]) -> str:
    """Say how many lines have passed.

    Args:
        results: What became of each line, by its name.
    """
    counts = {
        letter: sum(results.get(line.name) == PASSED for line in LINES if line.name[0] == letter) for letter in "FP"
    }
    return f"faults survived {counts['F']} of 95, P-list {counts['P']} of 50"


def render(results: Mapping[str, str], told: str) -> str:
    """Write the page.

    Args:
        results: What became of each line, by its name.
        told: When and how they ran.
    """
    text = _HEAD.format(told=f"{survived(results).capitalize().replace('p-list', 'P-list')}. {told}".strip())
    group = ""
    for line in LINES:
        if line.group != group:
            group = line.group
            text += _TABLE.format(group=group)
        text += _row(line, results.get(line.name, NOT_RUN))
    return text


def recorded() -> dict[str, str]:
    """Return the results that the page has of lines whose tests are still the same."""
    if not PAGE.exists():
        return {}
    cells = [row.split(" | ") for row in PAGE.read_text().splitlines() if row.startswith(("| F", "| P"))]
    by_name = {row[0].removeprefix("| "): row for row in cells if len(row) == 5}
    return {
        line.name: row[4].removesuffix(" |")
        for line in LINES
        if (row := by_name.get(line.name)) and row[3] == _tests(line) and tests_of(line.name)
    }


def _row(line: Line, result: str) -> str:
    shown = result if tests_of(line.name) else "none"
    return f"| {line.name} | {line.fault} | {line.expected} | {_tests(line)} | {shown} |\n"


def _tests(line: Line) -> str:
    links = [f"[{each.test.removeprefix('test_')}](../../{each.path})" for each in tests_of(line.name)]
    return ", ".join(links) or line.reason or "none yet"
