"""The trained model as a file that plain Keras loads (`--save-model`)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from dlion_mpi.config.options import Config
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.log import say
from dlion_mpi.loop.ports import Replica
from dlion_mpi.mpi import startup
from dlion_mpi.mpi.startup import Ranks


def check(config: Config, ranks: Ranks) -> None:
    """Rank 0 can write there. Raises UserError, before an hour of training rather than after it."""
    if config.save_model is None or ranks.rank != 0:
        return
    path = Path(config.save_model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _partial(path)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--save-model {path}: cannot be written ({error.strerror})") from None


def save(config: Config, ranks: Ranks, replica: Replica, accuracy: float, *, report: bool) -> None:
    """Bring the best worker's knowledge, or the mean of all, to rank 0, which writes it; on all ranks together.

    ``accuracy``: of this worker's last test. The replicas stay as they are. Raises RunError on rank 0.
    """
    assert config.save_model is not None
    own = replica.knowledge()
    if config.save_model_of == "mean":
        whose, knowledge = f"the mean of {ranks.size} workers", startup.mean_of_all(ranks, own)
    else:
        accuracies = startup.gather_numbers(ranks.communicator, accuracy)[:, 0]
        best = int(np.argmax(accuracies))
        whose = f"rank {best}, test accuracy {accuracies[best]:.2%}"
        knowledge = startup.share_from_root(ranks, own.copy(), best)
    if ranks.rank != 0:
        return
    path = Path(config.save_model)
    replica.set_knowledge(knowledge)
    try:
        _write(replica, path)
    finally:
        replica.set_knowledge(own)
    if report:
        say(f"dlion: {path} has the model of {whose}")


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
