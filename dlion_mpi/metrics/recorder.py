"""What a run writes: one HDF5 file per rank, ``metrics-00000.h5`` for rank 0, readable while it grows.

The files are written in HDF5's single-writer-multiple-readers mode (SWMR): open them with
``h5py.File(path, "r", swmr=True)`` at any time, also after the writer was killed; what was flushed (once a
second) is there. docs/metrics.md describes every data set.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dlion_mpi.errors import RunError
from dlion_mpi.metrics.records import Evaluation, StepRecord, Transfer
from dlion_mpi.metrics.timeline import FIRST_PIECE, PIECE, RECORDS, Phase, Unlogged
from dlion_mpi.wire import Header

FORMAT = 1
FLUSH_S = 1.0

_STEP = {
    "step": "u8",
    "time_s": "f8",
    "compute_s": "f4",
    "paced_s": "f4",
    "select_encode_s": "f4",
    "wait_s": "f4",
    "apply_s": "f4",
    "step_s": "f4",
    "mpi_cpu_s": "f8",
    "loss": "f4",
    "lbs": "u4",
    "gbs": "u4",
}
_LINK = {
    "quality": "f4",
    "bytes_sent": "u8",
    "bytes_received": "u8",
    "bytes_per_s": "f4",
    "age_s": "f4",
    "age_steps": "f4",
}
_EVALUATION = {"step": "u8", "time_s": "f8", "accuracy": "f4"}
_TRANSFER = {
    "step": "u8",
    "time_s": "f8",
    "started_step": "u8",
    "source": "u4",
    "merged": "u1",
    "payload_bytes": "u8",
}


FILE_NAME = re.compile(r"metrics-(\d{5,})(?:\.(\d+))?\.h5")
"""A rank's metrics, and which part of a run that was resumed; none for the first."""


def next_part(folder: Path) -> int:
    """The number of the part that comes after those in the folder; 0 for the first. Raises OSError."""
    matches = [FILE_NAME.fullmatch(path.name) for path in folder.iterdir()]
    return max((int(match[2] or 0) + 1 for match in matches if match), default=0)


