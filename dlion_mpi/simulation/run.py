"""What every simulated run has, whoever trains in it: data, model, threads, recorders, and a line now and then."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from dlion_mpi.config.options import Config
from dlion_mpi.files import AnyRecorder, new_folder, new_recorder
from dlion_mpi.learner import backend, models
from dlion_mpi.learner.batches import Batch, Batches
from dlion_mpi.learner.evaluate import rows_to_test
from dlion_mpi.learner.shards import Shard, check_alike, load_shards
from dlion_mpi.log import say
from dlion_mpi.metrics.records import Evaluation, StepRecord
from dlion_mpi.microcloud.environments import Environment
from dlion_mpi.simulation.shared_replica import SharedReplica, VirtualReplica
from dlion_mpi.vector.layout import Vector
from dlion_mpi.view.live import EVERY_S, Reporter, draw, goal_of, terminal_for, title_of
from dlion_mpi.view.snapshot import RankSnapshot, Snapshot
from dlion_mpi.view.terminal import Terminal

MOST_SNAPSHOTS = 3
"""Snapshots of one worker that wait to be tested."""
MOST_KNOWN = 256
"""Accuracies that are remembered, of workers that may have the same snapshot."""


@dataclass(kw_only=True)
class VirtualRun:
    """A run in virtual time before its first step. By rank: ``shards``, ``replicas``, ``batches``, ``recorders``.

    ``pool``: the threads that compute gradients while the events go on; ``test_pool``: those that test accuracy.
    """

    config: Config
    environment: Environment
    shards: Sequence[Shard]
    shared: SharedReplica
    replicas: Sequence[VirtualReplica]
    batches: Sequence[Batches]
    recorders: Sequence[AnyRecorder]
    pool: ThreadPoolExecutor
    test_pool: ThreadPoolExecutor
    meter: Meter
    accuracies: Accuracies = field(init=False)
    complete: bool = False
    """Whether it has ended as it should; the recorders say so."""
    _collector: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        rows = rows_to_test(self.shards[0].x_test, self.shards[0].y_test, self.config.test_samples)
        self.accuracies = Accuracies(self.shared, rows, self.test_pool)

    def __enter__(self) -> VirtualRun:
        # Looking for garbage took an eighth of the time: a million objects of TensorFlow's stay anyway, and what a
        # step leaves behind has hardly any cycles.
        gc.freeze()
        self._collector = gc.get_threshold()
        gc.set_threshold(100_000, 20, 20)
        return self

    def __exit__(self, *_: object) -> None:
        gc.set_threshold(*self._collector)
        gc.unfreeze()
        self.pool.shutdown(cancel_futures=True)
        self.test_pool.shutdown(cancel_futures=True)
        for recorder in self.recorders:
            recorder.close(complete=self.complete)

    @property
    def workers(self) -> int:
        """How many workers it has."""
        return self.environment.workers

    def evaluator(self) -> VirtualEvaluator:
        """What tests one worker's snapshots."""
        at_once = self.config.target_accuracy is not None
        return VirtualEvaluator(self.accuracies, at_once=at_once)


def prepare(
    config: Config, environment: Environment, *, model: Any, shards: Sequence[Shard] | None, report: bool
) -> VirtualRun:
    """Read the data, build the model, make the folder: everything that can be wrong before time begins to pass.

    ``config`` is resolved. ``model``, ``shards``: in place of what it names. Raises UserError.
    """
    workers = environment.workers
    threads = config.threads or _cores()
    if shards is None:
        shards = load_shards(
            config.data,
            ranks=workers,
            partition=config.partition,
            alpha=config.dirichlet_alpha,
            seed=config.seed,
        )
    check_alike([shard.kind for shard in shards])
    backend.start(1, concurrent=threads)  # one thread for each operation: its sums then have one order only
    own, optimizer = models.trainable(config, shards[0].input_shape, shards[0].classes, model)
    shared = SharedReplica(own, optimizer, shards[0].x_train.dtype)
    new_folder(config)
    if report:
        say(
            f"dlion simulate: {config.strategy}, {config.sync}, {workers} worker{'s' * (workers > 1)} of "
            f"{environment.name}; {config.model}, {shared.layout.size:,} parameters; {shards[0].name} from "
            f"{shards[0].source}, {shards[0].train_samples_global:,} training samples"
        )
        if config.seconds is None and any(phase.share for phase in environment.phases[1:]):
            say("the length of the run is not known, so its first phase stays: give --seconds")
    return VirtualRun(
        config=config,
        environment=environment,
        shards=shards,
        shared=shared,
        replicas=[VirtualReplica(shared, rank) for rank in range(workers)],
        batches=[Batches(shard, seed=config.seed, rank=rank) for rank, shard in enumerate(shards)],
        recorders=_recorders(config, environment, shards),
        pool=ThreadPoolExecutor(threads, thread_name_prefix="compute"),
        test_pool=ThreadPoolExecutor(threads, thread_name_prefix="test"),
        meter=Meter(
            workers,
            config,
            every_s=config.progress_every if report else 0.0,
            terminal=terminal_for(config) if report else None,
            title=title_of(config, "worker", workers, more=[environment.name]),
        ),
    )


