"""Read what a run has left behind: one value per run, with arrays by rank. Needs numpy and h5py only.

A run that is still going, was killed, has ranks missing or is of another version is read as far as it goes;
what cannot be shown is said in its ``notes``. docs/metrics.md describes the files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import UserError
from dlion_mpi.metrics.recorder import FILE_NAME, FORMAT
from dlion_mpi.metrics.timeline import checked

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "steps": (
        *("step", "time_s", "compute_s", "paced_s", "select_encode_s", "wait_s", "apply_s", "step_s"),
        *("loss", "lbs", "gbs", "mpi_cpu_s"),
    ),
    "links": ("quality", "bytes_sent", "bytes_received", "bytes_per_s", "age_s", "age_steps"),
    "evaluations": ("step", "time_s", "accuracy"),
    "transfers": ("step", "time_s", "started_step", "source", "merged", "payload_bytes"),
}
"""What a metrics file holds, by group."""
SIGNATURE = b"\x89HDF\r\n\x1a\n"
SWMR_WRITER = 4
"""The bit of a file's superblock that says that a writer has it, or had it when it was killed."""
LOOKS = 4
MOST_WORKERS = 100_000
"""More than this is no number of workers but a broken file."""
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError)
"""What h5py raises for a file that is cut off, is being written, or is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One rank's metrics: ``steps`` (T,), ``evaluations`` (E,) and ``transfers`` (K,) by column name.

    Whole numbers are int64, seconds float64, NaN where nothing was or the file has no such column.
    ``before``: the part of a run that was resumed which came before, as far as it counts; its rows are the first.
    ``first``: of the file's steps the first that was read. ``closed``: whether the file's writer has closed it, at
    the end or before.
    """

    rank: int
    workers: int
    path: Path
    attributes: Mapping[str, Any]
    steps: Columns
    evaluations: Columns
    transfers: Columns
    ended: bool
    first: int = 0
    closed: bool = False
    before: Rank | None = None

    def links(self) -> Columns:
        """Per link, (T, workers) by column name, row by row with ``steps``: read when asked for, since it is most.

        Of a file that has become unreadable all is NaN.
        """
        rows = len(self.steps["time_s"])
        if self.before is None:
            return self._own_links(rows)
        before = self.before.links()
        own = self._own_links(rows - len(self.before.steps["time_s"]))
        return {name: np.concatenate([_widened(part[name], self.workers) for part in (before, own)]) for name in own}

    def _own_links(self, rows: int) -> Columns:
        shape = (rows, self.workers)
        try:
            with _open(self.path) as file:
                read = slice(self.first, self.first + rows)
                found = {name: _dataset(file, f"links/{name}", 2, read) for name in COLUMNS["links"]}
        except UNREADABLE:
            found = dict.fromkeys(COLUMNS["links"])
        return {name: _fitted(values, shape) for name, values in found.items()}

    def timeline(self, name: str) -> Array | None:
        """The records of a data set of `timeline.RECORDS` in the order of time; None if it has none."""
        try:
            with _open(self.path) as file:
                dataset = file.get(f"timeline/{name}")
                if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1:
                    return None
                return checked(name, dataset[()])
        except UNREADABLE:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as far as it can be read. ``ranks``: those found, by rank; ``workers``: as many as there should be.

    ``config``: by ``table.key``. ``environment``, ``emulated``: the micro-cloud of a simulated and of an emulated run.
    ``notes``: what cannot be shown, a line each.
    """

    path: Path
    workers: int
    ranks: Sequence[Rank]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    environment: Mapping[str, Any] | None
    emulated: Mapping[str, Any] | None
    ended: bool
    notes: Sequence[str]

    @property
    def strategy(self) -> str:
        """As configured; "unknown" if the file does not say."""
        return str(self.config.get("run.strategy", "unknown"))

    @property
    def seconds(self) -> float:
        """From the beginning of training to the last step or evaluation of any rank."""
        ends = [group["time_s"] for rank in self.ranks for group in (rank.steps, rank.evaluations)]
        return max((float(times.max()) for times in ends if len(times)), default=0.0)

    def attribute(self, name: str) -> str:
        """What the ranks say of themselves, such as ``host``: all different values, in the order of the ranks."""
        return ", ".join(dict.fromkeys(str(rank.attributes.get(name, "")) for rank in self.ranks if rank.attributes))


def load(folder: str | os.PathLike[str], *, last: int | None = None) -> Run:
    """Read the run of a folder that ``--out`` made, of each rank the ``last`` steps or all. Raises UserError."""
    path = Path(folder)
    files = _files(path)
    notes = _Notes()
    newest = max(part for parts in files.values() for part in parts)
    ranks = _ranks_of(files, newest, notes, last)
    if not ranks:
        raise UserError(f"{path}: its metrics cannot be read: {'; '.join(notes.lines())}")
    workers = max(rank.workers for rank in ranks)
    missing = sorted(set(range(workers)) - set(files))
    if missing:
        notes.add("no metrics file, so nothing is shown of what happened there", *missing)
    gone = [rank for rank in files if newest not in files[rank]]
    if gone:
        notes.add("took part only until the run was resumed without them", *gone)
    ended = not missing and len(ranks) == len(files) and all(rank.ended for rank in ranks if rank.rank not in gone)
    going = [rank.rank for rank in ranks if not rank.ended and rank.rank not in gone]
    if going:
        ago_s = max(0.0, time.time() - max(max(files[rank].items())[1].stat().st_mtime for rank in going))
        notes.add(
            f"not ended: still going (last written {_duration(ago_s)} ago), or stopped, failed or killed; "
            "shown as far as it was written",
            *going,
        )
    first = next((rank for rank in ranks if rank.rank not in gone), ranks[0]).attributes
    return Run(
        path=path,
        workers=workers,
        ranks=tuple(ranks),
        config=_config(first, path, notes),
        versions={str(k): str(v) for k, v in (_table(first, "versions") or {}).items()},
        environment=_table(first, "environment"),
        emulated=_table(first, "emulated"),
        ended=ended,
        notes=notes.lines(),
    )


def load_all(folders: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read several runs, each once. Raises UserError for the first folder without one."""
    distinct = {Path(folder).resolve(): folder for folder in reversed(list(folders))}
    return [load(folder) for folder in reversed(distinct.values())]


