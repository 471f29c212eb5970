"""One run on this rank: agree, build, train, leave together, sum up."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dlion_mpi.checkpoint import export, resume, rounds, session, stalled
from dlion_mpi.checkpoint.lock import FolderLock
from dlion_mpi.checkpoint.preemption import EXIT_CODE, Preemption
from dlion_mpi.checkpoint.start import NEW, Start
from dlion_mpi.config.options import Config
from dlion_mpi.errors import DataError, RunError, Stalled, UserError
from dlion_mpi.files import AnyRecorder, new_folder, new_recorder, new_recorders
from dlion_mpi.learner import backend, models
from dlion_mpi.learner.batches import Batches
from dlion_mpi.learner.evaluate import CHUNK, BackgroundEvaluator, differing_tests, digest_of_tests
from dlion_mpi.learner.keras_model import check_alike as check_models
from dlion_mpi.learner.replica import Replica
from dlion_mpi.learner.shards import Shard, check_alike, load, merge_facts
from dlion_mpi.log import say
from dlion_mpi.loop import statistics
from dlion_mpi.loop.epochs import EPOCHS
from dlion_mpi.loop.membership import Membership
from dlion_mpi.loop.train import CHANNELS, leave, train
from dlion_mpi.loop.worker import Clock, Worker
from dlion_mpi.metrics.names import check_names, check_same
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.microcloud.environments import PaceClock, start_clock
from dlion_mpi.mpi import sums
from dlion_mpi.mpi.cores import share_of_cores
from dlion_mpi.mpi.driver import drive
from dlion_mpi.mpi.exchange import Exchange
from dlion_mpi.mpi.ranks import Ranks
from dlion_mpi.mpi.startup import library
from dlion_mpi.mpi.watching import Watch, Watched
from dlion_mpi.provenance import versions
from dlion_mpi.result import Finish, Result, sum_up
from dlion_mpi.signals import STOPPING, stopped_by_signals
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.registry import check_gradients, resolve
from dlion_mpi.strategies.types import Plan
from dlion_mpi.view.live import show_progress, title_of


def run(
    config: Config,
    *,
    model: Any = None,
    own_data: Callable[[], Shard] | None = None,
    report: bool = True,
    start: Start = NEW,
    watched: Watched | None = None,
) -> Result:
    """Train on all ranks of MPI's world. Every rank calls this with an equal Config.

    ``model``: a Keras model to use instead of the Config's. ``own_data``: returns this rank's data, instead of the
    Config's. ``report``: print progress on stderr. ``start``: a new run, or one that is resumed. ``watched``:
    callbacks and epochs, if the run has any. Raises UserError, on every rank if on any.
    """
    with session.preemptible(config) as preemption, FolderLock() as lock:
        ranks = Ranks(stall_limit=config.stall_limit)
        strategy, config = _agree(ranks, config, start, watched)
        if start.run is not None:
            _lock(ranks, lock, start.run)
        loaded = resume.load(ranks, start, report=report)
        with ExitStack() as stack:
            built = _build(ranks, config, strategy, start, loaded, model, own_data, watched, lock, stack)
        if report and ranks.rank == 0:
            _say_what(config, ranks.size, built)
        try:
            return _whole(ranks, built, preemption, loaded, lock, report)
        except Stalled as error:
            return stalled.end(ranks, built.worker, error, built.recorder)


def _whole(
    ranks: Ranks,
    built: _Built,
    preemption: Preemption | None,
    loaded: resume.Loaded | None,
    lock: FolderLock,
    report: bool,
) -> Result:
    """Train, test and sum up, with all ranks. Raises Stalled."""
    worker = built.worker
    # With checkpoints, the preemption handles SIGTERM. The summary is shielded too, since launchers repeat signals.
    with stopped_by_signals([worker], STOPPING if preemption is None else (signal.SIGINT,)):
        with closing(built.batches), _shown(ranks, built, report):
            if built.watch is not None:
                built.watch.begin()
            with session.checkpoints(worker, preemption, loaded, report=report):
                seconds = _train(built, 0.0 if loaded is None else loaded.checkpoint.time_s)
            if ranks.size > 1:
                statistics.settle(worker.replica, worker.batch_sizes.lbs, ranks.mean)
            _evaluate_last(worker, built.evaluator, seconds, built.watch)
            export.save(ranks, worker, report=report)
        _close(worker, built.recorder)
        finishes = [Finish.from_text(text) for text in ranks.gather_text(Finish.of(worker, seconds).to_text())]
        ranks.free()
        lock.release()  # while signals are still handled
        return sum_up(worker.config, finishes, rank=ranks.rank, report=report)


def _agree(ranks: Ranks, config: Config, start: Start, watched: Watched | None) -> tuple[Strategy, Config]:
    """Resolve the options. Raises UserError if ranks were given different runs, or the run cannot be done here."""
    ranks.agree(
        "\n".join(
            [
                *(f"{name} = {version}" for name, version in versions().items()),
                f"{start}",
                f"epochs = {watched.describe() if watched is not None else 'none'}",
                config.to_toml(),
            ]
        )
    )
    strategy, config = resolve(config)
    export.check(ranks, config)
    sums.check(ranks, strategy.summed_by)
    return strategy, config


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """The parts of a run on this rank. ``pace``: the machine to emulate, if any."""

    shard: Shard
    batches: Batches
    worker: Worker
    exchange: Exchange
    evaluator: BackgroundEvaluator
    recorder: AnyRecorder
    pace: PaceClock | None
    watch: Watch | None


def _build(
    ranks: Ranks,
    config: Config,
    strategy: Strategy,
    start: Start,
    loaded: resume.Loaded | None,
    model: Any,
    own_data: Callable[[], Shard] | None,
    watched: Watched | None,
    lock: FolderLock,
    stack: ExitStack,
) -> _Built:
    """Build the parts of the run. Raises UserError. ``stack``: then removes what this rank has begun to write."""
    members = Membership(tuple(range(ranks.size)))
    pace = ranks.together(lambda: PaceClock.from_environ(ranks.rank, run_seconds=config.seconds))
    threads = config.threads or share_of_cores(ranks)
    shard = _shard(ranks, config, own_data)
    samples = shard.train_samples_global
    if watched is not None:
        config = _with_epochs(config, watched, ranks.size, samples, loaded)
    replica = _replica(ranks, config, strategy, shard, model, threads)
    if config.checkpoint_every is not None:
        session.check(strategy, Plan(config=config, rank=ranks.rank, ranks=members.ranks, layout=replica.layout))
    metrics = _metrics(ranks, config, replica)
    recorder = _recorder(ranks, config, start, loaded, shard, pace, metrics, lock)
    stack.callback(recorder.discard)
    exchange = _exchange(ranks, config, strategy, replica, recorder, () if watched is None else (EPOCHS,))
    evaluator = BackgroundEvaluator(replica.evaluate, partial(shard.tests, CHUNK, config.test_samples))
    batches = Batches(shard, seed=config.seed, rank=ranks.rank, waiting=ranks.stall.waiting)
    worker = Worker(
        config=config,
        rank=ranks.rank,
        members=members,
        strategy=strategy,
        replica=replica,
        batches=batches,
        links=exchange.links,
        collectives=exchange.collectives,
        evaluator=evaluator,
        recorder=recorder,
        clock=Clock(exchange.clock.now_s, time.thread_time),
        training_samples=samples or 0,
        processors=threads,
        metrics=metrics,
        encoder=exchange.encoder,
        reduce=exchange.sums.reduce,
    )
    watch = None
    if watched is not None:
        watch = Watch(ranks, watched, worker, replica.model, samples or 0)
    if loaded is not None:
        ranks.together(partial(loaded.restore, worker))
    if start.run is not None:
        resume.accept(ranks, config, start.run, loaded)
    stack.pop_all()
    return _Built(
        shard=shard,
        batches=batches,
        worker=worker,
        exchange=exchange,
        evaluator=evaluator,
        recorder=recorder,
        pace=pace,
        watch=watch,
    )


def _with_epochs(
    config: Config, watched: Watched, workers: int, samples: int | None, loaded: resume.Loaded | None
) -> Config:
    if loaded is None:
        return watched.with_steps(config, workers, samples, 0, {})
    return watched.with_steps(config, workers, samples, loaded.step, loaded.arrays)


def _shard(ranks: Ranks, config: Config, own_data: Callable[[], Shard] | None) -> Shard:
    """Read this rank's data, with the facts that only all ranks together know. Raises UserError if shards differ."""
    shard = ranks.together(own_data or partial(_load, ranks, config))
    facts = ranks.gather_numbers(*(np.nan if fact is None else fact for fact in (shard.classes, shard.samples)))
    whole = [tuple(None if np.isnan(fact) else int(fact) for fact in row) for row in facts]
    ranks.together(partial(check_alike, ranks.gather_text(shard.kind)))
    differing = differing_tests(ranks.gather_text(ranks.together(partial(digest_of_tests, shard))))
    if differing and ranks.rank == 0:
        say(f"dlion: {differing}")
    return shard.with_facts(*merge_facts(whole))


