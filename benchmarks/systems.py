"""Systems in micro-clouds, simulated or emulated: seconds to 70 % and 80 %, accuracy and spread at 120 s, bytes sent.

Every finished run is a line of the results file at once. What the file has already is not run again, so a run that
was cut off is started again with the same command. Run it from the root of the repository.

    python benchmarks/systems.py --results systems.jsonl
    python benchmarks/systems.py --results systems.jsonl --emulated --seeds 0 --seconds 240 --jobs 1 \
        --env homo-a homo-b hetero-sys-a hetero-sys-b --system dlion baseline ako gaia hop horovod
    python benchmarks/systems_table.py systems.jsonl --markdown

A run tests every 20 steps, with 1,000 samples, until the mean over the workers reaches 80 %, or for `--seconds` or
`--steps`, whichever comes first: a system whose many quick steps lead nowhere would take hours. The changes of the
dynamic environments come at thirds of `--at`, whatever the length of the run. Emulated runs take as long as they say,
need root, and the machine to themselves.
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

from dlion_mpi.learner.evaluate import target_reached_s
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.microcloud import environments
from dlion_mpi.provenance import commit, versions

ENVIRONMENTS = tuple(name for name in environments.names() if not name.startswith("gpu-"))
SYSTEMS = (
    "free-network",
    "allreduce",
    "dlion",
    "dlion --preset paper",
    "baseline",
    "ako --ako-partitions 16 --learning-rate 0.05",
    "gaia --gaia-threshold 0.2",
    "hop --hop-graph ring --staleness 20 --hop-max-gap 32",
)
"""The rivals with the best settings of a sweep over homo-b and hetero-sys-a; see results/sweep.jsonl."""
TARGETS = (0.7, 0.8)
BEYOND = 0.85
"""Noted where a run gets there that had to last so long (``--at``): no run is prolonged for it."""
SIMULATED, EMULATED = "simulated", "emulated"


@dataclass(frozen=True, slots=True)
class Case:
    """What one line of the results file is about. ``system``: a strategy, and options after it."""

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
        """The case of a line. Raises KeyError if it is none."""
        return cls(*(run[part.name] for part in fields(cls)))


@dataclass
class Results:
    """The results file, which several threads and processes may add to."""

    path: Path
    runs: list[dict[str, Any]] = field(init=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.runs = read(self.path)

    def lacking(self, wanted: Iterable[Case]) -> list[Case]:
        """Those that no line is about, each once."""
        done = {Case.of(run) for run in self.runs}
        return [case for case in dict.fromkeys(wanted) if case not in done]

    def add(self, run: dict[str, Any]) -> None:
        """Append a line, on disk when this returns. What a write that was cut off has left stays a line of its own."""
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
        """The seconds that the same system took to the last target, from the runs that are most like it: another seed,
        else the other testbed, else other environments; infinite if there are none."""
        known = [run for run in list(self.runs) if run["system"] == case.system]

        def likeness(run: dict[str, Any]) -> tuple[bool, bool]:
            return run["environment"] == case.environment, run["testbed"] == case.testbed

        most = max(map(likeness, known), default=None)
        times = [run["seconds_to"][_percent(TARGETS[-1])] for run in known if likeness(run) == most]
        return statistics.median(time or math.inf for time in times) if times else math.inf


@dataclass(frozen=True, slots=True)
class Measured:
    """One run. By worker: its tests, the times of its steps and the bytes it had sent by then."""

    tests: list[list[Evaluation]]
    times_s: list[np.ndarray]
    sent_bytes: list[np.ndarray]

    @classmethod
    def of(cls, folder: Path) -> Measured:
        """Read the metrics that a run has left."""
        measured = cls([], [], [])
        for path in sorted(folder.glob("metrics-*.h5")):
            with h5py.File(path) as file:
                columns = (file[f"evaluations/{name}"][:].tolist() for name in ("step", "time_s", "accuracy"))
                measured.tests.append([Evaluation(*row) for row in zip(*columns, strict=True)])
                measured.times_s.append(file["steps/time_s"][:])
                measured.sent_bytes.append(file["links/bytes_sent"][:].sum(axis=1))
        return measured

    def reached_s(self, target: float) -> float | None:
        """When the workers' mean accuracy reached the target."""
        return target_reached_s(self.tests, target)

    def lasted_s(self) -> float:
        """When the first worker ended."""
        return min((float(times[-1]) for times in self.times_s if len(times)), default=0.0)

    def accuracies(self, at_s: float) -> list[float]:
        """By worker, of its newest test by then; empty before everyone's first."""
        newest = [[e.accuracy for e in tests if e.time_s <= at_s][-1:] for tests in self.tests]
        return [own[0] for own in newest] if all(newest) else []

    def mean_accuracy(self, until_s: float) -> float:
        """Over the time until then, and over the workers, each by its newest test; none before its first.

        Steadier than when a target is reached, which a single lucky test decides.
        """
        means = []
        for tests in self.tests:
            own = [e for e in tests if e.time_s < until_s]
            times = np.array([e.time_s for e in own] + [until_s])
            means.append(float(np.diff(times) @ np.array([e.accuracy for e in own])) / until_s if own else 0.0)
        return statistics.mean(means)

    def gigabytes(self, at_s: float) -> float:
        """Sent by all workers by then."""
        counts = [int(np.searchsorted(times, at_s, side="right")) for times in self.times_s]
        return sum(int(sent[n - 1]) for sent, n in zip(self.sent_bytes, counts, strict=True) if n) / 1e9


