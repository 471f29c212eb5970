"""Parts of a run that a worker's loop calls: tests, records, checkpoints, epochs."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from dlion_mpi.loop.ports import Computed, Until
from dlion_mpi.metrics.records import Evaluation, StepRecord, Transfer, Waited
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.vector.layout import Vector
from dlion_mpi.vector.named_arrays import Array, Arrays
from dlion_mpi.wire import Header, Message

if TYPE_CHECKING:
    from dlion_mpi.loop.worker import Worker


class Evaluator(Protocol):
    """Evaluates snapshots in the background; see `learner.evaluate.BackgroundEvaluator`."""

    def pending(self) -> int:
        """Number of snapshots that are being evaluated or wait."""

    def submit(self, step: int, time_s: float, knowledge: Vector) -> None:
        """Start to evaluate a snapshot."""

    def poll(self, *, wait: bool = False) -> list[Evaluation]:
        """The evaluations finished since the last call; with ``wait``, all that were submitted."""


class Recorder(Protocol):
    """Records the run; see `metrics.recorder.Recorder`."""

    def step(self, record: StepRecord) -> None:
        """Record a step."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """Record an evaluation."""

    def transfer(self, transfer: Transfer, time_s: float) -> None:
        """Record a knowledge transfer."""

    def waited(self, waits: Sequence[Waited]) -> None:
        """Record a wait of unusual length, a row for each rank that was waited for, so that readers see it at once."""

    def span(self, phase: Phase, step: int, start_s: float, end_s: float) -> None:
        """Record what a span of time was spent on."""

    def applied(self, header: Header, step: int, applied_s: float) -> None:
        """Record that a message was applied in this worker's step."""


class Checkpoints(Protocol):
    """Takes checkpoints between steps; see `checkpoint.rounds.CheckpointRounds`."""

    holding: bool
    """Whether no entries may be sent until all snapshots have been taken."""
    over: bool
    """Whether no checkpoint is in progress and none will be taken any more."""

    def advance(self, w: Worker) -> Iterator[Until]:
        """Continue a checkpoint between two steps, or take one that is due."""

    def serve(self, w: Worker) -> None:
        """Take part in the others' checkpoints after the last step."""

    def arrived(self, w: Worker, message: Message) -> None:
        """Log a received message."""

    def end(self, reason: str) -> None:
        """End all workers together, after a last checkpoint."""


class Epochs(Protocol):
    """Averages logs at the ends of epochs; see `loop.epochs.Epochs`."""

    started: int
    """The number of gathers that this worker has taken part in."""

    def batch_begin(self, w: Worker) -> None:
        """Note that a step begins."""

    def advance(self, w: Worker, computed: Computed, samples: int) -> Generator[Until, None, None]:
        """Note a step of ``samples`` that has been completed."""

    def leave(self, rounds_everywhere: int) -> None:
        """Take part in the gathers that others have started and this worker has not."""

    def settled(self) -> bool:
        """Whether no gather is in flight."""

    def to_arrays(self) -> Arrays:
        """The epoch of the worker, and its end."""

    def from_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Restore what `to_arrays` gave, if it is there. Raises StateError."""
