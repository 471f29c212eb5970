"""One worker: what its loop in `loop/train.py` works on."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dlion_mpi.config.options import Config
from dlion_mpi.loop.batch_sizes import StatusRounds
from dlion_mpi.loop.knowledge import KnowledgeRounds
from dlion_mpi.loop.links import Links
from dlion_mpi.loop.membership import Membership
from dlion_mpi.loop.ports import BackgroundEncoder, Batches, Collectives, Reduce, Replica, Stamp, Until
from dlion_mpi.metrics.records import Evaluation, StepRecord, Transfer
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.strategies.contract import Inbox, LinkView, Outgoing, Plan, Strategy
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import Header, Kind, Message


class Evaluator(Protocol):
    """Evaluates snapshots off the critical path; see `learner.evaluate.BackgroundEvaluator`."""

    def pending(self) -> int:
        """Number of snapshots that are being evaluated or wait."""

    def submit(self, step: int, time_s: float, knowledge: Vector) -> None:
        """Evaluate a snapshot."""

    def poll(self, *, wait: bool = False) -> list[Evaluation]:
        """What has been evaluated; with ``wait``, all that was submitted."""


class Recorder(Protocol):
    """Keeps what happens; see `metrics.recorder.Recorder`."""

    def step(self, record: StepRecord) -> None:
        """A step."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation."""

    def transfer(self, transfer: Transfer, time_s: float) -> None:
        """A knowledge transfer."""

    def span(self, phase: Phase, step: int, start_s: float, end_s: float) -> None:
        """What a span of time was spent on."""

    def applied(self, header: Header, step: int, applied_s: float) -> None:
        """A message was used in this worker's step."""


class Checkpoints(Protocol):
    """Takes checkpoints between steps; see `checkpoint.rounds.CheckpointRounds`."""

    holding: bool
    """Whether no entries may be sent for the moment."""
    over: bool
    """Whether no checkpoint will be taken any more, and none is under way."""

    def advance(self, w: Worker) -> Iterator[Until]:
        """Between two steps: move a checkpoint on, or take one that is due."""

    def serve(self, w: Worker) -> None:
        """After the last step: go on taking part in the others' checkpoints."""

    def arrived(self, w: Worker, message: Message) -> None:
        """A message has come."""

    def end(self, reason: str) -> None:
        """The run has come to its end: all workers are to end together, after a last checkpoint."""


@dataclass(slots=True)
class Timings:
    """Where the time of the step at hand has gone, in seconds."""

    started_s: float
    lbs: int
    gbs: int
    compute_s: float = 0.0
    paced_s: float = 0.0
    select_encode_s: float = 0.0
    wait_s: float = 0.0
    apply_s: float = 0.0


@dataclass(slots=True)
class Spent:
    """Where this worker's time has gone since training began, in seconds; and how many samples it computed."""

    samples: int = 0
    compute_s: float = 0.0
    select_encode_s: float = 0.0
    wait_s: float = 0.0
    apply_s: float = 0.0

    def add(self, timings: Timings) -> None:
        """One more step."""
        self.samples += timings.lbs
        self.compute_s += timings.compute_s
        self.select_encode_s += timings.select_encode_s
        self.wait_s += timings.wait_s
        self.apply_s += timings.apply_s


