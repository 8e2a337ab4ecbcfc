"""The comparison as a picture: a panel a workload, a bar a contender, ours in colour."""

from collections.abc import Iterator
from html import escape

from benchmarks.peers.results import Results
from benchmarks.peers.rows import OURS, OURS_REMOVED, ROWS, Row
from benchmarks.report import figure

SHOWN = ("drain-1", "drain-2", "latency", "enqueue", "enqueue-bulk", "parents", "steps", "steady")
COLUMNS = 2
PANEL_WIDTH, LABEL_WIDTH, BAR_WIDTH = 470, 205, 175
BAR_HEIGHT, HEAD_HEIGHT, GAP = 18, 34, 26
LABELS = {OURS_REMOVED: "pgconductor, removed"}


def draw(results: Results) -> str:
    """Return an SVG of those panels that have a figure of ours."""
    panels, bottoms = [], [GAP] * COLUMNS
    for row in _rows(results):
        bars = _bars(results, row)
        column = bottoms.index(min(bottoms))
        panels.append(_panel(row, bars, GAP + column * PANEL_WIDTH, bottoms[column]))
        bottoms[column] += HEAD_HEIGHT + len(bars) * BAR_HEIGHT + GAP
    width, height = COLUMNS * PANEL_WIDTH + GAP, max(bottoms)
    return _PICTURE.format(width=width, height=height, panels="\n".join(panels))


def _rows(results: Results) -> Iterator[Row]:
    for name in SHOWN:
        row = next(row for row in ROWS if row.measure == name)
        if results.figure(row.measure, OURS, row.detail) is not None:
            yield row


def _bars(results: Results, row: Row) -> list[tuple[str, float]]:
    figures = dict(results.peers(row.measure, detail=row.detail))
    for ours in (OURS, OURS_REMOVED):
        if (mine := results.figure(row.measure, ours, row.detail)) is not None:
            figures[ours] = mine
    return sorted(figures.items(), key=lambda bar: bar[1], reverse=not row.lower)


def _panel(row: Row, bars: list[tuple[str, float]], left: int, top: int) -> str:
    largest = max(value for _, value in bars) or 1
    better = ("p50, " if row.tail else "") + ("less is better" if row.lower else "more is better")
    lines = [f'<text x="{left}" y="{top + 12}" class="head">{escape(row.title)}</text>']
    lines.append(f'<text x="{left}" y="{top + 26}" class="unit">{escape(row.unit)}, {better}</text>')
    for place, (name, value) in enumerate(bars):
        y, kind = top + HEAD_HEIGHT + place * BAR_HEIGHT, "ours" if name in (OURS, OURS_REMOVED) else "peer"
        length = max(1, round(BAR_WIDTH * value / largest))
        start, label = left + LABEL_WIDTH, escape(LABELS.get(name, name))
        lines += [
            f'<text x="{start - 8}" y="{y + 12}" text-anchor="end">{label}</text>',
            f'<rect x="{start}" y="{y + 2}" width="{length}" height="{BAR_HEIGHT - 5}" rx="2" class="{kind}"/>',
            f'<text x="{start + length + 6}" y="{y + 12}" class="value">{figure(value)}</text>',
        ]
    return "\n".join(lines)


_PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<style>
text {{ font-family: system-ui, sans-serif; font-size: 12px; fill: #333 }}
.head {{ font-weight: 600; font-size: 13px }} .unit {{ fill: #777; font-size: 11px }} .value {{ font-size: 11px }}
.ours {{ fill: #2563eb }} .peer {{ fill: #b6bcc6 }}
</style>
<rect width="100%" height="100%" fill="#fff"/>
{panels}
</svg>
"""
