"""Compare systems in micro-clouds, simulated or emulated: seconds to 70 % and 80 %, accuracy, spread and bytes sent.

Each finished run becomes a line of the results file immediately. Runs that the file contains are not repeated, so an
interrupted comparison resumes with the same command. Run it from the root of the repository.

    python benchmarks/systems.py --results systems.jsonl
    python benchmarks/systems.py --results systems.jsonl --emulated --seeds 0 --seconds 240 --jobs 1 \
        --env homo-a homo-b hetero-sys-a hetero-sys-b --system dlion baseline ako gaia hop horovod
    python benchmarks/systems_table.py systems.jsonl --markdown

A run evaluates 1,000 samples every 20 steps. It ends when the mean over the workers reaches 80 %, or after `--seconds`
or `--steps`, because a system that makes many quick steps without progress would take hours. The phases of the dynamic
environments change at thirds of `--at`, for any length of the run. Emulated runs take their real time, and need root
and an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from systems_table import read

from dlion_mpi.config.target import Target
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.metrics.targets import reached_s
from dlion_mpi.microcloud import environments
from dlion_mpi.provenance import commit, versions

ENVIRONMENTS = tuple(name for name in environments.names() if not name.startswith("gpu-"))
SYSTEMS = (
    "free-network",
    "allreduce",
    "dlion",
    "dlion --preset paper",
    "baseline",
    "ako --ako.partitions 16 --learning-rate 0.05",
    "gaia --gaia.threshold 0.2",
    "hop --hop.graph ring --staleness 20 --hop.max-gap 32",
)
"""Strategies with their options. The rivals have the best settings of a sweep over homo-b and hetero-sys-a
(results/sweep.jsonl)."""
TARGETS = (0.7, 0.8)
BEYOND = 0.85
"""A higher target, recorded if a run of length ``--at`` reaches it. No run is extended for it."""
SIMULATED, EMULATED = "simulated", "emulated"


@dataclass(frozen=True, slots=True)
class Case:
    """The settings of one line of the results file. ``system``: a strategy and its options."""

    testbed: str
    environment: str
    system: str
    seed: int
    most_seconds: float
    most_steps: int
    at_seconds: float
    learning_rate: float

    @classmethod
    def of(cls, run: dict[str, Any]) -> Case:
        """Return the case of a line. Raises KeyError if a field is missing."""
        return cls(*(run[part.name] for part in fields(cls)))


@dataclass
class Results:
    """The results file. Several threads and processes may append to it."""

    path: Path
    runs: list[dict[str, Any]] = field(init=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.runs = read(self.path)

    def lacking(self, wanted: Iterable[Case]) -> list[Case]:
        """Return the wanted cases that are not in the file, without duplicates."""
        done = {Case.of(run) for run in self.runs}
        return [case for case in dict.fromkeys(wanted) if case not in done]

    def add(self, run: dict[str, Any]) -> None:
        """Append a line and flush it to the disk. The rest of an interrupted write stays on a separate line."""
        with self._lock, self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
            start = b"\n" if end and file.read(1) != b"\n" else b""
            file.write(start + json.dumps(run).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self.runs.append(run)

    def expected_s(self, case: Case) -> float:
        """Estimate the seconds to the last target from the most similar runs of the same system.

        Prefers other seeds, then the other testbed, then other environments. Returns infinity if there are none.
        """
        known = [run for run in list(self.runs) if run["system"] == case.system]

        def likeness(run: dict[str, Any]) -> tuple[bool, bool]:
            return run["environment"] == case.environment, run["testbed"] == case.testbed

        most = max(map(likeness, known), default=None)
        times = [run["seconds_to"][_percent(TARGETS[-1])] for run in known if likeness(run) == most]
        return statistics.median(time or math.inf for time in times) if times else math.inf


@dataclass(frozen=True, slots=True)
class Measured:
    """One run. By worker: its evaluations, the times of its steps, and the bytes sent at those times."""

    tests: list[list[Evaluation]]
    times_s: list[np.ndarray]
    sent_bytes: list[np.ndarray]

    @classmethod
    def of(cls, folder: Path) -> Measured:
        """Read the metrics of a run."""
        measured = cls([], [], [])
        for path in sorted(folder.glob("metrics-*.h5")):
            with h5py.File(path) as file:
                columns = (file[f"evaluations/{name}"][:].tolist() for name in ("step", "time_s", "accuracy"))
                measured.tests.append(
                    [Evaluation(step, at_s, {"accuracy": a}) for step, at_s, a in zip(*columns, strict=True)]
                )
                measured.times_s.append(file["steps/time_s"][:])
                measured.sent_bytes.append(file["links/bytes_sent"][:].sum(axis=1))
        return measured

    def reached_s(self, target: float) -> float | None:
        """Return the time at which the mean accuracy of the workers reached the target."""
        return reached_s(self.tests, Target("accuracy", ">=", target))

    def lasted_s(self) -> float:
        """Return the time at which the first worker ended."""
        return min((float(times[-1]) for times in self.times_s if len(times)), default=0.0)

    def accuracies(self, at_s: float) -> list[float]:
        """Return the accuracy of each worker's newest evaluation at a time; empty before all have one."""
        newest = [[e.metrics["accuracy"] for e in tests if e.time_s <= at_s][-1:] for tests in self.tests]
        return [own[0] for own in newest] if all(newest) else []

    def mean_accuracy(self, until_s: float) -> float:
        """Return the mean accuracy over time and over the workers until ``until_s``; 0 before the first evaluation.

        Less noisy than the time to a target, which a single lucky evaluation decides.
        """
        means = []
        for tests in self.tests:
            own = [e for e in tests if e.time_s < until_s]
            times = np.array([e.time_s for e in own] + [until_s])
            means.append(
                float(np.diff(times) @ np.array([e.metrics["accuracy"] for e in own])) / until_s if own else 0.0
            )
        return statistics.mean(means)

    def gigabytes(self, at_s: float) -> float:
        """Return the GB that all workers have sent at a time."""
        counts = [int(np.searchsorted(times, at_s, side="right")) for times in self.times_s]
        return sum(int(sent[n - 1]) for sent, n in zip(self.sent_bytes, counts, strict=True) if n) / 1e9


