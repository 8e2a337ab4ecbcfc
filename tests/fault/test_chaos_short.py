"""A short part of `make chaos`: one seed, another each time, and what the harness itself must be able to see.

`PGCONDUCTOR_CHAOS_SEED=123 pytest tests/fault/test_chaos_short.py` draws the same programs and faults again; how they
fall against each other is the machine's. `make chaos SEED=123` does the same and keeps the logs.
"""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from psycopg.rows import DictRow

from pgconductor.embedded import EmbeddedServer
from tests.fault.chaos import model, strikes
from tests.fault.chaos.plan import KINDS, Offer, draw
from tests.fault.chaos.run import run_seed
from tests.fault.programs import Program, caught, child, detached, fail, started, step, tag, transaction


@pytest.mark.covers("F30", "F31", "F44", "F45")
@pytest.mark.timeout(300)  # above the seed's own limit, which says what is missing
async def test_chaos_a_drawn_seed_keeps_every_promise(mortal_server: EmbeddedServer, tmp_path: Path) -> None:
    seed = int(os.environ.get("PGCONDUCTOR_CHAOS_SEED") or random.SystemRandom().randrange(10**9))
    print(f"PGCONDUCTOR_CHAOS_SEED={seed}")  # noqa: T201 (pytest shows it when the test fails)
    result = await run_seed(mortal_server, seed, tmp_path)
    assert result.problems == []
    assert (result.lost, result.settled_twice, result.effects_doubled, result.never_fired) == (0, 0, 0, [])
    assert result.executions > 0


def test_a_seed_draws_the_same_plan_again_and_every_fault_there_is() -> None:
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert {strike.kind for seed in range(50) for strike in draw(seed).strikes} == set(KINDS)
    assert all(callable(getattr(strikes, kind)) for kind in KINDS)


# ---------------------------------------------------------------- what the model expects


def expected(*program: Any) -> list[tuple[str, bool, str, int]]:
    found = model.expect([tag("p"), *program], is_certain=True)
    return [(each.tag, each.is_certain, each.outcome, each.attempt) for each in found]


def test_the_model_counts_attempts_and_no_more_than_there_are() -> None:
    assert expected(fail("f", 2)) == [("p", True, "completed", 3)]
    assert expected(fail("f", 1), fail("g", 3)) == [("p", True, "completed", 4)]
    assert expected(step("a"), fail("f", 4)) == [("p", True, "failed", 4)]


def test_the_model_fails_a_parent_at_once_with_its_child_unless_it_catches() -> None:
    failing: Program = [tag("c"), fail("f", 4)]
    assert expected(child("c", *failing)) == [("p", True, "failed", 1), ("c", True, "failed", 4)]
    assert expected(caught(child("c", *failing)))[0] == ("p", True, "completed", 1)
    assert expected(fail("g", 1), child("c", *failing))[0] == ("p", True, "failed", 2)


def test_the_model_is_sure_of_what_nobody_may_cancel() -> None:
    assert expected(detached("d", tag("c"), step("s")))[1] == ("c", True, "completed", 1)
    assert [each[1] for each in expected(started("s", 1, [tag("c")], [tag("d")]))] == [True, False, False]


# ---------------------------------------------------------------- what it finds


OFFER = Offer(0, "p", "program", [tag("p"), step("a"), transaction("t")], is_keyed=True, delay=0)


def judged(*rows: dict[str, Any], recorded: Sequence[str] = ("a", "t"), accepted: str = "1") -> tuple[int, list[str]]:
    def ask(query: str) -> Sequence[DictRow]:
        if query == model.RECORDED:
            return [{"execution_id": "1", "name": name, "count": 1} for name in recorded]
        return [{"id": "1", "tag": "p", "state": "completed", "attempt": 1} | row for row in rows]

    return model.check([OFFER], {"p": accepted} if accepted else {}, ask)


def test_the_model_finds_nothing_where_all_is_well() -> None:
    assert judged({}) == (0, [])
    assert judged(accepted="", recorded=()) == (0, [])


FAULTY: list[tuple[list[dict[str, Any]], Sequence[str], int, str]] = [
    ([], (), 1, "lost"),
    ([{"state": "running"}], ("a", "t"), 1, "lost"),
    ([{"state": "failed"}], ("a", "t"), 0, "is failed in attempt 1, expected completed"),
    ([{"attempt": 2}], ("a", "t"), 0, "in attempt 2, expected completed in 1"),
    ([{}], ("a",), 0, "recorded ['a'], expected ['a', 't']"),
    ([{}, {"id": "2"}], ("a", "t"), 0, "was made 2 times"),
    ([{}, {"id": "2", "tag": "x"}], ("a", "t"), 0, "x was never offered"),
]


@pytest.mark.parametrize(("rows", "recorded", "lost", "problem"), FAULTY)
def test_the_model_finds_what_is_wrong(
    rows: list[dict[str, Any]], recorded: Sequence[str], lost: int, problem: str
) -> None:
    found, problems = judged(*rows, recorded=recorded)
    assert found == lost
    assert any(problem in each for each in problems)
