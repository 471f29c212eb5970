"""Write the metrics of one rank: an HDF5 file, ``metrics-00000.h5`` for rank 0, that can be read while it grows.

The file is written in HDF5's single-writer-multiple-readers mode (SWMR). Other processes can open it at any time with
``h5py.File(path, "r", swmr=True)``, also after the writer was killed; they see everything up to the last flush. A flush
happens once a second. docs/metrics.md describes the columns.

HDF5 does not fail cleanly where a disk is full: rows become zeros, and the process may crash at its end. So the room
for everything that a flush can add is reserved first, at the end of the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
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
ROOM_BYTES = 1 << 16
"""Room for what HDF5 adds to the rows: indices and headers."""


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
        try:
            self._reserve(2 * ROOM_BYTES)
        except OSError:
            self.discard()
            raise
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
        if self._broken:
            return
        try:
            self._write()
        except (OSError, RuntimeError) as error:
            self._broken = True
            raise RunError(f"cannot write {self.path}: {str(error).splitlines()[0]}; is the disk full?") from None

    def _write(self) -> None:
        with self._lock:
            timeline, self._timeline = self._timeline, {name: [] for name in RECORDS}
        rows, self._rows = self._rows, {group: [] for group in self._rows}
        columns = {
            **self._columns(rows),
            **{f"timeline/{name}": np.array(e, RECORDS[name]) for name, e in timeline.items() if e},
        }
        self._reserve(ROOM_BYTES + sum(self._added_bytes(name, values) for name, values in columns.items()))
        for name, values in columns.items():
            dataset = self._file[name]
            start = dataset.shape[0]
            dataset.resize(start + len(values), axis=0)
            dataset[start:] = values
        self._file.flush()
        self._flushed_s = time.monotonic()

    def _columns(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
        """The values to append to each data set of a group, by its name."""
        columns = {}
        for group, records in rows.items():
            for name in TABLES[group] if records else ():
                columns[f"{group}/{name}"] = np.asarray([getattr(record, name) for record in records])
        for name in self._metrics if rows["evaluations"] else ():
            columns[f"evaluations/{column_of(name)}"] = np.asarray([e.metrics[name] for e in rows["evaluations"]])
        for name, measure in LINKS.items() if rows["steps"] else ():
            columns[f"links/{name}"] = self._by_peer(measure, [getattr(record, name) for record in rows["steps"]])
        return columns

    def _added_bytes(self, name: str, values: np.ndarray) -> int:
        """Size of the chunks that these values add to a data set."""
        dataset = self._file[name]
        length, (chunk, *_) = dataset.shape[0], dataset.chunks
        added = -(-(length + len(values)) // chunk) - -(-length // chunk)
        return added * math.prod(dataset.chunks) * dataset.dtype.itemsize

    def _reserve(self, size_bytes: int) -> None:
        """Reserve room on the disk at the end of the file, which is all that HDF5 will need. Raises OSError."""
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            end = self._file.id.get_filesize()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, end, size_bytes)
            elif (disk := os.fstatvfs(descriptor)).f_bavail * disk.f_frsize < size_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)

    def _by_peer(self, measure: Measure, steps: Sequence[Mapping[int, float]]) -> np.ndarray:
        """Values of a measure of links, (steps, workers); NaN, or 0 in a column of whole numbers, where none is."""
        values = np.full((len(steps), self._workers), np.nan if measure.dtype.startswith("f") else 0, measure.dtype)
        for row, by_peer in zip(values, steps, strict=True):
            for peer, value in by_peer.items():
                row[peer] = value
        return values

    def close(self, *, complete: bool) -> None:
        """Flush and close the file. ``complete``: the run ended without an error. Raises RunError.

        A file that could not be written has what was flushed before.
        """
        if not self._file:
            return
        try:
            self.flush()
            self._file["ended"][()] = np.uint8(complete and not self._broken)
        finally:
            with contextlib.suppress(OSError, RuntimeError):
                size_bytes = self._file.id.get_filesize()
                self._file.close()
                os.truncate(self.path, size_bytes)  # gives back the room

    def discard(self) -> None:
        """Remove the file: the run does not begin."""
        self._file.close()
        self.path.unlink(missing_ok=True)


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

    def discard(self) -> None:
        """Do nothing."""
