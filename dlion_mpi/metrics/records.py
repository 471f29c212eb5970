"""What a run records: steps, evaluations, transfers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of one worker. Times in seconds; ``time_s`` is its end, since training began.

    ``select_encode_s``: selecting, encoding and posting. ``wait_s``: for what the synchronisation mode wants.
    ``apply_s``: decoding, weighing and the optimizer. ``paced_s``: the part of ``compute_s`` that was slept to
    play a slower machine. ``mpi_cpu_s``: processor time that the thread that owns MPI has taken so far.

    Per link, by peer: ``quality`` the N that was sent (NaN: nothing), cumulative bytes both ways, the measured bytes
    per second, and the mean age of the messages that were applied, from the computing of their gradient, in seconds
    and in steps (NaN: none).
    """

    step: int
    time_s: float
    compute_s: float
    paced_s: float
    select_encode_s: float
    wait_s: float
    apply_s: float
    step_s: float
    loss: float
    lbs: int
    gbs: int
    mpi_cpu_s: float = 0.0
    quality: Mapping[int, float] = field(default_factory=dict)
    bytes_sent: Mapping[int, int] = field(default_factory=dict)
    bytes_received: Mapping[int, int] = field(default_factory=dict)
    bytes_per_s: Mapping[int, float] = field(default_factory=dict)
    age_s: Mapping[int, float] = field(default_factory=dict)
    age_steps: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Test accuracy, in 0..1, of the weights of ``step`` at ``time_s``, in seconds since training began.

    ``seconds``: from then to the result; 0 in virtual time.
    """

    step: int
    time_s: float
    accuracy: float
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Transfer:
    """A finished knowledge transfer: whose weights came, whether this worker merged them, and what it took."""

    step: int
    source: int
    merged: bool
    started_step: int
    payload_bytes: int
    started_s: float = 0.0
