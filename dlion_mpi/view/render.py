"""Draw a `Snapshot`: as a view that fits a terminal of any size, or as plain lines."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dlion_mpi.metrics.gauges import link_gauges, rank_gauges
from dlion_mpi.metrics.names import main_metric
from dlion_mpi.metrics.records import Gauge
from dlion_mpi.view.forms import clock, metric_text, text_of
from dlion_mpi.view.lines import named_metric, progress_line
from dlion_mpi.view.snapshot import LinkSnapshot, RankSnapshot, Snapshot

Cells = list[str]

BAR = (10, 40)
"""Least and greatest width of the progress bar."""
GAP = 2
"""Spaces between columns."""
LINKS_SHARE = 3
"""A third of the lines shows links, even when the ranks do not fit."""


def view(snapshot: Snapshot, width: int, height: int) -> RenderableType:
    """Draw what fits into ``width`` characters and ``height`` lines: progress, then ranks, then links."""
    title = Text(snapshot.title, style="bold", no_wrap=True, overflow="ellipsis")
    notes = [Text(note, style="yellow", no_wrap=True, overflow="ellipsis") for note in snapshot.notes]
    parts: list[RenderableType] = [_progress(snapshot, width)]
    if height >= 6:
        parts.insert(0, title)
        parts += notes[: height // 6]
    ranks, links = list(snapshot.ranks), _slowest_first(snapshot.links())
    for_ranks, for_links = _split(height - len(parts), len(ranks), len(links))
    columns = [["rank", *(str(rank.rank) for rank in ranks)], *_columns(rank_gauges(snapshot.metrics), ranks)]
    parts += _table(columns, for_ranks, width, "ranks")
    shown = sorted(links[: max(0, for_links - 2)] if len(links) >= for_links else links, key=_ends)
    columns = [["link", *(f"{link.source}->{link.target}" for link in shown)], *_columns(link_gauges(), shown)]
    parts += _table(columns, for_links, width, "links, the slowest shown", total=len(links))
    return Group(*parts)


def render(snapshot: Snapshot, width: int, height: int, *, encoding: str = "utf-8", colour: bool = True) -> str:
    """Draw the view as text of at most ``height`` lines and ``width`` columns; ``colour``: with escape sequences."""
    drawn = io.BytesIO()
    file = io.TextIOWrapper(drawn, encoding=encoding, errors="replace", newline="")
    console = Console(
        file=file,
        width=width,
        height=height,
        force_terminal=True,
        color_system="standard" if colour else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    console.print(view(snapshot, width, height), end="", crop=True)
    file.flush()
    lines = drawn.getvalue().decode(encoding).splitlines()
    return "\n".join(line.rstrip() for line in lines[:height])


def lines(snapshot: Snapshot) -> list[str]:
    """Draw plain text: a line about the run, one per rank, then the notes."""
    ranks = [progress_line(rank) for rank in snapshot.ranks]
    return [" ".join([snapshot.title, *_status(snapshot)]), *ranks, *snapshot.notes]


def _status(snapshot: Snapshot) -> list[str]:
    """The progress of the run in words."""
    goal, share, left_s = snapshot.goal, snapshot.share(), snapshot.left_s()
    words = [] if share is None else [f"{share:.0%}"]
    elapsed = clock(snapshot.elapsed_s) + (" virtual" if snapshot.virtual else "")
    words.append(elapsed if goal.seconds is None else f"{elapsed} of {clock(goal.seconds)}")
    if left_s is not None and not snapshot.state:
        words.append(f"{clock(left_s)} left")
    metric = main_metric(snapshot.metrics) if goal.target is None else goal.target.metric
    if metric is not None:
        said = named_metric(metric, snapshot.mean(metric)) if metric in snapshot.metrics else ""
        if goal.target is not None:
            said = f"{said or f'no {metric} yet'}, target {metric_text(metric, goal.target.value)}"
        words += [said] if said else []
    return [f"{word};" for word in words[:-1]] + words[-1:] + ([f"({snapshot.state})"] if snapshot.state else [])


def _progress(snapshot: Snapshot, width: int) -> RenderableType:
    """One line: the status, after a bar if the end is known and there is room."""
    words = Text(" ".join(_status(snapshot)), no_wrap=True, overflow="ellipsis")
    share, room = snapshot.share(), width - words.cell_len - GAP
    if share is None or room < BAR[0]:
        return words
    row = Table.grid(padding=(0, GAP, 0, 0))
    row.add_row(ProgressBar(total=1.0, completed=share, width=min(room, BAR[1])), words)
    return row


def _split(room: int, ranks: int, links: int) -> tuple[int, int]:
    """Divide ``room`` lines between the tables of ranks and of links, headings included."""
    wanted_ranks, wanted_links = ranks + 1 if ranks else 0, links + 1 if links else 0
    if wanted_ranks + wanted_links <= room:
        return wanted_ranks, wanted_links
    for_links = min(wanted_links, max(room - wanted_ranks, room // LINKS_SHARE))
    if for_links < 3:  # a heading and a remark alone are useless
        for_links = 0
    return min(wanted_ranks, max(0, room - for_links)), for_links


def _columns(gauges: Sequence[Gauge], rows: Sequence[RankSnapshot | LinkSnapshot]) -> list[Cells]:
    """Heading and cells of each column. Gauges with the same heading share a column."""
    columns: dict[str, Cells] = {}
    for gauge in gauges:
        texts = [text_of(row[gauge.key], gauge.form) for row in rows]
        if gauge.head in columns:
            texts = [f"{before}/{text}" for before, text in zip(columns[gauge.head], texts, strict=True)]
        if gauge.head:
            columns[gauge.head] = texts
    return [[head, *texts] for head, texts in columns.items()]


def _table(columns: list[Cells], room: int, width: int, what: str, total: int = 0) -> list[RenderableType]:
    """At most ``room`` lines: a heading, rows, and how many of ``total`` rows are left out.

    In a narrow terminal the last columns are left out.
    """
    rows = len(columns[0]) - 1
    total = max(total, rows)
    if room < 2 or not rows:
        return []
    shown = rows if total < room else min(rows, room - 2)
    while len(columns) > 1 and sum(max(map(len, cells)) + GAP for cells in columns) - GAP > width:
        columns = columns[:-1]
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for head, *_ in columns:
        table.add_column(head, justify="right", no_wrap=True, overflow="ellipsis")
    for row in range(1, shown + 1):
        table.add_row(*(cells[row] for cells in columns))
    parts: list[RenderableType] = [table] if shown else []
    if shown < total:
        parts.append(Text(f"... {total - shown} more {what}", no_wrap=True, overflow="ellipsis"))
    return parts


def _slowest_first(links: Sequence[LinkSnapshot]) -> list[LinkSnapshot]:
    return sorted(links, key=lambda link: link["bytes_per_s"] if link["bytes_per_s"] > 0 else math.inf)


def _ends(link: LinkSnapshot) -> tuple[int, int]:
    return link.source, link.target
