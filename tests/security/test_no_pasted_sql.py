"""No SQL of ours is put together from values: parameters, and identifiers that are quoted.

Ruff's S608 sees what looks like a statement; this looks at every call that sends one.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.covers("F81")
ROOT = Path(__file__).parent.parent.parent
SENDERS = {"execute", "executemany", "fetch", "fetchrow", "fetchval", "copy", "_execute", "_row", "Query"}
# What may stand in a statement: a schema or path that was quoted; signatures and views as the server itself wrote them.
QUOTED = {
    "', '.join((signature for signature, *_ in routines))",
    "views",
    "_quoted(",
    "quote(",
    "_path(",
    "_quote(",
    "sql.Identifier(",
    "self._schema_name()",
}


def sources() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted((ROOT / "src").rglob("*.py")):
        yield path, ast.parse(path.read_text())


def parts(node: ast.expr) -> list[str]:
    """Return what is put into a string when it is made, as source."""
    if isinstance(node, ast.JoinedStr):
        return [ast.unparse(each.value) for each in node.values if isinstance(each, ast.FormattedValue)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return [ast.unparse(node.right)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        inner = parts(node.func.value) if node.func.attr == "encode" else []
        is_format = node.func.attr == "format" and isinstance(node.func.value, ast.Constant | ast.JoinedStr)
        return inner + [ast.unparse(each) for each in node.args if is_format]
    return []


def pasted(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield what goes into the text of statements and is not quoted."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in SENDERS:
            for each in (part for argument in node.args[:2] for part in parts(argument)):
                if not any(each.startswith(quoted) for quoted in QUOTED):
                    yield node.lineno, each


def test_statements_are_not_pasted_together() -> None:
    found = [f"{path.relative_to(ROOT)}:{line}: {part}" for path, tree in sources() for line, part in pasted(tree)]
    assert found == []


@pytest.mark.parametrize(
    ("code", "is_pasted"),
    [
        ("conn.execute(f'select {x}')", True),
        ("conn.execute(f'select {x}'.encode())", True),
        ("conn.execute('select %s' % x)", True),
        ("conn.execute('select {}'.format(x))", True),
        ("cur.fetchrow(f'select {x}')", True),
        ("conn.execute('select %s', (x,))", False),
        ("conn.execute(f'listen {_quoted(x)}')", False),
    ],
)
def test_a_pasted_statement_is_seen(code: str, is_pasted: bool) -> None:
    assert bool(list(pasted(ast.parse(code)))) is is_pasted


def test_every_exception_from_the_lint_says_why() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{number}"
        for path, _ in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "S608" in line and not re.search(r"S608\s*(-|\()", line)
    ]
    assert silent == []


def test_functions_that_run_text_run_only_their_own() -> None:
    """EXECUTE stands where an expression of quoted names is run, where one of our tables is locked, and for roles."""
    running = [
        f"{path.name}: {line.strip()}"
        for path in sorted((ROOT / "src/pgconductor/sql/functions").glob("*.sql"))
        for line in path.read_text().splitlines()
        if re.search(r"\bexecute\b(?! function)", line.partition("--")[0], re.IGNORECASE)
        and not re.search(r"grant execute|'execute'|%I after|format\('execute|EXECUTE'", line)
    ]
    assert [line.partition(":")[0] for line in running] == [
        *["57_changes.sql"] * 3,
        "62_vacuum.sql",
        *["90_rights.sql"] * 6,
    ], running
