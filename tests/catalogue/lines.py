"""The faults that this project is held to, as data.

`F` and a number from 1 to 95 is a line of the catalogue: what goes wrong, and what is to come of it. `P` and a number
from 1 to 50 is a fault of an earlier engine of this kind, and what is the case here instead. A test says which lines it
holds with `@pytest.mark.covers("F23", "P6")`; what no test here can hold has its reason in `REASONS`.
"""

from dataclasses import dataclass

from tests.catalogue import faults, originals


@dataclass(frozen=True)
class Line:
    """One fault.

    Attributes:
        name: As markers name it.
        group: The heading it stands under.
        fault: What goes wrong.
        expected: What is to come of it.
        reason: Why no test here holds it, else empty.
    """

    name: str
    group: str
    fault: str
    expected: str
    reason: str = ""


_NO_DASHBOARD = "the dashboard is not written yet, and nothing else serves requests"

REASONS: dict[str, str] = {
    "F89": _NO_DASHBOARD,
    "F90": _NO_DASHBOARD,
    "F92": _NO_DASHBOARD,
    "F95": "the lock file pins every package by hash; an audit asks a service on the network, which no test does",
}
"""Lines without a test here, and why."""


def _lines() -> list[Line]:
    found: list[Line] = []
    for letter, groups in (("F", faults.GROUPS), ("P", originals.GROUPS)):
        for group, rows in groups.items():
            for fault, expected in rows:
                name = f"{letter}{sum(line.name[0] == letter for line in found) + 1}"
                found.append(Line(name, group, fault, expected, REASONS.get(name, "")))
    return found


LINES = _lines()
BY_NAME = {line.name: line for line in LINES}
