"""The ports of a worker's loop: what it waits for, and what its surroundings, real or simulated, have to offer."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays
from dlion_mpi.wire import Bytes, ValueType


@dataclass(frozen=True, slots=True)
class Compute:
    """Request to compute over a ``batch`` with a number of ``samples``. The answer is a `Computed`.

    ``kind``: the gradient, the movement, or a whole training step (``alone``: there is no peer).
    """

    batch: Any
    samples: int
    kind: Literal["gradients", "movements", "alone"]


@dataclass(frozen=True, slots=True)
class Computed:
    """``vector``: the gradient or the movement, (P,) float32; None after a whole training step.

    ``finite``: whether loss and vector are finite. ``seconds``: duration, of which ``paced_s`` were slept. ``logs``:
    what Keras's training step returned. ``samples``: how many were used, if not as many as requested.
    """

    loss: float
    vector: Vector | None
    finite: bool
    seconds: float
    paced_s: float
    logs: Mapping[str, float] = field(default_factory=dict)
    samples: int | None = None

    @classmethod
    def of(cls, found: Gradient, seconds: float, paced_s: float) -> Computed:
        """The answer, given what a replica has computed in this time."""
        vector = found.vector if len(found.vector) else None
        return cls(found.loss, vector, found.finite, seconds, paced_s, found.logs)

    def of_samples(self, samples: int) -> Computed:
        """The same answer, of this number of samples."""
        return replace(self, samples=samples)


@dataclass(frozen=True, slots=True)
class Stamp:
    """The fields of a step that every message header carries."""

    epoch: int
    step: int
    lbs: int
    gbs: int
    computed_at: float


@dataclass(frozen=True, slots=True)
class Until:
    """The loop waits until ``ready()``, which has no side effects.

    The driver asks again whenever something has arrived, and at ``deadline_s`` of the run's clock. Before it asks, it
    calls ``receive()``.
    """

    ready: Callable[[], bool]
    receive: Callable[[], None] = lambda: None
    deadline_s: float = math.inf

    def ask(self) -> bool:
        """Receive what has arrived, then tell whether the loop can continue."""
        self.receive()
        return self.ready()


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Messages that were encoded and queued in one go.

    ``step``: of the worker. ``start_s``, ``end_s``: on the run's clock. ``cpu_s``: processor seconds. ``quality``: by
    peer the N of each message that carries entries.
    """

    step: int
    start_s: float
    end_s: float
    cpu_s: float
    quality: dict[int, float]


class BackgroundEncoder(Protocol):
    """Encodes messages in the background, one batch after the other; see `mpi.encoder.EncoderThread`."""

    def begin(self, work: Callable[[], EncodedBatch]) -> None:
        """Queue ``work``."""

    def done(self) -> bool:
        """Whether all queued work is done. Raises what ``work`` raised, once."""

    def take(self) -> list[EncodedBatch]:
        """Return the batches encoded since the last call. Only when `done`."""


Loop = Generator[Compute | Until, Computed | None, None]


class Ticket(Protocol):
    """A collective in flight. ``table``: (n, k) of a gather, row r from rank r. ``vector``: of a broadcast or sum."""

    done: bool
    table: npt.NDArray[np.float64]
    vector: Vector


class Reduce(Protocol):
    """Computes a strategy's sums; see `mpi.collectives.Collectives.reduce`."""

    def __call__(self, vector: Vector | None, value_type: ValueType = "float32") -> Ticket:
        """Sum all workers' vectors.

        None: this worker has ended. Then every worker's sum is empty, and this was the last one.
        """


class Collectives(Protocol):
    """Non-blocking collectives of MPI or of its simulation; see `mpi.collectives.Collectives`."""

    def gather(self, channel: str, record: Sequence[float]) -> Ticket:
        """Gather the records of all ranks on all ranks."""

    def broadcast(self, channel: str, root: int, vector: Vector) -> Ticket:
        """Send the root's vector to all ranks."""

    def reduce(self, channel: str, vector: Vector | None, value_type: ValueType = "float32") -> Ticket:
        """Sum the vectors of all ranks on all ranks. The sum is empty if a rank gives None."""


class Channel(IntEnum):
    """Parcels of one channel arrive in order; those of different channels may overtake one another."""

    MESSAGE = 1
    ACK = 2
    REPORT = 3


