"""One run on this rank, from its Config to its result: agree, build, train, leave together, sum up."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from dlion_mpi import startup
from dlion_mpi.collectives import Collectives
from dlion_mpi.config import Config
from dlion_mpi.console import SUMMARY_COLUMNS, Progress, say, summary
from dlion_mpi.data import Batches, Shard, load, merge_facts
from dlion_mpi.driver import drive
from dlion_mpi.environments import PaceClock, start_clock
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.evaluate import BackgroundEvaluator, Evaluation, target_reached_s
from dlion_mpi.exchange_cost import seconds_per_byte
from dlion_mpi.links import Links
from dlion_mpi.membership import Membership
from dlion_mpi.metrics import NoRecorder, Recorder
from dlion_mpi.model import Replica, build, optimizer, tensorflow
from dlion_mpi.progress import ProgressThread
from dlion_mpi.startup import Ranks, together
from dlion_mpi.strategies import resolve
from dlion_mpi.testbed import Loop
from dlion_mpi.train import CHANNELS, leave, train
from dlion_mpi.worker import Worker

PACKAGES = ("dlion-mpi", "mpi4py", "numpy", "h5py", "keras")
"""Whose versions must be equal on all ranks, and are recorded."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended; but for ``rank`` the same on every rank.

    ``result``: its JSON object. ``exit_code``: 0, 1 if it failed on any rank, 128 + the signal that ended it.
    """

    rank: int
    result: dict[str, Any]
    exit_code: int


def run(
    config: Config, *, model: Any = None, own_data: Callable[[], Shard] | None = None, report: bool = True
) -> Outcome:
    """Train on all ranks of MPI's world. Every rank calls this with an equal Config.

    ``model``, ``own_data``: a Keras model, and what gives this rank's data, in place of what the Config names.
    ``report``: say how it goes on stderr. Raises UserError on every rank if any has one.
    """
    ranks = startup.begin()
    startup.agree(ranks, "\n".join(f"{k} = {v}" for k, v in _versions().items()) + "\n" + config.to_toml())
    strategy, config = resolve(config)
    pace_clock = together(ranks, lambda: PaceClock.from_environ(ranks.rank, run_seconds=config.seconds))
    shard = _merge(ranks, together(ranks, own_data or (lambda: _load(config, ranks))))
    replica = together(ranks, lambda: _replica(config, ranks, shard, model))
    replica.set_knowledge(startup.share_from_root(ranks, replica.knowledge()))
    folder = together(ranks, lambda: _new_folder(config, ranks))
    recorder = together(ranks, lambda: _recorder(config, ranks, shard, folder))
    if report and ranks.rank == 0:
        say(
            f"dlion: {config.strategy}, {config.sync}, {ranks.size} rank{'s' * (ranks.size > 1)}; {config.model}, "
            f"{replica.layout.size:,} parameters; {shard.name} from {shard.source}, "
            f"{shard.train_samples_global:,} training samples"
        )

    clock = startup.CommonClock(ranks)
    progress = ProgressThread()
    links_communicator = ranks.communicator.Dup()
    links = Links(
        links_communicator,
        size=replica.layout.size,
        window=config.window,
        now_s=clock.now_s,
        wake=progress.wake,
    )
    collectives = Collectives(ranks.communicator, CHANNELS, progress.wake)
    evaluator = BackgroundEvaluator(replica.correct, shard.x_test, shard.y_test)
    worker = Worker(
        config=config,
        rank=ranks.rank,
        members=Membership(tuple(range(ranks.size))),
        strategy=strategy,
        replica=replica,
        batches=Batches(shard, seed=config.seed, rank=ranks.rank),
        links=links,
        collectives=collectives,
        evaluator=evaluator,
        recorder=recorder,
        now_s=clock.now_s,
        training_samples=shard.train_samples_global,
        exchange_s_per_byte=seconds_per_byte(config.value_type) if config.value_type else 0.0,
    )
    if report:
        worker.on_step = Progress(
            ranks.rank, config.progress_every, lambda: worker.evaluations[-1].accuracy if worker.evaluations else None
        )

    def driven(loop: Loop) -> None:
        drive(loop, replica=replica, progress=progress, now_s=clock.now_s, pace_model=pace_clock)

    with _signals(worker):
        clock.start()
        if ranks.rank == 0:
            start_clock(config.seconds)
        progress.start(links, collectives)
        _train(worker, driven)
        seconds = clock.now_s()
        progress.stop()
        links.cancel()
        collectives.free()
        links_communicator.Free()
        _evaluate_last(worker, evaluator, replica, seconds)
    recorder.close(complete=worker.exit_code == 0)
    result, rows = _sum_up(worker, ranks, seconds)
    exit_codes = startup.gather_numbers(ranks.communicator, worker.exit_code)[:, 0]
    ranks.communicator.Free()
    if report and ranks.rank == 0:
        say(summary(result, rows))
    return Outcome(ranks.rank, result, 1 if 1 in exit_codes else int(exit_codes.max()))


def _train(worker: Worker, driven: Callable[[Loop], None]) -> None:
    """Train, and leave in good order whatever happens to this rank's training."""
    try:
        driven(train(worker))
    except RunError as error:
        worker.stop_reason, worker.exit_code = str(error), 1
    driven(leave(worker))


@contextlib.contextmanager
def _signals(worker: Worker) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step at hand; a second Ctrl-C ends it at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if worker.stop_reason == name and number == signal.SIGINT:
            raise KeyboardInterrupt
        worker.stop_reason, worker.exit_code = name, 128 + number

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are the caller's business
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _load(config: Config, ranks: Ranks) -> Shard:
    return load(
        config.data,
        rank=ranks.rank,
        ranks=ranks.size,
        partition=config.partition,
        alpha=config.dirichlet_alpha,
        seed=config.seed,
    )


