"""Compare simulated runs with emulated runs of the same options. Prints one JSON object.

Compares iterations and bytes sent by each worker, and accuracy at the end, for each environment, strategy and seed. An
emulated run needs root and an otherwise idle machine. Run this from the root of the repository.

    python benchmarks/agreement.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
from heading import heading

LIMITS = {"iterations": 0.10, "bytes": 0.10, "accuracy_points": 2.0}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run. ``iterations``, ``bytes_sent``: by worker. ``accuracy``: mean at the end, 0 to 1."""

    iterations: list[int]
    bytes_sent: list[int]
    accuracy: float


def run(command: Sequence[str]) -> Measured:
    """Run a command that ends with `--out`, and read its metrics. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        done = subprocess.run([*command, "--out", str(out)], stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        iterations, sent = [], []
        for path in sorted(out.glob("*.h5")):
            with h5py.File(path) as file:
                iterations.append(len(file["steps/step"]))
                sent.append(int(file["links/bytes_sent"][-1].sum()))
    return Measured(iterations=iterations, bytes_sent=sent, accuracy=result["accuracy_mean"])


def compared(
    env: str, strategy: str, seconds: float, seeds: int, earlier: Mapping[tuple[str, str], Sequence[Measured]]
) -> dict[str, Any]:
    """Run both testbeds with all seeds. Returns ratios of emulated over simulated by worker, medians over the seeds.

    ``earlier``: emulated runs to reuse, by environment and strategy, one per seed.
    """
    pairs = []
    for seed in range(seeds):
        options = ["--strategy", strategy, "--seconds", str(seconds), "--seed", str(seed), "--progress-every", "0"]
        dlion = [sys.executable, "-m", "dlion_mpi"]
        if (env, strategy) in earlier:
            emulated = earlier[env, strategy][seed]
        else:
            emulated = run([*dlion, "emulate", "run", "--env", env, "--", *dlion, "train", *options])
        simulated = run([*dlion, "simulate", "--env", env, *options])
        pairs.append((emulated, simulated))
        print(f"{env} {strategy} seed {seed}: {emulated} {simulated}", file=sys.stderr, flush=True)
    workers = range(len(pairs[0][0].iterations))
    iterations = [statistics.median(e.iterations[k] / s.iterations[k] for e, s in pairs) for k in workers]
    sent = [statistics.median(e.bytes_sent[k] / s.bytes_sent[k] for e, s in pairs) for k in workers]
    points = 100 * (statistics.mean(e.accuracy for e, _ in pairs) - statistics.mean(s.accuracy for _, s in pairs))
    return {
        "environment": env,
        "strategy": strategy,
        "iterations_ratio": [round(ratio, 3) for ratio in iterations],
        "bytes_ratio": [round(ratio, 3) for ratio in sent],
        "accuracy_emulated": [round(e.accuracy, 4) for e, _ in pairs],
        "accuracy_simulated": [round(s.accuracy, 4) for _, s in pairs],
        "accuracy_difference_points": round(points, 2),
        "within": {
            "iterations": max(abs(1 - ratio) for ratio in iterations) <= LIMITS["iterations"],
            "bytes": max(abs(1 - ratio) for ratio in sent) <= LIMITS["bytes"],
            "accuracy_points": abs(points) <= LIMITS["accuracy_points"],
        },
        "runs": [{"emulated": asdict(e), "simulated": asdict(s)} for e, s in pairs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare emulated runs with simulated ones; prints JSON.")
    parser.add_argument("--env", nargs="+", default=["homo-b", "hetero-sys-a"])
    parser.add_argument("--strategy", nargs="+", default=["dlion", "baseline"])
    parser.add_argument("--seconds", type=float, default=120.0, help="length of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--reuse", nargs="*", default=[], metavar="JSON", help="reuse the emulated runs of these results"
    )
    args = parser.parse_args()
    earlier = {
        (result["environment"], result["strategy"]): [Measured(**pair["emulated"]) for pair in result["runs"]]
        for path in args.reuse
        for result in json.loads(Path(path).read_text(encoding="utf-8"))["results"]
    }
    about = heading("agreement") | {"seconds": args.seconds, "limits": LIMITS}
    results = [compared(env, name, args.seconds, args.seeds, earlier) for name in args.strategy for env in args.env]
    print(json.dumps(about | {"results": results}))


if __name__ == "__main__":
    main()