def labels(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: its strategy if that tells them apart, else its folder's, else its whole path."""
    for name in (lambda run: run.strategy, lambda run: run.path.resolve().name):
        names = [name(run) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.path) for run in runs]


def _files(path: Path) -> dict[int, dict[int, Path]]:
    """The metrics files of a folder by rank and part. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: there is no such folder; give the folder that --out of a run has made")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; give the folder that --out of a run has made")
    try:
        matches = {file: FILE_NAME.fullmatch(file.name) for file in path.iterdir()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    found: dict[int, dict[int, Path]] = {}
    for file, match in matches.items():
        if match:
            found.setdefault(int(match[1]), {})[int(match[2] or 0)] = file
    if not found:
        inside = sorted(file.parent.name for file in path.glob("*/metrics-*.h5"))
        hint = f"but there is one in {path / inside[0]}" if inside else "give the folder that --out of a run has made"
        raise UserError(f"{path}: holds no run (no metrics-00000.h5), {hint}")
    return found


def _ranks_of(files: Mapping[int, Mapping[int, Path]], newest: int, notes: _Notes, last: int | None) -> list[Rank]:
    """Every rank that can be read, its parts joined."""
    parts = {
        number: {part: _read(file, number, notes, last) for part, file in own.items()} for number, own in files.items()
    }
    resumed: dict[int, Mapping[str, Any]] = {}
    for own in parts.values():
        for part, rank in own.items():
            if rank is not None and part not in resumed:
                resumed[part] = _table(rank.attributes, "resumed") or {}
    ranks = []
    for _, own in sorted(parts.items()):
        joined: Rank | None = None
        for part in range(newest + 1):
            if joined is not None and part in resumed:
                joined = _until(joined, resumed[part])
            following = own.get(part)
            if following is not None:
                joined = following if joined is None else _joined(joined, following)
        if joined is not None:
            ranks.append(joined)
    return ranks


def _until(rank: Rank, resumed: Mapping[str, Any]) -> Rank:
    """What counts of a rank after the run was resumed: what came before the checkpoint that it went on from."""
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
    )


def _where(columns: Columns, kept: Array) -> Columns:
    return {name: values[kept] for name, values in columns.items()}


def _joined(before: Rank, after: Rank) -> Rank:
    """Two parts of a rank as one."""
    return dataclasses.replace(
        after,
        before=before,
        workers=max(before.workers, after.workers),
        steps=_after(before.steps, after.steps),
        evaluations=_after(before.evaluations, after.evaluations),
        transfers=_after(before.transfers, after.transfers),
    )


def _after(before: Columns, after: Columns) -> Columns:
    return {name: np.concatenate([before[name], values]) for name, values in after.items()}


def _widened(values: Array, workers: int) -> Array:
    """Columns of a part with fewer workers, with none for the others."""
    if values.shape[1] == workers:
        return values
    wide = np.full((len(values), workers), np.nan)
    wide[:, : values.shape[1]] = values
    return wide


def _read(path: Path, number: int, notes: _Notes, last: int | None) -> Rank | None:
    """One rank's file, or None with a note why not."""
    try:
        closed = not _head(path)[11] & SWMR_WRITER
        with _open(path) as file:
            attributes = {name: _plain(value) for name, value in file.attrs.items()}
            rows = {"steps": slice(None) if last is None else _last(file, "steps", last)}
            groups = {
                group: {name: _dataset(file, f"{group}/{name}", 1, rows.get(group, slice(None))) for name in names}
                for group, names in COLUMNS.items()
                if group != "links"
            }
            lacking = [f"links/{name}" for name in COLUMNS["links"] if f"links/{name}" not in file]
            ended = _dataset(file, "ended", 0)
    except UNREADABLE as error:
        notes.add(f"{path.name} cannot be read: {_reason(error)}", number)
        return None
    version = attributes.get("format", "unknown")
    if version != FORMAT:
        notes.add(f"written in format {version}, this program knows {FORMAT}: what both know is shown", number)
    if groups["steps"]["time_s"] is None:
        notes.add(f"{path.name} has no steps/time_s, so nothing of it can be shown", number)
        return None
    lacking += [f"{group}/{name}" for group, columns in groups.items() for name in columns if columns[name] is None]
    if lacking:
        notes.add(f"without {', '.join(lacking)}: left empty", number)
    workers = attributes.get("workers")
    return Rank(
        rank=number,
        workers=workers if isinstance(workers, int) and number < workers <= MOST_WORKERS else number + 1,
        path=path,
        attributes=attributes,
        steps=_aligned(groups["steps"]),
        evaluations=_aligned(groups["evaluations"]),
        transfers=_aligned(groups["transfers"]),
        ended=ended is not None and bool(ended[()]),
        first=rows["steps"].start or 0,
        closed=closed,
    )