def _load(ranks: Ranks, config: Config) -> Shard:
    return load(
        config.data,
        rank=ranks.rank,
        ranks=ranks.size,
        partition=config.partition,
        alpha=config.dirichlet_alpha,
        seed=config.seed,
        local_ranks=ranks.local_size,
    )


def _replica(ranks: Ranks, config: Config, strategy: Strategy, shard: Shard, model: Any, threads: int) -> Replica:
    """Build the model, with rank 0's first weights."""

    def build() -> Replica:
        backend.start(threads, local_rank=ranks.local_rank)
        keras_model = models.trainable(config, shard, model)
        guarded = config.non_finite == "skip"
        return Replica(keras_model, ranks.rank, tests=next(shard.tests(2), None), guarded=guarded)

    replica = ranks.together(build)
    ranks.together(partial(check_models, ranks.gather_text(replica.facts())))
    ranks.together(partial(check_gradients, config.strategy, strategy.exchanges, replica.takes_gradients))
    ranks.together(partial(replica.trace, "alone" if ranks.size == 1 else strategy.exchanges))
    replica.set_knowledge(ranks.share(replica.knowledge()))
    if len(frozen := replica.frozen()):
        replica.set_frozen(ranks.share(frozen))
    return replica


def _metrics(ranks: Ranks, config: Config, replica: Replica) -> tuple[str, ...]:
    """Names of the test metrics; none without test rows. Raises UserError if ranks or options name others."""
    own = replica.metric_names
    ranks.together(partial(check_same, ranks.gather_text("\n".join(own))))
    ranks.together(partial(check_names, own, config.target, config.best))
    return own


