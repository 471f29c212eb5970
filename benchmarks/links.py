"""Measure full links without queues in emulated runs of dlion, with the kernel's counters. Prints one JSON object.

Measures the utilisation of each link by the counters of the kernel's traffic shaper; the messages that carried
everything there was to send; the age of gradients when they are applied; step time over computing time; the balance of
iteration times; and the recovery of utilisation and age after a rate change. Needs root and an otherwise idle machine
for 9 minutes.

    python benchmarks/links.py > benchmarks/results/links.json

The limits are those of issue 4: utilisation at least 0.93; age (95th percentile) under 2.5 iterations; slowest worker
at most 1.10 of the median after 20 iterations; steps at most 1.05 of their computing time; after a change, utilisation
of 0.90 and that age within 5 s.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from heading import heading

from dlion_mpi.emulation import netns, records
from dlion_mpi.microcloud import environments
from dlion_mpi.microcloud.environments import Environment

ENVIRONMENTS = ("hetero-net-a", "hetero-net-b", "hetero-sys-a", "homo-b")
WARM_UP_S = 10.0
SETTLED_STEP = 20
FULL = "--dlion.link-share 1 --patience 0 --value-type bfloat16"
"""Options that fill the links and do not wait for peers; not the default."""
NAME = "links"
"""Name of the emulation."""
UNTESTED = "--evaluate-every 1000000"
"""Disables evaluation, which would use the cores that six ranks share."""
SELDOM = 0.1
"""A link has more to send than it carries if at most this fraction of its messages carried everything."""
STEP = ("step_s", "compute_s", "wait_s", "time_s", "mpi_cpu_s")
CHANGE_S = 30.0
CHANGES = {"50 to 20": (50, 20), "20 to 50": (20, 50)}
CHANGING = """
workers = 6
[[phases]]
cores = 24
uplink_mbit = {before}
start_s = 0
[[phases]]
cores = 24
uplink_mbit = {after}
start_s = {change_s}
"""


@dataclass
class Counters:
    """Samples of the shapers' counters: seconds since the start of training, and bytes sent by worker and peer."""

    workers: int
    times_s: list[float] = field(default_factory=list)
    sent_bytes: list[np.ndarray] = field(default_factory=list)

    def read(self) -> None:
        """Read the counters of all links if training has started."""
        clock = next((e.clock for e in records.find_all() if e.name == NAME), None)
        began = None if clock is None else environments.read_clock(clock)
        if began is None:
            return
        sent = np.zeros((self.workers, self.workers))
        for worker in range(self.workers):
            for peer, count in netns.sent_bytes(NAME, worker).items():
                sent[worker, peer] = count
        if sent.any():
            self.times_s.append(time.time() - began.started_s)
            self.sent_bytes.append(sent)

    def megabits_per_s(self, start_s: float, stop_s: float) -> np.ndarray:
        """Return the rates by worker and peer between the samples nearest to two times."""
        times = np.array(self.times_s)
        first, last = int(np.abs(times - start_s).argmin()), int(np.abs(times - stop_s).argmin())
        return (self.sent_bytes[last] - self.sent_bytes[first]) * 8e-6 / (times[last] - times[first])


@dataclass(frozen=True)
class Run:
    """An emulated run: the environment, the kernel's counters, and each worker's metrics."""

    environment: Environment
    counters: Counters
    steps: list[dict[str, np.ndarray]]
    ages_s: list[np.ndarray]
    qualities: list[np.ndarray]
    """N of each message, by step and peer."""
    seconds: float

    def use(self, start_s: float, stop_s: float) -> dict[str, float]:
        """Return the utilisation of each link, by name, between two times of one phase."""
        rates = self.counters.megabits_per_s(start_s, stop_s)
        workers = range(self.environment.workers)
        phase = self.environment.phase_at(start_s, self.seconds)
        return {
            f"{k}-{j}": float(rates[k, j] / self.environment.rate_mbit(k, j, phase))
            for k in workers
            for j in workers
            if k != j
        }

    def whole(self, start_s: float) -> dict[str, float]:
        """Return the fraction of each link's messages after a time that carried every non-zero entry (N = 100)."""
        shares = {}
        for k, (quality, steps) in enumerate(zip(self.qualities, self.steps, strict=True)):
            later = quality[steps["time_s"] >= start_s]
            for j in range(self.environment.workers):
                if j != k and np.isfinite(later[:, j]).any():
                    sent = later[np.isfinite(later[:, j]), j]
                    shares[f"{k}-{j}"] = float(np.mean(sent >= 100))
        return shares

    def ages(self, start_s: float, stop_s: float) -> np.ndarray:
        """Return the ages of the gradients applied between two times, in iterations of their receivers.

        Ages are measured in seconds: in steps, a gradient would seem older to a worker that is ahead of its sender.
        """
        ages = []
        for age_s, steps in zip(self.ages_s, self.steps, strict=True):
            own = age_s[(steps["time_s"] >= start_s) & (steps["time_s"] < stop_s)]
            ages.append(own[np.isfinite(own)] / np.median(steps["step_s"]))
        return np.concatenate(ages)


