"""A rank of a job that trains rows: `mpirun -n 2 python -m tests.keras_rows.program FOLDER ROW...`.

Each row goes through `dlion_mpi.fit` with the whole exchange, and one of the ranks compares the result with plain
Keras. Each rank appends a JSON object per row to FOLDER/RANK.jsonl, so that a job that dies tells where.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import dlion_mpi

RANK, RANKS = dlion_mpi.rank(), dlion_mpi.size()

import keras  # noqa: E402  # after MPI, as the docs say

from dlion_mpi.strategies.dlion import Dlion  # noqa: E402
from tests.keras_rows import reference  # noqa: E402
from tests.keras_rows.row import Data, Row  # noqa: E402
from tests.keras_rows.rows import BY_NAME  # noqa: E402

LOGS_TOLERANCE = 1e-3


def fitted(row: Row, model: Any, data: Data) -> dict[str, Any]:
    """Train with every entry of every movement exchanged at every step; the summary."""
    return dlion_mpi.fit(
        model,
        data.train,
        data.validation,
        **data.options,
        strategy=Dlion(max_n=100.0),
        sync="sync",
        batching="fixed",
        global_batch="fixed",
        value_type="float32",
        batch_size=reference.BATCH_SIZE,
        steps=row.steps,
        seed=reference.SEED,
        progress_every=0,
    )


def differences(row: Row, weights: list[Any], summary: Mapping[str, Any]) -> list[str]:
    """The places where the run differs from plain Keras."""
    wanted = reference.trained(row, [reference.drawn(row, rank) for rank in range(RANKS)], row.data(RANK))
    found = []
    for at, (have, want) in enumerate(zip(weights, wanted.weights, strict=True)):
        error = float(np.abs(have - want).max(initial=0))
        if not error <= row.tolerance * max(1.0, float(np.abs(want).max(initial=0))):
            found.append(f"weights {at} of shape {want.shape} differ by {error:.2g}")
    for name, want in wanted.logs.items():
        key = "val_loss_per_rank" if name == "loss" else f"{name}_per_rank"
        have = summary.get(key, [None])[RANK if key in summary else 0]
        if have is None or not abs(have - want) <= LOGS_TOLERANCE * max(1, abs(want)) + 50 * row.tolerance:
            found.append(f"{key} is {have}, evaluate gives {want:.6g}")
    return found


def result(row: Row, *, compares: bool) -> dict[str, Any]:
    """Train the row; the JSON object that tells how it went."""
    start = time.perf_counter()
    model = reference.built(row)
    data = row.data(RANK)
    summary = fitted(row, model, data)
    weights = [np.array(keras.ops.convert_to_numpy(v)) for v in model.trainable_variables]
    seconds = time.perf_counter() - start
    digest = xxhash.xxh64(b"".join(w.tobytes() for w in weights)).hexdigest()
    if summary["steps"] != row.steps:
        return {"error": f"{summary['steps']} steps of {row.steps}"}
    wrong = differences(row, weights, summary) if compares else []
    return {"error": "; ".join(wrong), "digest": digest, "fit_s": seconds, "s": time.perf_counter() - start}


def main(folder: Path, names: list[str]) -> None:
    """Train the rows in turn, and write a line about each before and after."""
    with open(folder / f"{RANK}.jsonl", "a", encoding="utf-8") as file:
        for at, name in enumerate(names):
            row = BY_NAME[name]
            _write(file, {"row": name, "started": True})
            try:
                missing = row.missing(keras.backend.backend())
                line = {"skipped": missing} if missing else result(row, compares=at % RANKS == RANK)
            except Exception as error:
                text = str(error).strip() or "no text"
                line = {"error": f"{type(error).__name__}: {text.splitlines()[0][:300]} ... {text[-300:]}"}
            _write(file, {"row": name, **line})
            keras.backend.clear_session()


def _write(file: Any, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main(Path(sys.argv[1]), sys.argv[2:])