class Unstable(Exception):
    """Raised for a run that failed by itself, for example by a non-finite loss."""


def measured(case: Case, seconds: float, target: float) -> Measured:
    """Run until ``target`` or for ``seconds``. Raises Unstable, or RuntimeError for other failures."""
    with tempfile.TemporaryDirectory() as folder:
        env, out = _fixed_phases(case, Path(folder)), Path(folder) / "run"
        dlion = [sys.executable, "-m", "dlion_mpi"]
        command = [*dlion, "simulate", "--env", env, "--threads", "1"]
        if case.testbed == EMULATED:
            command = [*dlion, "emulate", "run", "--env", env, "--name", "systems", "--", *dlion, "train"]
        command += ["--learning-rate", str(case.learning_rate), "--strategy", *shlex.split(case.system)]
        command += ["--evaluate-every", "20", "--test-samples", "1000", "--progress-every", "0"]
        command += ["--seed", str(case.seed), "--seconds", str(seconds), "--steps", str(case.most_steps)]
        command += ["--target", f"accuracy>={target}", "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            error = Unstable if done.returncode == 1 and "not finite" in done.stderr else RuntimeError
            raise error(f"{case.environment}, {case.system}, seed {case.seed}: code {done.returncode}: {reason}")
        return Measured.of(out)


def _fixed_phases(case: Case, folder: Path) -> str:
    """Return the environment, or a copy whose phases begin at fixed times instead of fractions of the run."""
    path = environments.locate(case.environment)
    starts = iter(environments.load(path).phase_starts_s(case.at_seconds))
    text, changed = re.subn(
        r"^share *=.*$", lambda _: f"start_s = {next(starts)!r}", path.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    if not changed:
        return str(path)
    own = folder / path.name
    own.write_text(text, encoding="utf-8")
    return str(own)


def covering(case: Case, expected_s: float) -> Measured:
    """Return a run that lasts until the last target and until `at`, at most for the most seconds.

    A run ends at its target. If that is before `at`, a second run of length `at` with an unreachable target is needed,
    which is identical up to then. ``expected_s``, the expected time to the target, decides which of the two is tried
    first.
    """
    short = None
    no_longer = case.most_seconds <= case.at_seconds
    if no_longer or expected_s <= case.at_seconds:
        short = measured(case, case.at_seconds, 1.0)
        if no_longer or short.reached_s(TARGETS[-1]) is not None:
            return short
    long = measured(case, case.most_seconds, TARGETS[-1])
    if long.reached_s(TARGETS[-1]) is None or long.lasted_s() >= case.at_seconds:
        return long
    return short or measured(case, case.at_seconds, 1.0)


def line(case: Case, expected_s: float) -> dict[str, Any]:
    """Run a case and return its line of the results file. Seconds are None if a target was not reached."""
    run: dict[str, Any] = {
        **asdict(case),
        "commit": commit(),
        "versions": versions(),
        "seconds_to": {_percent(target): None for target in TARGETS},
        "seconds_beyond": {_percent(BEYOND): None},
        "steps": None,
        "lasted_s": None,
        "accuracy_at": None,
        "spread_at": None,
        "mean_accuracy_to": None,
        "gigabytes_at": None,
        "gigabytes_to_end": None,
        "failed": None,
    }
    try:
        made = covering(case, expected_s)
    except Unstable as failure:
        return run | {"failed": str(failure)}
    reached = {_percent(target): made.reached_s(target) for target in (*TARGETS, BEYOND)}
    reached_s = {name: None if s is None else round(s, 2) for name, s in reached.items()}
    beyond = {name: reached_s.pop(name) for name in run["seconds_beyond"]}
    accuracies = made.accuracies(case.at_seconds)
    return run | {
        "seconds_to": reached_s,
        "seconds_beyond": beyond,
        "steps": [len(times) for times in made.times_s],
        "lasted_s": round(made.lasted_s(), 2),
        "accuracy_at": round(statistics.mean(accuracies), 4) if accuracies else None,
        "spread_at": round(statistics.pstdev(accuracies), 4) if accuracies else None,
        "mean_accuracy_to": round(made.mean_accuracy(case.at_seconds), 4) if accuracies else None,
        "gigabytes_at": round(made.gigabytes(case.at_seconds), 3),
        "gigabytes_to_end": round(made.gigabytes(reached[_percent(TARGETS[-1])] or math.inf), 3),
    }


def _percent(target: float) -> str:
    return f"{target:.0%}"


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases seed by seed, so that an interrupted comparison has complete seeds."""
    for seed, env, system in product(args.seeds, args.env, args.system):
        testbed = EMULATED if args.emulated else SIMULATED
        yield Case(
            testbed, env, shlex.join(shlex.split(system)), seed, args.seconds, args.steps, args.at, args.learning_rate
        )


def run_all(results: Results, wanted: Iterable[Case], jobs: int) -> list[str]:
    """Run the cases that the results file lacks. Returns failures. No case starts after a failure or a signal."""
    failures: list[str] = []

    def run(case: Case) -> None:
        if failures:
            return
        try:
            new = line(case, results.expected_s(case))
        except RuntimeError as failure:
            failures.append(str(failure))
            return
        results.add(new)
        print(
            json.dumps({name: value for name, value in new.items() if name != "versions"}), file=sys.stderr, flush=True
        )

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(run, results.lacking(wanted)))
        except BaseException:
            failures.append("stopped")
            raise
    return failures


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare systems in micro-clouds; appends JSON lines to a file.")
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="file to append to")
    parser.add_argument("--emulated", action="store_true", help="run real ranks on shaped links instead of simulating")
    parser.add_argument("--env", nargs="+", default=list(ENVIRONMENTS))
    parser.add_argument("--system", nargs="+", default=list(SYSTEMS), help="strategies with their options, each quoted")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=3000.0, help="most virtual seconds of a run")
    parser.add_argument("--steps", type=int, default=2000, help="most steps of a worker")
    parser.add_argument("--at", type=float, default=120.0, metavar="SECONDS", help="time at which accuracy is compared")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="for systems that do not set one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    args = parser.parse_args(words)
    if not 0 < args.at <= args.seconds:
        parser.error("--at must be above 0 and at most --seconds")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the running cases were finished and saved"))
    if failures := run_all(Results(args.results), cases(args), args.jobs):
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
