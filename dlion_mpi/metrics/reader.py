"""Read a run from the metrics files in its folder. Needs only NumPy and h5py.

Runs that are still active, were killed, lack ranks or come from another version are read as far as possible; the
run's ``notes`` say what is missing. docs/metrics.md describes the files.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlion_mpi.config.target import Target
from dlion_mpi.errors import UserError
from dlion_mpi.metrics.check import FileCheck
from dlion_mpi.metrics.files import find_files
from dlion_mpi.metrics.names import main_metric
from dlion_mpi.metrics.notes import Notes
from dlion_mpi.metrics.rank import Rank, json_attribute, read_ranks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as far as it can be read.

    ``workers``: number of workers, also those without a file. ``ranks``: those that were read. ``config``: options by
    ``table.key``. ``environment``, ``emulated``: micro-cloud of a simulated and of an emulated run. ``notes``: what is
    missing.
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
        """The configured strategy; "unknown" without a configuration."""
        return str(self.config.get("run.strategy", "unknown"))

    @property
    def target(self) -> Target | None:
        """The target that was configured."""
        earlier = self.config.get("run.target_accuracy")  # before targets had metrics
        try:
            text = f"accuracy>={earlier}" if earlier is not None else self.config.get("run.target")
            return None if text is None else Target.parse(str(text))
        except UserError:
            return None

    @property
    def metrics(self) -> list[str]:
        """The names of the test metrics of all ranks, the main one first."""
        found = list(dict.fromkeys(name for rank in self.ranks for name in rank.metrics))
        main = main_metric(found)
        return sorted(found, key=lambda name: name != main)

    @property
    def seconds(self) -> float:
        """Time from the beginning of training to the last step or evaluation of any rank."""
        ends = [group["time_s"] for rank in self.ranks for group in (rank.steps, rank.evaluations)]
        return max((float(times.max()) for times in ends if len(times)), default=0.0)

    def attribute(self, name: str) -> str:
        """The distinct values of an attribute, such as ``host``, in order of ranks."""
        return ", ".join(dict.fromkeys(str(rank.attributes.get(name, "")) for rank in self.ranks if rank.attributes))


def load(folder: str | os.PathLike[str], *, last: int | None = None, check: FileCheck | None = None) -> Run:
    """Read the run in a folder that ``--out`` made.

    ``last``: number of steps to read of each rank. ``check``: to be given when the same run is read again and again.
    Raises UserError if the folder holds no run that can be read.
    """
    path = Path(folder)
    files = find_files(path)
    notes = Notes()
    damaged = (check or FileCheck()).damaged(file for parts in files.values() for file in parts.values())
    ranks = read_ranks(files, damaged, notes, last)
    if not ranks:
        raise UserError(f"{path}: its metrics cannot be read: {'; '.join(notes.lines())}")
    workers = max(rank.workers for rank in ranks)
    missing = sorted(set(range(workers)) - set(files))
    if missing:
        notes.add("no metrics file", *missing)
    newest = max(part for parts in files.values() for part in parts)
    left = [rank for rank in files if newest not in files[rank]]
    if left:
        notes.add("took part only until the run was resumed with fewer ranks", *left)
    active = [rank.rank for rank in ranks if not rank.ended and rank.rank not in left]
    if active:
        notes.add(_not_ended([max(files[rank].items())[1] for rank in active]), *active)
    first = next((rank for rank in ranks if rank.rank not in left), ranks[0]).attributes
    return Run(
        path=path,
        workers=workers,
        ranks=tuple(ranks),
        config=_config(first, path, notes),
        versions={str(k): str(v) for k, v in (json_attribute(first, "versions") or {}).items()},
        environment=json_attribute(first, "environment"),
        emulated=json_attribute(first, "emulated"),
        ended=not missing and not active and len(ranks) == len(files),
        notes=notes.lines(),
    )


def load_all(folders: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read several runs, each once. Raises UserError for the first folder that holds no run."""
    distinct = {Path(folder).resolve(): folder for folder in reversed(list(folders))}
    return [load(folder) for folder in reversed(distinct.values())]


def labels(runs: Sequence[Run]) -> list[str]:
    """Short distinct names: strategies, else names of folders, else whole paths."""
    for name in (lambda run: run.strategy, lambda run: run.path.resolve().name):
        names = [name(run) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.path) for run in runs]


def _not_ended(paths: Sequence[Path]) -> str:
    ago_s = max(0.0, time.time() - max(path.stat().st_mtime for path in paths))
    return f"not ended: still running (last written {_duration(ago_s)} ago), or stopped, failed or killed"


def _duration(seconds: float) -> str:
    for unit, length in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}s"
    return f"{seconds:.0f} s"


def _config(attributes: Mapping[str, Any], path: Path, notes: Notes) -> dict[str, Any]:
    """The configuration by ``table.key``, from the file's attribute or from config.toml."""
    try:
        text = attributes.get("config") or (path / "config.toml").read_text(encoding="utf-8")
        tables = tomllib.loads(str(text))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        notes.add("the configuration cannot be read")
        return {}
    return {
        f"{table}.{key}": value
        for table, entries in tables.items()
        if isinstance(entries, dict)
        for key, value in entries.items()
    }