def _open(path: Path) -> h5py.File:
    """Open a metrics file, also while it is written or after its writer was killed. Raises OSError."""
    # In SWMR mode HDF5 takes what it cannot read for what is just being written, and tries again for ever. So that
    # mode is for files whose writer has not closed them, and a file that was cut off is found out beforehand.
    for _ in range(LOOKS):
        head = _head(path)
        if head.startswith(SIGNATURE) and head[8] == 3 and path.stat().st_size < int.from_bytes(head[28:36], "little"):
            time.sleep(0.05)  # unless its writer is making it longer at this moment
            continue
        written = head.startswith(SIGNATURE) and head[8] == 3 and bool(head[11] & SWMR_WRITER)
        return h5py.File(path, "r", swmr=written, locking="best-effort")
    raise OSError("truncated")


def _head(path: Path) -> bytes:
    """The superblock: of version 3, byte 11 says who writes, and from byte 28 how long the file is."""
    with open(path, "rb") as file:
        return file.read(36).ljust(36, b"\0")


def _last(file: h5py.File, group: str, count: int) -> slice:
    """The last rows that all columns of a group have."""
    columns = [file.get(f"{group}/{name}") for name in COLUMNS[group]]
    length = min((len(column) for column in columns if isinstance(column, h5py.Dataset) and column.ndim), default=0)
    return slice(max(0, length - count), length)


