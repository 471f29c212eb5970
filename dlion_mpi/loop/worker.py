"""The state of one worker, and what it needs of its surroundings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from typing import Any

from dlion_mpi.algorithms.lengths import Lengths
from dlion_mpi.algorithms.patience import Patience
from dlion_mpi.config.options import Config
from dlion_mpi.loop.averages import AverageRounds
from dlion_mpi.loop.batch_sizes import BatchSizeRounds
from dlion_mpi.loop.budget import ExchangeBudget
from dlion_mpi.loop.clock import Clock, Scope
from dlion_mpi.loop.knowledge import KnowledgeRounds
from dlion_mpi.loop.links import Links
from dlion_mpi.loop.membership import Membership
from dlion_mpi.loop.parts import Checkpoints, Epochs, Evaluator, Recorder
from dlion_mpi.loop.ports import BackgroundEncoder, Batches, Collectives, Reduce, Replica, Stamp
from dlion_mpi.loop.step import Step
from dlion_mpi.metrics.gauges import Totals
from dlion_mpi.metrics.records import Evaluation, StepRecord
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.types import Inbox, LinkView, Plan
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import Kind


@dataclass(slots=True)
class History:
    """Results of the run so far."""

    evaluations: list[Evaluation] = field(default_factory=list)
    evaluated_s: float = 0.0
    """When the last snapshot was submitted for evaluation."""
    totals: Totals = field(default_factory=Totals)
    step_s: float = 0.0
    """Running mean of a step's seconds without waiting: the time that a message may take to arrive."""


