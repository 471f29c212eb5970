"""The checkpoints of one run on this rank, as `run.py` uses them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dlion_mpi.checkpoint import folder, resume
from dlion_mpi.checkpoint.preemption import EXIT_CODE, Preemption
from dlion_mpi.checkpoint.resume import Loaded
from dlion_mpi.checkpoint.rounds import CheckpointRounds
from dlion_mpi.config.options import Config
from dlion_mpi.errors import Stalled, UserError
from dlion_mpi.log import say
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.recorder import Recorder as FileRecorder
from dlion_mpi.provenance import versions
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.types import Plan


@contextlib.contextmanager
def preemptible(config: Config) -> Iterator[Preemption | None]:
    """Watch for signals and the end of the allocation, if the run takes checkpoints. Yields None if it takes none."""
    if config.checkpoint_every is None:
        yield None
        return
    preemption = Preemption(config.time_limit.seconds if config.time_limit is not None else None)
    with preemption.listening():
        yield preemption


def check(strategy: Strategy, plan: Plan) -> None:
    """Raise UserError for a strategy whose state a checkpoint cannot keep."""
    try:
        strategy.to_arrays(strategy.start(plan))
    except TypeError as error:
        raise UserError(f"--checkpoint-every: strategy {strategy.name}: {error}") from None


@contextlib.contextmanager
def checkpoints(
    worker: Worker, preemption: Preemption | None, loaded: Loaded | None, *, report: bool
) -> Iterator[None]:
    """Take checkpoints while the worker trains, if the run takes any. Afterwards the worker says why the run ended."""
    if preemption is None:
        yield
        return
    with ThreadPoolExecutor(1, "checkpoint") as executor:
        rounds = worker.checkpoints = _rounds(worker, preemption, loaded, executor, report)
        try:
            yield
        except Stalled:
            rounds.hurry()
            raise
    _explain(worker, rounds)
    if rounds.lost and worker.rank == 0 and not folder.complete(Path(str(worker.config.out))):
        say(f"dlion: {worker.config.out} has no checkpoint: none could be written")


def _rounds(
    worker: Worker, preemption: Preemption, loaded: Loaded | None, executor: ThreadPoolExecutor, report: bool
) -> CheckpointRounds:
    config = worker.config
    assert config.out is not None
    return CheckpointRounds(
        config,
        worker.rank,
        len(worker.members),
        run=Path(config.out),
        collectives=worker.collectives,
        executor=executor,
        preemption=preemption,
        texts={
            "format": resume.FORMAT,
            "config": config.to_toml(),
            "model": config.model,
            "variables": worker.replica.describe(),
            "versions": json.dumps(versions()),
        },
        last_step=loaded.checkpoint.step if loaded is not None else -1,
        own_step=loaded.own_step if loaded is not None else -1,
        before=worker.recorder.flush if isinstance(worker.recorder, FileRecorder) else lambda: None,
        say=say if report else lambda line: None,
        warn=say,
    )


def _explain(worker: Worker, rounds: CheckpointRounds) -> None:
    """Say in the worker why the run has ended."""
    if rounds.left is None or worker.exit_code:
        return
    if not rounds.preempted:
        worker.stop_reason = rounds.left
    elif rounds.safe:
        worker.stop_reason = rounds.left and f"{rounds.left}: to be started again with --resume {worker.config.out}"
        worker.exit_code = EXIT_CODE
    else:
        worker.stop_reason, worker.exit_code = f"{rounds.left}, and its checkpoint could not be written", 1
