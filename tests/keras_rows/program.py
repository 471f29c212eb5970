"""A rank of a job that trains rows: `mpirun -n 2 python -m tests.keras_rows.program FOLDER ROW...`.

Each row goes through `dlion_mpi.fit` with the whole exchange, and one of the ranks compares the result with plain
Keras. Each rank appends JSON objects for each row to FOLDER/RANK.jsonl, so that a job that dies tells where.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

import dlion_mpi

RANK, RANKS = dlion_mpi.rank(), dlion_mpi.size()

from dlion_mpi.learner.backend import light  # noqa: E402

with light():  # after MPI, as the docs say
    import keras

from dlion_mpi.strategies.dlion import Dlion  # noqa: E402
from tests.keras_rows import reference  # noqa: E402
from tests.keras_rows.row import Row  # noqa: E402
from tests.keras_rows.rows import BY_NAME  # noqa: E402

LOGS_TOLERANCE = 1e-3
TOGETHER = 8
"""Rows that are trained before they are compared. The ranks compare side by side; while one trains, all train."""


def fitted(row: Row, model: Any) -> dict[str, Any]:
    """Train with every entry of every movement exchanged at every step; the summary."""
    data = row.data(RANK)
    return dlion_mpi.fit(
        model,
        data.train,
        data.validation,
        **data.options,
        strategy=Dlion(max_n=100.0, outer_learning_rate=1.0),
        sync="sync",
        batching="fixed",
        global_batch="fixed",
        value_type="float32",
        batch_size=reference.BATCH_SIZE,
        steps=row.steps,
        seed=reference.SEED,
        progress_every=0,
    )


class Trained(NamedTuple):
    """What a run has left: its trainable weights, the summary, and how long it took."""

    weights: list[Any]
    summary: dict[str, Any]
    fit_s: float


def trained(row: Row) -> Trained:
    """Build and train the row, together with the other ranks."""
    start = time.perf_counter()
    model = reference.built(row)
    summary = fitted(row, model)
    weights = [np.array(keras.ops.convert_to_numpy(v)) for v in model.trainable_variables]
    return Trained(weights, summary, time.perf_counter() - start)


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


def result(row: Row, run: Trained, *, compares: bool) -> dict[str, Any]:
    """The JSON object that tells how the row went."""
    start = time.perf_counter()
    if run.summary["steps"] != row.steps:
        return {"error": f"{run.summary['steps']} steps of {row.steps}"}
    wrong = differences(row, run.weights, run.summary) if compares else []
    digest = xxhash.xxh64(b"".join(w.tobytes() for w in run.weights)).hexdigest()
    seconds = run.fit_s + time.perf_counter() - start
    return {"error": "; ".join(wrong), "digest": digest, "fit_s": run.fit_s, "s": seconds}


def main(folder: Path, names: list[str]) -> None:
    """Train some rows in turn, share their comparisons among the ranks, and continue with the next."""
    with open(folder / f"{RANK}.jsonl", "a", encoding="utf-8") as file:
        for first in range(0, len(names), TOGETHER):
            _some(file, names[first : first + TOGETHER])


def _some(file: Any, names: list[str]) -> None:
    """Write a line about each row before and after training, and before and after the comparison."""
    runs: dict[str, Trained] = {}
    for name in names:
        row = BY_NAME[name]
        _write(file, {"row": name, "state": "started"})
        missing = row.missing(keras.backend.backend())
        if missing:
            _write(file, {"row": name, "skipped": missing})
            continue
        with _errors(file, name):
            runs[name] = trained(row)
            _write(file, {"row": name, "state": "trained"})
    for at, name in enumerate(names):
        if name not in runs:
            continue
        _write(file, {"row": name, "state": "started"})
        with _errors(file, name):
            _write(file, {"row": name, **result(BY_NAME[name], runs[name], compares=at % RANKS == RANK)})


@contextmanager
def _errors(file: Any, name: str) -> Iterator[None]:
    """Write an error as the row's result, and forget the models."""
    try:
        yield
    except Exception as error:
        text = str(error).strip() or "no text"
        line = f"{type(error).__name__}: {text.splitlines()[0][:300]} ... {text[-300:]}"
        _write(file, {"row": name, "error": line})
    finally:
        keras.backend.clear_session()


def _write(file: Any, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    gc.freeze()  # clear_session collects garbage: not among the backend's million objects
    main(Path(sys.argv[1]), sys.argv[2:])
