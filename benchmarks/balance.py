"""Measure weighted dynamic batching: balance of iteration times from the start and after each change, and its cost.

Runs dlion in emulated environments (or simulated ones with `--simulated`) and prints one JSON object. Emulated runs
need root and an otherwise idle machine for three minutes.

    python benchmarks/balance.py > benchmarks/results/balance.json

The limits are those of issue 4. From 20 iterations after the start, and from 15 iterations after a change, the slowest
worker's iteration takes at most 1.10 of the median worker's. The batch sizes add up to the global batch at every step.
Everything except computing and exchange takes at most 1 % of the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from heading import heading
from training import trained

from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.microcloud import environments

RUNS = {"hetero-sys-a": 40.0, "dynamic-a": 90.0}
"""Length of a run in seconds, by environment. 90 s cover the three phases of dynamic-a."""
LIMIT = 1.10


@dataclass(frozen=True)
class Run:
    """Measurements of a run. Arrays have shape (workers, iterations)."""

    began_s: np.ndarray
    compute_s: np.ndarray
    lbs: np.ndarray
    gbs: np.ndarray
    profile_s: list[float]
    """Per worker: seconds from the start of training to the first iteration, spent timing two batch sizes."""
    agree_s: list[float]
    """Per worker: seconds spent waiting for the throughput of the other workers."""
    other_share: list[float]
    """Per worker: fraction of the time spent neither computing, selecting, waiting nor applying."""

    @classmethod
    def of(cls, folder: Path) -> Run:
        """Read a run's metrics, up to the last iteration that all workers have completed."""
        workers: list[dict[str, np.ndarray]] = []
        agree_s = []
        for path in sorted(folder.glob("metrics-*.h5")):
            with h5py.File(path) as file:
                workers.append({name: column[:] for name, column in file["steps"].items()})
                spans = file["timeline/spans"][:]
                agreeing = spans[spans["phase"] == Phase.AGREE]
                agree_s.append(float((agreeing["end_s"] - agreeing["start_s"]).sum()))
        made = min(len(own["step"]) for own in workers)
        named = ("compute_s", "select_encode_s", "wait_s", "apply_s")

        def column(name: str) -> np.ndarray:
            return np.array([own[name][:made] for own in workers])

        began_s = column("time_s") - column("step_s")
        return cls(
            began_s=began_s,
            compute_s=column("compute_s"),
            lbs=column("lbs").astype(np.int64),
            gbs=column("gbs").astype(np.int64),
            profile_s=began_s[:, 0].tolist(),
            agree_s=agree_s,
            other_share=[float(1 - sum(own[name].sum() for name in named) / own["step_s"].sum()) for own in workers],
        )

    def slowest_over_median(self) -> np.ndarray:
        """Return the computing time of the slowest worker over that of the median worker, by iteration."""
        return self.compute_s.max(axis=0) / np.median(self.compute_s, axis=0)

    def first_of(self, start_s: float) -> int:
        """Return the first iteration that any worker began at or after a time."""
        return int(np.argmax((self.began_s >= start_s).any(axis=0)))


def balanced_after(ratios: np.ndarray) -> int | None:
    """Return the first iteration after which 95 % of the ratios are within the limit; None if there is none."""
    within = ratios <= LIMIT
    for k in range(len(within)):
        if within[k] and within[k:].mean() >= 0.95:
            return k
    return None


def measured(env: str, seconds: float, seed: int, simulated: bool) -> dict[str, Any]:
    """Run one environment. Returns how soon and how well iterations are balanced in each phase, and the cost."""
    with trained(env, [], seconds=seconds, seed=seed, simulated=simulated) as folder:
        run = Run.of(folder)
    ratios = run.slowest_over_median()
    firsts = [run.first_of(start_s) for start_s in environments.load(env).phase_starts_s(seconds)]
    phases = []
    for first, after in zip(firsts, [*firsts[1:], len(ratios)], strict=True):
        own = ratios[first:after]
        settled = balanced_after(own)
        later = own[settled:] if settled is not None else own
        phases.append(
            {
                "first_iteration": first,
                "iterations": after - first,
                "balanced_after": settled,
                "then_median": round(float(np.median(later)), 3),
                "then_p95": round(float(np.percentile(later, 95)), 3),
                "first_20": [round(float(ratio), 2) for ratio in own[:20]],
            }
        )
    missed = run.lbs.sum(axis=0) != run.gbs.max(axis=0)
    length_s = float(run.began_s[:, -1].max())
    return {
        "environment": env,
        "seconds": seconds,
        "phases": phases,
        "iterations_off_the_global_batch": int(missed.sum()),
        "off_by_most_samples": int(np.abs(run.lbs.sum(axis=0) - run.gbs.max(axis=0)).max()),
        "profile_s": round(statistics.median(run.profile_s), 2),
        "standing_still_share": round(max(run.agree_s) / length_s, 4),
        "other_share": round(statistics.median(run.other_share), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the balance of iteration times; prints JSON.")
    parser.add_argument("--simulated", action="store_true", help="run in virtual time")
    parser.add_argument("--env", nargs="+", default=list(RUNS))
    parser.add_argument("--seconds", type=float, help="length of each run (default: by environment)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    about = heading("balance") | {"simulated": args.simulated}
    runs = [measured(env, args.seconds or RUNS.get(env, 90.0), args.seed, args.simulated) for env in args.env]
    print(json.dumps(about | {"runs": runs}))


if __name__ == "__main__":
    main()
