"""Driver of all workers' loops in virtual time, as `mpi/driver.py` and `mpi/progress.py` drive one in real time."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from dlion_mpi.errors import RunError
from dlion_mpi.loop import compute, statistics
from dlion_mpi.loop.clock import Clock
from dlion_mpi.loop.leave import leave
from dlion_mpi.loop.membership import Membership
from dlion_mpi.loop.ports import Compute, Computed, Loop, Until
from dlion_mpi.loop.sums import SUM
from dlion_mpi.loop.train import train
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.records import StepRecord
from dlion_mpi.result import Finish
from dlion_mpi.signals import stopped_by_signals
from dlion_mpi.simulation.collectives import Operations, VirtualCollectives
from dlion_mpi.simulation.links import Processor, VirtualEncoder, VirtualLinks
from dlion_mpi.simulation.network import Events, Network
from dlion_mpi.simulation.run import VirtualRun
from dlion_mpi.strategies.registry import resolve
from dlion_mpi.vector.gradient import Gradient


class Process:
    """One worker's loop, and the condition that it waits for."""

    def __init__(
        self, worker: Worker, processor: Processor, run: VirtualRun, events: Events, on_end: Callable[[], None]
    ) -> None:
        self.worker = worker
        self._processor = processor
        self.ended_s = 0.0
        self._run = run
        self._events = events
        self._on_end = on_end
        self._loop: Loop = _life(worker)
        self._waiting: Until | None = None
        self._woken = False
        self._exchange_s = 0.0  # processor time of messages in the loop that virtual time already includes

    def wake(self) -> None:
        """Schedule one check of the loop's condition, after all other events of the current time."""
        if self._waiting is not None and not self._woken:
            self._woken = True
            self._events.at(self._events.now_s, self._look)

    def _look(self) -> None:
        self._woken = False
        if self._waiting is not None and self._waiting.ask():
            self._waiting = None
            self.resume(None)

    def resume(self, answer: Computed | None) -> None:
        """Run the loop until it has to wait."""
        try:
            while True:
                request = self._loop.send(answer)
                if isinstance(request, Compute):
                    self._compute(request)
                    return
                if not request.ask():
                    self._waiting = request
                    if self._events.now_s < request.deadline_s < math.inf:
                        self._events.at(request.deadline_s, self.wake)
                    return
                answer = None
        except StopIteration:
            self.ended_s = self._events.now_s
            self._on_end()

    def _compute(self, request: Compute) -> None:
        """Compute in the thread pool, and resume the loop when the virtual time of that has passed.

        That time includes the processor time that messages have cost the loop since the last computation.
        """
        run, rank, now_s = self._run, self.worker.rank, self._events.now_s
        seconds = run.environment.pace(rank, now_s, run.config.seconds).seconds(request.samples)
        future = run.pool.submit(compute.answer, request, run.replicas[rank])
        exchange_s, self._exchange_s = self._processor.loop_s - self._exchange_s, self._processor.loop_s
        self._events.at(now_s + exchange_s + seconds, partial(self._computed, future, seconds))

    def _computed(self, future: Future[Gradient], seconds: float) -> None:
        self.resume(Computed.of(future.result(), seconds, seconds))


def _life(worker: Worker) -> Loop:
    """Train one worker. After a RunError it still leaves in the regular way."""
    try:
        yield from train(worker)
    except RunError as error:
        worker.stop_reason, worker.exit_code = str(error), 1
        yield from leave(worker)


def drive(run: VirtualRun) -> list[Finish]:
    """Run all workers' loops to their ends, then evaluate the last weights of each."""
    events = Events()
    network = Network(run.environment, events, run.config.seconds)
    processes: list[Process] = []
    running = set(range(run.workers))
    size, window = run.shared.layout.size, resolve(run.config)[0].window
    links = [
        VirtualLinks(rank, run.workers, network, events, size=size, window=window, log=recorder)
        for rank, recorder in enumerate(run.recorders)
    ]
    operations = Operations(network, links, lambda rank: processes[rank].wake())
    for rank, own_links in enumerate(links):
        own_links.connect(links)
        worker = Worker(
            config=run.config,
            rank=rank,
            members=Membership(tuple(range(run.workers))),
            strategy=resolve(run.config)[0],
            replica=run.replicas[rank],
            batches=run.batches[rank],
            links=own_links,
            collectives=(collectives := VirtualCollectives(rank, operations)),
            evaluator=run.evaluator(),
            recorder=run.recorders[rank],
            clock=Clock(lambda: events.now_s),
            training_samples=run.shards[0].train_samples_global or 0,
            metrics=run.metrics,
            reduce=partial(collectives.reduce, SUM),
        )
        worker.on_step = partial(_metered, run, worker)
        processes.append(Process(worker, own_links.processor, run, events, partial(running.discard, rank)))
        own_links.wake = processes[rank].wake
        worker.encoder = VirtualEncoder(own_links.processor, events, processes[rank].wake)
    with stopped_by_signals([process.worker for process in processes]):
        for process in processes:
            events.at(0.0, partial(process.resume, None))
        events.run(lambda: not running)
    if running:
        raise RuntimeError(f"deadlock: workers {sorted(running)} wait, and no event is left")
    workers = [process.worker for process in processes]
    statistics.average([worker.replica for worker in workers], [worker.batch_sizes.lbs for worker in workers])
    for process in processes:
        worker = process.worker
        worker.replica.finish()
        if worker.metrics:
            worker.evaluator.submit(worker.step, process.ended_s, worker.replica.knowledge())
    return [_finish(process) for process in processes]


def _metered(run: VirtualRun, worker: Worker, record: StepRecord) -> None:
    run.meter.step(worker.rank, record, worker.history.evaluations)


def _finish(process: Process) -> Finish:
    """Record the last evaluations and return the worker's results."""
    worker = process.worker
    for evaluation in worker.evaluator.poll(wait=True):
        worker.history.evaluations.append(evaluation)
        worker.recorder.evaluation(evaluation)
    return Finish.of(worker, process.ended_s)
