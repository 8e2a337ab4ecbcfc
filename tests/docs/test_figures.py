"""The figures in README are those of the page of `make bench-peers`, in three digits; bold where ours is first.

With `-vv`, a failure shows the rows that README must have.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs/operating/benchmarks.md").read_text()
OURS = "pgconductor"
NONE = "\N{EN DASH}"
IDLE = "idle: enqueue to start, p50 / p99"
WORKLOADS = [
    "drain 20,000 no-op jobs, 1 process",
    "drain 20,000 no-op jobs, 2 processes",
    IDLE,
    "parents with one child",
    "memoized steps, 10 each",
]


def table(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading: its head, then its rows."""
    under = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in under.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def median(cell: str) -> float | None:
    """Return the first number of a cell; None where the peer has none."""
    found = re.match(r"\d[\d,.]*", cell)
    return float(found[0].replace(",", "")) if found else None


def shown(figure: float | None) -> str:
    return NONE if figure is None else f"{float(f'{figure:.3g}'):,g}"


def figures_of_the_page(workload: str) -> dict[str, float | None]:
    """Return the median of each contender that keeps its history as it comes."""
    head, *rows = table(PAGE, "Everybody")
    (row,) = (row for row in rows if row[0] == workload)
    medians = dict(zip(head[2:], map(median, row[2:]), strict=True))
    del medians[f"{OURS}, finished work removed"]
    return medians


def column_of_readme(workload: str) -> dict[str, str]:
    """Return what README must show of a workload, by contender."""
    medians = figures_of_the_page(workload)
    known = [figure for figure in medians.values() if figure is not None]
    first = min(known) if workload == IDLE else max(known)
    unit = " ms" if workload == IDLE else ""
    cells = {name: shown(figure) + unit * (figure is not None) for name, figure in medians.items()}
    if medians[OURS] == first:
        cells[OURS] = f"**{cells[OURS]}**"
    return cells


def test_the_table_in_readme_is_the_page_s() -> None:
    columns = [column_of_readme(workload) for workload in WORKLOADS]
    expected = [" | ".join([name, *(column[name] for column in columns)]) for name in columns[0]]

    rows = table(README, "Beside others")[1:]
    found = [" | ".join([row[0].strip("*").split()[0], *row[1:-1]]) for row in rows]

    assert "\n".join(found) == "\n".join(expected)


def test_readme_names_the_versions_that_were_measured() -> None:
    versions = {name: version for name, version, *_ in table(PAGE, "Settings")[1:]}
    expected = [f"{name} {version.rpartition('.')[0]}" for name, version in versions.items()]

    found = [row[0] for row in table(README, "Beside others")[2:]]

    assert found == expected


def test_the_bare_queue_in_readme_is_the_page_s() -> None:
    rows = {name: median(cell) for name, cell in table(PAGE, "Floors")[1:]}
    assert f"A bare queue without any engine moved {shown(rows['floor-queue'])} rows/s there." in README
