"""One run on this rank, from its Config to its result: agree, build, train, leave together, sum up."""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlion_mpi.checkpoint import export
from dlion_mpi.checkpoint.preemption import EXIT_CODE, Preemption
from dlion_mpi.checkpoint.resume import Loaded, prepare_folder
from dlion_mpi.checkpoint.resume import about as about_parts
from dlion_mpi.checkpoint.resume import load as load_checkpoint
from dlion_mpi.checkpoint.rounds import CHANNELS as CHECKPOINT_CHANNELS
from dlion_mpi.checkpoint.session import Session, preemptible
from dlion_mpi.checkpoint.session import check as check_resumable
from dlion_mpi.checkpoint.start import NEW, Start
from dlion_mpi.config.options import Config
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.files import AnyRecorder, new_folder, new_recorder
from dlion_mpi.learner import backend, models
from dlion_mpi.learner.batches import Batches
from dlion_mpi.learner.evaluate import BackgroundEvaluator, rows_to_test
from dlion_mpi.learner.replica import Replica
from dlion_mpi.learner.shards import Shard, load, merge_facts
from dlion_mpi.log import say
from dlion_mpi.loop.clock import Clock
from dlion_mpi.loop.leave import leave
from dlion_mpi.loop.links import ByteLinks
from dlion_mpi.loop.membership import Membership
from dlion_mpi.loop.ports import Loop, Reduce
from dlion_mpi.loop.sums import SUM
from dlion_mpi.loop.train import CHANNELS, train
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.metrics.timeline import MessageLog
from dlion_mpi.microcloud.environments import PaceClock, start_clock
from dlion_mpi.mpi import startup
from dlion_mpi.mpi.collectives import Collectives
from dlion_mpi.mpi.driver import EncoderThread, drive
from dlion_mpi.mpi.progress import ProgressThread
from dlion_mpi.mpi.startup import Ranks, together
from dlion_mpi.mpi.transport import MpiTransport
from dlion_mpi.provenance import versions
from dlion_mpi.result import Result, exit_code, result_of, summary_row
from dlion_mpi.signals import STOPPING, stopped_by_signals
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.registry import resolve
from dlion_mpi.strategies.types import Plan
from dlion_mpi.view.lines import summary
from dlion_mpi.view.live import show_progress, title_of

if TYPE_CHECKING:
    from dlion_mpi.mpi.horovod import HorovodReducer


def run(
    config: Config,
    *,
    model: Any = None,
    own_data: Callable[[], Shard] | None = None,
    report: bool = True,
    start: Start = NEW,
) -> Result:
    """Train on all ranks of MPI's world. Every rank calls this with an equal Config.

    ``model``, ``own_data``: a Keras model, and what gives this rank's data, in place of what the Config names.
    ``report``: say how it goes on stderr. ``start``: whether it goes on with a run. Raises UserError on every rank if
    any has one.
    """
    with preemptible(config) as preemption:
        return _run(config, model, own_data, report, start, preemption)


