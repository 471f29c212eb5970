"""The checkpoints of one run on this rank: what `run.py` makes before training and asks afterwards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dlion_mpi.checkpoint import resume
from dlion_mpi.checkpoint.preemption import EXIT_CODE, Preemption
from dlion_mpi.checkpoint.resume import Loaded
from dlion_mpi.checkpoint.rounds import CheckpointRounds
from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.log import say
from dlion_mpi.loop.worker import Recorder, Worker
from dlion_mpi.metrics.recorder import Recorder as FileRecorder
from dlion_mpi.provenance import versions
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.types import Plan


@contextlib.contextmanager
def preemptible(config: Config) -> Iterator[Preemption | None]:
    """From here on signals and the allocation's end are heeded, if the run takes checkpoints; None if not."""
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
    """While the worker trains, take checkpoints, if the run takes any."""
    session = Session(worker, preemption, loaded, report=report) if preemption is not None else None
    yield
    if session is not None:
        session.close()


class Session:
    """Rounds of checkpoints for a worker, and the thread that writes them."""

    def __init__(self, worker: Worker, preemption: Preemption, loaded: Loaded | None, *, report: bool) -> None:
        config, replica = worker.config, worker.replica
        assert config.out is not None
        self._worker = worker
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self.rounds = worker.checkpoints = CheckpointRounds(
            config,
            worker.rank,
            len(worker.members),
            run=Path(config.out),
            collectives=worker.collectives,
            executor=self._executor,
            preemption=preemption,
            texts={
                "format": resume.FORMAT,
                "config": config.to_toml(),
                "model": config.model,
                "variables": replica.describe(),
                "versions": json.dumps(versions()),
            },
            last_step=loaded.checkpoint.step if loaded is not None else -1,
            own_step=loaded.own_step if loaded is not None else -1,
            before=_flush(worker.recorder),
            say=say if report else lambda line: None,
        )

    def close(self) -> None:
        """After training: end the thread, and say in the worker why the run has ended."""
        self._executor.shutdown()
        worker, rounds = self._worker, self.rounds
        if rounds.left is None or worker.exit_code:
            return
        if not rounds.preempted:
            worker.stop_reason = rounds.left
        elif rounds.safe:
            worker.stop_reason = rounds.left and f"{rounds.left}: to be started again with --resume {worker.config.out}"
            worker.exit_code = EXIT_CODE
        else:
            worker.stop_reason, worker.exit_code = f"{rounds.left}, and its checkpoint could not be written", 1


def _flush(recorder: Recorder) -> Callable[[], None]:
    """What makes the metrics reach as far as the checkpoint."""
    return recorder.flush if isinstance(recorder, FileRecorder) else lambda: None
