"""The figures of the page: plain values that become JSON, from which the page draws a chart and a table.

There are five kinds: ``lines`` over time in one panel or several, ``bars`` with one part or several, ``targets``, a
``matrix``, and ``spans`` of time in rows. Numbers are rounded to what a reader can see; NaN becomes None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dlion_mpi.metrics.files import Array

DIGITS = 4
EACH = 8
"""Up to this many workers have a line and a colour each. More are drawn as a median and a band."""
ROWS = 40
"""Only the first workers have a row."""
MOST = 400
"""A line has at most this many values; longer ones are thinned evenly."""

Figure = dict[str, Any]
Series = dict[str, Any]
TIME = "time (s of training)"


def numbers(values: Iterable[float] | Array, digits: int = DIGITS) -> list[float | None]:
    """Round to significant digits; None for a value that is not finite."""
    return [_rounded(float(value), digits) for value in values]


def _rounded(value: float, digits: int) -> float | None:
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded


def series(
    name: str,
    colour: int,
    y: Array,
    *,
    time_s: Array | None = None,
    low: Array | None = None,
    high: Array | None = None,
) -> Series:
    """A line. ``time_s``: its times, if the figure has no common ones. ``low``, ``high``: its band."""
    kept = np.linspace(0, len(y) - 1, min(len(y), MOST)).astype(int)
    line: Series = {"name": name, "colour": colour, "y": numbers(y[kept])}
    if time_s is not None:
        line["t"] = numbers(time_s[kept], 6)
    if low is not None and high is not None:
        line |= {"low": numbers(low[kept]), "high": numbers(high[kept])}
    return line


def lines(
    key: str,
    title: str,
    says: str,
    y: str,
    panels: Sequence[tuple[str, Sequence[Series]]],
    *,
    time_s: Array | None = None,
    band: str = "",
    log: bool = False,
    top: float | None = None,
    cap: float | None = None,
) -> Figure:
    """Lines over time.

    ``says``: what the reader sees. ``y``: quantity and unit. ``band``: meaning of the bands. ``log``: a logarithmic
    axis if values are far apart. ``top``, ``cap``: smallest and largest end of the axis.
    """
    return {
        "kind": "lines",
        "key": key,
        "title": title,
        "says": says,
        "x": TIME,
        "y": y,
        "t": None if time_s is None else numbers(time_s, 6),
        "panels": [{"title": name, "series": list(lines_)} for name, lines_ in panels],
        "band": band,
        "log": log,
        "top": top,
        "cap": cap,
    }


def bars(
    key: str,
    title: str,
    says: str,
    x: str,
    rows: Sequence[str],
    parts: Sequence[tuple[str, int, Array]],
) -> Figure:
    """Horizontal stacked bars. ``x``: quantity and unit. ``parts``: name, colour, and a value for each row."""
    return {
        "kind": "bars",
        "key": key,
        "title": title,
        "says": says,
        "x": x,
        "rows": list(rows),
        "parts": [{"name": name, "colour": colour, "values": numbers(values)} for name, colour, values in parts],
    }
