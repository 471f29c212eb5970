"""What a figure of the page consists of: plain values that become JSON, from which its chart and its table are made.

Four kinds: ``lines`` over time in one panel or several, ``bars`` of one part or several, a ``matrix``, and
``spans`` of time in rows. Numbers are rounded to what a reader can see; NaN becomes None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dlion_mpi.metrics.reader import Array

DIGITS = 4
EACH = 8
"""Up to so many workers are drawn one by one in the same chart, and have a colour each."""
ROWS = 40
"""Up to so many workers have a row each."""

MOST = 400
"""Up to so many values make a line; of more tests than that, evenly many are left out."""

Figure = dict[str, Any]
Series = dict[str, Any]
TIME = "time (s of training)"


def numbers(values: Iterable[float] | Array, digits: int = DIGITS) -> list[float | None]:
    """With so many significant digits; None for what is no finite number."""
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
    """A line. ``time_s``: its own times, where the figure has none for all. ``low``, ``high``: its band."""
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
    """Lines over time. ``y``: quantity and unit. ``band``: what bands are. ``top``, ``cap``: the least and the most
    at which the axis ends. ``log``: a logarithmic axis where values are far apart."""
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
    """Horizontal bars, a row each. ``x``: quantity and unit. ``parts``: name, colour and value by row, stacked."""
    return {
        "kind": "bars",
        "key": key,
        "title": title,
        "says": says,
        "x": x,
        "rows": list(rows),
        "parts": [{"name": name, "colour": colour, "values": numbers(values)} for name, colour, values in parts],
    }
