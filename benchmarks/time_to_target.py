"""Seconds of virtual time to 70 % and 80 % test accuracy: systems in micro-clouds, as one JSON object.

Every run is `dlion simulate` until the mean over the workers reaches 80 %, or until `--seconds`. Testing every 10
steps, with 2,000 samples, bounds what a figure can be off by. Run it from the root of the repository.

    python benchmarks/time_to_target.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import h5py

from dlion_mpi.evaluate import Evaluation, target_reached_s
from dlion_mpi.outcome import commit, versions

ENVIRONMENTS = ("homo-a", "homo-b", "hetero-cpu-a", "hetero-net-a", "hetero-sys-a", "hetero-sys-b")
SYSTEMS = ("free-network", "allreduce", "baseline", "dlion")
TARGETS = (0.7, 0.8)


def evaluations(path: Path) -> list[Evaluation]:
    """What a worker's metrics file says of its tests."""
    with h5py.File(path) as file:
        rows = zip(
            file["evaluations/step"][:], file["evaluations/time_s"][:], file["evaluations/accuracy"][:], strict=True
        )
        return [Evaluation(int(step), float(time_s), float(accuracy)) for step, time_s, accuracy in rows]


def simulated(env: str, system: str, seed: int, *options: str) -> tuple[dict[str, Any], list[list[Evaluation]]]:
    """One run: its JSON line, and the tests of every worker. ``system``: a strategy, and options after it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "dlion_mpi", "simulate", "--env", env, "--strategy", *shlex.split(system)]
        command += ["--evaluate-every", "10", "--test-samples", "2000", "--seed", str(seed), "--threads", "1"]
        command += ["--progress-every", "0", "--out", str(out), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip().splitlines()[-1]}")
        own = [evaluations(path) for path in sorted(out.glob("*.h5"))]
    return json.loads(done.stdout.splitlines()[-1]), own


def measured(env: str, system: str, seed: int, seconds: float, at_s: float) -> dict[str, Any]:
    """Seconds to each target, None where it was not reached; and accuracy at ``at_s``, if that is not 0."""
    result, own = simulated(env, system, seed, "--seconds", str(seconds), "--target-accuracy", str(TARGETS[-1]))
    reached = {f"{target:.0%}": target_reached_s(own, target) for target in TARGETS}
    run = {
        "environment": env,
        "system": system,
        "seed": seed,
        "seconds_to": {name: None if s is None else round(s, 1) for name, s in reached.items()},
        "steps": result["steps"],
        "seconds": round(result["seconds"], 1),
        "gigabytes_sent": round(result["bytes_sent"] / 1e9, 2),
    }
    if at_s:
        if result["seconds"] < at_s:
            _, own = simulated(env, system, seed, "--seconds", str(at_s))
        latest = [max((e for e in tests if e.time_s <= at_s), key=lambda e: e.time_s, default=None) for tests in own]
        accuracies = [0.0 if e is None else e.accuracy for e in latest]
        run["accuracy_at"] = round(statistics.mean(accuracies), 4)
        run["spread_at"] = round(statistics.pstdev(accuracies), 4)
    print(json.dumps(run), file=sys.stderr, flush=True)
    return run


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the seeds; a seed that did not reach the target counts as infinity."""
    rows = []
    for env, system in dict.fromkeys((run["environment"], run["system"]) for run in runs):
        own = [run for run in runs if (run["environment"], run["system"]) == (env, system)]
        row: dict[str, Any] = {"environment": env, "system": system}
        for target in own[0]["seconds_to"]:
            middle = statistics.median(run["seconds_to"][target] or float("inf") for run in own)
            row[target] = None if middle == float("inf") else middle
        for name in ("accuracy_at", "spread_at", "gigabytes_sent"):
            if name in own[0]:
                row[name] = statistics.median(run[name] for run in own)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Virtual seconds to 70 %% and 80 %%, as one JSON object.")
    parser.add_argument("--env", nargs="+", default=list(ENVIRONMENTS))
    parser.add_argument("--system", nargs="+", default=list(SYSTEMS), help="strategies, each with its options, quoted")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6000.0, help="most virtual seconds of a run")
    parser.add_argument("--at", type=float, default=0.0, metavar="SECONDS", help="also accuracy and spread then")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        cases = product(args.env, args.system, range(args.seeds))
        runs = list(pool.map(lambda case: measured(case[0], case[1], case[2], args.seconds, args.at), cases))
    about = {
        "benchmark": "time_to_target",
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "most_seconds": args.seconds,
        "at_seconds": args.at or None,
        "seeds": args.seeds,
    }
    print(json.dumps(about | {"table": table(runs), "runs": runs}))


if __name__ == "__main__":
    main()
