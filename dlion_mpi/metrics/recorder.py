"""Write the metrics of one rank: an HDF5 file, ``metrics-00000.h5`` for rank 0, that can be read while it grows.

The file is written in HDF5's single-writer-multiple-readers mode (SWMR). Other processes can open it at any time with
``h5py.File(path, "r", swmr=True)``, also after the writer was killed; they see everything up to the last flush. A flush
happens once a second. docs/metrics.md describes the columns.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dlion_mpi.errors import RunError
from dlion_mpi.metrics.files import FORMAT, file_name
from dlion_mpi.metrics.names import column_of
from dlion_mpi.metrics.records import LINKS, METRIC, TABLES, Evaluation, Measure, StepRecord, Transfer, Waited
from dlion_mpi.metrics.timeline import FIRST_PIECE, PIECE, RECORDS, Phase, Unlogged
from dlion_mpi.wire import Header

FLUSH_S = 1.0
"""Seconds between flushes."""
CHUNK = 1024
"""Rows of a chunk in a file."""
LINK_CHUNK = 4096
"""Values of a chunk of a measure of links."""


class Recorder:
    """Writes the metrics file of one rank.

    ``attributes``: configuration, versions, host and so on, as text or numbers. ``part``: how often the run was
    resumed; each part has its own file. ``metrics``: names of the test metrics, the same in every evaluation.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        workers: int,
        attributes: Mapping[str, Any],
        part: int = 0,
        *,
        metrics: Sequence[str] = (),
    ) -> None:
        self.path = folder / file_name(rank, part)
        self._workers, self._metrics = workers, tuple(metrics)
        self._rows: dict[str, list[Any]] = {"steps": [], "evaluations": [], "transfers": [], "waits": []}
        self._timeline: dict[str, list[tuple[Any, ...]]] = {name: [] for name in RECORDS}
        self._lock = threading.Lock()  # the background encoder posts messages too
        self._pieces = np.full((2, workers), FIRST_PIECE)
        self._file = h5py.File(self.path, "w", libver="latest")
        for name, value in {"format": FORMAT, "rank": rank, "workers": workers, **attributes}.items():
            self._file.attrs[name] = value
        self._create_columns()
        self._file.swmr_mode = True
        self._flushed_s = time.monotonic()
        self._broken = False

    def _create_columns(self) -> None:
        rows = max(1, LINK_CHUNK // max(1, self._workers))
        for group, columns in TABLES.items():
            tail, chunks = ((self._workers,), (rows, self._workers)) if group == "links" else ((), (CHUNK,))
            for name, measure in columns.items():
                self._create(f"{group}/{name}", measure.dtype, tail, chunks)
        for metric in self._metrics:
            self._create(f"evaluations/{column_of(metric)}", METRIC.dtype, (), (CHUNK,))
        for name, dtype in RECORDS.items():
            self._create(f"timeline/{name}", dtype, (), (CHUNK,))
        # 0 until the run ends without an error.
        self._file.create_dataset("ended", data=np.uint8(0))

    def _create(self, name: str, dtype: Any, tail: tuple[int, ...], chunks: tuple[int, ...]) -> None:
        self._file.create_dataset(name, (0, *tail), dtype, maxshape=(None, *tail), chunks=chunks)

    def step(self, record: StepRecord) -> None:
        """Add a step. Flush once a second."""
        self._rows["steps"].append(record)
        if time.monotonic() - self._flushed_s > FLUSH_S:
            self.flush()

    def evaluation(self, evaluation: Evaluation) -> None:
        """Add an evaluation."""
        self._rows["evaluations"].append(evaluation)
        self.span(Phase.EVALUATE, evaluation.step, evaluation.time_s, evaluation.time_s + evaluation.seconds)

    def transfer(self, transfer: Transfer, time_s: float) -> None:
        """Add a knowledge transfer that finished at ``time_s``."""
        self._rows["transfers"].append(dataclasses.replace(transfer, time_s=time_s))

    def waited(self, waits: Sequence[Waited]) -> None:
        """Add a wait of unusual length, and flush: it may be the last that readers see for long."""
        self._rows["waits"].extend(waits)
        self.flush()

    def span(self, phase: Phase, step: int, start_s: float, end_s: float) -> None:
        """Add a span of time, unless it is empty."""
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
        """Add a piece of an all-reduce that went to ``peer``, came from it, or both."""
        if sent_bytes:
            sequence = int(self._pieces[0, peer])
            self._timeline["sent"].append((peer, PIECE, 0, sequence, sent_bytes, np.nan, 0.0, began_s))
            self._pieces[0, peer] += 1
        if received_bytes:
            self._timeline["arrived"].append((peer, int(self._pieces[1, peer]), ended_s))
            self._pieces[1, peer] += 1

    def applied(self, header: Header, step: int, applied_s: float) -> None:
        """Add that this rank applied a message in its step ``step``."""
        self._timeline["applied"].append((header.sender, header.sequence, step, applied_s))

    def flush(self) -> None:
        """Write everything so far, so that readers see it, even if this process is killed. Raises RunError."""
        try:
            self._write()
        except (OSError, RuntimeError) as error:  # h5py raises either when a disk is full
            self._broken = True
            raise RunError(f"cannot write {self.path}: {str(error).splitlines()[0]}; is the disk full?") from None

    def _write(self) -> None:
        rows, self._rows = self._rows, {group: [] for group in self._rows}
        for group, records in rows.items():
            if records:
                for name in TABLES[group]:
                    self._append(f"{group}/{name}", [getattr(record, name) for record in records])
        if rows["evaluations"]:
            for name in self._metrics:
                self._append(f"evaluations/{column_of(name)}", [e.metrics[name] for e in rows["evaluations"]])
        if rows["steps"]:
            for name, measure in LINKS.items():
                self._append(
                    f"links/{name}", self._by_peer(measure, [getattr(record, name) for record in rows["steps"]])
                )
        with self._lock:
            timeline, self._timeline = self._timeline, {name: [] for name in RECORDS}
        for name, entries in timeline.items():
            if entries:
                self._append(f"timeline/{name}", np.array(entries, RECORDS[name]))
        self._file.flush()
        self._flushed_s = time.monotonic()

    def _by_peer(self, measure: Measure, steps: Sequence[Mapping[int, float]]) -> np.ndarray:
        """Values of a measure of links, (steps, workers); NaN, or 0 in a column of whole numbers, where none is."""
        values = np.full((len(steps), self._workers), np.nan if measure.dtype.startswith("f") else 0, measure.dtype)
        for row, by_peer in zip(values, steps, strict=True):
            for peer, value in by_peer.items():
                row[peer] = value
        return values

    def _append(self, name: str, rows: Sequence[Any] | np.ndarray) -> None:
        dataset = self._file[name]
        start = dataset.shape[0]
        dataset.resize(start + len(rows), axis=0)
        dataset[start:] = np.asarray(rows)

    def close(self, *, complete: bool) -> None:
        """Flush and close the file, unless writing failed before. ``complete``: the run ended without an error."""
        if self._broken:
            return
        self.flush()
        self._file["ended"][()] = np.uint8(complete)
        self._file.close()


class NoRecorder(Unlogged):
    """Records nothing: for a run without ``--out``."""

    def step(self, record: StepRecord) -> None:
        """Do nothing."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """Do nothing."""

    def transfer(self, transfer: Transfer, time_s: float) -> None:
        """Do nothing."""

    def waited(self, waits: Sequence[Waited]) -> None:
        """Do nothing."""

    def span(self, phase: Phase, step: int, start_s: float, end_s: float) -> None:
        """Do nothing."""

    def applied(self, header: Header, step: int, applied_s: float) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self, *, complete: bool) -> None:
        """Do nothing."""
