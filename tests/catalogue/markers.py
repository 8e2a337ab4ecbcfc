"""Which tests hold which lines: what the `covers` markers in the source say, without importing it."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, order=True)
class Covering:
    """A test that says it holds a line."""

    path: str
    test: str
    line: str

    @property
    def id(self) -> str:
        """Its name for pytest, without parameters."""
        return f"{self.path}::{self.test}"


@cache
def coverings() -> list[Covering]:
    """Return what all markers under `tests/` say, sorted."""
    found: set[Covering] = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        source = path.read_text()
        if "covers(" in source:
            found |= set(_of_module(ast.parse(source), str(path.relative_to(ROOT))))
    return sorted(found)


def tests_of(line: str) -> list[Covering]:
    """Return the tests that hold a line."""
    return [each for each in coverings() if each.line == line]


def _of_module(module: ast.Module, path: str) -> Iterator[Covering]:
    named = {
        target.id: _lines_in([node.value], {})
        for node in module.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    of_all = named.get("pytestmark", [])
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            for line in of_all + _lines_in(node.decorator_list, named):
                yield Covering(path, node.name, line)


def _lines_in(nodes: Iterable[ast.AST], named: dict[str, list[str]]) -> list[str]:
    """Return what the markers below some expressions name; a name stands for the marker that it was given."""
    found: list[str] = []
    for node in (each for top in nodes for each in ast.walk(top)):
        if isinstance(node, ast.Name):
            found += named.get(node.id, [])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "covers":
            found += [str(value.value) for value in node.args if isinstance(value, ast.Constant)]
    return found
