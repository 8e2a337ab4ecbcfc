"""An installer that is killed at any statement of any migration leaves what it found, and the next one goes on."""

import re

import psycopg
import pytest

from pgconductor import schema

DIE = "\nselect pg_terminate_backend(pg_backend_pid());"
FUNCTIONS_EVERY = 25


def cuts(script: str, every: int) -> list[str]:
    """Return the beginnings of a script that end with a statement."""
    ends = [match.end() for match in re.finditer(r";\n", script) if not _is_quoted(script[: match.end()])]
    return [script[:end] for end in ends[::every]]


def _is_quoted(text: str) -> bool:
    """Tell whether a text ends inside of $$ or $a word$."""
    return len(re.findall(r"\$\w*\$", text)) % 2 == 1


@pytest.mark.covers("F78", "P44")
@pytest.mark.fault
def test_an_installer_may_be_killed_at_each_statement(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = schema._execute
    killed_count = 0
    for step in schema.pending(None):
        is_functions = step.name == "functions"
        for cut in cuts(step.script, FUNCTIONS_EVERY if is_functions else 1):
            script = cut + DIE

            def die(conn: schema.Connection, text: str, whole: str = step.script, part: str = script) -> None:
                execute(conn, part if text == whole else text)

            monkeypatch.setattr(schema, "_execute", die)
            with pytest.raises(psycopg.OperationalError):
                schema.migrate(empty)
            killed_count += 1
        monkeypatch.setattr(schema, "_execute", execute)
        with psycopg.connect(empty, autocommit=True) as conn:
            assert schema._apply_next(conn, "pgconductor") == [step.title]
    with psycopg.connect(empty, autocommit=True) as conn:
        assert schema.is_current(conn)
        assert schema.migrate(conn) == []
    assert killed_count > 50