def _recorders(config: Config, environment: Environment, shards: Sequence[Shard]) -> list[AnyRecorder]:
    about = {"mpi": "none: simulated", "environment": json.dumps(dataclasses.asdict(environment))}
    return [new_recorder(config, rank, len(shards), shard, about) for rank, shard in enumerate(shards)]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Accuracies:
    """Tests snapshots of all workers in threads of their own; the same snapshot only once."""

    def __init__(self, shared: SharedReplica, rows: Batch, pool: ThreadPoolExecutor) -> None:
        self._shared, self._rows, self._pool = shared, rows, pool
        self._known: dict[bytes, Future[float]] = {}

    def of(self, knowledge: Vector) -> Future[float]:
        """Of this snapshot, which must not be changed any more."""
        digest = hashlib.blake2b(knowledge.data, digest_size=16).digest()
        if digest not in self._known:
            if len(self._known) == MOST_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[digest] = self._pool.submit(self._shared.accuracy, knowledge, self._rows)
        return self._known[digest]


class VirtualEvaluator:
    """Tests one worker's snapshots; in virtual time that takes no time.

    ``at_once``: results must be there at the next `poll`, since the run may end by them; else when they are ready,
    so that nobody waits for them. See `learner.evaluate.BackgroundEvaluator`.
    """

    def __init__(self, accuracies: Accuracies, *, at_once: bool) -> None:
        self._accuracies, self._at_once = accuracies, at_once
        self._submitted: deque[tuple[int, float, Future[float]]] = deque()

    def pending(self) -> int:
        """Zero: in virtual time no snapshot waits."""
        return 0

    def submit(self, step: int, time_s: float, knowledge: Vector) -> None:
        """Test this snapshot; it must not be changed any more."""
        if len(self._submitted) == MOST_SNAPSHOTS:
            self._submitted[0][2].exception()  # wait: snapshots are as large as the model
        self._submitted.append((step, time_s, self._accuracies.of(knowledge)))

    def poll(self, *, wait: bool = False) -> list[Evaluation]:
        """What has been tested since the last call; with ``wait``, all that was submitted."""
        tested = []
        while self._submitted and (wait or self._at_once or self._submitted[0][2].done()):
            step, time_s, future = self._submitted.popleft()
            tested.append(Evaluation(step, time_s, future.result()))
        return tested


class Meter:
    """Says how far the virtual run is: a line every ``every_s`` seconds of real time (0: never), or a view of all
    workers in ``terminal``, with a ``title``."""

    def __init__(self, workers: int, config: Config, *, every_s: float, terminal: Terminal | None, title: str) -> None:
        self.steps = [0] * workers
        self.accuracies = [math.nan] * workers
        self._every_s, self._said_s = every_s, time.monotonic()
        self._terminal, self._title, self._goal, self._begun_s = terminal, title, goal_of(config), self._said_s
        self._snapshots: dict[int, RankSnapshot] = {}
        self._reporters = [
            Reporter(rank, workers, EVERY_S, partial(self._accuracy, rank), partial(self._snapshots.__setitem__, rank))
            for rank in range(workers)
        ]

    def shown(self) -> AbstractContextManager[None]:
        """While the run goes on, in a terminal if there is one."""
        self._begun_s = time.monotonic()
        return nullcontext() if self._terminal is None else draw(self._terminal, self._snapshot)

    def step(self, rank: int, record: StepRecord, evaluations: Sequence[Evaluation]) -> None:
        """A worker has done a step."""
        self.steps[rank] = record.step + 1
        if evaluations:
            self.accuracies[rank] = evaluations[-1].accuracy
        if self._terminal is not None:
            self._reporters[rank](record)
        elif self._every_s and time.monotonic() - self._said_s >= self._every_s:
            self._said_s = time.monotonic()
            known = [a for a in self.accuracies if not math.isnan(a)]
            tested = f"  accuracy {np.mean(known):.1%}" if known else ""
            say(f"{record.time_s:8.1f} virtual s  steps {min(self.steps)} to {max(self.steps)}{tested}")

    def _accuracy(self, rank: int) -> float:
        return self.accuracies[rank]

    def _snapshot(self) -> Snapshot:
        ranks = [snapshot for _, snapshot in sorted(dict(self._snapshots).items())]
        elapsed_s = max((rank["time_s"] for rank in ranks), default=0.0)
        return Snapshot(
            title=self._title,
            workers=len(self.steps),
            ranks=ranks,
            goal=self._goal,
            elapsed_s=elapsed_s,
            virtual=True,
            real_s_per_s=(time.monotonic() - self._begun_s) / elapsed_s if elapsed_s else math.nan,
        )
