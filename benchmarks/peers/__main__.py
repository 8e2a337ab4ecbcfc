"""`make bench-peers`, or `python -m benchmarks.peers --help`."""

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from benchmarks import machine
from benchmarks.peers.environments import Package, SetupError, ensure, read_packages
from benchmarks.peers.peer import Peer
from benchmarks.peers.picture import draw
from benchmarks.peers.report import Comparison
from benchmarks.peers.results import Results
from benchmarks.peers.runner import Form, Runner
from benchmarks.server import Server, running_server
from pgconductor.cli.loop import run

RESULTS = Path("benchmarks/results")
ROUNDS = 3
MINUTES = 22.0
SAME = ("machine", "server", "settings")  # what two runs have to share for their samples to stand side by side


async def _prepare(console: Console, server: Server, packages: Sequence[Package], results: Results) -> list[Peer]:
    """Return the peers that can be measured; the others are named, with the reason."""
    ready = []
    for package in packages:
        peer = Peer(package, server)
        try:
            await peer.prepare()
        except (SetupError, RuntimeError, OSError) as reason:
            console.print(f"[yellow]{package.name} is not measured:[/] {escape(str(reason)[-600:])}")
            results.versions[package.name] = f"not measured: {str(reason).splitlines()[-1][:120]}"
            continue
        results.versions[package.name] = peer.version
        if not package.is_node:
            results.python_peers.add(package.name)
        ready.append(peer)
    return ready


def _take_over(earlier: Mapping[str, Any], conditions: Mapping[str, Any], results: Results) -> None:
    """Keep the samples of an earlier run, if they are of the same machine, server and settings."""
    for name in SAME:
        if earlier.get(name) != conditions[name]:
            raise click.UsageError(f"--resume: the run to go on with had another {name}")
    results.take_over(earlier["measures"])
    results.versions.update(earlier["versions"])


async def _compare(
    console: Console, server: Server, packages: Sequence[Package], comparison: Comparison, form: Form, output: Path
) -> None:
    peers = await _prepare(console, server, packages, comparison.results)
    estimate = form.estimate([peer.share for peer in peers])
    console.print(
        f"about {estimate:.0f} minutes if all is to be taken; {form.minutes:g} at most, and what has begun then"
    )
    keep = partial(comparison.write_json, output)
    await Runner(console, server, peers, comparison.results, form, keep).run()


@click.command()
@click.option("--rounds", type=int, help=f"How many interleaved rounds; by default {ROUNDS}, with `--quick` one.")
@click.option("--only", multiple=True, metavar="NAME", help="Repeatable; a measure or its beginning.")
@click.option("--peers", metavar="NAMES", help="Only these, separated by commas; `none` for ours alone.")
@click.option("--quick", is_flag=True, help="Leave out what takes long.")
@click.option("--full", is_flag=True, help="Measure slow peers in everything too.")
@click.option("--huge", is_flag=True, help="With ten million ready and ten million finished, which takes long to fill.")
@click.option("--minutes", type=float, default=MINUTES, show_default=True, help="When nothing more is begun.")
@click.option("--resume", is_flag=True, help="Keep what OUTPUT has of an earlier run, and take what is missing.")
@click.option("--setup", is_flag=True, help="Only make the environments of the peers.")
@click.option("--page", type=Path, help="Write the page of the documentation here, with its picture beside it.")
@click.option("--output", type=Path, default=RESULTS / "peers.json", show_default=True)
def main(
    rounds: int | None,
    only: tuple[str, ...],
    peers: str | None,
    quick: bool,
    full: bool,
    huge: bool,
    minutes: float,
    resume: bool,
    setup: bool,
    page: Path | None,
    output: Path,
) -> None:
    """Measure the engine beside its peers on one server. Leaves with 1 when a round was not correct.

    Every sample is written to OUTPUT when it was taken, so that `--resume` goes on after an interruption.
    """
    console = Console(width=None if sys.stdout.isatty() else 220)
    packages = [package for package in read_packages() if peers is None or package.name in peers.split(",")]
    if setup:
        made = [_set_up(console, package) for package in packages]
        sys.exit(not all(made))
    signal.signal(signal.SIGTERM, _interrupt)
    form = Form(rounds or (1 if quick else ROUNDS), only, quick, full, huge, minutes)
    comparison = _measured(console, packages, form, output, resume=resume)
    comparison.print(console)
    comparison.write_json(output)
    picture = (page or output).with_suffix(".svg")
    picture.write_text(draw(comparison.results))
    if page:
        comparison.write_page(page, picture.name)
    console.print(f"written to {', '.join(str(path) for path in (output, picture, page) if path)}")
    sys.exit(bool(comparison.results.faults))


def _measured(console: Console, packages: Sequence[Package], form: Form, output: Path, *, resume: bool) -> Comparison:
    results, pinned = Results(), read_packages()
    try:
        with running_server(over_tcp=True) as server:
            conditions = {"machine": machine.describe(), "server": server.describe(), "form": str(form)}
            conditions["settings"] = {package.name: dict(package.settings) for package in pinned}
            if resume and output.exists():
                _take_over(json.loads(output.read_text()), conditions, results)
            shown = [each for each in pinned if each in packages or each.name in results.versions]
            comparison = Comparison(results, conditions, shown)
            run(_compare(console, server, packages, comparison, form, output))
    except KeyboardInterrupt:
        console.print(f"interrupted; {output} has what was measured, and --resume takes the rest")
        sys.exit(128 + signal.SIGINT)
    return comparison


def _interrupt(_number: int, _frame: object) -> None:
    """End as Ctrl-C does, so that no server stays; once, as `timeout` tells a process twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.raise_signal(signal.SIGINT)


def _set_up(console: Console, package: Package) -> bool:
    try:
        ensure(package)
    except SetupError as reason:
        console.print(f"[red]{package.name}[/] {escape(str(reason))}")
        return False
    console.print(escape(f"{package.name} {' '.join(package.packages)}"))
    return True


if __name__ == "__main__":
    main()