def _run(
    config: Config,
    model: Any,
    own_data: Callable[[], Shard] | None,
    report: bool,
    start: Start,
    preemption: Preemption | None,
) -> Result:
    ranks = startup.begin()
    strategy, config = _agreed(config, ranks, start, preemption)
    loaded = load_checkpoint(ranks, start, report=report)
    pace_clock = together(ranks, lambda: PaceClock.from_environ(ranks.rank, run_seconds=config.seconds))
    shard = _merge(ranks, together(ranks, own_data or (lambda: _load(config, ranks))))
    threads = config.threads or startup.threads(ranks)
    replica = together(ranks, lambda: _replica(config, ranks, shard, model, threads))
    members = Membership(tuple(range(ranks.size)))
    if preemption is not None:
        plan = Plan(config=config, rank=ranks.rank, ranks=members.ranks, layout=replica.layout)
        check_resumable(strategy, plan)
    replica.set_knowledge(startup.share_from_root(ranks, replica.knowledge()))
    recorder = _recorder(config, ranks, start, loaded, shard, pace_clock)
    _say_what(config, ranks, replica, shard, report)
    clock = startup.CommonClock(ranks)
    exchange = _Exchange(ranks, config, strategy, replica, clock, recorder)
    evaluator = BackgroundEvaluator(replica.evaluate, rows_to_test(shard.x_test, shard.y_test, config.test_samples))
    worker = Worker(
        config=config,
        rank=ranks.rank,
        members=members,
        strategy=strategy,
        replica=replica,
        batches=(batches := Batches(shard, seed=config.seed, rank=ranks.rank)),
        links=exchange.links,
        collectives=exchange.collectives,
        evaluator=evaluator,
        recorder=recorder,
        clock=Clock(clock.now_s, time.thread_time),
        training_samples=shard.train_samples_global,
        processors=threads,
        encoder=exchange.thread,
        reduce=exchange.reduce,
    )
    session = None
    if preemption is not None:
        session = Session(config, worker, replica, exchange.collectives, preemption, loaded, report=report)
    if loaded is not None:
        together(ranks, lambda: loaded.restore(worker, replica, batches, exchange.links))
    driven = functools.partial(
        drive, replica=replica, progress=exchange.progress, now_s=clock.now_s, pace_model=pace_clock
    )
    signals = STOPPING if session is None else (signal.SIGINT,)
    with stopped_by_signals([worker], signals):
        with _progress_shown(worker, ranks, exchange, report):
            clock.start(0.0 if loaded is None else loaded.checkpoint.time_s)
            if ranks.rank == 0:
                start_clock(config.seconds)
            with exchange.open():
                _train(worker, driven)
                seconds = clock.now_s()
            if session is not None:
                session.close()
            _evaluate_last(worker, evaluator, replica, seconds)
            _save_model(worker, ranks, replica, report)
        # Still shielded: launchers repeat a signal, and the second must not cost the summary.
        recorder.close(complete=worker.exit_code == 0)
        outcome = _sum_up(worker, ranks, seconds, report)
        ranks.communicator.Free()
    return outcome


def _agreed(config: Config, ranks: Ranks, start: Start, preemption: Preemption | None) -> tuple[Strategy, Config]:
    """What is to be run, once it is known that all ranks were told the same and that it can be done here."""
    startup.agree(ranks, "\n".join(f"{k} = {v}" for k, v in versions().items()) + f"\n{start}\n" + config.to_toml())
    strategy, config = resolve(config)
    together(ranks, lambda: export.check(config, ranks))
    if strategy.summed_by == "horovod":
        from dlion_mpi.mpi import horovod as horovod_baseline

        together(ranks, horovod_baseline.require)
    return strategy, config


class _Exchange:
    """The links, the collectives, the thread that drives them by MPI, and the one that makes messages."""

    def __init__(
        self,
        ranks: Ranks,
        config: Config,
        strategy: Strategy,
        replica: Replica,
        clock: startup.CommonClock,
        log: MessageLog,
    ) -> None:
        self.progress = ProgressThread()
        self._communicator = ranks.communicator.Dup()
        self._transport = MpiTransport(self._communicator, self.progress.wake)
        self.links = ByteLinks(
            ranks.rank,
            ranks.size,
            self._transport,
            size=replica.layout.size,
            window=config.window or strategy.window,
            now_s=clock.now_s,
            lock=threading.Lock(),
            log=log,
        )
        channels = CHANNELS if config.checkpoint_every is None else (*CHANNELS, *CHECKPOINT_CHANNELS)
        self.collectives = Collectives(
            ranks.communicator, channels, self.progress.wake, self.links.carried, clock.now_s
        )
        self.thread = EncoderThread(self.progress.notify)
        self.reduce: Reduce = functools.partial(self.collectives.reduce, SUM)
        self._horovod: HorovodReducer | None = None
        if strategy.summed_by == "horovod":
            from dlion_mpi.mpi import horovod as horovod_baseline

            hvd = together(ranks, horovod_baseline.load)
            self._horovod = horovod_baseline.HorovodReducer(hvd, ranks, replica.layout.size, self.links.carried)
            self.reduce = self._horovod.reduce

    @contextmanager
    def open(self) -> Iterator[None]:
        """In here MPI belongs to the thread. At the end, after `leave`, nothing is under way any more."""
        self.progress.start(self._transport, self.collectives)
        yield
        self.thread.close()
        self.progress.stop()
        if self._horovod is not None:
            self._horovod.close()
        self._transport.close()
        self.collectives.free()
        self._communicator.Free()


def _progress_shown(worker: Worker, ranks: Ranks, exchange: _Exchange, report: bool) -> AbstractContextManager[None]:
    """While the worker trains, say how it goes, if that is wanted."""
    if not report:
        return nullcontext()
    gather = functools.partial(startup.gather_numbers, ranks.communicator)
    return show_progress(worker, ranks.size, exchange.links, gather, title_of(worker.config, "rank", ranks.size))


