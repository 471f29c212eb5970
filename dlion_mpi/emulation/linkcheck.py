"""Evaluation of `dlion emulate check`: the set and the measured rate of each link, their ratio, and its bounds.

The measured rate of a link is the payload that MPI delivered over it while all links were busy. Ethernet, IP and TCP
headers take about 4 % of the set rate, so a perfect link measures 0.956 of it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import RunError
from dlion_mpi.microcloud.environments import Environment

LINK_BOUNDS = (0.93, 1.02)  # measured over set
PACE_BOUNDS = (0.95, 1.05)
SETTLE_S = 1.0  # a new rate must be in effect this long after its phase begins
SMOOTH_BINS = 3


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Measurements of the probe.

    `received_bytes`: (destination, source, bin) int64. `paces_s`: (worker, phase, 2) float64, modelled and measured
    seconds.
    """

    bin_s: float
    received_bytes: npt.NDArray[np.int64]
    paces_s: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement and its set value. `what`: "link", "pace" or "change". Phases count from 1."""

    what: str
    phase: int
    worker: int
    peer: int | None
    set: float
    measured: float
    unit: str
    bounds: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Measured over set."""
        return self.measured / self.set

    @property
    def ok(self) -> bool:
        """Whether the ratio is within its bounds."""
        return self.bounds[0] <= self.ratio <= self.bounds[1]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All measurements of a check."""

    environment: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every measurement is within its bounds."""
        return all(row.ok for row in self.rows)


def run_seconds(environment: Environment, phase_seconds: float) -> float:
    """Return the length of a run in which each phase lasts at least `phase_seconds`."""
    if environment.phases[0].start_s is not None:
        return environment.phase_starts_s(None)[-1] + phase_seconds
    return phase_seconds / min(phase.share or 1.0 for phase in environment.phases)


def read_probe(text: str, environment: Environment) -> Probe:
    """Parse the probe's measurements from the last line of its output. Raises RunError if they are missing."""
    try:
        table: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
        probe = Probe(
            bin_s=float(table["bin_s"]),
            received_bytes=np.array(table["received_bytes"], dtype=np.int64),
            paces_s=np.array(table["paces_s"], dtype=np.float64),
        )
    except (IndexError, KeyError, TypeError, ValueError):
        raise RunError("the probe printed no measurements") from None
    workers = environment.workers
    if probe.received_bytes.shape[:2] != (workers, workers) or len(probe.paces_s) != workers:
        raise RunError(f"the probe did not measure {workers} workers")
    return probe


def evaluate(environment: Environment, probe: Probe, seconds: float) -> Report:
    """Compare every link, rate change and pace of a run of `seconds` with the environment."""
    starts_s = environment.phase_starts_s(seconds)
    rows: list[Row] = []
    for index, start_s in enumerate(starts_s):
        end_s = (*starts_s, seconds)[index + 1]
        rows += _links(environment, probe, index, start_s + SETTLE_S, end_s)
        if index > 0:
            rows += _changes(environment, probe, index, start_s)
        rows += _paces(environment, probe, index)
    return Report(environment=environment.name, rows=tuple(rows))


def _pairs(environment: Environment) -> list[tuple[int, int]]:
    workers = range(environment.workers)
    return [(source, destination) for source in workers for destination in workers if source != destination]


def _links(environment: Environment, probe: Probe, index: int, begin_s: float, end_s: float) -> list[Row]:
    """Mean rate of each link over the whole bins between two times."""
    first, last = math.ceil(begin_s / probe.bin_s), math.floor(end_s / probe.bin_s)
    rows = []
    for source, destination in _pairs(environment):
        set_mbit = environment.rate_mbit(source, destination, environment.phases[index])
        total_bytes = int(probe.received_bytes[destination, source, first:last].sum())
        row = Row(
            what="link",
            phase=index + 1,
            worker=source,
            peer=destination,
            set=set_mbit,
            measured=total_bytes * 8e-6 / ((last - first) * probe.bin_s),
            unit="Mbit/s",
            bounds=LINK_BOUNDS,
        )
        rows.append(row)
    return rows


def _changes(environment: Environment, probe: Probe, index: int, start_s: float) -> list[Row]:
    """Return the delay from the start of a phase until each link's rate is closer to its new value than to the old one.

    The delay ends with the first `SMOOTH_BINS` bins whose mean is closer, so it errs on the late side. Links whose rate
    changes by less than a fifth are skipped, because noise would dominate.
    """
    rows = []
    first = math.floor(start_s / probe.bin_s)
    before, after = environment.phases[index - 1], environment.phases[index]
    for source, destination in _pairs(environment):
        old_mbit = environment.rate_mbit(source, destination, before)
        new_mbit = environment.rate_mbit(source, destination, after)
        if max(old_mbit, new_mbit) < 1.2 * min(old_mbit, new_mbit):
            continue
        bytes_per_bin = probe.received_bytes[destination, source, first:].astype(np.float64)
        smooth_bytes = np.convolve(bytes_per_bin, np.ones(SMOOTH_BINS) / SMOOTH_BINS, "valid")
        rose = smooth_bytes * 8e-6 / probe.bin_s > (old_mbit + new_mbit) / 2
        there = np.flatnonzero(rose == (new_mbit > old_mbit))
        delay_s = (first + int(there[0]) + SMOOTH_BINS) * probe.bin_s - start_s if len(there) else math.inf
        row = Row(
            what="change",
            phase=index + 1,
            worker=source,
            peer=destination,
            set=SETTLE_S,
            measured=delay_s,
            unit="s",
            bounds=(0.0, 1.0),
        )
        rows.append(row)
    return rows


def _paces(environment: Environment, probe: Probe, index: int) -> list[Row]:
    """Return the duration of each worker's paced iterations."""
    rows = []
    for worker in range(environment.workers):
        target_s, took_s = (float(value) for value in probe.paces_s[worker, index])
        row = Row(
            what="pace",
            phase=index + 1,
            worker=worker,
            peer=None,
            set=target_s,
            measured=took_s,
            unit="s",
            bounds=PACE_BOUNDS,
        )
        rows.append(row)
    return rows


def to_table(report: Report) -> str:
    """Format a report as a text table with one line per measurement and a verdict."""
    lines = [f"phase  {'what':<6}  {'worker':<10}  {'set':>16}  {'measured':>16}  {'ratio':>6}"]
    for row in report.rows:
        who = f"{row.worker}" if row.peer is None else f"{row.worker} -> {row.peer}"
        limit = f"{'<= ' if row.what == 'change' else ''}{row.set:.3f} {row.unit}"
        measured = f"{row.measured:.3f} {row.unit}"
        verdict = "" if row.ok else "  OUT OF BOUNDS"
        figures = f"{limit:>16}  {measured:>16}  {row.ratio:>6.3f}"
        lines.append(f"{row.phase:>5}  {row.what:<6}  {who:<10}  {figures}{verdict}")
    bad = sum(not row.ok for row in report.rows)
    verdict = f"{bad} of {len(report.rows)} measurements out of bounds" if bad else "all within bounds"
    lines.append(f"{report.environment}: {verdict}")
    links, paces = (f"{low} to {high}" for low, high in (LINK_BOUNDS, PACE_BOUNDS))
    lines.append(f"bounds: links {links} of the set rate (payload only: headers take about 4 %), paces {paces}")
    return "\n".join(lines)


def to_json(report: Report) -> str:
    """Format a report as one line of JSON."""
    rows = [{**asdict(row), "ratio": row.ratio, "ok": row.ok} for row in report.rows]
    return json.dumps({"environment": report.environment, "ok": report.ok, "rows": rows})