@dataclass(slots=True)
class Worker:
    """Everything one worker's loop works on. ``now_s``: the run's common clock, 0 when training begins."""

    config: Config
    rank: int
    members: Membership
    strategy: Strategy
    replica: Replica
    batches: Batches
    links: Links[Any]
    collectives: Collectives
    evaluator: Evaluator
    recorder: Recorder
    now_s: Callable[[], float]
    training_samples: int
    cpu_s: Callable[[], float] = lambda: 0.0
    """Processor time that the calling thread has used: what the exchange costs, however many share the cores."""
    processors: int = 1
    """How many compute the gradient: of their time the exchange is granted a share."""
    beside: BackgroundEncoder | None = None
    """Makes messages beside the loop; see `exchange`. While it does, it alone changes ``posted`` and the links."""
    reduce: Reduce | None = None
    """For a strategy that shares its gradients by a sum; see `Effect.share`."""
    on_step: Callable[[StepRecord], None] = lambda record: None
    stop_reason: str | None = None
    """Why the run must end before its time: a signal, a failure, a reached target; "" if another rank knows."""
    exit_code: int = 0
    checkpoints: Checkpoints | None = None

    alone: bool = field(init=False)
    """Whether there has never been a peer."""
    end_step: float = field(init=False)
    """Steps after which the run ends, for this worker or for one that it cannot go on without."""
    step: int = 0
    midway: bool = False
    """Whether the step at hand has been begun; where the run ends in it, it will never be completed."""
    skipped: int = 0
    """Steps that were left out before the one at hand ended; see `Effect.skipped`."""
    reductions: int = 0
    """Sums that this worker has taken part in."""
    step_s: float = 0.0
    """Running mean of what a step takes without waiting: what a message may take to cross."""
    exchanged_step: int = -1
    message_bytes: float = field(init=False)
    """What a message may have so that the exchange keeps to its share of the processor."""
    exchange_credit_s: float = 0.0
    """Processor time that the exchange may still take: what `--exchange-share` grants, less what it has taken."""
    exchange_cpu_s: float = 0.0
    """Processor time that selecting, encoding, decoding and adding have cost since that was charged, in the loop and
    beside it."""
    decoding_s: float = 0.0
    """What taking in what has arrived has cost so far: it is no waiting, though the loop does it while it waits."""
    moved_cpu_s: float = 0.0
    """Of `Links.cpu_s`, what has been charged or disturbed no computing."""
    posted: Counter[int] = field(default_factory=Counter)
    """Messages that every peer was sent by `post`."""
    collected: Counter[int] = field(default_factory=Counter)
    """Messages that have come from every peer."""
    evaluated_s: float = 0.0
    transfer_asked_s: float = 0.0
    """When the newest knowledge transfer was asked for."""
    evaluations: list[Evaluation] = field(default_factory=list)
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=10))
    spent: Spent = field(default_factory=Spent)
    state: Any = None
    inbox: Inbox = field(init=False)
    status: StatusRounds = field(init=False)
    knowledge: KnowledgeRounds = field(init=False)

    def __post_init__(self) -> None:
        workers = len(self.members)
        self.alone = workers == 1
        self.end_step = self.config.last_step
        self.message_bytes = self.whole_bytes
        self.inbox = Inbox(dict.fromkeys(self.members.peers(self.rank), -1))
        self.status = StatusRounds(self.config, self.rank, workers, self.training_samples, self.collectives)
        self.knowledge = KnowledgeRounds(self.config, self.rank, workers, self.collectives)
        self.state = self.strategy.start(
            Plan(config=self.config, rank=self.rank, ranks=self.members.ranks, layout=self.replica.layout)
        )

    @property
    def whole_bytes(self) -> float:
        """A gradient with all its entries."""
        return 4.0 * self.replica.layout.size

    @property
    def peers(self) -> tuple[int, ...]:
        """The live peers."""
        return self.members.peers(self.rank)

    def ended(self) -> bool:
        """Whether there is no next step."""
        if self.checkpoints is not None:
            return self.cut_short()
        return self.cut_short() or self.timed_out()

    def timed_out(self) -> bool:
        """Whether `--seconds` are over."""
        return self.config.seconds is not None and self.now_s() >= self.config.seconds

    def end(self, reason: str) -> None:
        """End the run; where checkpoints are taken, all together after a last one."""
        if self.checkpoints is not None:
            self.checkpoints.end(reason)
        else:
            self.stop_reason = self.stop_reason or reason

    def cut_short(self) -> bool:
        """Whether the step at hand will never be completed."""
        return self.stop_reason is not None or self.step >= self.end_step

    def last_accuracy(self) -> float | None:
        """Of the newest evaluation, in 0..1; None before the first."""
        return self.evaluations[-1].accuracy if self.evaluations else None

    def stamp(self, computed_at: float = 0.0) -> Stamp:
        """For the headers of this step."""
        return Stamp(self.members.epoch, self.step, self.status.lbs, self.status.gbs, computed_at)

    def link_views(self, step_s: float) -> dict[int, LinkView]:
        """The links as the strategy may use them."""
        links = self.links.view(self.peers, step_s)
        if self.checkpoints is not None and self.checkpoints.holding:
            return not_ready(links)
        return links

    def post(self, messages: dict[int, Outgoing], stamp: Stamp) -> None:
        """Hand the links messages."""
        self.links.post(messages, stamp)
        self.posted.update(messages.keys())

    def collect(self) -> None:
        """Take in what has arrived: gradients wait in the inbox, departures change the membership."""
        start_s, start_cpu_s = self.now_s(), self.cpu_s()
        messages = self.links.poll()
        if messages:
            now_s = self.now_s()
            self.decoding_s += now_s - start_s
            self.exchange_cpu_s += self.cpu_s() - start_cpu_s
            self.recorder.span(Phase.APPLY, self.step, start_s, now_s)
        for message in messages:
            sender = message.header.sender
            self.collected[sender] += 1
            if self.checkpoints is not None:
                self.checkpoints.arrived(self, message)
            self.inbox.put(message)
            if message.header.kind is Kind.STOP:
                self.stop_reason = self.stop_reason or ""
            if message.header.kind in (Kind.CLOSE, Kind.STOP):
                self.members = self.members.without(sender)
                self.inbox.newest.pop(sender, None)
                if self.config.mode.lockstep:  # nobody can complete a step that one has not taken
                    self.end_step = min(self.end_step, message.header.step)

    def may_complete(self) -> bool:
        """Whether this step can be completed, or will never be."""
        self.collect()
        return self.cut_short() or self.strategy.may_advance(self.state, self.step, self.inbox)

    def is_fresh(self) -> bool:
        """Whether the message of this step is here of every live peer, `--backup` of the slowest left out."""
        newest = sorted(self.inbox.newest.values())[self.config.backup or 0 :]
        return all(step >= self.step for step in newest)


def not_ready(links: Mapping[int, LinkView]) -> dict[int, LinkView]:
    """The links as if none took a message now."""
    return {peer: LinkView(False, link.budget_bytes) for peer, link in links.items()}
