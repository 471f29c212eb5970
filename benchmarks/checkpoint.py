"""Measure the cost of a checkpoint: step time while one is written, and read and write speed compared with `cp`.

Prints one JSON object. The state is about 100 MB: a dense model with a momentum slot per weight. Steps with and without
a checkpoint in progress are timed in the same run, so that both see the same machine. An fsync follows `cp`, because a
complete checkpoint is on the disk. Both read from the page cache.

    python benchmarks/checkpoint.py [--folder DIR] [--megabytes 100] [--steps 400]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from heading import heading

from dlion_mpi import run as runner
from dlion_mpi.checkpoint import file
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.records import StepRecord
from dlion_mpi.strategies.given import config_of
from dlion_mpi.view import live

REPEATS = 7


def dense(weights: int) -> Callable[[Sequence[int], int], Any]:
    """Return a builder of a model of two dense layers with about ``weights`` weights."""

    def build(input_shape: Sequence[int], classes: int) -> Any:
        import keras

        inputs = int(np.prod(input_shape))
        width = weights // (inputs + classes)
        layers = keras.layers
        return keras.Sequential(
            [keras.Input(tuple(input_shape)), layers.Flatten(), layers.Dense(width, "relu"), layers.Dense(classes)]
        )

    return build


def step_times(out: Path, weights: int, steps: int) -> dict[str, Any]:
    """Time the steps of one rank with and without a checkpoint in progress."""
    during: list[float] = []
    alone: list[float] = []
    original = live.Reporter

    class Timed(original):  # type: ignore[misc, valid-type]
        """Sorts the time from step to step by whether a checkpoint was in progress."""

        last_s = 0.0
        was_busy = False

        def __call__(self, record: StepRecord) -> None:
            worker: Worker = self._accuracy.__self__
            busy = bool(worker.checkpoints._busy)  # type: ignore[union-attr]
            if record.step > 20:
                (during if busy or self.was_busy else alone).append(record.time_s - self.last_s)
            self.last_s, self.was_busy = record.time_s, busy

    live.Reporter = Timed  # type: ignore[misc]
    config = config_of(
        {
            "data": "fashion-mnist",
            "model": "dense",
            "momentum": 0.9,
            "learning_rate": 0.001,
            "steps": steps,
            "batch_size": 32,
            "threads": 1,
            "evaluate_every": "1000000",
            "test_samples": 100,
            "progress_every": 0,
            "out": str(out),
            "checkpoint_every": str(steps // 10),
            "keep_checkpoints": 1,
        }
    )
    from dlion_mpi.learner import backend

    backend.start(1)
    runner.run(config, model=dense(weights)((28, 28, 1), 10))
    live.Reporter = original  # type: ignore[misc]
    return {
        "steps_with": len(during),
        "steps_without": len(alone),
        "mean_with_ms": 1e3 * statistics.mean(during),
        "median_with_ms": 1e3 * statistics.median(during),
        "mean_without_ms": 1e3 * statistics.mean(alone),
        "median_without_ms": 1e3 * statistics.median(alone),
        "ratio_of_means": statistics.mean(during) / statistics.mean(alone),
        "ratio_of_medians": statistics.median(during) / statistics.median(alone),
        "longest_with_ms": 1e3 * max(during),
    }


def seconds(call: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def speeds(scratch: Path, megabytes: int) -> dict[str, Any]:
    """Measure MB/s of writing and reading a file, and of `cp` on the same file, in turn."""
    arrays = {f"part/{k}": np.random.default_rng(k).random(megabytes * 125_000, dtype=np.float32) for k in range(2)}
    path, other = scratch / "rank-00000.h5", scratch / "copy"
    written = file.write(path, arrays, {})
    times: dict[str, list[float]] = {"write": [], "cp": [], "read": [], "cat": []}

    def copy() -> None:
        subprocess.run(["cp", str(path), str(other)], check=True)
        descriptor = os.open(other, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)

    for _ in _turns():
        path.unlink()
        times["write"].append(seconds(lambda: file.write(path, arrays, {})))
        other.unlink(missing_ok=True)
        times["cp"].append(seconds(copy))
        times["read"].append(seconds(lambda: file.read(path, written)))
        times["cat"].append(seconds(lambda: subprocess.run(["cp", str(path), "/dev/null"], check=True)))
    size = written.size_bytes / 1e6
    rates = {f"{name}_mb_per_s": size / statistics.median(found) for name, found in times.items()}
    pairs = [cp / write for cp, write in zip(times["cp"], times["write"], strict=True)]
    reads = [cp / read for cp, read in zip(times["cp"], times["read"], strict=True)]
    return {
        "megabytes": size,
        **rates,
        "write_over_cp": statistics.median(pairs),
        "read_over_cp": statistics.median(reads),
    }


def _turns() -> Iterator[int]:
    for turn in range(REPEATS):
        os.sync()
        yield turn


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure (default: a temporary folder)")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the state (default: 100)")
    parser.add_argument("--steps", type=int, default=400, help="steps to time (default: 400)")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        result = {
            **heading("checkpoint"),
            "files": speeds(scratch, args.megabytes),
            "steps": step_times(scratch / "run", args.megabytes * 1_000_000 // 8, args.steps),
        }
    finally:
        shutil.rmtree(scratch)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
