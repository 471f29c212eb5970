"""A micro-cloud as a value: the compute speed of each worker and the rate of each link, by phase of the run."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from dlion_mpi.errors import UserError

SECONDS_PER_SAMPLE_24 = 0.18 / 32  # so that 32 samples take 0.2 s on 24 cores, alpha included
SHARE_TOLERANCE = 1e-3


class InvalidEnvironment(UserError):
    """Raised for an invalid value of an environment: its key, and its phase (None: outside the phases)."""

    def __init__(self, key: str, problem: str, phase: int | None = None) -> None:
        self.key, self.phase = key, phase
        where = key if phase is None else f"phases[{phase}].{key}"
        super().__init__(f"{where}: {problem}")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Duration of an iteration in seconds: alpha + beta * batch."""

    alpha_s: float
    beta_s: float

    def seconds(self, batch: int) -> float:
        """Return the seconds of an iteration of `batch` samples."""
        return self.alpha_s + self.beta_s * batch


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Compute and network conditions during a part of the run.

    `cores`: relative compute per worker. `uplink_mbit`: Mbit/s per worker, shared by the links to its peers; or
    `link_mbit[source][destination]` with 0 on the diagonal. The phase begins when the `share`s (fractions of the run)
    of the earlier phases end, or at `start_s`.
    """

    cores: tuple[float, ...]
    uplink_mbit: tuple[float, ...] | None = None
    link_mbit: tuple[tuple[float, ...], ...] | None = None
    share: float | None = None
    start_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A micro-cloud: its workers, their pace and their links. Raises InvalidEnvironment, a UserError.

    `latency_s`: one way, of every link; or `link_latency_s[source][destination]` with 0 on the diagonal.
    """

    name: str
    workers: int
    phases: tuple[Phase, ...]
    alpha_s: float = 0.02
    seconds_per_sample_24: float = SECONDS_PER_SAMPLE_24
    latency_s: float = 0.0
    link_latency_s: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InvalidEnvironment("workers", f"{self.workers} workers; give at least 1")
        for key in ("alpha_s", "latency_s"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidEnvironment(key, f"{value:g} seconds; give 0 or more")
        if not (math.isfinite(self.seconds_per_sample_24) and self.seconds_per_sample_24 > 0):
            raise InvalidEnvironment(
                "seconds_per_sample_24", f"{self.seconds_per_sample_24:g} seconds; give more than 0"
            )
        if self.link_latency_s is not None:
            _check_latencies(self.link_latency_s, self.latency_s, self.workers)
        if not self.phases:
            raise InvalidEnvironment("phases", "none given; add a [[phases]] table")
        for index, phase in enumerate(self.phases):
            _check_phase(phase, index, self.workers)
        _check_times(self.phases)

    def phase_starts_s(self, run_seconds: float | None) -> tuple[float, ...]:
        """Return the start of each phase in seconds from the start of training.

        `run_seconds`: planned length of the run; None or NaN if unknown. Phases given as shares then start at infinity,
        except the first.
        """
        if self.phases[0].start_s is not None:
            return tuple(float(phase.start_s or 0.0) for phase in self.phases)
        if run_seconds is None or math.isnan(run_seconds):
            return (0.0,) + (math.inf,) * (len(self.phases) - 1)
        shares = [1.0 if phase.share is None else phase.share for phase in self.phases]
        ends = list(accumulate(shares))
        return (0.0, *(run_seconds * end / ends[-1] for end in ends[:-1]))

    def phase_at(self, time_s: float, run_seconds: float | None) -> Phase:
        """Return the phase that is active `time_s` seconds after the start of training."""
        return self.phases[max(bisect_right(self.phase_starts_s(run_seconds), time_s) - 1, 0)]

    def pace(self, worker: int, time_s: float, run_seconds: float | None) -> Pace:
        """Return the pace of `worker` at `time_s`: beta is the time per sample on 24 cores, times 24 / cores."""
        cores = self.phase_at(time_s, run_seconds).cores[worker]
        return Pace(alpha_s=self.alpha_s, beta_s=self.seconds_per_sample_24 * 24.0 / cores)

    def latency_of(self, source: int, destination: int) -> float:
        """Return the seconds from when a byte leaves a link until it arrives."""
        return self.latency_s if self.link_latency_s is None else self.link_latency_s[source][destination]

    def rate_mbit(self, source: int, destination: int, phase: Phase) -> float:
        """Return the nominal Mbit/s of a link while all links of its source are busy.

        The links to the peers share an uplink evenly; a matrix gives each link its own rate. Raises ValueError for a
        link of a worker to itself.
        """
        if source == destination:
            raise ValueError(f"worker {source} has no link to itself")
        if phase.link_mbit is not None:
            return phase.link_mbit[source][destination]
        assert phase.uplink_mbit is not None  # the constructor refuses a phase without a network
        return phase.uplink_mbit[source] / (self.workers - 1)


def _check_latencies(matrix: tuple[tuple[float, ...], ...], latency_s: float, workers: int) -> None:
    """Raise InvalidEnvironment unless the matrix fits and replaces the one latency of all links."""
    if latency_s:
        raise InvalidEnvironment("link_latency_s", "give latency_s or link_latency_s, and not both")
    if [len(row) for row in matrix] != [workers] * workers:
        raise InvalidEnvironment("link_latency_s", f"give {workers} rows of {workers} numbers")
    for source, row in enumerate(matrix):
        for destination, value in enumerate(row):
            link = f"from worker {source} to {destination}"
            if source == destination and value != 0:
                raise InvalidEnvironment("link_latency_s", f"{value:g} {link}; the diagonal must be 0")
            if not (math.isfinite(value) and value >= 0):
                raise InvalidEnvironment("link_latency_s", f"{value:g} seconds {link}; give 0 or more")


def _check_phase(phase: Phase, index: int, workers: int) -> None:
    """Raise InvalidEnvironment unless every list fits `workers` and every rate is above zero."""

    def check(key: str, values: tuple[float, ...]) -> None:
        if len(values) != workers:
            raise InvalidEnvironment(
                key,
                f"{len(values)} values for {workers} workers; give {workers}, or one for all",
                index,
            )
        for value in values:
            if not (math.isfinite(value) and value > 0):
                raise InvalidEnvironment(key, f"{value:g} is not above zero; give a positive number", index)

    check("cores", phase.cores)
    if (phase.uplink_mbit is None) == (phase.link_mbit is None):
        raise InvalidEnvironment("uplink_mbit", "give uplink_mbit or link_mbit, and not both", index)
    if phase.uplink_mbit is not None:
        check("uplink_mbit", phase.uplink_mbit)
    if phase.link_mbit is None:
        return
    if [len(row) for row in phase.link_mbit] != [workers] * workers:
        raise InvalidEnvironment("link_mbit", f"give {workers} rows of {workers} numbers", index)
    for source, row in enumerate(phase.link_mbit):
        for destination, rate in enumerate(row):
            link = f"from worker {source} to {destination}"
            if source == destination and rate != 0:
                raise InvalidEnvironment("link_mbit", f"{rate:g} {link}; the diagonal must be 0", index)
            if source != destination and not (math.isfinite(rate) and rate > 0):
                raise InvalidEnvironment("link_mbit", f"{rate:g} {link}; give a positive number", index)


def _check_times(phases: tuple[Phase, ...]) -> None:
    """Raise InvalidEnvironment unless the phases follow each other, all by `share` or all by `start_s`."""
    by_start = [phase.start_s is not None for phase in phases]
    by_share = [phase.share is not None for phase in phases]
    if len(phases) == 1 and not by_start[0] and not by_share[0]:
        return
    for index, (start, share) in enumerate(zip(by_start, by_share, strict=True)):
        if start == share or start != by_start[0]:
            raise InvalidEnvironment("share", "give share in every phase, or start_s in every phase", index)
    previous_s = -math.inf
    for index, phase in enumerate(phases):
        if phase.share is not None and not 0 < phase.share <= 1:
            raise InvalidEnvironment("share", f"{phase.share:g} is not a part of the run; give 0 to 1", index)
        if phase.start_s is not None:
            if index == 0 and phase.start_s != 0:
                raise InvalidEnvironment("start_s", f"{phase.start_s:g}; the first phase starts at 0", index)
            if not (math.isfinite(phase.start_s) and phase.start_s > previous_s):
                raise InvalidEnvironment("start_s", f"{phase.start_s:g} does not follow {previous_s:g}", index)
            previous_s = phase.start_s
    total = math.fsum(phase.share or 0.0 for phase in phases)
    if by_share[0] and abs(total - 1.0) > SHARE_TOLERANCE:
        raise InvalidEnvironment("share", f"the shares of all phases add up to {total:g}; make it 1", len(phases) - 1)
