"""What a checkpoint costs: the step while one is being written, and reading and writing against `cp`.

Prints one JSON object. The state is about 100 MB: a dense model with a momentum slot for every weight. Steps are timed
one by one, with and without a checkpoint under way, in the same run, so that both see the same machine. `cp` is
followed by an fsync, since a checkpoint is on the disk when it counts; a file is read from the page cache by both.

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
from dlion_mpi.config.parsing import config_of
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.records import StepRecord
from dlion_mpi.view import live

REPEATS = 7


def dense(weights: int) -> Callable[[Sequence[int], int], Any]:
    """A builder of two dense layers with about so many weights."""

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
    """Seconds of a step with and without a checkpoint under way, in one run of one rank."""
    under_way: list[float] = []
    alone: list[float] = []
    original = live.Progress

    class Timed(original):  # type: ignore[misc, valid-type]
        """Sorts steps by whether a checkpoint is under way; the whole time from step to step counts."""

        last_s = 0.0
        was_busy = False

        def __call__(self, record: StepRecord) -> None:
            worker: Worker = self.accuracy.__self__
            busy = bool(worker.checkpoints._busy)  # type: ignore[union-attr]
            if record.step > 20:
                (under_way if busy or self.was_busy else alone).append(record.time_s - self.last_s)
            self.last_s, self.was_busy = record.time_s, busy

    live.Progress = Timed  # type: ignore[misc]
    config = config_of(
        {
            "data": "fashion-mnist",
            "model": "dense",
            "momentum": 0.9,
            "learning_rate": 0.001,
            "steps": steps,
            "lbs": 32,
            "threads": 1,
            "evaluate_every": "1000000",
            "test_samples": 100,
            "progress_every": 0,
            "out": str(out),
            "checkpoint_every": str(steps // 10),
            "keep_checkpoints": 1,
        }
    )
    from dlion_mpi.learner.replica import tensorflow

    tensorflow(1)
    runner.run(config, model=dense(weights)((28, 28, 1), 10))
    live.Progress = original  # type: ignore[misc]
    return {
        "steps_with": len(under_way),
        "steps_without": len(alone),
        "mean_with_ms": 1e3 * statistics.mean(under_way),
        "median_with_ms": 1e3 * statistics.median(under_way),
        "mean_without_ms": 1e3 * statistics.mean(alone),
        "median_without_ms": 1e3 * statistics.median(alone),
        "ratio_of_means": statistics.mean(under_way) / statistics.mean(alone),
        "ratio_of_medians": statistics.median(under_way) / statistics.median(alone),
        "longest_with_ms": 1e3 * max(under_way),
    }


def seconds(what: Callable[[], Any]) -> float:
    """What it takes."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def speeds(scratch: Path, megabytes: int) -> dict[str, Any]:
    """MB/s of writing and reading a file, and of `cp` of the same file, in turn."""
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
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary one)")
    parser.add_argument("--megabytes", type=int, default=100, help="of state (default: 100)")
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
