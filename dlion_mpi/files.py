"""The folder of a run and the files in it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.metrics.recorder import NoRecorder, Recorder
from dlion_mpi.mpi.ranks import Ranks
from dlion_mpi.provenance import commit, versions
from dlion_mpi.view import tensorboard
from dlion_mpi.view.tensorboard import TensorBoard

AnyRecorder = Recorder | NoRecorder | TensorBoard
"""Records a rank's metrics."""


class Data(Protocol):
    """A rank's training data: where it is from, and the number of its rows if that is known."""

    @property
    def source(self) -> str: ...

    @property
    def samples(self) -> int | None: ...


def new_folder(config: Config) -> None:
    """Make the folder of ``--out``. Raises UserError if it exists: no run overwrites another.

    The folder of ``--tensorboard`` must be unused too. Each rank makes its own folder in it.
    """
    tensorboard.check_unused(config.tensorboard)
    if config.out is None:
        return
    folder = Path(config.out)
    try:
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    except FileExistsError:
        raise UserError(f"--out {folder}: exists already; give a new folder, or move that one away") from None
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None


def new_recorder(
    config: Config,
    rank: int,
    workers: int,
    data: Data,
    about: Mapping[str, Any],
    metrics: Sequence[str],
    part: int = 0,
) -> AnyRecorder:
    """Make the recorder of a rank's metrics, in the folders of ``--out`` and ``--tensorboard``.

    ``about``: attributes of this run, added to those of every run. ``metrics``: names of the test metrics. ``part``:
    0, or the number of times that the run was resumed. Raises UserError.
    """
    recorder: Recorder | NoRecorder = NoRecorder()
    if config.out is not None:
        attributes = {
            "config": config.to_toml(),
            "versions": json.dumps(versions()),
            "commit": commit(),
            "host": platform.node(),
            "pid": os.getpid(),
            "python": platform.python_version(),
            "data_source": data.source,
            **({} if data.samples is None else {"samples": data.samples}),
            **about,
        }
        try:
            recorder = Recorder(Path(config.out), rank, workers, attributes, part, metrics=metrics)
        except OSError as error:
            raise UserError(f"--out {config.out}: rank {rank} cannot write its metrics there ({error})") from None
    if config.tensorboard is None:
        return recorder
    return TensorBoard(recorder, Path(config.tensorboard), rank, workers)


def new_recorders(ranks: Ranks, make: Callable[[], AnyRecorder]) -> AnyRecorder:
    """Make the recorders of all ranks together. Raises UserError on all if one cannot; the others' files then go."""
    made: list[AnyRecorder] = []
    try:
        ranks.together(lambda: made.append(make()))
    except UserError:
        for recorder in made:
            recorder.discard()
        raise
    return made[0]
