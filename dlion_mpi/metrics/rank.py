"""Read the metrics of one rank: one file, or one for each part of a run that was resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dlion_mpi.metrics.files import (
    FORMAT,
    UNREADABLE,
    Array,
    attributes_of,
    fitted,
    is_closed,
    last_rows,
    open_file,
    read_column,
    reason_of,
)
from dlion_mpi.metrics.names import metric_of
from dlion_mpi.metrics.notes import Notes
from dlion_mpi.metrics.records import LINKS, TABLES
from dlion_mpi.metrics.timeline import RECORDS, checked

Columns = Mapping[str, Array]

MOST_WORKERS = 100_000
"""A larger number of workers is an error in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """The metrics of one rank. ``steps`` (T,), ``evaluations`` (E,), ``transfers`` (K,) and ``waits`` (W,) are columns.

    Whole numbers are int64 and seconds float64. Values that the file lacks are NaN. ``evaluations`` has ``step``,
    ``time_s`` and the test metrics of the run.
    ``first``: row of the file at which ``steps`` begins. ``closed``: whether the writer has closed the file, at the end
    of the run or before. ``before``: the part before the run was resumed, up to the checkpoint; its rows come first.
    """

    rank: int
    workers: int
    path: Path
    attributes: Mapping[str, Any]
    steps: Columns
    evaluations: Columns
    transfers: Columns
    waits: Columns
    ended: bool
    first: int = 0
    closed: bool = False
    before: Rank | None = None

    @property
    def metrics(self) -> list[str]:
        """The names of the test metrics."""
        return [name for name in self.evaluations if name not in TABLES["evaluations"]]

    def links(self) -> Columns:
        """Read the measures of links, (T, workers) by name, with the rows of ``steps``.

        They are most of the file, so they are read on demand. All are NaN if the file has become unreadable.
        """
        rows = len(self.steps["time_s"])
        if self.before is None:
            return self._part_links(rows)
        before = self.before.links()
        after = self._part_links(rows - len(self.before.steps["time_s"]))
        return {name: np.concatenate([_widened(p[name], self.workers) for p in (before, after)]) for name in after}

    def _part_links(self, rows: int) -> Columns:
        found: dict[str, Array | None] = dict.fromkeys(LINKS)
        try:
            with open_file(self.path) as file:
                read = slice(self.first, self.first + rows)
                found = {name: read_column(file, f"links/{name}", 2, read) for name in LINKS}
        except UNREADABLE:
            pass
        return {name: fitted(values, (rows, self.workers)) for name, values in found.items()}

    def timeline(self, name: str) -> Array | None:
        """Read the records of a data set of `timeline.RECORDS`, in order of time; None if the file lacks it."""
        try:
            with open_file(self.path) as file:
                dataset = file.get(f"timeline/{name}")
                if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1:
                    return None
                return checked(name, dataset[()])
        except UNREADABLE:
            return None


def read_ranks(
    files: Mapping[int, Mapping[int, Path]], damaged: Collection[Path], notes: Notes, last: int | None
) -> list[Rank]:
    """Read every rank that can be read and join its parts. ``last``: number of steps to read of each."""
    newest = max(part for parts in files.values() for part in parts)
    parts: dict[int, dict[int, Rank | None]] = {rank: {} for rank in sorted(files)}
    for rank, paths in sorted(files.items()):
        for part, path in paths.items():
            if path in damaged:
                notes.add(f"{path.name} cannot be read: it is damaged", rank)
            else:
                parts[rank][part] = read_rank(path, rank, notes, last)
    resumed: dict[int, Mapping[str, Any]] = {}
    for found in parts.values():
        for part, one in found.items():
            if one is not None and part not in resumed:
                resumed[part] = json_attribute(one.attributes, "resumed") or {}
    joined = [_join_all(found, resumed, newest) for found in parts.values()]
    return [rank for rank in joined if rank is not None]


