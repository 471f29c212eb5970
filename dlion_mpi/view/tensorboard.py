"""`--tensorboard`: the gauges of each rank as TensorBoard scalars; each rank is one of TensorBoard's runs.

The loop only counts steps. Once a second it passes an event to TensorFlow's writer, which has its own thread: at fifty
steps a second, a point per step would be far more than the thousand points that TensorBoard shows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlion_mpi.errors import UserError
from dlion_mpi.learner import tensorflow
from dlion_mpi.log import say
from dlion_mpi.metrics.gauges import as_gauges, link_gauges, rank_gauges
from dlion_mpi.metrics.recorder import NoRecorder, Recorder
from dlion_mpi.metrics.records import GAUGES, LINKS, STEPS, Evaluation, StepRecord, Transfer, Waited
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.view.snapshot import RankSnapshot, Tally
from dlion_mpi.wire import Header

EVERY_S = 1.0
"""Seconds between two points on the run's clock, which is virtual in a simulation."""
FLUSH_S = 2
QUEUE = 10_000
"""Events that may be queued before the loop waits for the disk."""


def check_unused(path: str | None) -> None:
    """Refuse a ``--tensorboard`` folder that is not empty, since TensorBoard would draw two runs as one.

    Raises UserError.
    """
    if path is None:
        return
    folder = Path(path)
    try:
        used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise UserError(f"--tensorboard {path}: cannot be read ({error.strerror})") from None
    if used:
        raise UserError(f"--tensorboard {path}: exists already; give a new folder, or move that one away")


def scalars(snapshot: RankSnapshot) -> dict[str, float]:
    """The known gauges of a snapshot by tag."""
    values = {gauge.tag: snapshot[gauge.key] for gauge in rank_gauges() if gauge.tag}
    for gauge in link_gauges():
        if gauge.tag:
            for peer, value in enumerate(snapshot.links[gauge.key]):
                values[f"{gauge.tag}/{LINKS[gauge.measure].link}_{peer}"] = float(value)
    return {tag: value for tag, value in values.items() if not math.isnan(value)}


def event_scalars(record: Evaluation | Transfer) -> dict[str, float]:
    """The gauges of an evaluation or a transfer by tag."""
    if isinstance(record, Evaluation):
        return {tag: value for tag, value in as_gauges(record.metrics).items() if not math.isnan(value)}
    shown = [gauge for gauge in GAUGES if gauge.tag and gauge.measure not in STEPS and hasattr(record, gauge.measure)]
    return {gauge.tag: float(getattr(record, gauge.measure)) for gauge in shown}


class TensorBoard:
    """Writes the events of one rank, and passes everything on to another recorder.

    ``now_s``: the current time in seconds since the epoch. Raises UserError if the folder cannot be written.
    """

    def __init__(
        self,
        recorder: Recorder | NoRecorder,
        folder: Path,
        rank: int,
        workers: int,
        *,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        own = folder / f"rank-{rank}"
        try:
            own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--tensorboard {folder}: rank {rank} cannot write there ({error.strerror})") from None
        tf = tensorflow.load()

        self._recorder, self._tally = recorder, Tally(rank, workers)
        self._event, self._summary = tf.compat.v1.Event, tf.compat.v1.Summary
        self._now_s, self._begun_s = now_s, math.nan
        self._written_s, self._last_s = -EVERY_S, 0.0
        with tf.Graph().as_default():  # the only writer of TensorFlow that accepts whole events needs a graph
            self._writer: Any = tf.compat.v1.summary.FileWriter(str(own), max_queue=QUEUE, flush_secs=FLUSH_S)

    def step(self, record: StepRecord) -> None:
        """Count a step. Write a point once a second."""
        self._recorder.step(record)
        self._tally.add(record)
        if record.time_s - self._written_s >= EVERY_S:
            self._point(record.time_s)
        self._last_s = record.time_s

    def evaluation(self, evaluation: Evaluation) -> None:
        """Write a point for an evaluation."""
        self._recorder.evaluation(evaluation)
        self._write(evaluation.step, evaluation.time_s, event_scalars(evaluation))

    def transfer(self, transfer: Transfer, time_s: float) -> None:
        """Write a point for a finished knowledge transfer."""
        self._recorder.transfer(transfer, time_s)
        self._write(transfer.step, time_s, event_scalars(transfer))

    def waited(self, waits: Sequence[Waited]) -> None:
        """Pass on; there is no scalar for it."""
        self._recorder.waited(waits)

    def span(self, phase: Phase, step: int, start_s: float, end_s: float) -> None:
        """Pass on; there is no scalar for it."""
        self._recorder.span(phase, step, start_s, end_s)

    def applied(self, header: Header, step: int, applied_s: float) -> None:
        """Pass on; there is no scalar for it."""
        self._recorder.applied(header, step, applied_s)

    def sent(self, peer: int, header: Header, size_bytes: int, posted_s: float) -> None:
        """Pass on; there is no scalar for it."""
        self._recorder.sent(peer, header, size_bytes, posted_s)

    def arrived(self, peer: int, sequence: int, arrived_s: float) -> None:
        """Pass on; there is no scalar for it."""
        self._recorder.arrived(peer, sequence, arrived_s)

    def piece(self, peer: int, sent_bytes: int, received_bytes: int, began_s: float, ended_s: float) -> None:
        """Pass on; there is no scalar for it."""
        self._recorder.piece(peer, sent_bytes, received_bytes, began_s, ended_s)

    def flush(self) -> None:
        """Flush the other recorder. The writer's thread flushes the events."""
        self._recorder.flush()

    def close(self, *, complete: bool) -> None:
        """Write a point for the last steps, and close the file."""
        if len(self._tally):
            self._point(self._last_s)
        self._try(lambda: self._writer.close())
        self._recorder.close(complete=complete)

    def discard(self) -> None:
        """Close the file, and remove the other recorder's."""
        self._try(lambda: self._writer.close())
        self._recorder.discard()

    def _point(self, time_s: float) -> None:
        snapshot = self._tally.take({})
        self._written_s = time_s
        self._write(int(snapshot["step"]), time_s, scalars(snapshot))

    def _write(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        if math.isnan(self._begun_s):
            self._begun_s = self._now_s() - time_s
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])
        event = self._event(wall_time=self._begun_s + time_s, step=step, summary=summary)
        self._try(lambda: self._writer.add_event(event))

    def _try(self, write: Callable[[], None]) -> None:
        """Write unless that failed before: a full disk must not end the run. The failure is printed once."""
        if self._writer is None:
            return
        try:
            write()
        except Exception as error:  # TensorFlow's own kinds
            self._writer = None
            say(f"dlion: --tensorboard: nothing more is written ({str(error).splitlines()[0]})")
