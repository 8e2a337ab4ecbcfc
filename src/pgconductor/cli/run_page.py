"""The page of one execution: facts, error, tree, and the waterfall of what it did when."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from pgconductor.cli.text import MARKS, STYLES, ago, counted, elapsed, instant, line, place_of, safe, span, state
from pgconductor.stored_error import error_from_json

Json = dict[str, Any]
NAME_WIDTH_MAX: Final = 36
VALUE_LENGTH_MAX: Final = 2_000
TOOK_WIDTH: Final = 7
MOMENT: Final = timedelta(milliseconds=1)


class Bar(NamedTuple):
    """One line of the waterfall."""

    name: str
    kind: str
    status: str
    start: datetime
    end: datetime | None
    until: datetime | None
    note: str


def print_run(out: Console, found: Json, nodes_max: int) -> None:
    """Print the page."""
    run, steps, nodes = found["run"], found["steps"], found["tree"]
    out.print()
    out.print(Text.assemble(" ", state(run["state"]), "  ", (line(run["task"]), "bold"), "  ", (run["id"], "dim")))
    running = found.get("running")
    out.print(_facts(run, running))
    _print_error(out, run)
    if len(nodes) > 1:
        _print_heading(out, "tree" if len(nodes) < nodes_max else f"tree, the first {nodes_max}")
        out.print(_tree(nodes))
    bars = [*_bars(run, steps, {node["id"]: node for node in nodes}), *_running_bars(running)]
    if len(bars) > 1:
        _print_heading(out, "waterfall" if len(steps) < nodes_max else f"waterfall, the first {nodes_max} steps")
        out.print(_waterfall(bars, out.width))
    out.print()


def _print_heading(out: Console, text: str) -> None:
    out.print(Text(f"\n {text}", style="bold"))


def _facts(run: Json, running: Json | None) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right", min_width=9)
    table.add_column(overflow="fold")
    for name, value in _rows(run, running):
        table.add_row(name, value if isinstance(value, Text) else safe(value, VALUE_LENGTH_MAX))
    return table


def _rows(run: Json, running: Json | None) -> Iterator[tuple[str, str | Text]]:
    attempt = f", attempt {run['attempt']}" if run["attempt"] > 1 else ""
    crashes = f", lost {counted(run['crashes'], 'time')} with its process" if run["crashes"] else ""
    yield "queue", f"{line(run['queue'])}, priority {run['priority']}{attempt}{crashes}"
    yield "created", f"{_clock(run['created_at'])}  {ago(run['created_at'])}"
    if run["state"] == "scheduled":
        yield "due", f"{_clock(run['run_at'])}  {ago(run['run_at'])}"
    if run["started_at"]:
        yield "started", f"{_clock(run['started_at'])}  after {span(run['created_at'], run['started_at'])}"
    if running:
        yield "runs on", f"{place_of(running)}  since {_clock(running['since'])}"
    if run["finished_at"]:
        yield (
            "finished",
            f"{_clock(run['finished_at'])}  took {span(run['started_at'] or run['created_at'], run['finished_at'])}",
        )
    if run["parent_id"]:
        yield "parent", f"{run['parent_id']}  step {line(run['parent_step'])}"
    if run["dedupe_key"]:
        yield "key", line(run["dedupe_key"])
    if run["trigger"]:
        yield "trigger", line(run["trigger"])
    if run["cancel_requested_at"]:
        yield "cancelled", f"{_clock(run['cancel_requested_at'])}  {line(run['cancel_reason'] or '')}"
    yield "payload", _json(run["payload"])
    if run["state"] == "completed":
        yield "result", _json(run["result"])


def _json(value: Any) -> str:
    raw: bytes = msgspec.json.encode(value)
    return raw.decode()


def _clock(text: str) -> str:
    at = instant(text)
    return str(at.astimezone().isoformat(" ", "milliseconds"))[:23] if at else ""


def _print_error(out: Console, run: Json) -> None:
    if not run["error"]:
        return
    stored = error_from_json(msgspec.json.encode(run["error"]))
    *frames, message = stored.render().splitlines() or [stored.type]
    earlier = f"attempt {run['attempt'] - 1}" if run["attempt"] > 1 else "an earlier attempt"
    _print_heading(out, "error" if run["finished_at"] else f"error of {earlier}")
    for frame in frames:
        out.print(Text(f" {safe(frame)}", style="dim"), soft_wrap=True)
    out.print(Text(f" {safe(message)}", style="red"), soft_wrap=True)


def _tree(nodes: list[Json]) -> Tree:
    branches: dict[str, Tree] = {}
    root = branches[nodes[0]["id"]] = Tree(_label(nodes[0]), guide_style="dim")
    for node in nodes[1:]:
        parent = branches.get(node["parent_id"])
        if parent is not None:
            branches[node["id"]] = parent.add(_label(node))
    return root


def _label(node: Json) -> Text:
    label = Text.assemble((MARKS[node["state"]], STYLES[node["state"]]), " ", line(node["task"]))
    if node["step"] and node["step"] != node["task"]:
        label.append(f" as {line(node['step'], NAME_WIDTH_MAX)}", style="dim")
    label.append(f"  {node['id']}", style="dim")
    if node["started_at"]:
        label.append(f"  {span(node['started_at'], node['finished_at'])}")
    if node["error"]:
        label.append(f"  {line(node['error'], 80)}", style="red")
    return label


def _bars(run: Json, steps: list[Json], nodes: dict[str, Json]) -> Iterator[Bar]:
    created = instant(run["created_at"])
    if created is None:
        return
    started, finished = instant(run["started_at"]), instant(run["finished_at"])
    if started:
        yield Bar("queued", "queue", "waiting", created, started, None, "")
    yield Bar(line(run["task"]), "run", run["state"], started or created, finished, None, "")
    for step in steps:
        start, end, status = instant(step["created_at"]), instant(step["finished_at"]), step["status"]
        if start is None:
            continue
        if status == "pending" and finished:
            end, status = finished, "cancelled"  # what is open at an execution's end nobody answers any more
        note = _note(step, nodes) if status == step["status"] else ""
        yield Bar(_step_name(step), step["kind"], status, start, end, instant(step["due_at"]), note)


def _running_bars(running: Json | None) -> Iterator[Bar]:
    """Yield the steps whose code runs, or that pause between two tries, as their process told with its last beat."""
    steps: list[Json] = running["steps"] if running else []
    for step in steps:
        start, again = instant(step["began_at"]), instant(step["next_at"])
        failed = f"try {step['number']} of {step['most']}" if step["most"] else ""
        if again is not None:
            failed = f"again at {_clock(step['next_at'])[11:19]}, {failed}"
        note = f"{failed}: {line(step['error'], 80)}" if failed else ""
        yield Bar(line(step["step"]), "step", "running", start or datetime.now(UTC), None, again, note)


def _step_name(step: Json) -> str:
    index = f"[{step['index']}]" if step["index"] else ""
    again = f" (round {step['round'] + 1})" if step["round"] else ""
    return f"{line(step['name'])}{index}{again}"


def _note(step: Json, nodes: dict[str, Json]) -> str:
    if step["status"] == "pending":  # its error is what it says when its time is over
        child = nodes.get(step["child_id"] or "")
        due = f"until {_clock(step['due_at'])}" if step["due_at"] else ""
        return str(child["state"]) if child else due
    return line(step["error"].get("message", ""), 80) if step["error"] else ""


def _waterfall(bars: list[Bar], width: int) -> Table:
    now = datetime.now(UTC)
    first = min(bar.start for bar in bars)
    whole = max(max(bar.end or now for bar in bars) - first, MOMENT)
    names = min(NAME_WIDTH_MAX, max(len(bar.name) for bar in bars))
    kinds = max(len(bar.kind) for bar in bars)
    notes = min(max(len(bar.note) for bar in bars), max(0, width // 4))
    scale = max(10, width - names - kinds - notes - TOOK_WIDTH - 8)
    table = Table.grid(padding=(0, 1))
    for size in (2, names, kinds, scale):
        table.add_column(no_wrap=True, overflow="ellipsis", width=size)
    table.add_column(no_wrap=True, justify="right", width=TOOK_WIDTH)
    table.add_column(no_wrap=True, overflow="ellipsis", width=notes)
    for bar in bars:
        end = bar.end or now
        drawn = _draw(bar, (bar.start - first) / whole, (end - first) / whole, scale)
        took = elapsed(max(0.0, (end - bar.start).total_seconds()))
        style = STYLES[bar.status]
        mark = Text(" ·" if bar.kind == "queue" else f" {MARKS[bar.status]}", style=style)
        note = Text(bar.note, style="red" if bar.status in ("failed", "timed_out") else "dim")
        table.add_row(mark, bar.name, Text(bar.kind, style="dim"), drawn, took, note)
    return table


def _draw(bar: Bar, start: float, end: float, width: int) -> Text:
    """Draw a bar from one share of the width to another; at least one cell, dotted while it is under way."""
    left = min(width - 1, int(start * width))
    length = max(1, min(width, round(end * width)) - left)
    cells = "┄" * length if bar.kind == "queue" else ("━" if bar.end else "╍") * length
    return Text(" " * left + cells, style="dim" if bar.kind == "queue" else STYLES[bar.status])