@dataclass(slots=True)
class Worker:
    """The state of one worker's loop."""

    config: Config
    rank: int
    members: Membership
    strategy: Strategy
    # what surrounds the loop: real, simulated or in memory
    replica: Replica
    batches: Batches
    links: Links[Any]
    collectives: Collectives
    evaluator: Evaluator
    recorder: Recorder
    clock: Clock
    reduce: Reduce
    """Computes the strategy's sums."""
    training_samples: InitVar[int]
    processors: InitVar[int] = 1
    metrics: tuple[str, ...] = ()
    """Names of the metrics of a test; empty where there is no test data, and nothing is tested."""
    encoder: BackgroundEncoder | None = None
    """Encodes messages in the background. While it does, it alone posts to the links."""
    profiles: bool = True
    """Whether batches may be timed before the first step."""
    epochs: Epochs | None = None
    checkpoints: Checkpoints | None = None
    on_step: Callable[[StepRecord], None] = lambda record: None
    # how far it is
    step: int = 0
    current: Step | None = None
    """The step that has begun and not ended. If the run ends in it, it is never completed."""
    pending: StepRecord | None = None
    """The record of the previous step, until the background encoder has finished its messages."""
    end_step: float = field(init=False)
    """The step at which the run ends, for this worker or for one that it cannot continue without."""
    left_step: float = math.inf
    """The lowest step at which another worker has left."""
    stop_reason: str | None = None
    """Why the run must end early: a signal, a failure, a reached target; "" if another rank knows why."""
    exit_code: int = 0
    # what it has learned
    state: Any = None
    inbox: Inbox = field(init=False)
    patience: Patience = field(default_factory=Patience)
    summing: bool = field(init=False)
    """Whether the strategy sums and, as far as is known, no worker has ended."""
    summed_step: int = -1
    """The step of the newest sum: all workers have reached it."""
    budget: ExchangeBudget = field(init=False)
    batch_sizes: BatchSizeRounds = field(init=False)
    knowledge: KnowledgeRounds = field(init=False)
    averages: AverageRounds = field(init=False)
    history: History = field(default_factory=History)

    def __post_init__(self, training_samples: int, processors: int) -> None:
        workers = len(self.members)
        self.end_step = self.config.last_step
        self.budget = ExchangeBudget(
            share=self.config.exchange_share or 0.0,
            processors=processors,
            dense_bytes=4.0 * self.replica.layout.size,
            clock=self.clock,
            transport_cpu_s=self.links.cpu_s,
        )
        self.inbox = Inbox(dict.fromkeys(self.members.peers(self.rank), -1))
        self.batch_sizes = BatchSizeRounds(self.config, self.rank, workers, training_samples, self.collectives)
        self.knowledge = KnowledgeRounds(self.config, self.rank, workers, self.collectives, self.now_s)
        lengths = Lengths() if self.strategy.lengthens(self.config) and self.replica.normalises else None
        self.averages = AverageRounds(self.config, workers, len(self.replica.statistics()), lengths, self.collectives)
        self.summing = self.strategy.sums() and not self.alone
        plan = Plan(config=self.config, rank=self.rank, ranks=self.members.ranks, layout=self.replica.layout)
        self.state = self.strategy.start(plan)

    @property
    def alone(self) -> bool:
        """Whether the run has one worker."""
        return self.batch_sizes.workers == 1

    @property
    def peers(self) -> tuple[int, ...]:
        """The live peers."""
        return self.members.peers(self.rank)

    def now_s(self) -> float:
        """Seconds on the run's common clock."""
        return self.clock.now_s()

    @contextmanager
    def timed(self, phase: Phase, *, span: Phase | None = None, charged: bool = False) -> Iterator[Scope]:
        """Time a scope: record its span, as ``span`` if given, and add its seconds to the step's ``phase``.

        The time of scopes inside it counts for those alone. ``charged``: charge the budget for its processor time.
        """
        scope, open_scopes_s = Scope(self.now_s(), self.clock.cpu_s()), self.clock.nested_s
        open_scopes_s.append(0.0)
        try:
            yield scope
        finally:
            inside_s = open_scopes_s.pop()
            if not scope.discarded:
                end_s = self.now_s()
                self.recorder.span(span or phase, self.step, scope.start_s, end_s)
                if self.current is not None:
                    self.current.add(phase, end_s - scope.start_s - inside_s)
                if charged:
                    self.budget.charge(self.clock.cpu_s() - scope.start_cpu_s)
                inside_s = end_s - scope.start_s
            if open_scopes_s:
                open_scopes_s[-1] += inside_s

    def ended(self) -> bool:
        """Whether there is no next step."""
        if self.checkpoints is not None:
            return self.cut_short()
        return self.cut_short() or self.timed_out()

    def timed_out(self) -> bool:
        """Whether ``--seconds`` have passed."""
        return self.config.seconds is not None and self.now_s() >= self.config.seconds

    def end(self, reason: str) -> None:
        """End the run. Where checkpoints are taken, all workers end together after a last one."""
        if self.checkpoints is not None:
            self.checkpoints.end(reason)
        else:
            self.stop_reason = self.stop_reason or reason

    def cut_short(self) -> bool:
        """Whether the current step will never be completed."""
        return self.stop_reason is not None or self.step >= self.end_step

    def last_test(self) -> Mapping[str, float]:
        """The metrics of the newest evaluation, by name; empty before the first."""
        return self.history.evaluations[-1].metrics if self.history.evaluations else {}

    def shared_knowledge(self) -> Vector:
        """A copy of the knowledge (K,) float32, without what the strategy has applied ahead of all peers.

        Nothing may be selected meanwhile.
        """
        knowledge = self.replica.knowledge()
        ahead = None if self.alone else self.strategy.ahead(self.state)
        if ahead is not None:
            knowledge[: len(ahead)] -= ahead
        return knowledge

    def heard_steps(self) -> dict[int, int]:
        """The step at which each peer was last heard of, by its messages or by a sum; -1 for none yet."""
        newest = self.inbox.newest
        return {peer: max(newest.get(peer, -1), self.summed_step) for peer in self.links.posted()}

    def take_tests(self, *, wait: bool = False) -> None:
        """Note the tests that are done; with ``wait``, all that were submitted."""
        for evaluation in self.evaluator.poll(wait=wait):
            self.history.evaluations.append(evaluation)
            self.recorder.evaluation(evaluation)
            if self.config.target is not None:
                self.batch_sizes.tested = evaluation.metrics[self.config.target.metric]

    def stamp(self, computed_at: float = 0.0) -> Stamp:
        """The fields of this step for message headers."""
        sizes = self.current or self.batch_sizes
        return Stamp(self.members.epoch, self.step, sizes.lbs, sizes.gbs, computed_at)

    def link_views(self, step_s: float) -> dict[int, LinkView]:
        """The links of the live peers, as a strategy may use them in a step of ``step_s`` seconds."""
        links = self.links.view(self.peers, step_s)
        if self.checkpoints is not None and self.checkpoints.holding:
            return {peer: LinkView(False, link.budget_bytes) for peer, link in links.items()}
        return links

    def collect(self) -> None:
        """Decode what has arrived: payloads wait in the inbox, departures change the membership."""
        with self.timed(Phase.APPLY, charged=True) as scope:
            messages = self.links.poll()
            scope.discarded = not messages
        for message in messages:
            sender = message.header.sender
            if self.checkpoints is not None:
                self.checkpoints.arrived(self, message)
            self.inbox.put(message)
            self.patience.arrived(sender, message.header.step, self.now_s())
            if message.header.kind is Kind.STOP:
                self.stop_reason = self.stop_reason or ""
            if message.header.kind in (Kind.CLOSE, Kind.STOP):
                self.members = self.members.without(sender)
                self.left_step = min(self.left_step, message.header.step)
                self.inbox.newest.pop(sender, None)
                if self.config.mode.lockstep:  # no worker can complete a step without its message
                    self.end_step = min(self.end_step, message.header.step)

    def write_record(self) -> None:
        """Record the step that has ended, if its record is still pending."""
        if self.pending is not None:
            record, self.pending = self.pending, None
            self.recorder.step(record)
            self.on_step(record)

    def may_complete(self) -> bool:
        """Whether the current step can be completed, or never will be."""
        return self.cut_short() or self.strategy.may_advance(self.state, self.step, self.inbox)

    def patient_until_s(self) -> float:
        """The time until which this step, which has been computed, waits for peers that it need not wait for."""
        assert self.current is not None
        now_s = self.now_s()
        if not self.config.patience:
            return now_s
        most_s = self.config.patience * self.current.compute_s
        self.patience.expect(self.links.latencies(), most_s, self.history.step_s)
        self.patience.ready(self.step, now_s)
        return now_s + self.patience.longest_s(self.peers, most_s)

    def is_fresh(self) -> bool:
        """Whether the messages of this step have arrived from all live peers, ``--backup`` of the slowest left out.

        Of a peer whose messages cannot be in time, whether the message has arrived that should be here by now.
        """
        lags = self.patience.lags
        newest = sorted(step + lags.get(peer, 0) for peer, step in self.inbox.newest.items())
        return all(step >= self.step for step in newest[self.config.backup or 0 :])