def _train(worker: Worker, driven: Callable[[Loop], None]) -> None:
    """Train, and leave in good order whatever happens to this rank's training."""
    try:
        driven(train(worker))
    except RunError as error:
        worker.stop_reason, worker.exit_code = str(error), 1
        driven(leave(worker))


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


def _replica(config: Config, ranks: Ranks, shard: Shard, model: Any, threads: int) -> Replica:
    backend.start(threads, local_rank=ranks.local_rank)
    own, optimizer = models.trainable(config, shard.input_shape, shard.classes, model)
    return Replica(own, optimizer, shard.x_train.dtype, ranks.rank)


def _recorder(
    config: Config, ranks: Ranks, start: Start, loaded: Loaded | None, shard: Shard, emulated: PaceClock | None
) -> AnyRecorder:
    """This rank's metrics in the folder of ``--out``, which rank 0 makes unless the run goes on there."""
    about, part = {"mpi": startup.library()}, 0
    if emulated is not None:
        about["emulated"] = json.dumps(dataclasses.asdict(emulated.environment))
    if start.run is not None:
        part = together(ranks, lambda: prepare_folder(config, start, ranks))
        part = int(startup.gather_numbers(ranks.communicator, part)[0, 0])
        about["resumed"] = about_parts(loaded)
    else:
        together(ranks, lambda: new_folder(config) if ranks.rank == 0 else None)
    folder = Path(config.out) if config.out is not None else None
    return together(ranks, lambda: new_recorder(config, folder, ranks.rank, ranks.size, shard, about, part))


def _say_what(config: Config, ranks: Ranks, replica: Replica, shard: Shard, report: bool) -> None:
    if report and ranks.rank == 0:
        say(
            f"dlion: {config.strategy}, {config.sync}, {ranks.size} rank{'s' * (ranks.size > 1)}; {config.model}, "
            f"{replica.layout.size:,} parameters; {shard.name} from {shard.source}, "
            f"{shard.train_samples_global:,} training samples"
        )


def _evaluate_last(worker: Worker, evaluator: BackgroundEvaluator, replica: Replica, seconds: float) -> None:
    """Test the final weights, and take in what was still being tested; not where the time is over, but for a first."""
    if worker.exit_code == EXIT_CODE and worker.history.evaluations:
        evaluator.close(abandon=True)
        return
    replica.finish()
    evaluator.submit(worker.step, seconds, replica.knowledge())
    for evaluation in evaluator.poll(wait=True):
        worker.history.evaluations.append(evaluation)
        worker.recorder.evaluation(evaluation)
    evaluator.close()


def _save_model(worker: Worker, ranks: Ranks, replica: Replica, report: bool) -> None:
    """``--save-model``, if the run has ended as it should on all ranks."""
    if worker.config.save_model is None or startup.gather_numbers(ranks.communicator, worker.exit_code).any():
        return
    try:
        export.save(worker.config, ranks, replica, worker.history.evaluations[-1].accuracy, report=report)
    except RunError as error:
        worker.stop_reason, worker.exit_code = str(error), 1


def _sum_up(worker: Worker, ranks: Ranks, seconds: float, report: bool) -> Result:
    """How the run ended on all ranks; rank 0 says it."""
    rows = startup.gather_numbers(ranks.communicator, *summary_row(worker, seconds))
    reasons = startup.gather_text(ranks.communicator, worker.stop_reason or "")
    codes = startup.gather_numbers(ranks.communicator, worker.exit_code)[:, 0]
    result = result_of(worker.config, rows, reasons, _everyones_evaluations(worker, ranks))
    if report and ranks.rank == 0:
        say(summary(result, rows.tolist()))
    return Result(ranks.rank, result, exit_code(codes.tolist()))


def _everyones_evaluations(worker: Worker, ranks: Ranks) -> list[list[Evaluation]]:
    own = worker.history.evaluations
    counts = startup.gather_numbers(ranks.communicator, len(own))[:, 0].astype(int)
    padded = [*own, *[own[-1]] * (int(counts.max()) - len(own))]
    numbers = [value for e in padded for value in (e.step, e.time_s, e.accuracy)]
    table = startup.gather_numbers(ranks.communicator, *numbers).reshape(ranks.size, -1, 3)
    return [
        [Evaluation(int(step), float(time_s), float(accuracy)) for step, time_s, accuracy in rows[:count]]
        for rows, count in zip(table, counts, strict=True)
    ]
