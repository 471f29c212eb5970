"""A tidy table for each quantity: one row for each thing that was measured, one column for each property of it.

Every table begins with ``run`` (its label) and ``rank``. The other columns are those of docs/metrics.md, in their
units; NaN where there was nothing, or the file does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dlion_mpi.metrics.reader import Array, Columns, Rank, Run, labels
from dlion_mpi.report.settings import settings as rows_of_settings


def steps(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each step of each rank."""
    return _table(runs, lambda rank: rank.steps)


def evaluations(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each test of a rank's weights."""
    return _table(runs, lambda rank: rank.evaluations)


def transfers(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each knowledge transfer at each rank."""
    return _table(runs, lambda rank: rank.transfers)


def links(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each step of each rank and each of its peers: column ``peer``, with ``step`` and ``time_s``."""
    return _table(runs, _links)


def settings(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each setting and version, a column for each run; ``differs``: whether the runs do, these first."""
    rows = rows_of_settings(runs)
    table = pd.DataFrame([values for _, values, _ in rows], index=[name for name, _, _ in rows], columns=labels(runs))
    table.insert(0, "differs", [differs for _, _, differs in rows])
    return table.rename_axis("setting")


def _links(rank: Rank) -> Mapping[str, Array]:
    """The columns of a rank's links, its own left out: (steps x peers,) each, step by step."""
    columns: Columns = rank.links()
    peers = np.delete(np.arange(rank.workers, dtype=np.int32), rank.rank)
    count = len(rank.steps["time_s"])
    long = {
        "peer": np.tile(peers, count),
        "step": np.repeat(rank.steps["step"], len(peers)),
        "time_s": np.repeat(rank.steps["time_s"], len(peers)),
    }
    return long | {name: np.delete(values, rank.rank, axis=1).ravel() for name, values in columns.items()}


def _table(runs: Sequence[Run], columns_of: Callable[[Rank], Mapping[str, Array]]) -> pd.DataFrame:
    """The columns of all ranks of all runs, one under another."""
    names = labels(runs)
    parts = [(n, rank, dict(columns_of(rank))) for n, run in enumerate(runs) for rank in run.ranks]
    lengths = [len(next(iter(columns.values()))) for _, _, columns in parts]
    table: dict[str, Any] = {
        "run": pd.Categorical.from_codes(
            np.repeat(np.array([n for n, _, _ in parts], dtype=np.int32), lengths), pd.Index(names)
        ),
        "rank": np.repeat(np.array([rank.rank for _, rank, _ in parts], dtype=np.int32), lengths),
    }
    for name in list(parts[0][2]):
        # Column by column, each dropped as it is done: of a long run there is no room for everything twice.
        table[name] = np.concatenate([columns.pop(name) for _, _, columns in parts])
    return pd.DataFrame(table, copy=False)