def _recorder(
    ranks: Ranks,
    config: Config,
    start: Start,
    loaded: resume.Loaded | None,
    shard: Shard,
    pace: PaceClock | None,
    metrics: Sequence[str],
    lock: FolderLock,
) -> AnyRecorder:
    """Open this rank's metrics in the folder of ``--out``, which rank 0 makes unless the run is resumed there.

    Raises UserError on all ranks if one cannot; then none has a file.
    """
    about, part = {"mpi": library()}, 0
    if pace is not None:
        about["emulated"] = json.dumps(dataclasses.asdict(pace.environment))
    if start.run is not None:
        about["resumed"], part = resume.about(loaded), resume.part_of(ranks, start.run)
    else:
        ranks.together(lambda: new_folder(config) if ranks.rank == 0 else None)
        if config.out is not None:
            _lock(ranks, lock, Path(config.out))
    return new_recorders(ranks, lambda: new_recorder(config, ranks.rank, ranks.size, shard, about, metrics, part))


def _lock(ranks: Ranks, lock: FolderLock, run: Path) -> None:
    """Lock the folder of the run, on rank 0 for all. Raises UserError on all ranks."""
    ranks.together(lambda: lock.take(run) if ranks.rank == 0 else None)


def _say_what(config: Config, ranks: int, built: _Built) -> None:
    shard, parameters = built.shard, built.worker.replica.layout.size
    say(
        f"dlion: {config.strategy}, {config.sync}, {ranks} rank{'s' * (ranks > 1)}; {config.model}, "
        f"{parameters:,} parameters; {shard.describe()}"
    )


