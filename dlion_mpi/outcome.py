"""What a run leaves behind, whether its micro-cloud is real or simulated: its folder, its metrics, its result."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dlion_mpi import tensorboard
from dlion_mpi.config import Config
from dlion_mpi.console import SUMMARY_COLUMNS
from dlion_mpi.data import Shard
from dlion_mpi.errors import UserError
from dlion_mpi.evaluate import Evaluation, target_reached_s
from dlion_mpi.metrics import NoRecorder, Recorder
from dlion_mpi.tensorboard import TensorBoard
from dlion_mpi.worker import Worker

AnyRecorder = Recorder | NoRecorder | TensorBoard
"""What keeps a rank's metrics."""

PACKAGES = ("dlion-mpi", "mpi4py", "numpy", "h5py", "keras")
"""Whose versions must be equal on all ranks, and are recorded."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended; but for ``rank`` the same on every rank.

    ``result``: its JSON object. ``exit_code``: 0, 1 if it failed on any rank, 75 if it is to be started again and will
    go on, 128 + the signal that ended it.
    """

    rank: int
    result: dict[str, Any]
    exit_code: int


def exit_code(codes: Sequence[float]) -> int:
    """The run's exit code from everyone's: a failure counts before a signal."""
    return 1 if 1 in codes else int(max(codes))


def summary_row(worker: Worker, seconds: float) -> list[float]:
    """A worker's numbers of SUMMARY_COLUMNS after ``seconds`` of training. It has been evaluated once at least."""
    spent = worker.spent
    return [
        worker.step,
        worker.evaluations[-1].accuracy,
        float(np.mean(worker.recent_losses)) if worker.recent_losses else math.nan,
        spent.samples,
        spent.compute_s,
        spent.select_encode_s,
        spent.wait_s,
        spent.apply_s,
        seconds,
        sum(link.bytes_sent for link in worker.links.totals().values()),
    ]


def result_of(
    config: Config,
    rows: npt.NDArray[np.float64],
    reasons: Sequence[str],
    evaluations: Sequence[Sequence[Evaluation]],
) -> dict[str, Any]:
    """The run's JSON object. By rank: ``rows`` (n, columns) of SUMMARY_COLUMNS, why it stopped, its evaluations."""
    column = dict(zip(SUMMARY_COLUMNS, rows.T, strict=True))
    losses = column["loss"]
    return {
        "strategy": config.strategy,
        "ranks": len(rows),
        "steps": int(column["steps"].max()),
        "seconds": round(float(column["seconds"].max()), 3),
        "accuracy_mean": round(float(column["accuracy"].mean()), 6),
        "accuracy_std": round(float(column["accuracy"].std()), 6),
        "accuracy_per_rank": [round(float(a), 6) for a in column["accuracy"]],
        "loss": round(float(losses.mean()), 6) if np.isfinite(losses).all() else None,
        "bytes_sent": int(column["bytes_sent"].sum()),
        "target_reached_s": target_reached_s(evaluations, config.target_accuracy),
        "stopped": next((reason for reason in reasons if reason), None),
        "out": config.out,
    }


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


@functools.cache
def versions() -> dict[str, str]:
    """The versions that all ranks must share."""
    found = {}
    for package in (*PACKAGES, "tensorflow", "tensorflow-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@functools.cache
def commit() -> str:
    """The git commit of the package if it runs from a checkout, else an empty text."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


STOPPING = (signal.SIGINT, signal.SIGTERM)


class Stoppable(Protocol):
    """A worker, or something else that ends after the step at hand when it is given a reason."""

    stop_reason: str | None
    exit_code: int


@contextlib.contextmanager
def stopped_by_signals(workers: Sequence[Stoppable], numbers: Sequence[signal.Signals] = STOPPING) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the workers' run after the step at hand; a second Ctrl-C ends it at once.

    A second SIGTERM, which launchers send, changes nothing.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if workers[0].stop_reason == name and number == signal.SIGINT:
            raise KeyboardInterrupt
        for worker in workers:
            worker.stop_reason, worker.exit_code = name, 128 + number

    try:
        before = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # not the main thread: signals are the caller's business
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