class Parcel(Protocol):
    """The unit that a transport moves: an array of bytes, or in a simulation an object in place of ``nbytes`` bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes that the parcel takes of its link."""


P = TypeVar("P", bound=Parcel)
Done = Callable[[], None]
"""Says that a parcel has been sent, or read, and its memory may be reused. May be called from any thread."""


class Transport(Protocol[P]):
    """Moves parcels between one worker and its peers, whole and in the order of each channel."""

    def open(self, deliver: Callable[[int, Channel, P, Done], None]) -> None:
        """Call ``deliver(peer, channel, parcel, done)`` for each parcel that arrives."""

    def send(self, peer: int, channel: Channel, parcel: P, done: Done) -> None:
        """Queue a parcel for ``peer``, from any thread. Call ``done`` when it has been sent."""


class ByteTransport(Transport[Bytes], Protocol):
    """A transport of a real run."""

    def expect(self, channel: Channel, size_bytes: int, buffers: int) -> None:
        """Prepare to receive parcels of at most ``size_bytes``, of which ``buffers`` per peer may be unread.

        Called before the first parcel of the channel can arrive.
        """

    def cpu_s(self) -> float:
        """Processor seconds that the transport's own thread has used."""


class Replica(Protocol):
    """One worker's copy of the model; see `learner.replica.Replica`.

    Weights: (P,) float32. Knowledge: weights and statistics, (K,) float32. A batch is what `Batches.take` gave.
    ``takes_gradients``: False for a model that cannot give its gradient, because its training step is the user's.
    """

    layout: Layout
    metric_names: tuple[str, ...]
    """The metrics that `evaluate` gives, the same on all ranks."""

    @property
    def takes_gradients(self) -> bool: ...

    @property
    def normalises(self) -> bool:
        """Whether the optimizer moves by about the same length whatever the noise of a batch."""

    def movement(self, batch: Any) -> Gradient:
        """Do a training step with the model's optimizer. Returns its loss and what it has added to the weights, (P,).

        Afterwards the weights are as before. The optimizer's variables and the statistics are as after the step.
        """

    def move(self, movement: Vector) -> None:
        """Add a movement to the weights, (P,)."""

    def gradient(self, batch: Any) -> Gradient:
        """Compute loss and mean gradient over a batch; the weights stay as they are."""

    def step_alone(self, batch: Any) -> Gradient:
        """Do a whole training step. Returns its loss, with an empty vector; NaN for a step that was left out."""

    def apply(self, gradient: Vector) -> None:
        """Give the optimizer an effective gradient, (P,)."""

    def weights(self) -> Vector:
        """A copy of the weights."""

    def set_weights(self, weights: Vector) -> None:
        """Replace the weights."""

    def knowledge(self) -> Vector:
        """A copy of weights and statistics."""

    def set_knowledge(self, knowledge: Vector) -> None:
        """Replace weights and statistics."""

    def statistics(self) -> Vector:
        """A copy of the statistics, (K - P,)."""

    def set_statistics(self, statistics: Vector) -> None:
        """Replace the statistics."""

    def averages(self) -> Vector:
        """A copy of the averages of the weights that `finish` puts in their place: (P,), or none."""

    def set_averages(self, averages: Vector) -> None:
        """Replace the averages of the weights."""

    def evaluate(self, knowledge: Vector, batches: Iterable[Any]) -> dict[str, float]:
        """The metrics of a model with this knowledge on batches of test rows. Any thread may call this."""

    def finish(self) -> None:
        """After the last step: put in the weights what the optimizer keeps for the end, such as their averages."""

    def describe(self) -> str:
        """A text that tells one model from another."""

    def to_arrays(self) -> Arrays:
        """Everything that training changes, by name, in arrays that do not change any more."""

    def from_arrays(self, arrays: Mapping[str, Array], *, generators: bool = True) -> None:
        """Restore what `to_arrays` gave; ``generators``: its random generators too. Raises StateError."""

    def save(self, path: Path) -> None:
        """Write the model in Keras's format."""


class Batches(Protocol):
    """The worker's training data; see `learner.batches.Batches`."""

    def take(self, size: int) -> Any:
        """The next ``size`` rows."""

    def start_epoch(self, epoch: int) -> None:
        """Continue with the first row of this epoch."""

    def state(self) -> dict[str, int]:
        """The position in the data."""

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where ``state`` was taken. Raises UserError for data that it does not fit."""
