"""A simulated run before its first step: data, model, workers, threads, recorders."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dlion_mpi.config.options import Config
from dlion_mpi.files import AnyRecorder, new_folder, new_recorder
from dlion_mpi.learner import backend, models
from dlion_mpi.learner.batches import Batches
from dlion_mpi.learner.shards import Shard, check_alike, load_shards
from dlion_mpi.log import say
from dlion_mpi.metrics.names import check_names
from dlion_mpi.microcloud.environments import Environment
from dlion_mpi.simulation.evaluate import Tests, VirtualEvaluator
from dlion_mpi.simulation.meter import Meter
from dlion_mpi.simulation.shared_replica import CHUNK, SharedReplica, VirtualReplica
from dlion_mpi.strategies.registry import check_gradients
from dlion_mpi.view.live import terminal_for, title_of


@dataclass(kw_only=True)
class VirtualRun:
    """A run in virtual time. By rank: ``shards``, ``replicas``, ``batches``, ``recorders``.

    ``pool``: threads that compute gradients while the events continue. ``test_pool``: threads that test.
    ``metrics``: names of the test metrics.
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
    metrics: tuple[str, ...]
    tests: Tests = field(init=False)
    complete: bool = False
    """Whether the run has ended as intended; the recorders write it down."""
    _collector: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.tests = Tests(self.shared, partial(self.shards[0].tests, CHUNK, self.config.test_samples), self.test_pool)

    def __enter__(self) -> VirtualRun:
        # Garbage collection took an eighth of the time: it visits TensorFlow's million objects, which stay, and a step
        # leaves hardly any cycles.
        gc.freeze()
        self._collector = gc.get_threshold()
        gc.set_threshold(100_000, 20, 20)
        return self

    def __exit__(self, *_: object) -> None:
        gc.set_threshold(*self._collector)
        gc.unfreeze()
        self.pool.shutdown(cancel_futures=True)
        self.test_pool.shutdown(cancel_futures=True)
        for batches in self.batches:
            batches.close()
        for recorder in self.recorders:
            recorder.close(complete=self.complete)

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self.environment.workers

    def evaluator(self) -> VirtualEvaluator:
        """A new evaluator for one worker's snapshots."""
        return VirtualEvaluator(self.tests, at_once=self.config.target is not None)


def prepare(
    config: Config,
    environment: Environment,
    *,
    model: Any,
    shards: Sequence[Shard] | None,
    report: bool,
    exchanges: str = "movements",
) -> VirtualRun:
    """Read the data, build the model, make the folder: everything that can fail before virtual time begins.

    ``config``: resolved. ``model``, ``shards``: used instead of those that the Config names. ``exchanges``: of the
    strategy. Raises UserError.
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
    shared = SharedReplica(models.trainable(config, shards[0], model), tests=next(shards[0].tests(2), None))
    check_gradients(config.strategy, exchanges, shared.takes_gradients)
    metrics = shared.metric_names
    check_names(metrics, config.target, config.best)
    new_folder(config)
    if report:
        say(
            f"dlion simulate: {config.strategy}, {config.sync}, {workers} worker{'s' * (workers > 1)} of "
            f"{environment.name}; {config.model}, {shared.layout.size:,} parameters; {shards[0].describe()}"
        )
        if config.seconds is None and any(phase.share for phase in environment.phases[1:]):
            say("the length of the run is unknown, so its first phase lasts: give --seconds")
    return VirtualRun(
        config=config,
        environment=environment,
        shards=shards,
        shared=shared,
        replicas=[VirtualReplica(shared, rank) for rank in range(workers)],
        batches=[Batches(shard, seed=config.seed, rank=rank) for rank, shard in enumerate(shards)],
        recorders=_recorders(config, environment, shards, metrics),
        pool=ThreadPoolExecutor(threads, thread_name_prefix="compute"),
        test_pool=ThreadPoolExecutor(threads, thread_name_prefix="test"),
        meter=Meter(
            workers,
            config,
            metrics,
            every_s=config.progress_every if report else 0.0,
            terminal=terminal_for(config) if report else None,
            title=title_of(config, "worker", workers, more=[environment.name]),
        ),
        metrics=metrics,
    )


def _recorders(
    config: Config, environment: Environment, shards: Sequence[Shard], metrics: Sequence[str]
) -> list[AnyRecorder]:
    about = {"mpi": "none: simulated", "environment": json.dumps(dataclasses.asdict(environment))}
    return [new_recorder(config, rank, len(shards), shard, about, metrics) for rank, shard in enumerate(shards)]


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
