"""What the workers wrote down outside the database, and what must be true of it."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycopg.rows import DictRow

from tests.fault.programs import digest

Ask = Callable[[str], Sequence[DictRow]]


@dataclass(frozen=True)
class Line:
    """One entry; `at` is on the clock that all processes of a machine share."""

    at: float
    pid: int
    execution: str
    event: str
    name: str
    value: Any


class Ledger:
    """The lines of all processes, in order."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = sorted(lines, key=lambda line: line.at)

    @classmethod
    def read(cls, folder: Path) -> "Ledger":
        """Read what has been written; the last line of a process may be cut off while it is being written."""
        texts = (text for file in folder.glob("*.jsonl") for text in file.read_text().split("\n")[:-1])
        return cls([Line(**json.loads(text)) for text in texts])

    def of(self, event: str, name: str, execution: object = None) -> list[Line]:
        """Return the lines of an event at an operation."""
        return [
            line
            for line in self.lines
            if (line.event, line.name) == (event, name) and execution in (None, line.execution)
        ]

    def runs(self, name: str) -> int:
        """Return how often the body of a step ran."""
        return len(self.of("ran", name))

    def values(self, name: str) -> set[str]:
        """Return the different values that runs saw at an operation."""
        return {json.dumps(line.value) for line in self.of("saw", name)}

    def check(self, ask: Ask) -> None:
        """Hold it against the database once everything has ended.

        A body ran at least once for each recorded step; all runs saw the one recorded value; a transaction's effect is
        there once if it was recorded, and else not at all.
        """
        problems = [*self._steps(ask), *self._effects(ask)]
        assert not problems, "\n".join(problems)

    def _steps(self, ask: Ask) -> Iterator[str]:
        ran = Counter((line.execution, line.name) for line in self.lines if line.event == "ran")
        seen: dict[tuple[str, str], set[str]] = defaultdict(set)
        for line in self.lines:
            if line.event == "saw" and isinstance(line.value, str):
                seen[line.execution, line.name].add(line.value)
        recorded = {
            (str(row["execution_id"]), row["name"]): digest(row["value"])
            for row in ask("select execution_id, name, value from steps where kind in ('step', 'transaction')")
        }
        for key, value in recorded.items():
            if ran[key] < 1 or seen[key] - {value}:
                yield f"step {key}: recorded {value!r}, ran {ran[key]} times, seen {seen[key]}"
        for key in seen.keys() - recorded.keys():
            yield f"step {key}: seen as {seen[key]} and not recorded"

    def _effects(self, ask: Ask) -> Iterator[str]:
        yield from (
            f"effect {dict(row)}"
            for row in ask("""
                select coalesce(e.execution_id, s.execution_id) as execution, coalesce(e.name, s.name) as name,
                       coalesce(e.count, 0) as effects, s.name is not null as is_recorded
                from (select execution_id, name, count(*) from public.effect group by 1, 2) e
                full join (select execution_id, name from steps where kind = 'transaction') s
                  on s.execution_id = e.execution_id and s.name = e.name
                where coalesce(e.count, 0) <> 1 or s.name is null""")
        )
