"""The trained model as a file that plain Keras loads (`--save-model`)."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import numpy as np

from dlion_mpi.config.options import Config
from dlion_mpi.config.target import falls
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.log import say
from dlion_mpi.loop.ports import Replica
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.names import best_metric
from dlion_mpi.mpi.ranks import Ranks


def check(ranks: Ranks, config: Config) -> None:
    """Check that rank 0 can write there, before an hour of training rather than after it. Raises UserError."""

    def probe() -> None:
        if config.save_model is None or ranks.rank != 0:
            return
        path = Path(config.save_model)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _partial(path).touch()
            _partial(path).unlink()
        except OSError as error:
            raise UserError(f"--save-model {path}: cannot be written ({error.strerror})") from None

    ranks.together(probe)


def save(ranks: Ranks, worker: Worker, *, report: bool) -> None:
    """Write the model of the best worker, or the mean of all, on rank 0, if no rank has failed.

    All ranks call this together. The replicas stay as they are. If the file cannot be written, rank 0 has failed.
    """
    config, replica = worker.config, worker.replica
    if config.save_model is None or ranks.gather_numbers(worker.exit_code).any():
        return
    own = replica.knowledge()
    if config.save_model_of == "mean":
        whose, knowledge = f"the mean of {ranks.size} workers", ranks.mean(own)
    else:
        best, whose = _best(ranks, worker)
        knowledge = ranks.share(own.copy(), best)
    if ranks.rank != 0:
        return
    replica.set_knowledge(knowledge)
    try:
        _write(replica, Path(config.save_model))
        if report:
            say(f"dlion: {config.save_model} has the model of {whose}")
    except RunError as error:
        worker.stop_reason, worker.exit_code = str(error), 1
    finally:
        replica.set_knowledge(own)


def _best(ranks: Ranks, worker: Worker) -> tuple[int, str]:
    """The best rank by ``--best``, and in words why. Without test data, the lowest training loss tells."""
    metric = best_metric(worker.config.best, worker.metrics)
    value = worker.history.totals.mean("loss") if metric is None else worker.last_test().get(metric, math.nan)
    values = ranks.gather_numbers(value)[:, 0]
    wanted = values if metric is None or falls(metric) else -values
    best = int(np.argmin(np.where(np.isnan(wanted), np.inf, wanted)))
    return best, f"rank {best}, {'training loss' if metric is None else f'test {metric}'} {values[best]:.4g}"


def _write(replica: Replica, path: Path) -> None:
    partial = _partial(path)
    try:
        replica.save(partial)
        os.replace(partial, path)
    except (OSError, ValueError, RuntimeError) as error:  # h5py and zipfile raise either for a full disk
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(f"--save-model {path}: could not be written ({reason})") from None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.partial.keras")  # Keras goes by the ending
