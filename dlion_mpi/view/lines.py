"""Plain lines on stderr: the progress of a rank, and the summary at the end of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlion_mpi.metrics.gauges import TEST, summary_gauges, summary_names
from dlion_mpi.metrics.names import form_of, main_metric
from dlion_mpi.view.forms import metric_text, text_of
from dlion_mpi.view.snapshot import RankSnapshot


def progress_line(rank: RankSnapshot) -> str:
    """The progress of a rank in one line."""
    metrics = [name.removeprefix(TEST) for name in rank.numbers if name.startswith(TEST)]
    tested = "" if (main := main_metric(metrics)) is None else named_metric(main, rank[f"{TEST}{main}"])
    tested = f"  {tested}" if tested else ""
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


def named_metric(metric: str, value: float) -> str:
    """A test metric and its value in short; empty if the value is not finite."""
    return f"{metric} {metric_text(metric, value)}" if math.isfinite(value) else ""


def summary(result: dict[str, Any], rows: Sequence[Sequence[float]], metrics: Sequence[str]) -> str:
    """The summary at the end: a table with a row per rank, and how the run ended.

    ``result``: the run's JSON object. ``rows``: the numbers of `metrics.gauges.summary_names` by rank. ``metrics``:
    names of the test metrics.
    """
    gauges, names = summary_gauges(metrics), summary_names(metrics)
    table = [["rank", *(gauge.head for gauge in gauges)]]
    for rank, row in enumerate(rows):
        numbers = dict(zip(names, row, strict=True))
        table.append([str(rank), *(text_of(numbers[gauge.key], gauge.form) for gauge in gauges)])
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
    ranks = f"{result['ranks']} rank{'s' * (result['ranks'] > 1)}"
    lines.append(f"{result['strategy']}, {ranks}, {result['seconds']:.1f} s: {_tests(result, metrics)}")
    if result["stopped"]:
        lines.append(f"stopped early: {result['stopped']}")
    if result["out"]:
        lines.append(f"metrics: {result['out']}")
    return "\n".join(["", *lines])


def _tests(result: dict[str, Any], metrics: Sequence[str]) -> str:
    """The main test metric: its mean and its spread."""
    main = main_metric(metrics)
    if main is None:
        return "no validation data"
    mean, std = (result[f"{main}_{part}"] for part in ("mean", "std"))
    text = f"test {main} {text_of(math.nan if mean is None else mean, form_of(main))}"
    if result["ranks"] > 1 and std is not None:
        text += f", standard deviation between ranks {text_of(std, form_of(main))}"
    return text
