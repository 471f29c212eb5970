"""`--tensorboard`: what the metrics files hold, as scalars that TensorBoard shows, one of its runs per rank.

The loop only counts; once a second it hands an event to TensorFlow's own writer, whose thread writes it. Fifty steps
a second would else be fifty points a second, of which TensorBoard shows a thousand in all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dlion_mpi.errors import UserError
from dlion_mpi.learner import tensorflow
from dlion_mpi.log import say
from dlion_mpi.metrics.recorder import NoRecorder, Recorder
from dlion_mpi.metrics.records import Evaluation, StepRecord, Transfer
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.view.snapshot import RankSnapshot, Tally
from dlion_mpi.wire import Header

EVERY_S = 1.0
"""Between two points, by the run's clock: virtual in a simulation."""
FLUSH_S = 2
QUEUE = 10_000
"""Events that may wait for the file before the loop would wait for them."""


def check_unused(path: str | None) -> None:
    """Refuse a folder of ``--tensorboard`` that holds something: two runs in one would be drawn as one.

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
    """The values by tag, of what is known."""
    values = {
        "training/loss": snapshot.loss,
        "training/samples_per_s": snapshot.samples_per_s,
        "batch/lbs": snapshot.lbs,
        "batch/gbs": snapshot.gbs,
        "time/step_s": snapshot.step_s,
        "time/waiting_share": snapshot.waiting,
    }
    for peer in range(len(snapshot.bytes_sent)):
        values |= {
            f"link_N/to_{peer}": float(snapshot.quality[peer]),
            f"link_bytes_per_s/to_{peer}": float(snapshot.bytes_per_s[peer]),
            f"link_bytes_sent/to_{peer}": float(snapshot.bytes_sent[peer]),
            f"link_age_s/from_{peer}": float(snapshot.age_s[peer]),
        }
    return {tag: value for tag, value in values.items() if not math.isnan(value)}


class TensorBoard:
    """Writes one rank's events, and hands all on to another recorder.

    ``now_s``: when, in seconds since the epoch. Raises UserError if it cannot write there.
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
        self._pending = False
        with tf.Graph().as_default():  # of TensorFlow's writers the one that takes events as they are wants a graph
            self._writer: Any = tf.compat.v1.summary.FileWriter(str(own), max_queue=QUEUE, flush_secs=FLUSH_S)

    def step(self, record: StepRecord) -> None:
        """Count a step; a point if it is time for one."""
        self._recorder.step(record)
        self._tally.add(record)
        self._pending = True
        if record.time_s - self._written_s >= EVERY_S:
            self._point(record.time_s)
        self._last_s = record.time_s

    def evaluation(self, evaluation: Evaluation) -> None:
        """A point of the test accuracy."""
        self._recorder.evaluation(evaluation)
        self._write(evaluation.step, evaluation.time_s, {"test/accuracy": evaluation.accuracy})

    def transfer(self, transfer: Transfer, time_s: float) -> None:
        """A point for a finished knowledge transfer."""
        self._recorder.transfer(transfer, time_s)
        values = {"transfer/source": float(transfer.source), "transfer/merged": float(transfer.merged)}
        self._write(transfer.step, time_s, values)

    def span(self, phase: Phase, step: int, start_s: float, end_s: float) -> None:
        """No scalar."""
        self._recorder.span(phase, step, start_s, end_s)

    def applied(self, header: Header, step: int, applied_s: float) -> None:
        """No scalar."""
        self._recorder.applied(header, step, applied_s)

    def sent(self, peer: int, header: Header, size_bytes: int, posted_s: float) -> None:
        """No scalar."""
        self._recorder.sent(peer, header, size_bytes, posted_s)

    def arrived(self, peer: int, sequence: int, arrived_s: float) -> None:
        """No scalar."""
        self._recorder.arrived(peer, sequence, arrived_s)

    def piece(self, peer: int, sent_bytes: int, received_bytes: int, began_s: float, ended_s: float) -> None:
        """No scalar."""
        self._recorder.piece(peer, sent_bytes, received_bytes, began_s, ended_s)

    def flush(self) -> None:
        """What the metrics file is still to be told; the events are flushed by their own thread."""
        self._recorder.flush()

    def close(self, *, complete: bool) -> None:
        """The last steps, and the end of the file."""
        if self._pending:
            self._point(self._last_s)
        self._writing(lambda: self._writer.close())
        self._recorder.close(complete=complete)

    def _point(self, time_s: float) -> None:
        snapshot = self._tally.take(None)
        self._written_s, self._pending = time_s, False
        self._write(int(snapshot.step), time_s, scalars(snapshot))

    def _write(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        if math.isnan(self._begun_s):
            self._begun_s = self._now_s() - time_s
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])
        event = self._event(wall_time=self._begun_s + time_s, step=step, summary=summary)
        self._writing(lambda: self._writer.add_event(event))

    def _writing(self, what: Callable[[], None]) -> None:
        """A disk that is full, or gone, must not end a run for this: it is said once, then nothing is written."""
        if self._writer is None:
            return
        try:
            what()
        except Exception as error:  # TensorFlow's own kinds
            self._writer = None
            say(f"dlion: --tensorboard: nothing more is written ({str(error).splitlines()[0]})")
