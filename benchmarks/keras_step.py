"""Compare a step of plain Keras with a step of DLion, on one rank and on two. Prints one JSON object.

    python benchmarks/keras_step.py [--turns 3] [--workload images ...] [--backend tensorflow]

Median step in ms and peak memory in MB, with one thread per process and no shaping of the network. Cases: `model.fit`
as Keras compiles it by default, `model.fit` without XLA, DLion on one rank and on two. The cases run in turn, several
times, each in new processes. Ratios are taken turn by turn: one rank to the faster `model.fit`, two ranks to one.
``vectors``: memory of a rank beyond that of `model.fit` without XLA, in vectors of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heading import heading

CASES = ("fit", "fit without XLA", "one rank", "two ranks")
WARM_UP = 10
LIMIT_S = 400


def workload(name: str) -> tuple[Any, Any, int, int]:
    """Return a compiled model, training rows, the batch size and the number of steps."""
    import keras
    import numpy as np

    from dlion_mpi.learner import networks
    from dlion_mpi.learner.batch import Batch
    from dlion_mpi.learner.models import cipher

    random = np.random.default_rng(0)
    classes = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if name in ("images", "images-deep"):
        rows = Batch(random.integers(0, 256, (2048, 28, 28, 1), np.uint8), random.integers(0, 10, 2048))
        if name == "images":
            model, optimizer = cipher((28, 28, 1), 10, scale=True), keras.optimizers.SGD(0.01)
        else:
            model = networks.residual(rows.part(0, 2), 10, blocks=3, width=16)
            optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        model.compile(optimizer, classes, metrics=["accuracy"], jit_compile=XLA)
        return model, rows, 32, 60
    if name == "text":
        tokens = random.integers(0, 256, (512, 65), np.uint8)
        rows = Batch(tokens[:, :-1], tokens[:, 1:])
        model = networks.transformer(rows.part(0, 2), depth=6, width=256, heads=8)
        model.compile(keras.optimizers.AdamW(0.001), classes, metrics=["accuracy"], jit_compile=XLA)
        return model, rows, 8, 30
    columns = {"dest": random.integers(0, 100, 65536, np.int32), "number": random.normal(size=(65536, 6)).astype("f4")}
    rows = Batch(columns, random.normal(size=65536).astype("f4"))
    model = networks.mlp(rows.part(0, 2), None)
    model.compile(keras.optimizers.Adam(0.001), "mse", metrics=["mae"], jit_compile=XLA)
    return model, rows, 256, 200


XLA: bool | str = False


def inside(case: str, name: str) -> None:
    """Run one case on this rank. Rank 0 prints its median step and the peak memory of the largest rank."""
    global XLA
    import numpy as np

    from dlion_mpi.learner import backend

    XLA = "auto" if case == "fit" else False
    backend.start(1)
    if "fit" in case:
        import keras

        model, rows, size, steps = workload(name)
        ends: list[float] = []
        timer = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
        options = {"batch_size": size, "steps_per_epoch": min(steps, rows.rows // size), "verbose": 0}
        while len(ends) < steps:
            model.fit(rows.x, rows.y, callbacks=[timer], **options)
        times = np.diff(ends)
    else:
        import h5py

        import dlion_mpi

        dlion_mpi.rank()
        model, rows, size, steps = workload(name)
        with tempfile.TemporaryDirectory() as own:
            out = Path(os.environ.get("BENCHMARK_OUT", own)) / f"{case}-{name}".replace(" ", "-")
            dlion_mpi.fit(
                model,
                (rows.x, rows.y),
                tuple(rows.part(0, 4)[:2]),
                steps=steps,
                batch_size=size,
                global_batch="fixed",
                batching="fixed" if dlion_mpi.size() > 1 else None,
                threads=1,
                evaluate_every=10**6,
                progress_every=0,
                out=str(out),
            )
            with h5py.File(out / f"metrics-{dlion_mpi.rank():05d}.h5") as file:
                times = file["steps/step_s"][:]
    result = {
        "ms": 1e3 * float(np.median(times[WARM_UP:])),
        "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "vector_mb": 4 * sum(int(np.prod(v.shape)) for v in model.trainable_variables) / 1e6,
    }
    print("RESULT " + json.dumps(result), flush=True)


def run(case: str, name: str, keras_backend: str) -> dict[str, float]:
    """Run one case in new processes; the slowest and largest rank counts."""
    command = [sys.executable, __file__, "--inside", case, "--workload", name]
    if case == "two ranks":
        command = [sys.executable, "-m", "dlion_mpi", "launch", "-n", "2", "--", *command]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "KERAS_BACKEND": keras_backend, "BENCHMARK_OUT": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    found = [json.loads(line.partition("RESULT ")[2]) for line in done.stdout.splitlines() if "RESULT " in line]
    if done.returncode or not found:
        raise RuntimeError(f"{case}, {name}: code {done.returncode}\n{done.stderr[-2000:]}")
    return {key: max(each[key] for each in found) for key in found[0]}


def summary(turns: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return medians over the turns, and medians of the ratios within a turn."""

    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values), 3)

    plain = [min(turn["fit"]["ms"], turn["fit without XLA"]["ms"]) for turn in turns]
    vectors = {
        case: median([(t[case]["mb"] - t["fit without XLA"]["mb"]) * 1.048576 / t[case]["vector_mb"] for t in turns])
        for case in ("one rank", "two ranks")
    }
    return {
        "ms": {case: median([turn[case]["ms"] for turn in turns]) for case in CASES},
        "mb": {case: median([turn[case]["mb"] for turn in turns]) for case in CASES},
        "vector_mb": round(turns[0]["one rank"]["vector_mb"], 3),
        "vectors": vectors,
        "one_rank_over_fit": median([t["one rank"]["ms"] / p for t, p in zip(turns, plain, strict=True)]),
        "two_ranks_over_one": median([t["two ranks"]["ms"] / t["one rank"]["ms"] for t in turns]),
    }


def main() -> None:
    """Measure all workloads, or the given ones."""
    names = ("images", "images-deep", "text", "tables")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workload", nargs="+", default=names, choices=names)
    parser.add_argument("--backend", default="tensorflow", choices=("tensorflow", "jax", "torch"))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.inside, options.workload[0])
        return
    result: dict[str, Any] = {**heading("keras_step"), "backend": options.backend, "workloads": {}}
    for name in options.workload:
        turns = [{case: run(case, name, options.backend) for case in CASES} for _ in range(options.turns)]
        result["workloads"][name] = summary(turns)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