class Recorder:
    """Writes one rank's metrics file.

    ``attributes``: configuration, versions, host, ...: text or numbers. Link data sets are (steps, n) with the
    own column unused. ``part``: of a run that was resumed, how many times; every part has a file of its own.
    """

    def __init__(self, folder: Path, rank: int, workers: int, attributes: Mapping[str, Any], part: int = 0) -> None:
        self.path = folder / (f"metrics-{rank:05d}.{part}.h5" if part else f"metrics-{rank:05d}.h5")
        self._workers = workers
        self._file = h5py.File(self.path, "w", libver="latest")
        for name, value in {"format": FORMAT, "rank": rank, "workers": workers, **attributes}.items():
            self._file.attrs[name] = value
        self._rows: dict[str, list[list[Any]]] = {"steps": [], "evaluations": [], "transfers": []}
        for group, columns in (("steps", _STEP), ("evaluations", _EVALUATION), ("transfers", _TRANSFER)):
            for name, dtype in columns.items():
                self._file.create_dataset(f"{group}/{name}", (0,), dtype, maxshape=(None,), chunks=(1024,))
        rows = max(1, 4096 // max(1, workers))
        for name, dtype in _LINK.items():
            self._file.create_dataset(
                f"links/{name}", (0, workers), dtype, maxshape=(None, workers), chunks=(rows, workers)
            )
        for name, record in RECORDS.items():
            self._file.create_dataset(f"timeline/{name}", (0,), record, maxshape=(None,), chunks=(1024,))
        # 0: running, or killed before it could say otherwise; 1: ended as it should.
        self._file.create_dataset("ended", data=np.uint8(0))
        self._file.swmr_mode = True
        self._links: dict[str, list[np.ndarray]] = {name: [] for name in _LINK}
        self._timeline: dict[str, list[tuple[Any, ...]]] = {name: [] for name in RECORDS}
        self._lock = threading.Lock()  # messages may be handed to links beside the loop
        self._pieces = np.full((2, workers), FIRST_PIECE)
        self._flushed_s = time.monotonic()
        self._broken = False

    def step(self, record: StepRecord) -> None:
        """Add a step; flushed once a second."""
        self._rows["steps"].append([getattr(record, name) for name in _STEP])
        for name, dtype in _LINK.items():
            row = np.full(self._workers, np.nan if dtype.startswith("f") else 0, dtype)
            for peer, value in getattr(record, name).items():
                row[peer] = value
            self._links[name].append(row)
        if time.monotonic() - self._flushed_s > FLUSH_S:
            self.flush()

    def evaluation(self, evaluation: Evaluation) -> None:
        """Add an evaluation."""
        self._rows["evaluations"].append([evaluation.step, evaluation.time_s, evaluation.accuracy])
        self.span(Phase.EVALUATE, evaluation.step, evaluation.time_s, evaluation.time_s + evaluation.seconds)

    def transfer(self, transfer: Transfer, time_s: float) -> None:
        """Add a finished knowledge transfer."""
        self._rows["transfers"].append(
            [
                transfer.step,
                time_s,
                transfer.started_step,
                transfer.source,
                transfer.merged,
                transfer.payload_bytes,
            ]
        )

    def span(self, phase: Phase, step: int, start_s: float, end_s: float) -> None:
        """Add what a span of time was spent on, unless it took no time."""
        if end_s > start_s:
            self._timeline["spans"].append((phase, step, start_s, end_s))

    def sent(self, peer: int, header: Header, size_bytes: int, posted_s: float) -> None:
        """Add a message to ``peer``."""
        h = header
        with self._lock:
            self._timeline["sent"].append(
                (peer, h.kind, h.step, h.sequence, size_bytes, h.quality, h.computed_at, posted_s)
            )

    def arrived(self, peer: int, sequence: int, arrived_s: float) -> None:
        """Add the arrival of a message from ``peer``."""
        self._timeline["arrived"].append((peer, sequence, arrived_s))

    def piece(self, peer: int, sent_bytes: int, received_bytes: int, began_s: float, ended_s: float) -> None:
        """Add a piece of a sum to or from ``peer``."""
        if sent_bytes:
            sequence = int(self._pieces[0, peer])
            self._timeline["sent"].append((peer, PIECE, 0, sequence, sent_bytes, np.nan, 0.0, began_s))
            self._pieces[0, peer] += 1
        if received_bytes:
            self._timeline["arrived"].append((peer, int(self._pieces[1, peer]), ended_s))
            self._pieces[1, peer] += 1

    def applied(self, header: Header, step: int, applied_s: float) -> None:
        """Add the use of a message in this rank's ``step``."""
        self._timeline["applied"].append((header.sender, header.sequence, step, applied_s))

    def flush(self) -> None:
        """Write what was added so that readers, and whoever comes after a kill, find it. Raises RunError."""
        try:
            self._write()
        except (OSError, RuntimeError) as error:  # h5py says either when a disk is full
            self._broken = True
            raise RunError(f"cannot write {self.path}: {str(error).splitlines()[0]}; is the disk full?") from None

    def _write(self) -> None:
        for group, columns in (("steps", _STEP), ("evaluations", _EVALUATION), ("transfers", _TRANSFER)):
            rows, self._rows[group] = self._rows[group], []
            if rows:
                for name, column in zip(columns, zip(*rows, strict=True), strict=True):
                    self._append(f"{group}/{name}", column)
        for name, link_rows in self._links.items():
            if link_rows:
                self._append(f"links/{name}", link_rows)
                self._links[name] = []
        with self._lock:
            timeline, self._timeline = self._timeline, {name: [] for name in RECORDS}
        for name, records in timeline.items():
            if records:
                self._append(f"timeline/{name}", np.array(records, RECORDS[name]))
        self._file.flush()
        self._flushed_s = time.monotonic()

    def close(self, *, complete: bool) -> None:
        """Flush and close; ``complete`` says that the run ended as it should. Nothing if writing has failed."""
        if self._broken:
            return
        self.flush()
        self._file["ended"][()] = np.uint8(complete)
        self._file.close()

    def _append(self, name: str, rows: Sequence[Any] | np.ndarray) -> None:
        dataset = self._file[name]
        start = dataset.shape[0]
        dataset.resize(start + len(rows), axis=0)
        dataset[start:] = np.asarray(rows)


class NoRecorder(Unlogged):
    """For a run without ``--out``: keeps nothing."""

    def step(self, record: StepRecord) -> None:
        """Nothing is kept."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """Nothing is kept."""

    def transfer(self, transfer: Transfer, time_s: float) -> None:
        """Nothing is kept."""

    def span(self, phase: Phase, step: int, start_s: float, end_s: float) -> None:
        """Nothing is kept."""

    def applied(self, header: Header, step: int, applied_s: float) -> None:
        """Nothing is kept."""

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self, *, complete: bool) -> None:
        """Nothing to close."""
