"""Numbers as short texts."""

from __future__ import annotations

import math

from dlion_mpi.config.target import is_share
from dlion_mpi.metrics.names import form_of

UNKNOWN = "-"


def text_of(value: float, form: str) -> str:
    """Format a number. ``form``: "time", "bytes", "bytes/s", or a format specification; see `metrics.records.Gauge`."""
    if not math.isfinite(value):
        return UNKNOWN
    if form == "time":
        return duration(value)
    if form == "bytes":
        return size(value)
    if form == "bytes/s":
        return f"{size(value)}/s" if value > 0 else UNKNOWN
    return format(value, form)


def metric_text(metric: str, value: float) -> str:
    """Format the value of a test metric in short: ``41.0%`` of an accuracy, else four digits."""
    return text_of(value, ".1%" if is_share(metric) else form_of(metric))


def duration(seconds: float) -> str:
    """Format the time of a step or a message: ``3.1 ms``, ``0.21 s``, ``42 s``."""
    if seconds < 0.0995:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.00995 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def size(count: float) -> str:
    """Format a number of bytes: ``512 B``, ``3.4 kB``, ``1.2 GB``."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * length:
            return f"{count / length:.1f} {unit}"
    return f"{count:.0f} B"


def clock(seconds: float) -> str:
    """Format the time of a run: ``0:42``, ``1:02:03``, ``2 d 03:04``."""
    whole = round(seconds)
    minutes, hours, days = whole // 60 % 60, whole // 3600 % 24, whole // 86400
    if days:
        return f"{days} d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
