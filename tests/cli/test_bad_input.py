"""Arguments that mean nothing: the command says so, and has done nothing."""

import subprocess

import pytest

from tests.cli.test_cli import command, run
from tests.sql.support import Db

BYTES = '{"a": "\udcff"}'
"""What Python makes of an argument that is not UTF-8."""


@pytest.mark.parametrize("duration", ["foo", "30", "-1s", "9999999d", ""])
@pytest.mark.parametrize(
    "arguments",
    [
        ["invoke", "charge", "--wait", "--timeout"],
        ["invoke", "charge", "--timeout"],
        ["invoke", "charge", "--delay"],
        ["tasks", "limit", "charge", "5", "--per"],
    ],
)
def test_a_duration_that_is_none_is_refused_before_anything_is_done(
    database: str, db: Db, arguments: list[str], duration: str
) -> None:
    result = run(database, *arguments, duration)

    assert result.exit_code == 2
    assert f"Invalid value for '{arguments[-1]}'" in result.stderr
    assert "write it as 250ms, 30s, 15m, 1h30m or 2d" in result.stderr
    assert db.execute("select from executions").rowcount == 0


def test_a_rate_within_no_time_is_refused(database: str) -> None:
    result = run(database, "tasks", "limit", "charge", "5", "--per", "0s")

    assert result.exit_code == 2
    assert "must be more than zero" in result.stderr


@pytest.mark.parametrize("arguments", [["invoke", "charge", BYTES], ["events", "emit", "paid", BYTES]])
def test_a_payload_that_is_not_utf_8_is_refused(database: str, arguments: list[str]) -> None:
    result = subprocess.run(command(database, *arguments), capture_output=True, text=True, check=False)

    assert result.returncode == 2
    assert "surrogates not allowed" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["tasks", "limit", BYTES, "5"], ["queues", "pause", BYTES], ["runs", "list", "--task", BYTES]],
)
def test_a_name_that_is_not_utf_8_is_an_error(database: str, arguments: list[str]) -> None:
    result = subprocess.run(command(database, *arguments), capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