class Unstable(Exception):
    """A run that ended itself, for example since its loss was no longer finite."""


def measured(case: Case, seconds: float, target: float) -> Measured:
    """Run until ``target``, or for ``seconds``. Raises Unstable, and RuntimeError for anything else that went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        env, out = _fixed_phases(case, Path(folder)), Path(folder) / "run"
        dlion = [sys.executable, "-m", "dlion_mpi"]
        command = [*dlion, "simulate", "--env", env, "--threads", "1"]
        if case.testbed == EMULATED:
            command = [*dlion, "emulate", "run", "--env", env, "--name", "systems", "--", *dlion, "train"]
        command += ["--learning-rate", str(case.learning_rate), "--strategy", *shlex.split(case.system)]
        command += ["--evaluate-every", "20", "--test-samples", "1000", "--progress-every", "0"]
        command += ["--seed", str(case.seed), "--seconds", str(seconds), "--steps", str(case.most_steps)]
        command += ["--target-accuracy", str(target), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["said nothing"])[-1]
            error = Unstable if done.returncode == 1 and "not finite" in done.stderr else RuntimeError
            raise error(f"{case.environment}, {case.system}, seed {case.seed}: code {done.returncode}: {said}")
        return Measured.of(out)


def _fixed_phases(case: Case, folder: Path) -> str:
    """The environment, or a file of it whose phases begin at set times in the place of parts of the run."""
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
    """A run that goes on until the last target and until `at`, at the longest for the most seconds.

    A run ends when it reaches its target, so if it gets there before `at` another is needed, of that length and with
    a target that is out of reach, whose workers do just the same. With ``expected_s``, the time to the target that
    is expected, the one that is more likely to be enough is made first.
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
    """Run a case: its line of the results file. Seconds are None where a target was not reached."""
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
    """Seed by seed, so that a cut leaves whole seeds."""
    for seed, env, system in product(args.seeds, args.env, args.system):
        testbed = EMULATED if args.emulated else SIMULATED
        yield Case(
            testbed, env, shlex.join(shlex.split(system)), seed, args.seconds, args.steps, args.at, args.learning_rate
        )


def run_all(results: Results, wanted: Iterable[Case], jobs: int) -> list[str]:
    """Run what the results file lacks. Returns what went wrong; after that, or a signal, nothing more is begun."""
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
    parser = argparse.ArgumentParser(description="Systems in micro-clouds, into a file of JSON lines.")
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="where runs are added")
    parser.add_argument(
        "--emulated", action="store_true", help="real ranks on shaped links, in the place of simulated ones"
    )
    parser.add_argument("--env", nargs="+", default=list(ENVIRONMENTS))
    parser.add_argument("--system", nargs="+", default=list(SYSTEMS), help="strategies, each with its options, quoted")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=3000.0, help="most virtual seconds of a run")
    parser.add_argument("--steps", type=int, default=2000, help="most steps of a worker")
    parser.add_argument("--at", type=float, default=120.0, metavar="SECONDS", help="when accuracy is compared")
    parser.add_argument(
        "--learning-rate", type=float, default=0.1, help="of systems that have none among their options"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    args = parser.parse_args(words)
    if not 0 < args.at <= args.seconds:
        parser.error("--at must be above 0 and at most --seconds")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; what was running has been finished and kept"))
    if failures := run_all(Results(args.results), cases(args), args.jobs):
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
