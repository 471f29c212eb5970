"""Draw a `Snapshot`: as a view that fits a terminal of any size, or as plain lines."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dlion_mpi.view.lines import progress_line
from dlion_mpi.view.snapshot import LinkSnapshot, RankSnapshot, Snapshot

Row = TypeVar("Row", RankSnapshot, LinkSnapshot)
UNKNOWN = "-"
BAR = (10, 40)
"""Least and most characters of the progress bar."""
GAP = 2
"""Spaces between columns."""
SHORT_OF_RANKS = 3
"""Of the lines for tables, one in so many goes to links even where the ranks do not fit."""


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """``need``: of a narrow terminal's columns those with the smallest stay."""

    head: str
    need: int
    text: Callable[[Row], str]


def number(value: float, form: str = ".0f") -> str:
    """``value``, or a dash where nothing is known."""
    return format(value, form) if math.isfinite(value) else UNKNOWN


def percent(value: float, digits: int = 0) -> str:
    """0.5 is ``50%``."""
    return number(value, f".{digits}%")


def span(seconds: float) -> str:
    """A time between steps or of a message: ``3.1 ms``, ``0.21 s``, ``42 s``."""
    if not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 0.0995:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.00995 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes: ``512 B``, ``3.4 kB``, ``1.2 GB``."""
    if not math.isfinite(count):
        return UNKNOWN
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * length:
            return f"{count / length:.1f} {unit}"
    return f"{count:.0f} B"


def clock(seconds: float) -> str:
    """A length of time as a clock shows it: ``0:42``, ``1:02:03``, ``2 d 03:04``."""
    whole = round(seconds)
    minutes, hours, days = whole // 60 % 60, whole // 3600 % 24, whole // 86400
    if days:
        return f"{days} d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


RANK_COLUMNS: Sequence[Column[RankSnapshot]] = (
    Column("rank", 0, lambda rank: str(rank.rank)),
    Column("step", 1, lambda rank: number(rank.step)),
    Column("batch", 4, lambda rank: f"{number(rank.lbs)}/{number(rank.gbs)}"),
    Column("step time", 5, lambda rank: span(rank.step_s)),
    Column("loss", 2, lambda rank: number(rank.loss, ".3f")),
    Column("samples/s", 7, lambda rank: number(rank.samples_per_s)),
    Column("accuracy", 3, lambda rank: percent(rank.accuracy, 1)),
    Column("waiting", 6, lambda rank: percent(rank.waiting)),
)
LINK_COLUMNS: Sequence[Column[LinkSnapshot]] = (
    Column("link", 0, lambda link: f"{link.source}->{link.target}"),
    Column("bandwidth", 1, lambda link: f"{size(link.bytes_per_s)}/s" if link.bytes_per_s > 0 else UNKNOWN),
    Column("N", 2, lambda link: number(link.quality, ".1f")),
    Column("sent", 3, lambda link: size(link.bytes_sent)),
    Column("age", 4, lambda link: span(link.age_s)),
)


def view(snapshot: Snapshot, width: int, height: int) -> RenderableType:
    """What fits ``width`` characters and ``height`` lines: how far it is, then ranks, then links."""
    title = Text(snapshot.title, style="bold", no_wrap=True, overflow="ellipsis")
    notes = [Text(note, style="yellow", no_wrap=True, overflow="ellipsis") for note in snapshot.notes]
    parts: list[RenderableType] = [_progress(snapshot, width)]
    if height >= 6:
        parts.insert(0, title)
        parts += notes[: height // 6]
    ranks, links = list(snapshot.ranks), _slowest_first(snapshot.links())
    for_ranks, for_links = _deal(height - len(parts), len(ranks), len(links))
    parts += _table(RANK_COLUMNS, ranks, for_ranks, width, "ranks")
    shown = sorted(links[: max(0, for_links - 2)], key=_ends) if len(links) >= for_links else sorted(links, key=_ends)
    parts += _table(LINK_COLUMNS, shown, for_links, width, "links, the slowest shown", of=len(links))
    return Group(*parts)


def render(snapshot: Snapshot, width: int, height: int, *, encoding: str = "utf-8", colour: bool = True) -> str:
    """The view as text of at most ``height`` lines, none longer than ``width``; with ``colour``, escape sequences."""
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
    """Plain text: a line about the run, one per rank as `dlion train` prints it, then what there is to say."""
    found = [" ".join([snapshot.title, *_words(snapshot)])]
    for rank in snapshot.ranks:
        qualities = np.nan_to_num(rank.quality)
        links = [(peer, float(qualities[peer]), float(sent)) for peer, sent in enumerate(rank.bytes_sent) if sent > 0]
        found.append(
            progress_line(
                rank=rank.rank,
                time_s=rank.time_s,
                step=int(np.nan_to_num(rank.step)),
                batch=f"{number(rank.lbs)}/{number(rank.gbs)}",
                loss=rank.loss,
                samples_per_s=rank.samples_per_s,
                accuracy=rank.accuracy if math.isfinite(rank.accuracy) else None,
                links=links,
            )
        )
    return [*found, *snapshot.notes]


def _words(snapshot: Snapshot) -> list[str]:
    """How far the run is, in words."""
    goal, share, left_s = snapshot.goal, snapshot.share(), snapshot.left_s()
    words = [] if share is None else [percent(share)]
    elapsed = clock(snapshot.elapsed_s) + (" virtual" if snapshot.virtual else "")
    words.append(elapsed if goal.seconds is None else f"{elapsed} of {clock(goal.seconds)}")
    if left_s is not None and not snapshot.state:
        words.append(f"{clock(left_s)} left")
    if goal.target_accuracy is not None or math.isfinite(snapshot.accuracy):
        wanted = "" if goal.target_accuracy is None else f"{percent(goal.target_accuracy, 1)} wanted"
        if math.isfinite(snapshot.accuracy):
            words.append(f"accuracy {percent(snapshot.accuracy, 1)}{wanted and ' of '}{wanted}")
        else:
            words.append(f"no accuracy yet, {wanted}")
    return [f"{word};" for word in words[:-1]] + words[-1:] + ([f"({snapshot.state})"] if snapshot.state else [])


def _progress(snapshot: Snapshot, width: int) -> RenderableType:
    """One line: a bar if the end is known and there is room, and the words."""
    words = Text(" ".join(_words(snapshot)), no_wrap=True, overflow="ellipsis")
    share, room = snapshot.share(), width - words.cell_len - GAP
    if share is None or room < BAR[0]:
        return words
    row = Table.grid(padding=(0, GAP, 0, 0))
    row.add_row(ProgressBar(total=1.0, completed=share, width=min(room, BAR[1])), words)
    return row


def _deal(room: int, ranks: int, links: int) -> tuple[int, int]:
    """Lines for the table of the ranks and that of the links, their heads included."""
    wanted_ranks, wanted_links = ranks + 1 if ranks else 0, links + 1 if links else 0
    if wanted_ranks + wanted_links <= room:
        return wanted_ranks, wanted_links
    for_links = min(wanted_links, max(room - wanted_ranks, room // SHORT_OF_RANKS))
    if for_links < 3:  # a head and a remark say nothing
        for_links = 0
    return min(wanted_ranks, max(0, room - for_links)), for_links


def _table(
    columns: Sequence[Column[Row]], rows: Sequence[Row], room: int, width: int, what: str, of: int = 0
) -> list[RenderableType]:
    """At most ``room`` lines: a head, rows, and how many of ``of`` were left out."""
    count = max(of, len(rows))
    if room < 2 or not rows:
        return []
    shown = list(rows) if count < room else list(rows)[: room - 2]
    cells = {column.head: [column.text(row) for row in shown] for column in columns}
    fitting = _fitting(columns, cells, width)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for column in fitting:
        table.add_column(column.head, justify="right", no_wrap=True, overflow="ellipsis")
    for index in range(len(shown)):
        table.add_row(*(cells[column.head][index] for column in fitting))
    parts: list[RenderableType] = [table] if shown else []
    if len(shown) < count:
        parts.append(Text(f"... {count - len(shown)} more {what}", no_wrap=True, overflow="ellipsis"))
    return parts


def _fitting(columns: Sequence[Column[Row]], cells: dict[str, list[str]], width: int) -> Sequence[Column[Row]]:
    """The columns that fit: the least needed go first."""
    kept = list(columns)
    while len(kept) > 1 and sum(_width(column.head, cells) for column in kept) + GAP * (len(kept) - 1) > width:
        kept.remove(max(kept, key=lambda column: column.need))
    return kept


def _width(head: str, cells: dict[str, list[str]]) -> int:
    return max(len(text) for text in [head, *cells[head]])


def _slowest_first(links: Sequence[LinkSnapshot]) -> list[LinkSnapshot]:
    return sorted(links, key=lambda link: link.bytes_per_s if link.bytes_per_s > 0 else math.inf)


def _ends(link: LinkSnapshot) -> tuple[int, int]:
    return link.source, link.target
