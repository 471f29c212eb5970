"""Measure step time, memory per rank, and the response time of the command line. Prints one JSON object.

    python benchmarks/train.py [step] [memory] [answer]

``step``: median step of DLion (2 ranks, Cipher, batch size 32, each rank on its own core) and of the same computation
alone, a plain TensorFlow loop that runs on both cores at the same time; also one rank against one plain loop. Both run
in turn, several times, and the ratio is taken pair by pair. ``memory``: resident MB per rank after 500 and after 5,000
steps. ``answer``: seconds that `dlion --help` and `dlion doctor` take.
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
import numpy as np

ROUNDS = 5
STEPS = 300
WARM_UP = 50
PARTS = ("compute_s", "select_encode_s", "wait_s", "apply_s", "step_s")
FIXED = ["--batching", "fixed", "--global-batch", "fixed", "--evaluate-every", "1000000", "--progress-every", "0"]

PLAIN = """
import os, sys, time, json
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
from dlion_mpi.learner.models import cipher
from dlion_mpi.learner import backend
from dlion_mpi.learner.batches import Batches
from dlion_mpi.learner.shards import load
backend.start(1)
import keras
import tensorflow as tf
steps = int(sys.argv[1])
shard = load("fashion-mnist", rank=0, ranks=2)
batches = Batches(shard, seed=0, rank=0)
model = cipher(shard.input_shape, shard.classes)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
optimizer = keras.optimizers.SGD(0.05)
optimizer.build(model.trainable_variables)
@tf.function(input_signature=[tf.TensorSpec([None, 28, 28, 1], tf.uint8), tf.TensorSpec([None], tf.int32)])
def step(x, y):
    with tf.GradientTape() as tape:
        value = loss(y, model(tf.cast(x, tf.float32) / 255.0, training=True))
    variables = [v.value for v in model.trainable_variables]
    optimizer.apply(tape.gradient(value, variables), model.trainable_variables)
    return value
times = []
for _ in range(steps):
    start = time.perf_counter()
    float(step(*batches.take(32)[:2]))
    times.append(time.perf_counter() - start)
print(json.dumps(times))
"""


def plain_ms(processes: int) -> float:
    """Return the median step of ``processes`` plain TensorFlow loops at the same time, each on its own core."""
    command = [sys.executable, "-c", PLAIN, str(STEPS)]
    running = [
        subprocess.Popen(["taskset", "-c", str(core), *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for core in range(processes)
    ]
    times = [json.loads(process.communicate()[0]) for process in running]
    return 1e3 * statistics.median(t for own in times for t in own[WARM_UP:])


def dlion_ms(ranks: int, *options: str) -> dict[str, float]:
    """Return medians over all ranks of the parts of a DLion step, and the MB that each rank sends per step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = ["dlion", "train", "--steps", str(STEPS), "--out", str(out), "--threads", "1", *FIXED, *options]
        pinned = ["bash", "-c", 'exec taskset -c ${OMPI_COMM_WORLD_RANK:-0} "$@"', "bash", *words]
        subprocess.run([*_mpirun(ranks), *pinned], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        columns: dict[str, list[float]] = {name: [] for name in PARTS}
        sent = 0
        for rank in range(ranks):
            with h5py.File(out / f"metrics-{rank:05d}.h5", "r", swmr=True) as file:
                for name in PARTS:
                    columns[name].extend(file[f"steps/{name}"][WARM_UP:].tolist())
                sent += int(file["links/bytes_sent"][-1].sum())
        medians = {name.replace("_s", "_ms"): 1e3 * statistics.median(values) for name, values in columns.items()}
        return {**medians, "mb_sent_per_rank_and_step": sent / ranks / STEPS / 1e6}


def _mpirun(ranks: int) -> list[str]:
    if ranks == 1:
        return []
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return ["mpirun", "--oversubscribe", "--bind-to", "none", *root, "-n", str(ranks)]


def step() -> dict[str, Any]:
    """Measure ratios of a DLion step to the same computation alone, in pairs run one after the other."""
    pairs: dict[str, list[dict[str, float]]] = {}
    cases = {
        "one_rank": (1, ()),
        "two_ranks": (2, ()),
        "two_ranks_all_entries": (2, ("--dlion.max-n", "100", "--exchange-share", "0")),
    }
    for _ in range(ROUNDS):
        for name, (ranks, options) in cases.items():
            ours, alone_ms = dlion_ms(ranks, *options), plain_ms(ranks)
            pairs.setdefault(name, []).append({**ours, "alone_ms": alone_ms, "ratio": ours["step_ms"] / alone_ms})
    return {
        name: {
            **{key: round(statistics.median(p[key] for p in own), 4) for key in own[0]},
            "ratios": [round(p["ratio"], 3) for p in own],
        }
        for name, own in pairs.items()
    }


def memory() -> dict[str, Any]:
    """Measure the resident memory of each rank in a run of 5,000 steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = ["dlion", "train", "--steps", "5000", "--out", str(out), *FIXED]
        run = subprocess.Popen([*_mpirun(2), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        samples: list[tuple[int, list[float]]] = []
        while run.poll() is None:
            time.sleep(1)
            resident = [mb for mb in (_resident_mb(entry, str(out)) for entry in Path("/proc").iterdir()) if mb]
            if len(resident) == 2:
                samples.append((_steps_done(out), resident))
    early = max(next(mb for steps, mb in samples if steps >= 500))
    late = max(samples[-1][1])
    return {"mb_after_500_steps": round(early), "mb_at_the_end": round(late), "growth": round(late / early - 1, 4)}


def _resident_mb(entry: Path, word: str) -> float | None:
    try:
        line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        if word.encode() not in line or b"mpirun" in line or b"python" not in line:
            return None
        status = dict(row.split(":", 1) for row in (entry / "status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]) / 1024
    except (OSError, KeyError):
        return None


def _steps_done(out: Path) -> int:
    try:
        with h5py.File(out / "metrics-00000.h5", "r", swmr=True) as file:
            return int(file["steps/step"].shape[0])
    except OSError:
        return 0


def answer() -> dict[str, Any]:
    """Measure the median wall seconds of commands that must respond quickly."""
    result = {}
    for words in (["--help"], ["train", "--help"], ["doctor"]):
        times = []
        for _ in range(ROUNDS):
            start_s = time.perf_counter()
            subprocess.run(["dlion", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
            times.append(time.perf_counter() - start_s)
        result["dlion " + " ".join(words)] = round(float(np.median(times)), 3)
    return result


def main() -> None:
    """Run the parts named on the command line, or all."""
    parts = {"step": step, "memory": memory, "answer": answer}
    chosen = sys.argv[1:] or list(parts)
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), **{name: parts[name]() for name in chosen}}, indent=1))


if __name__ == "__main__":
    main()
