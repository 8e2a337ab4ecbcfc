"""`make chaos`, or `python -m tests.fault.chaos --help`."""

import asyncio
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.fault.chaos import report
from tests.fault.chaos.plan import draw
from tests.fault.chaos.run import Result, as_json, plan_as_text, run_seed
from tests.fault.worlds import running_server


@click.command()
@click.option("--seed", default=1, show_default=True, help="The first seed.")
@click.option("--seeds", default=1, show_default=True, help="How many, one after the other.")
@click.option(
    "--results", type=Path, default=Path(".chaos/results.jsonl"), show_default=True,
    help="A line a seed is added. With several seeds, those that are there already are not run again.",
)  # fmt: skip
@click.option("--write-report", is_flag=True, help="Write docs/internals/chaos.md and chaos.json from the results.")
def main(seed: int, seeds: int, results: Path, write_report: bool) -> None:
    """Kill, stop, cut and restart real workers and a real Postgres under load, and hold it to every promise.

    Leaves with 1 when a seed failed; its logs are kept beside the results.
    """
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each write to a link that was cut
    console = Console(width=None if sys.stdout.isatty() else 140)
    results.parent.mkdir(parents=True, exist_ok=True)
    done = {each["seed"] for each in report.read(results)} if seeds > 1 else set[int]()
    failed = [
        result.seed for result in _run_all(console, [n for n in range(seed, seed + seeds) if n not in done], results)
        if result.problems
    ]  # fmt: skip
    found = report.read(results)
    console.print(report.summary(found))
    if write_report:
        report.write(found, Path("docs/internals"))
    for each in failed:
        console.print(f"[red]seed {each} failed[/]: {_home(results, each)}; again: make chaos SEED={each}")
    sys.exit(bool(failed))


def _run_all(console: Console, seeds: list[int], results: Path) -> Iterator[Result]:
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with running_server() as server, Progress(*bar, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("seeds", total=len(seeds))
        for seed in seeds:
            home = _home(results, seed)
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            (home / "plan.txt").write_text(plan_as_text(draw(seed)))
            result = asyncio.run(run_seed(server, seed, home))
            with results.open("a") as file:
                file.write(json.dumps(as_json(result)) + "\n")
            _tell(console, result)
            if result.problems:
                shutil.copy(server.log_file, home / "postgres.log")
                (home / "problems.txt").write_text("\n".join(result.problems))
            else:
                shutil.rmtree(home)
            progress.advance(task)
            yield result


def _home(results: Path, seed: int) -> Path:
    return results.parent.absolute() / f"seed-{seed}"


def _tell(console: Console, result: Result) -> None:
    word = "[red]FAILED[/]" if result.problems else "[green]ok[/]"
    console.print(
        f"seed {result.seed} {word} {result.seconds:.1f} s: {result.executions} executions,"
        f" {sum(result.faults.values())} faults, {result.crashes} runs lost with their process,"
        f" calm after {result.converge_seconds:.1f} s, {result.snapshots} snapshots",
        highlight=False,
    )
    for problem in result.problems[:5]:
        console.print(f"  {problem[:400]}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
