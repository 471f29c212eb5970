"""Tables of runs: a row per step, evaluation, transfer, or step and link.

Every table begins with the columns ``run`` (its label) and ``rank``. docs/metrics.md describes the other columns and
their units. NaN stands for a value that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dlion_mpi.metrics.files import Array, fitted
from dlion_mpi.metrics.rank import Columns, Rank
from dlion_mpi.metrics.reader import Run, labels
from dlion_mpi.report.settings import settings as rows_of_settings


def steps(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per step and rank."""
    return _table(runs, lambda rank: rank.steps)


def evaluations(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per evaluation of a rank."""
    return _table(runs, lambda rank: rank.evaluations)


def transfers(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per knowledge transfer and rank."""
    return _table(runs, lambda rank: rank.transfers)


def links(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per step, rank and peer, with ``step`` and ``time_s``."""
    return _table(runs, _links)


def settings(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per setting and version, and a column per run. Rows in which the runs differ come first."""
    rows = rows_of_settings(runs)
    table = pd.DataFrame([values for _, values, _ in rows], index=[name for name, _, _ in rows], columns=labels(runs))
    table.insert(0, "differs", [differs for _, _, differs in rows])
    return table.rename_axis("setting")


def _links(rank: Rank) -> Mapping[str, Array]:
    """The measures of a rank's links to its peers, (steps x peers,) each, ordered by step."""
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
    """Concatenate the columns of all ranks of all runs."""
    names = labels(runs)
    parts = [(n, rank, dict(columns_of(rank))) for n, run in enumerate(runs) for rank in run.ranks]
    lengths = [len(next(iter(columns.values()))) for _, _, columns in parts]
    table: dict[str, Any] = {
        "run": pd.Categorical.from_codes(
            np.repeat(np.array([n for n, _, _ in parts], dtype=np.int32), lengths), pd.Index(names)
        ),
        "rank": np.repeat(np.array([rank.rank for _, rank, _ in parts], dtype=np.int32), lengths),
    }
    for name in dict.fromkeys(name for _, _, columns in parts for name in columns):
        # Drop each column once it is copied: two copies of a long run would not fit in memory.
        own = [columns.pop(name, None) for _, _, columns in parts]
        table[name] = np.concatenate([fitted(part, (rows,)) for part, rows in zip(own, lengths, strict=True)])
    return pd.DataFrame(table, copy=False)
