"""Compare the step time of Horovod with that of strategies that compute the same sum. Prints one JSON object.

    python benchmarks/against_horovod.py [--turns 3] [--case allreduce ...]

Median step in ms (Cipher, Fashion-MNIST, batch size 32, one thread per rank, no evaluation) on one machine with its
unshaped network, with 2 and 4 ranks. Cases: a plain Horovod program, and `dlion train` with horovod, allreduce,
baseline, and dlion in `sync` with N = 100. The same processes run all cases in turn, several times and in a different
order each time, so that other load on the machine affects all cases equally. Ratios to `horovod` are taken turn by
turn. The plain program shows the cost of running Horovod inside the training loop.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
from heading import heading

RANKS = (2, 4)
STEPS, WARM_UP = 60, 15
LIMIT_S = 600
"""Time limit of the measurement with one number of ranks."""
WHOLE = {
    "sync": "sync",
    "dlion.max_n": 100,
    "batching": "fixed",
    "global_batch": "fixed",
    "transfer": "none",
    "value_type": "float32",
}
CASES: dict[str, dict[str, Any]] = {
    "horovod": {"strategy": "horovod"},
    "allreduce": {"strategy": "allreduce"},
    "baseline": {"strategy": "baseline"},
    "dlion_sync_n100": {"strategy": "dlion", **WHOLE},
}
PLAIN = "plain_horovod"
ALL = [PLAIN, *CASES]


def plain() -> list[float]:
    """Return the seconds of each step of this rank in a plain Horovod program."""
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf

    from dlion_mpi.learner.batches import Batches
    from dlion_mpi.learner.models import cipher
    from dlion_mpi.learner.shards import load

    hvd.init()
    shard = load("fashion-mnist", rank=hvd.rank(), ranks=hvd.size(), partition="iid", alpha=0.5, seed=0)
    batches = Batches(shard, seed=0, rank=hvd.rank())
    model = cipher(shard.input_shape, shard.classes)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.05)
    optimizer.build(model.trainable_variables)
    hvd.broadcast_variables([v.value for v in model.variables], 0)

    @tf.function(input_signature=[tf.TensorSpec([None, 28, 28, 1], tf.uint8), tf.TensorSpec([None], tf.int32)])
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss(y, model(tf.cast(x, tf.float32) / 255.0, training=True))
        gradients = tape.gradient(value, [v.value for v in model.trainable_variables])
        optimizer.apply(hvd.grouped_allreduce(gradients), model.trainable_variables)
        return value

    times = []
    for _ in range(STEPS):
        start_s = time.perf_counter()
        float(step(*batches.take(32)[:2]))
        times.append(time.perf_counter() - start_s)
    hvd.shutdown()
    return times


def trained(options: dict[str, Any], out: Path, rank: int) -> list[float]:
    """Return the seconds of each step of this rank in `dlion train`, which writes its metrics to ``out``."""
    from dlion_mpi.run import run
    from dlion_mpi.strategies.given import config_of

    config = config_of({"steps": STEPS, "threads": 1, "evaluate_every": "1000000", "out": str(out), **options})
    if code := run(config, report=False).exit_code:
        raise RuntimeError(f"{options}: ended with code {code}")
    with h5py.File(out / f"metrics-{rank:05d}.h5") as file:
        return [float(seconds) for seconds in file["steps/step_s"][:]]


def inside(turns: int, names: Sequence[str]) -> None:
    """Run these cases in turn on one rank. Rank 0 prints the median step of all ranks by turn and case, in ms."""
    from mpi4py import MPI

    from dlion_mpi.learner import backend

    backend.start(1)
    world = MPI.COMM_WORLD
    medians: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.bcast(own, root=0))
        for turn in range(turns):
            medians.append({})
            for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
                gc.collect()
                out = folder / f"{name}-{turn}"
                times = plain() if name == PLAIN else trained(CASES[name], out, world.Get_rank())
                all_times = [s for each in world.allgather(times) for s in each[WARM_UP:]]
                medians[-1][name] = 1e3 * statistics.median(all_times)
        world.Barrier()  # rank 0 removes the folder
    if world.Get_rank() == 0:
        print(json.dumps(medians), flush=True)


def measured(ranks: int, turns: int, names: Sequence[str]) -> dict[str, Any]:
    """Measure these cases with ``ranks`` ranks: medians over the turns, and ratios to Horovod."""
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = ["mpirun", "--oversubscribe", "--bind-to", "none", *root, "-n", str(ranks)]
    command += [sys.executable, "-m", "mpi4py", __file__, "--inside", "--turns", str(turns), "--case", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    medians = json.loads(done.stdout.splitlines()[-1])
    return {
        name: {
            "step_ms": round(statistics.median(turn[name] for turn in medians), 2),
            "to_horovod": round(statistics.median(turn[name] / turn["horovod"] for turn in medians), 3),
            "to_horovod_by_turn": [round(turn[name] / turn["horovod"], 3) for turn in medians],
        }
        for name in names
    }


def main() -> None:
    """Measure with each number of ranks and print the result."""
    parser = argparse.ArgumentParser(description="Step times of Horovod and of equivalent strategies, as JSON.")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--case", nargs="+", choices=ALL, default=ALL, help="cases to run in addition to horovod")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = [name for name in ALL if name in {"horovod", *args.case}]
    if args.inside:
        inside(args.turns, names)
        return
    about = heading("against_horovod")
    results = {f"{ranks}_ranks": measured(ranks, args.turns, names) for ranks in RANKS}
    about |= {
        "limits_of_allreduce": [0.9, 1.1],
        "within": {
            name: 0.9 <= own["allreduce"]["to_horovod"] <= 1.1 for name, own in results.items() if "allreduce" in own
        },
    }
    print(json.dumps(about | results, indent=1))


if __name__ == "__main__":
    main()