def read_rank(path: Path, number: int, notes: Notes, last: int | None = None) -> Rank | None:
    """Read one file without its links and timeline. Returns None, with a note, if it cannot be read."""
    try:
        closed = is_closed(path)
        with open_file(path) as file:
            attributes = attributes_of(file)
            rows = {"steps": slice(None) if last is None else last_rows(file, _names("steps"), last)}
            groups = {
                group: {name: read_column(file, f"{group}/{name}", 1, rows.get(group, slice(None))) for name in names}
                for group, names in TABLES.items()
                if group != "links"
            }
            tests = _read_metrics(file)
            lacking = [name for name in _names("links") if name not in file]
            ended = read_column(file, "ended", 0)
    except UNREADABLE as error:
        notes.add(f"{path.name} cannot be read: {reason_of(error)}", number)
        return None
    version = attributes.get("format", "unknown")
    if version != FORMAT:
        notes.add(f"file format {version}, this version reads format {FORMAT}: only common columns are shown", number)
    if groups["steps"]["time_s"] is None:
        notes.add(f"{path.name} has no valid steps/time_s, so the rank is left out", number)
        return None
    lacking += [
        f"{group}/{name}"
        for group, columns in groups.items()
        for name in columns
        if columns[name] is None and group != "waits"  # which files of earlier versions lack
    ]
    groups["evaluations"] |= tests
    if lacking:
        notes.add(f"{', '.join(lacking)} missing: left empty", number)
    workers = attributes.get("workers")
    return Rank(
        rank=number,
        workers=workers if isinstance(workers, int) and number < workers <= MOST_WORKERS else number + 1,
        path=path,
        attributes=attributes,
        steps=_aligned(groups["steps"]),
        evaluations=_aligned(groups["evaluations"]),
        transfers=_aligned(groups["transfers"]),
        waits=_aligned(groups["waits"]),
        ended=ended is not None and bool(ended[()]),
        first=rows["steps"].start or 0,
        closed=closed,
    )


def _read_metrics(file: h5py.File) -> dict[str, Array | None]:
    """The test metrics: every column of ``evaluations`` that is not declared."""
    group = file.get("evaluations")
    if not isinstance(group, h5py.Group):
        return {}
    names = [name for name in group if name not in TABLES["evaluations"]]
    columns = {metric_of(name): read_column(file, f"evaluations/{name}", 1) for name in names}
    return {name: values for name, values in columns.items() if values is not None}


def read_everything(path: Path) -> None:
    """Read all that a report or a trace would read of a file."""
    rank = read_rank(path, 0, Notes())
    if rank is not None:
        rank.links()
        for name in RECORDS:
            rank.timeline(name)


def json_attribute(attributes: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """An attribute that is a JSON object; None if it is missing or is something else."""
    try:
        value = json.loads(str(attributes.get(name, "null")))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _names(group: str) -> list[str]:
    return [f"{group}/{name}" for name in TABLES[group]]


def _aligned(columns: Mapping[str, Array | None]) -> Columns:
    """Cut columns to the shortest: the writer may have been caught, or killed, between two columns."""
    length = min((len(values) for values in columns.values() if values is not None), default=0)
    return {name: fitted(values, (length,)) for name, values in columns.items()}


def _join_all(parts: Mapping[int, Rank | None], resumed: Mapping[int, Mapping[str, Any]], newest: int) -> Rank | None:
    """Join the parts of a rank; of each, only what happened before the checkpoint from which the next resumed."""
    joined: Rank | None = None
    for part in range(newest + 1):
        if joined is not None and part in resumed:
            joined = _until(joined, resumed[part])
        following = parts.get(part)
        if following is not None:
            joined = following if joined is None else _join(joined, following)
    return joined


def _until(rank: Rank, resumed: Mapping[str, Any]) -> Rank:
    """Leave out what happened after the checkpoint from which the run resumed."""
    steps, time_s = resumed.get("steps"), resumed.get("time_s")
    if not isinstance(steps, list) or not isinstance(time_s, int | float):
        return rank
    last = steps[rank.rank] if rank.rank < len(steps) and isinstance(steps[rank.rank], int) else 0
    return dataclasses.replace(
        rank,
        before=None if rank.before is None else _until(rank.before, resumed),
        steps=_where(rank.steps, rank.steps["step"] < last),
        evaluations=_where(rank.evaluations, rank.evaluations["time_s"] <= time_s),
        transfers=_where(rank.transfers, rank.transfers["step"] <= last),
        waits=_where(rank.waits, rank.waits["time_s"] <= time_s),
    )


def _where(columns: Columns, kept: Array) -> Columns:
    return {name: values[kept] for name, values in columns.items()}


def _join(before: Rank, after: Rank) -> Rank:
    return dataclasses.replace(
        after,
        before=before,
        workers=max(before.workers, after.workers),
        steps=_concatenated(before.steps, after.steps),
        evaluations=_concatenated(before.evaluations, after.evaluations),
        transfers=_concatenated(before.transfers, after.transfers),
        waits=_concatenated(before.waits, after.waits),
    )


def _concatenated(before: Columns, after: Columns) -> Columns:
    """Join two parts. A test metric that only one of them has is NaN in the other."""
    lengths = {id(part): len(next(iter(part.values()))) for part in (before, after)}
    return {
        name: np.concatenate([fitted(part.get(name), (lengths[id(part)],)) for part in (before, after)])
        for name in {**before, **after}
    }


def _widened(values: Array, workers: int) -> Array:
    """Columns of a part that had fewer workers, with NaN for the others."""
    if values.shape[1] == workers:
        return values
    wide = np.full((len(values), workers), np.nan)
    wide[:, : values.shape[1]] = values
    return wide