def _dataset(file: h5py.File, name: str, dimensions: int, rows: slice = slice(None)) -> Array | None:
    """Rows of a data set as int64 or floating point; None if it is not there or is something else."""
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != dimensions or dataset.dtype.kind not in "iuf":
        return None
    values = dataset[rows] if dimensions else dataset[()]
    if dataset.dtype.kind in "iu":
        return np.asarray(values).astype(np.int64)
    if name.endswith("/time_s") and not np.isfinite(values).all():
        return None
    return np.asarray(values)


def _aligned(columns: Mapping[str, Array | None]) -> Columns:
    """Columns of equal length: a writer that goes on, or was killed, may have written one further than another."""
    length = min((len(values) for values in columns.values() if values is not None), default=0)
    return {name: _fitted(values, (length,)) for name, values in columns.items()}


def _fitted(values: Array | None, shape: tuple[int, ...]) -> Array:
    """The values cut to a shape; where there are none, NaN."""
    if values is not None and values.shape[1:] == shape[1:] and len(values) >= shape[0]:
        return values[: shape[0]]
    if values is None or values.shape[1:] != shape[1:]:
        return np.broadcast_to(np.float64(np.nan), shape)  # which takes no memory
    fitted = np.full(shape, np.nan)
    fitted[: len(values)] = values
    return fitted


def _plain(value: Any) -> Any:
    """An attribute as Python's own type."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value


def _config(attributes: Mapping[str, Any], path: Path, notes: _Notes) -> dict[str, Any]:
    """The configuration as ``table.key``: of the file's attribute, else of the folder's config.toml."""
    try:
        text = attributes.get("config") or (path / "config.toml").read_text(encoding="utf-8")
        tables = tomllib.loads(str(text))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        notes.add("its configuration cannot be read")
        return {}
    return {
        f"{table}.{key}": value
        for table, entries in tables.items()
        if isinstance(entries, dict)
        for key, value in entries.items()
    }


def _table(attributes: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """An attribute that is a JSON object; None if it is not there or is none."""
    try:
        value = json.loads(str(attributes.get(name, "null")))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    if "lock" in text or "already open" in text:
        return "its run is just beginning, or another program holds it"
    if "signature" in text or "truncated" in text:
        return "it is no HDF5 file, or was cut off"
    return (text.splitlines() or [type(error).__name__])[0]


def _duration(seconds: float) -> str:
    for unit, length in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}s"
    return f"{seconds:.0f} s"


class _Notes:
    """Lines of what cannot be shown; what holds for several ranks is said once."""

    def __init__(self) -> None:
        self._ranks: dict[str, list[int]] = {}

    def add(self, text: str, *ranks: int) -> None:
        """A line, about some ranks or about the whole run."""
        self._ranks.setdefault(text, []).extend(ranks)

    def lines(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(f"{_ranks(ranks)}{text}" for text, ranks in self._ranks.items())


def _ranks(ranks: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` is ``"ranks 0 to 2, 5: "``."""
    if not ranks:
        return ""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{a} to {b}" if b > a + 1 else f"{a}, {b}" if b > a else f"{a}" for a, b in spans)
    return f"rank{'s' * (len(ranks) > 1)} {text}: "
