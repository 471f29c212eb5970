"""Measure the cost of a step while a knowledge transfer is in progress.

Runs dlion with dropped gradients, so that there is something to transfer, and prints one JSON object. Runs are
emulated, which needs root and an otherwise idle machine for three minutes, or `--simulated`.

    python benchmarks/transfer.py > benchmarks/results/transfer.json

The limit is that of issue 4: a step with a transfer in progress takes at most 1.05 times as long as one without.
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

ENVIRONMENTS = ("homo-b", "hetero-sys-a")
OPTIONS = ("--dlion.unsent", "drop", "--transfer-period", "50")
SETTLED_S = 10.0
"""Seconds at the start of a run that are not counted, while bandwidth is measured."""


@dataclass(frozen=True)
class Run:
    """Times of the steps with and without a transfer in progress, by worker; durations and bytes of the transfers."""

    with_s: list[np.ndarray]
    without_s: list[np.ndarray]
    transfer_s: list[float]
    """Duration of each transfer, from its first gather to the merge, of all workers in one list."""
    payload_bytes: int
    gradient_bytes: int

    @classmethod
    def of(cls, folder: Path) -> Run:
        """Read the metrics of a run. A step counts as one with a transfer if they overlap for half of the step."""
        with_s, without_s, transfer_s = [], [], []
        payload = sent = 0
        for path in sorted(folder.glob("metrics-*.h5")):
            with h5py.File(path) as file:
                ends_s, step_s = file["steps/time_s"][:], file["steps/step_s"][:]
                spans = file["timeline/spans"][:]
                payload += int(file["transfers/payload_bytes"][:].sum())
                sent += int(file["links/bytes_sent"][-1].sum())
            spans = spans[spans["phase"] == Phase.TRANSFER]
            transfer_s += (spans["end_s"] - spans["start_s"]).tolist()
            starts_s = ends_s - step_s
            overlap_s = np.zeros(len(ends_s))
            for span in spans:
                overlap_s += np.maximum(0, np.minimum(ends_s, span["end_s"]) - np.maximum(starts_s, span["start_s"]))
            during, settled = overlap_s >= step_s / 2, starts_s >= SETTLED_S
            with_s.append(step_s[settled & during])
            without_s.append(step_s[settled & ~during])
        return cls(with_s, without_s, transfer_s, payload, sent)

    def cost(self) -> dict[str, Any]:
        """Return the time of a step with a transfer over one without: medians of the quotients of the workers."""
        both = [(a, b) for a, b in zip(self.with_s, self.without_s, strict=True) if len(a) and len(b)]
        return {
            "steps_with": sum(len(a) for a in self.with_s),
            "steps_without": sum(len(b) for b in self.without_s),
            "of_medians": _median([float(np.median(a) / np.median(b)) for a, b in both]),
            "of_means": _median([float(a.mean() / b.mean()) for a, b in both]),
            "transfer_s": _median(self.transfer_s),
        }


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


def measured(env: str, seconds: float, seed: int, simulated: bool) -> dict[str, Any]:
    """Run one environment and return its measurements."""
    with trained(env, [*OPTIONS, "--learning-rate", "0.1"], seconds=seconds, seed=seed, simulated=simulated) as folder:
        run = Run.of(folder)
    return {
        "environment": env,
        **run.cost(),
        "transferred_megabytes": round(run.payload_bytes / 1e6, 1),
        "gradient_megabytes": round(run.gradient_bytes / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cost of a knowledge transfer; prints JSON.")
    parser.add_argument("--simulated", action="store_true", help="run in virtual time")
    parser.add_argument("--env", nargs="+", default=list(ENVIRONMENTS))
    parser.add_argument("--seconds", type=float, default=75.0, help="length of each run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    about = heading("transfer") | {"seconds": args.seconds, "options": list(OPTIONS), "simulated": args.simulated}
    runs = [measured(env, args.seconds, args.seed, args.simulated) for env in args.env]
    print(json.dumps(about | {"runs": runs}))


if __name__ == "__main__":
    main()
