"""The house style, held: short functions and files, SQL where it belongs, nothing of one machine in the repository."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 600
SQL_MODULES = {
    *("engine.py", "queries.py", "route.py", "notify.py", "schema.py", "embedded.py", "testing.py"),
    "pytest_plugin.py",
}
SQL_FOLDERS = {"dashboard", "testing"}
VAGUE_NAMES = {"utils", "util", "common", "types", "base", "manager", "helpers"}

SQL_STATEMENT = re.compile(
    r"\s*(select\s.+|insert\s+into\s|update\s+\S+\s+set\s|delete\s+from\s|with\s+\w+\s+as\s|merge\s+into\s|truncate\s+table\s"
    r"|(create|alter|drop)\s+(table|index|schema|function|database|view|type|sequence|role|trigger)\s"
    r"|(listen|notify)\s+[a-z_]+\s*$|copy\s+\S+\s+(from|to)\s|call\s+\w+\()",
    re.IGNORECASE | re.DOTALL,
)
# Put together from halves, or this file would name what it looks for.
REGISTRY_HOSTS = [
    "python" + "hosted.org",
    "pypi" + ".org",
    "npm" + "js.org",
    "deb." + "debian.org",
    "proxy." + "golang",
]
MACHINE_PATHS = re.compile(r"(?<![\w.])/(work|root|Users/\w+|home/\w+)/")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def tracked_files() -> list[Path]:
    """Every file of the repository; where there is no git (an unpacked archive), what lies in its folders."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]
    return [p for folder in ("src", "tests", "docs", "examples", "benchmarks") for p in (ROOT / folder).rglob("*.*")]


def where(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT)}:{line}" if line else str(path.relative_to(ROOT))


def is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def function_length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function, its docstring aside."""
    first = node.body[0]
    docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring(first) else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def string_literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the strings of a module that it computes with, so no docstrings."""
    prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and is_docstring(n)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value


def may_hold_sql(path: Path) -> bool:
    inside = path.relative_to(ROOT / "src" / "pgconductor")
    return inside.name in SQL_MODULES or inside.parts[0] in SQL_FOLDERS


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""


def test_functions_are_short() -> None:
    long = [
        f"{where(path, node.lineno)} {node.name}: {length} lines"
        for path in python_files("src", "tests", "benchmarks", "examples")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := function_length(node)) > FUNCTION_LINES_MAX
    ]
    assert long == []


def test_files_are_short() -> None:
    lengths = {
        where(path): path.read_text().count("\n") for path in python_files("src", "tests", "benchmarks", "examples")
    }
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES_MAX} == {}


def test_sql_is_written_only_where_it_belongs() -> None:
    strays = [
        f"{where(path, line)}: {text.strip()[:60]}"
        for path in python_files("src")
        if not may_hold_sql(path)
        for line, text in string_literals(ast.parse(path.read_text()))
        if SQL_STATEMENT.match(text)
    ]
    assert strays == []


@pytest.mark.parametrize(
    ("text", "is_sql"),
    [
        ("select 1", True),
        ("\n  insert into ready values (1)", True),
        ("with due as (select 1) select * from due", True),
        ("drop schema x cascade", True),
        ("listen pgconductor", True),
        ("select", False),
        ("with_options", False),
        ("update the task", False),
        ("delete the directory", False),
    ],
)
def test_sql_is_recognised(text: str, is_sql: bool) -> None:
    assert bool(SQL_STATEMENT.match(text)) is is_sql


def test_modules_have_telling_names() -> None:
    vague = [where(path) for path in python_files("src") if VAGUE_NAMES & {path.stem, path.parent.name}]
    assert vague == []


def test_nothing_is_pickled() -> None:
    picklers = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
    found = [
        f"{where(path, line)} imports {name}"
        for path in python_files("src")
        for line, name in imported_modules(ast.parse(path.read_text()))
        if name.partition(".")[0] in picklers
    ]
    assert found == []


def test_every_sql_function_file_opens_with_its_contract() -> None:
    files = sorted((ROOT / "src/pgconductor/sql/functions").glob("*.sql"))
    assert [where(path) for path in files if not path.read_text().startswith(("--", "/*"))] == []


def test_repository_names_no_registry_and_no_machine() -> None:
    found: list[str] = []
    for path in tracked_files():
        if b"\0" in (content := path.read_bytes()):
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            if MACHINE_PATHS.search(line) or any(host in line for host in REGISTRY_HOSTS):
                found.append(f"{where(path, number)}: {line.strip()[:80]}")
    assert found == []
