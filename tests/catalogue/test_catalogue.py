"""The markers name lines that exist, and every line has a test or a reason."""

import re

from tests.catalogue import page
from tests.catalogue.lines import BY_NAME, LINES, REASONS
from tests.catalogue.markers import ROOT, coverings


def test_the_catalogue_is_whole() -> None:
    assert [line.name for line in LINES] == [f"F{n}" for n in range(1, 96)] + [f"P{n}" for n in range(1, 51)]
    assert [line.name for line in LINES if not line.fault or not line.expected] == []
    assert set(REASONS) <= set(BY_NAME)


def test_markers_name_lines_that_exist() -> None:
    assert [f"{each.id} covers {each.line}" for each in coverings() if each.line not in BY_NAME] == []


def test_every_line_has_a_test_or_a_reason() -> None:
    held = {each.line for each in coverings()}
    assert [line.name for line in LINES if line.name not in held and not line.reason] == []


def test_the_page_has_a_row_for_every_line_and_its_links_lead_somewhere() -> None:
    text = page.render({line.name: page.PASSED for line in LINES}, "")
    assert [row.split(" | ")[0] for row in text.splitlines() if re.match(r"\| [FP]\d", row)] == [
        f"| {line.name}" for line in LINES
    ]
    targets = set(re.findall(r"\]\(([^)]+)\)", text))
    assert [target for target in targets if not (page.PAGE.parent / target).is_file()] == []


def test_lines_are_counted_apart() -> None:
    assert page.survived({"F1": page.PASSED, "F2": "failed"}) == "faults survived 1 of 95, P-list 0 of 50"
    assert page.survived({"P50": page.PASSED, "F95": page.NOT_RUN}) == "faults survived 0 of 95, P-list 1 of 50"


def test_every_promise_is_linked_to_tests_that_exist() -> None:
    page = ROOT / "docs" / "operating" / "guarantees.md"
    promises = re.split(r"^(?=\d+\. \*\*)", page.read_text(), flags=re.MULTILINE)[1:]
    links = [re.findall(r"\]\((\.\./\.\./tests/[\w/]+\.py)\)", promise) for promise in promises]
    assert len(promises) == 18
    assert [promise[:40] for promise, found in zip(promises, links, strict=True) if not found] == []
    assert [link for found in links for link in found if not (page.parent / link).is_file()] == []
