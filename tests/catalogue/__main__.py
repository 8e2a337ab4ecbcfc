"""`python -m tests.catalogue [--collect] [what pytest is to be told]`: run the tests that hold the catalogue's lines.

With `--collect` nothing runs: the page is written with the results that it had. The exit code is 1 when a test failed.
"""

import platform
import sys
from collections import defaultdict
from datetime import UTC, datetime

import pytest

from tests.catalogue import page
from tests.catalogue.lines import LINES
from tests.catalogue.markers import coverings, tests_of

_WORST_FIRST = ("failed", "not run", "skipped", "passed")


class Recorder:
    """What became of each test, over all its parameters."""

    def __init__(self) -> None:
        self._outcomes: dict[str, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the outcome of a phase; a test whose set-up or tear-down failed has failed."""
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.nodeid.partition("[")[0]].add(report.outcome)

    def of_line(self, line: str) -> str:
        """Return what became of a line: the worst of its tests, each of which counts as the worst of its runs."""
        worst = [self._of_test(each.id) for each in tests_of(line)]
        return next((outcome for outcome in _WORST_FIRST if outcome in worst), page.NOT_RUN)

    def _of_test(self, id: str) -> str:
        found = self._outcomes.get(id, {page.NOT_RUN})
        if "failed" in found:
            return "failed"
        return page.PASSED if page.PASSED in found else min(found)


def main(arguments: list[str]) -> int:
    """Run or collect, write the page, and say how many lines have passed."""
    code = 0
    told = ""
    if arguments[:1] == ["--collect"]:
        results = page.recorded()
        told = next((row.partition(". ")[2] for row in _lines_of_page() if row.startswith("Faults survived")), "")
    else:
        recorder = Recorder()
        paths = sorted({each.path for each in coverings()})
        code = int(pytest.main(["-m", "covers", "-q", *arguments, *paths], plugins=[recorder]))
        results = {line.name: recorder.of_line(line.name) for line in LINES}
        told = f"Run on {datetime.now(UTC):%Y-%m-%d} with Python {platform.python_version()}."
    page.PAGE.write_text(page.render(results, told))
    print(page.survived(results))  # noqa: T201
    return code


def _lines_of_page() -> list[str]:
    return page.PAGE.read_text().splitlines() if page.PAGE.exists() else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
