"""What the demo shows: a live display on a terminal, plain lines everywhere else."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from demo_tasks import Survey
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WIDTH = 110
LEASE_SECONDS = 20


@dataclass(frozen=True)
class Snapshot:
    """How the survey stands.

    Attributes:
        completed: Files measured.
        total: Files listed; 0 before that.
        lost: Runs that were lost with their worker.
        workers: Runs held, and seconds since the last heartbeat, by process.
        steps: What the survey has recorded, with its status.
        failure: The attempt and the error of a proofreading that waits to be tried again.
    """

    completed: int
    total: int
    lost: int
    workers: dict[int, tuple[int, float]]
    steps: list[tuple[str, str]]
    failure: tuple[int, str] | None


@dataclass(frozen=True)
class WorkerLine:
    """One worker process."""

    pid: int
    is_killed: bool
    running: int
    silent_seconds: float | None

    def text(self) -> Text:
        """Describe it in a line."""
        if not self.is_killed:
            state = "starting" if self.silent_seconds is None else f"running {self.running}"
            return Text.assemble(("● ", "green"), f"worker {self.pid}  ", (state, "dim"))
        if self.silent_seconds is None:
            return Text.assemble(("✕ ", "red"), f"worker {self.pid}  ", ("killed; its runs were taken over", "dim"))
        left = max(0, LEASE_SECONDS - self.silent_seconds)
        wait = f"its lease ends in {left:.0f} s" if left else "its lease has ended"
        return Text.assemble(
            ("✕ ", "red"),
            f"worker {self.pid}  ",
            ("killed", "bold red"),
            (f"; still holds {self.running}, {wait}", "dim"),
        )


class Screen:
    """Shows the demo; a `with` block keeps the display up."""

    def __init__(self, began_at: float) -> None:
        self._began_at = began_at
        self._console = Console(highlight=False)
        if not self._console.is_terminal:
            self._console = Console(highlight=False, width=WIDTH, no_color=True)
        self._live = Live(console=self._console, refresh_per_second=10, transient=True)
        self._tenths = 0

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the display down."""
        self._live.stop()

    def event(self, text: str, style: str = "") -> None:
        """Print a line, with the time."""
        at = Text(f"{time.monotonic() - self._began_at:5.1f} s  ", style="dim")
        self._console.print(at + Text(text, style=style), soft_wrap=True)

    def killed(self, pid: int, runs: int, steps: int) -> None:
        """Tell of the kill."""
        self.event(f"SIGKILL to worker {pid}: it held {runs} runs, which had saved {steps} steps", style="bold red")

    def show(self, snapshot: Snapshot, workers: Sequence[WorkerLine]) -> None:
        """Show how it stands."""
        if self._console.is_terminal:
            self._live.update(Group(self._bar(snapshot), *(line.text() for line in workers)))
        elif snapshot.total and (tenths := snapshot.completed * 10 // snapshot.total) > self._tenths:
            self._tenths = tenths
            self.event(f"{snapshot.completed:5,} of {snapshot.total:,} files")

    def report(self, survey: Survey, expected: Survey, *, lost: int) -> bool:
        """Print the survey beside what it should be; tell whether they agree."""
        self._live.stop()
        self._console.print(_figures(survey, expected))
        for file in survey.largest:
            self._console.print(f"  {file.lines:7,} lines  {Path(file.path).name}", style="dim")
        is_once = len(survey.paths) == len(set(survey.paths))
        is_right = survey == expected and is_once
        counted = "every file is counted exactly once" if is_once else "some files are counted twice"
        verdict = f"{'equal' if survey == expected else 'NOT EQUAL'} to the direct computation; {counted}"
        self.event(f"{verdict}; {lost} runs were redone", style="bold green" if is_right else "bold red")
        return is_right

    def _bar(self, snapshot: Snapshot) -> Table:
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(1, snapshot.total), completed=snapshot.completed, width=50)
        done = f"{snapshot.completed:,} of {snapshot.total:,} files" if snapshot.total else "listing the files"
        now = next((name for name, status in snapshot.steps if status == "pending"), "")
        line.add_row(bar, done, Text(f"now: {now}" if now else "", style="dim"))
        return line


def _figures(survey: Survey, expected: Survey) -> Table:
    table = Table(title="the standard library", title_justify="left", title_style="bold")
    for name in ("", "by the workers", "directly", ""):
        table.add_column(name, justify="left" if name == "" else "right")
    rows = {
        "files": (len(survey.paths), len(expected.paths)),
        "lines": (survey.lines, expected.lines),
        "tokens": (survey.tokens, expected.tokens),
        "functions": (survey.functions, expected.functions),
        "longest line": (survey.longest_line, expected.longest_line),
    }
    for name, (found, right) in rows.items():
        table.add_row(name, f"{found:,}", f"{right:,}", "✓" if found == right else "✗")
    return table
