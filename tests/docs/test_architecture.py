"""ARCHITECTURE.md names every module, in the order that import-linter holds."""

import re
import tomllib
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "src/pgconductor"
NAME = re.compile(r"`(\w+)/?`")


def rows() -> list[list[str]]:
    """Return the modules of each row of the table, highest first."""
    table = (ROOT / "ARCHITECTURE.md").read_text().partition("\n## Modules")[2].partition("\n## ")[0]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [NAME.findall(first) for first in firsts]


def layers() -> dict[str, int]:
    """Return the layer of each module, counted from the highest."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    return {name: number for number, layer in enumerate(contract["layers"]) for name in re.findall(r"\w+", layer)}


def test_every_module_has_its_place_in_the_architecture() -> None:
    there = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}

    assert sorted(name for row in rows() for name in row) == sorted(there | folders)


def test_the_rows_are_in_the_order_of_the_layers() -> None:
    layer_of = layers()
    spans = [(min(numbers), max(numbers)) for row in rows() if (numbers := [layer_of[name] for name in row])]
    assert [pair for pair in pairwise(spans) if pair[0][1] > pair[1][0]] == []