def emulated(env: str, seconds: float, seed: int, options: str) -> Run:
    """Train for ``seconds`` in an emulation and read the kernel's counters twice a second."""
    environment = environments.load(env)
    counters = Counters(environment.workers)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        dlion = [sys.executable, "-m", "dlion_mpi"]
        command = [*dlion, "emulate", "run", "--env", env, "--name", NAME, "--", *dlion, "train", "--out", str(out)]
        command += ["--seconds", str(seconds), "--seed", str(seed), *shlex.split(options)]
        command += ["--progress-every", "0", *shlex.split(UNTESTED)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
            while running.poll() is None:
                counters.read()
                time.sleep(0.5)
        if running.returncode:
            sys.exit(f"the run in {env} failed with exit code {running.returncode}")
        steps, ages, qualities = [], [], []
        for path in sorted(out.glob("metrics-*.h5")):
            with h5py.File(path) as file:
                steps.append({name: file[f"steps/{name}"][:] for name in STEP})
                ages.append(file["links/age_s"][:])
                qualities.append(file["links/quality"][:])
    return Run(environment, counters, steps, ages, qualities, seconds)


def steady(env: str, seconds: float, seed: int, options: str) -> dict[str, Any]:
    """Measure utilisation, age, step times and balance after the warm-up."""
    run = emulated(env, seconds, seed, options)
    use = run.use(WARM_UP_S, seconds)
    ages = run.ages(WARM_UP_S, seconds)
    whole = run.whole(WARM_UP_S)
    more_to_send = [use[link] for link in use if whole.get(link, 0.0) <= SELDOM]
    own = [s["step_s"] - s["wait_s"] for s in run.steps]
    over = [float(np.median(s["step_s"] / s["compute_s"])) for s in run.steps]
    iteration_s = [float(np.median(s[SETTLED_STEP:])) for s in own]
    return {
        "environment": env,
        "use_least": round(min(use.values()), 3),
        "use_median": round(statistics.median(use.values()), 3),
        "use_least_of_those_with_more_to_send": round(min(more_to_send), 3) if more_to_send else None,
        "use_by_link": {link: round(value, 3) for link, value in use.items()},
        "whole_by_link": {link: round(value, 3) for link, value in whole.items() if value > 0},
        "age_median": round(float(np.median(ages)), 2),
        "age_p95": round(float(np.percentile(ages, 95)), 2),
        "slowest_over_median": round(max(iteration_s) / statistics.median(iteration_s), 3),
        "step_over_compute": round(statistics.median(over), 3),
        "waiting": round(statistics.mean(float(s["wait_s"].sum() / s["step_s"].sum()) for s in run.steps), 3),
        "mpi_thread_cores": round(max(float(s["mpi_cpu_s"][-1] / s["time_s"][-1]) for s in run.steps), 3),
        "steps": [len(s["step_s"]) for s in run.steps],
    }


def changing(name: str, seconds: float, seed: int, options: str) -> dict[str, Any]:
    """Measure utilisation and age from 5 s after all uplinks change, and for each second after the change."""
    before, after = CHANGES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "change.toml"
        path.write_text(CHANGING.format(before=before, after=after, change_s=CHANGE_S), encoding="utf-8")
        run = emulated(str(path), seconds, seed, options)
    later = CHANGE_S + 5
    ages = run.ages(later, seconds)
    by_second = [(float(s), run.use(s, s + 1), run.ages(s, s + 1)) for s in np.arange(CHANGE_S, CHANGE_S + 10)]
    return {
        "uplinks_mbit": name,
        "use_median_after_5_s": round(statistics.median(run.use(later, seconds).values()), 3),
        "use_least_after_5_s": round(min(run.use(later, seconds).values()), 3),
        "age_p95_after_5_s": round(float(np.percentile(ages, 95)), 2),
        "use_by_second": [round(statistics.median(use.values()), 2) for _, use, _ in by_second],
        "age_p95_by_second": [round(float(np.percentile(a, 95)), 1) if len(a) else None for _, _, a in by_second],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure link utilisation, ages of gradients and balance.")
    parser.add_argument("--env", nargs="*", default=list(ENVIRONMENTS))
    parser.add_argument("--change", nargs="*", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", default=FULL, help="options of dlion, quoted (default: %(default)s)")
    args = parser.parse_args()
    result = {
        **heading("links"),
        "seconds": args.seconds,
        "options": args.options,
        "steady": [steady(env, args.seconds, args.seed, args.options) for env in args.env],
        "changing": [changing(name, args.seconds, args.seed, args.options) for name in args.change],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
