"""Plain lines on stderr: the progress of a rank, and the summary at the end of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlion_mpi.metrics.gauges import summary_gauges, summary_names
from dlion_mpi.view.forms import text_of
from dlion_mpi.view.snapshot import RankSnapshot


def progress_line(rank: RankSnapshot) -> str:
    """The progress of a rank in one line."""
    tested = f"  accuracy {rank['accuracy']:.1%}" if math.isfinite(rank["accuracy"]) else ""
    quality = np.nan_to_num(rank.links["quality"])
    sent = "".join(
        f"  ->{peer} N {quality[peer]:.1f} {count / 1e6:.1f} MB"
        for peer, count in enumerate(rank.links["bytes_sent"])
        if peer != rank.rank and math.isfinite(count)
    )
    batch = "/".join(text_of(rank[size], ".0f") for size in ("lbs", "gbs"))
    return (
        f"[{rank.rank}] {np.nan_to_num(rank['time_s']):6.1f} s  step {np.nan_to_num(rank['step']):.0f}  batch {batch}  "
        f"loss {rank['loss']:.3f}  {rank['samples_per_s']:.0f} samples/s{tested}{sent}"
    )


def summary(result: dict[str, Any], rows: Sequence[Sequence[float]]) -> str:
    """The summary at the end: a table with a row per rank, and how the run ended.

    ``result``: the run's JSON object. ``rows``: the numbers of `metrics.gauges.summary_names` by rank.
    """
    table = [["rank", *(gauge.head for gauge in summary_gauges())]]
    for rank, row in enumerate(rows):
        numbers = dict(zip(summary_names(), row, strict=True))
        table.append([str(rank), *(text_of(numbers[gauge.key], gauge.form) for gauge in summary_gauges())])
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
    accuracy, ranks = f"{result['accuracy_mean']:.2%}", "1 rank"
    if result["ranks"] > 1:
        accuracy += f", standard deviation between ranks {result['accuracy_std']:.2%}"
        ranks = f"{result['ranks']} ranks"
    lines.append(f"{result['strategy']}, {ranks}, {result['seconds']:.1f} s: test accuracy {accuracy}")
    if result["stopped"]:
        lines.append(f"stopped early: {result['stopped']}")
    if result["out"]:
        lines.append(f"metrics: {result['out']}")
    return "\n".join(["", *lines])
