"""The step of Horovod, and of the strategies that do the same sum, side by side. Prints one JSON object.

    python benchmarks/against_horovod.py [REPEATS]

Median step in ms (Cipher, Fashion-MNIST, LBS 32, one thread per rank, evaluation off) on one machine's own, unshaped
network, with 2 and with 4 ranks: a plain Horovod program, and `dlion train` with horovod, allreduce, baseline, and
dlion in `sync` with N = 100. They are run in turn, several times; ratios to `horovod` are taken turn by turn. The
plain program shows what running Horovod inside the worker's loop costs Horovod.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py

RANKS = (2, 4)
REPEATS = 3
STEPS, WARM_UP = 200, 50
OPTIONS = ["--threads", "1", "--evaluate-every", "1000000", "--progress-every", "0"]
WHOLE = ["--sync", "sync", "--max-n", "100", "--batching", "fixed", "--gbs-schedule", "fixed", "--transfer", "none"]
CASES = {
    "horovod": ["--strategy", "horovod"],
    "allreduce": ["--strategy", "allreduce"],
    "baseline": ["--strategy", "baseline"],
    "dlion_sync_n100": ["--strategy", "dlion", *WHOLE],
}

PLAIN = """
import sys, time, json
from dlion_mpi.model import cipher, tensorflow
from dlion_mpi.data import Batches, load
tf = tensorflow(1)
import horovod.tensorflow as hvd
import keras
hvd.init()
shard = load("fashion-mnist", rank=hvd.rank(), ranks=hvd.size())
batches = Batches(shard, seed=0, rank=hvd.rank())
model = cipher(shard.input_shape, shard.classes)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
optimizer = keras.optimizers.SGD(0.05)
optimizer.build(model.trainable_variables)
hvd.broadcast_variables([v.value for v in model.variables], 0)
@tf.function(input_signature=[tf.TensorSpec([None, 28, 28, 1], tf.uint8), tf.TensorSpec([None], tf.int32)])
def step(x, y):
    with tf.GradientTape() as tape:
        value = loss(y, model(tf.cast(x, tf.float32) / 255.0, training=True))
    gradients = tape.gradient(value, [v.value for v in model.trainable_variables])
    optimizer.apply(hvd.grouped_allreduce(gradients), model.trainable_variables)
    return value
times = []
for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    float(step(*batches.take(32)))
    times.append(time.perf_counter() - start)
if hvd.rank() == 0:
    print(json.dumps(times))
"""


def plain_ms(ranks: int) -> float:
    """Median step of a plain Horovod program."""
    done = _mpirun(ranks, sys.executable, "-c", PLAIN, str(STEPS))
    return 1e3 * statistics.median(json.loads(done.splitlines()[-1])[WARM_UP:])


def dlion_ms(ranks: int, options: list[str]) -> float:
    """Median step, over all ranks, of `dlion train`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        _mpirun(ranks, "dlion", "train", "--steps", str(STEPS), "--out", str(out), *OPTIONS, *options)
        times: list[float] = []
        for rank in range(ranks):
            with h5py.File(out / f"metrics-{rank:05d}.h5", "r", swmr=True) as file:
                times.extend(file["steps/step_s"][WARM_UP:].tolist())
    return 1e3 * statistics.median(times)


def _mpirun(ranks: int, *words: str) -> str:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = ["mpirun", "--oversubscribe", "--bind-to", "none", *root, "-n", str(ranks), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        sys.exit(f"{' '.join(command[:12])} ... failed:\n{done.stderr}")
    return done.stdout


def measure(ranks: int, repeats: int) -> dict[str, Any]:
    """All cases in turn, ``repeats`` times."""
    turns = [
        {"plain_horovod": plain_ms(ranks)} | {name: dlion_ms(ranks, options) for name, options in CASES.items()}
        for _ in range(repeats)
    ]
    return {
        name: {
            "step_ms": round(statistics.median(turn[name] for turn in turns), 2),
            "to_horovod": round(statistics.median(turn[name] / turn["horovod"] for turn in turns), 3),
            "to_horovod_by_turn": [round(turn[name] / turn["horovod"], 3) for turn in turns],
        }
        for name in turns[0]
    }


def main() -> None:
    """Measure with every number of ranks."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else REPEATS
    results = {f"{ranks}_ranks": measure(ranks, repeats) for ranks in RANKS}
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), **results}, indent=1))


if __name__ == "__main__":
    main()
