"""The folder of a run and the files in it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.learner.shards import Shard
from dlion_mpi.metrics.recorder import NoRecorder, Recorder
from dlion_mpi.provenance import commit, versions
from dlion_mpi.view import tensorboard
from dlion_mpi.view.tensorboard import TensorBoard

AnyRecorder = Recorder | NoRecorder | TensorBoard
"""What keeps a rank's metrics."""


def new_folder(config: Config) -> Path | None:
    """Make the folder of ``--out``, which must be new: no run overwrites another. Raises UserError.

    That of ``--tensorboard`` must be unused too; each rank makes its own in it.
    """
    tensorboard.check_unused(config.tensorboard)
    if config.out is None:
        return None
    folder = Path(config.out)
    try:
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    except FileExistsError:
        raise UserError(f"--out {folder}: exists already; give a new folder, or move that one away") from None
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    return folder


def new_recorder(
    config: Config, folder: Path | None, rank: int, workers: int, shard: Shard, about: Mapping[str, Any], part: int = 0
) -> AnyRecorder:
    """The recorder of a rank's metrics. ``about``: attributes besides those of every run. Raises UserError."""
    recorder = _metrics(config, folder, rank, workers, shard, about, part)
    if config.tensorboard is None:
        return recorder
    return TensorBoard(recorder, Path(config.tensorboard), rank, workers)


def _metrics(
    config: Config, folder: Path | None, rank: int, workers: int, shard: Shard, about: Mapping[str, Any], part: int
) -> Recorder | NoRecorder:
    if folder is None:
        return NoRecorder()
    attributes = {
        "config": config.to_toml(),
        "versions": json.dumps(versions()),
        "commit": commit(),
        "host": platform.node(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "data_source": shard.source,
        "samples": shard.samples,
        **about,
    }
    try:
        return Recorder(folder, rank, workers, attributes, part)
    except OSError as error:
        raise UserError(f"--out {folder}: rank {rank} cannot write its metrics there ({error})") from None