def _exchange(
    ranks: Ranks,
    config: Config,
    strategy: Strategy,
    replica: Replica,
    recorder: AnyRecorder,
    channels: tuple[str, ...],
) -> Exchange:
    return Exchange(
        ranks,
        size=replica.layout.size,
        window=strategy.window,
        summed_by=strategy.summed_by,
        channels=(*CHANNELS, *channels, *(() if config.checkpoint_every is None else rounds.CHANNELS)),
        log=recorder,
    )


def _shown(ranks: Ranks, built: _Built, report: bool) -> AbstractContextManager[None]:
    """Show the progress while the worker trains, if that is wanted."""
    if not report:
        return nullcontext()
    title = title_of(built.worker.config, "rank", ranks.size)
    links, stall = built.exchange.links, ranks.stall
    return show_progress(built.worker, ranks.size, links, ranks.gather_numbers, title, lambda: stall.note)


def _train(built: _Built, begin_s: float) -> float:
    """Train from ``begin_s`` of the run's clock on, and leave in order even if this rank fails. Returns the end."""
    worker, exchange = built.worker, built.exchange
    driven = partial(drive, replica=worker.replica, exchange=exchange, pace=built.pace)
    exchange.clock.start(begin_s)
    exchange.stall.follow(worker)
    if worker.rank == 0:
        start_clock(worker.config.seconds)
    with exchange.open():
        try:
            driven(train(worker))
        except Stalled:
            raise
        except (RunError, UserError) as error:  # only this rank knows of it
            _fail(worker, error)
            driven(leave(worker))
        return exchange.clock.now_s()


def _close(worker: Worker, recorder: AnyRecorder) -> None:
    """Close the metrics. A disk that is full now fails the run, in order."""
    try:
        recorder.close(complete=worker.exit_code == 0)
    except RunError as error:
        if not worker.exit_code:
            _fail(worker, error)


def _fail(worker: Worker, error: Exception) -> None:
    """Note why this rank has failed. The reason names the rank, since all ranks will say it."""
    reason = str(error)
    name = f"rank {worker.rank}"
    if isinstance(error, DataError):
        name += f", step {worker.step}"
    worker.stop_reason, worker.exit_code = reason if reason.startswith(name) else f"{name}: {reason}", 1


def _evaluate_last(worker: Worker, evaluator: BackgroundEvaluator, seconds: float, watch: Watch | None) -> None:
    """Evaluate the last weights. If the time limit ends the run, it has no time for that, except for a first."""
    abandoned = worker.exit_code == EXIT_CODE and bool(worker.history.evaluations)
    if not abandoned:
        worker.replica.finish()
    if watch is not None:
        watch.end(abandoned=abandoned)
    if abandoned:
        evaluator.close(abandon=True)
        return
    if worker.metrics:
        evaluator.submit(worker.step, seconds, worker.replica.knowledge())
    try:
        evaluations = evaluator.poll(wait=True)
    except RunError as error:  # the test rows cannot be read, on this rank
        if not worker.exit_code:
            _fail(worker, error)
        evaluations = [Evaluation(worker.step, seconds, dict.fromkeys(worker.metrics, math.nan))]
    for evaluation in evaluations:
        worker.history.evaluations.append(evaluation)
        worker.recorder.evaluation(evaluation)
    evaluator.close()