def _merge(ranks: Ranks, shard: Shard) -> Shard:
    """The shard with what only all ranks together know; refuses shards that do not fit each other."""
    shapes = startup.gather_text(ranks.communicator, f"{shard.input_shape} {shard.x_train.dtype}")
    for rank, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise UserError(
                f"--data: rank {rank} has samples of {shape}, rank 0 of {shapes[0]}: they must be alike",
                quiet=ranks.rank != 0,
            )
    facts = startup.gather_numbers(ranks.communicator, shard.classes, shard.samples)
    return shard.with_facts(*merge_facts([(int(classes), int(samples)) for classes, samples in facts]))


def _replica(config: Config, ranks: Ranks, shard: Shard, model: Any) -> Replica:
    tensorflow(config.threads or startup.threads(ranks), ranks.local_rank)
    if model is None:
        model = build(config.model, shard.input_shape, shard.classes, config.seed)
    own = getattr(model, "optimizer", None)
    return Replica(
        model,
        own if own is not None else optimizer(config.optimizer, config.learning_rate, config.momentum),
        shard.x_train.dtype,
        ranks.rank,
    )


def _new_folder(config: Config, ranks: Ranks) -> Path | None:
    """Rank 0 makes the folder of ``--out``, which must be new: no run overwrites another."""
    if config.out is None:
        return None
    folder = Path(config.out)
    if ranks.rank == 0:
        try:
            folder.mkdir(parents=True)
            (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        except FileExistsError:
            raise UserError(f"--out {folder}: exists already; give a new folder, or move that one away") from None
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    return folder


def _recorder(config: Config, ranks: Ranks, shard: Shard, folder: Path | None) -> Recorder | NoRecorder:
    if folder is None:
        return NoRecorder()
    attributes = {
        "config": config.to_toml(),
        "versions": json.dumps(_versions()),
        "commit": _commit(),
        "host": platform.node(),
        "python": platform.python_version(),
        "mpi": startup.library(),
        "data_source": shard.source,
        "samples": shard.samples,
    }
    try:
        return Recorder(folder, ranks.rank, ranks.size, attributes)
    except OSError as error:
        raise UserError(f"--out {folder}: rank {ranks.rank} cannot write its metrics there ({error})") from None


def _versions() -> dict[str, str]:
    """The versions that all ranks must share."""
    versions = {}
    for package in (*PACKAGES, "tensorflow", "tensorflow-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _commit() -> str:
    """The git commit of the package if it runs from a checkout, else an empty text."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _evaluate_last(worker: Worker, evaluator: BackgroundEvaluator, replica: Replica, seconds: float) -> None:
    """Test the final weights, and take in what was still being tested."""
    evaluator.submit(worker.step, seconds, replica.knowledge())
    for evaluation in evaluator.poll(wait=True):
        worker.evaluations.append(evaluation)
        worker.recorder.evaluation(evaluation)
    evaluator.close()


def _sum_up(worker: Worker, ranks: Ranks, seconds: float) -> tuple[dict[str, Any], list[list[float]]]:
    """The run's JSON object, and per rank the numbers of SUMMARY_COLUMNS."""
    bytes_sent = sum(link.bytes_sent for link in worker.links.totals().values())
    spent = worker.spent
    own = [
        worker.step,
        worker.evaluations[-1].accuracy,
        float(np.mean(worker.recent_losses)) if worker.recent_losses else math.nan,
        spent.samples,
        spent.compute_s,
        spent.select_encode_s,
        spent.wait_s,
        spent.apply_s,
        seconds,
        bytes_sent,
    ]
    rows = startup.gather_numbers(ranks.communicator, *own)
    column = dict(zip(SUMMARY_COLUMNS, rows.T, strict=True))
    reasons = startup.gather_text(ranks.communicator, worker.stop_reason or "")
    losses = column["loss"]
    result = {
        "strategy": worker.config.strategy,
        "ranks": ranks.size,
        "steps": int(column["steps"].max()),
        "seconds": round(float(column["seconds"].max()), 3),
        "accuracy_mean": round(float(column["accuracy"].mean()), 6),
        "accuracy_std": round(float(column["accuracy"].std()), 6),
        "accuracy_per_rank": [round(float(a), 6) for a in column["accuracy"]],
        "loss": round(float(losses.mean()), 6) if np.isfinite(losses).all() else None,
        "bytes_sent": int(column["bytes_sent"].sum()),
        "target_reached_s": target_reached_s(_everyones_evaluations(worker, ranks), worker.config.target_accuracy),
        "stopped": next((reason for reason in reasons if reason), None),
        "out": worker.config.out,
    }
    return result, rows.tolist()


def _everyones_evaluations(worker: Worker, ranks: Ranks) -> list[list[Evaluation]]:
    own = worker.evaluations
    counts = startup.gather_numbers(ranks.communicator, len(own))[:, 0].astype(int)
    padded = [*own, *[own[-1]] * (int(counts.max()) - len(own))]
    numbers = [value for e in padded for value in (e.step, e.time_s, e.accuracy)]
    table = startup.gather_numbers(ranks.communicator, *numbers).reshape(ranks.size, -1, 3)
    return [
        [Evaluation(int(step), float(time_s), float(accuracy)) for step, time_s, accuracy in rows[:count]]
        for rows, count in zip(table, counts, strict=True)
    ]
