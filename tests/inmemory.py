"""Workers in one process: the real loop and strategies, with links and collectives made of lists.

Nothing here is timed. A schedule picks which worker moves next and how many ticks a message travels, so a test
can be as adverse as it likes and repeat it from a seed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi import wire
from dlion_mpi.algorithms.ring import ring_sum
from dlion_mpi.config.options import Config
from dlion_mpi.errors import RunError
from dlion_mpi.loop import compute
from dlion_mpi.loop.clock import Clock
from dlion_mpi.loop.leave import leave
from dlion_mpi.loop.links import ByteLinks
from dlion_mpi.loop.membership import Membership
from dlion_mpi.loop.ports import Channel, Compute, Computed, Done, EncodedBatch, Loop, Stamp, Until
from dlion_mpi.loop.sums import SUM
from dlion_mpi.loop.train import train
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.records import Evaluation, StepRecord, Transfer, Waited
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.strategies.registry import resolve
from dlion_mpi.strategies.types import LinkView, Outgoing
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, vector
from dlion_mpi.wire import Bytes, ValueType

STUCK = 20_000
"""Ticks without any worker moving after which it is a deadlock."""


class Stuck(AssertionError):
    """No worker moves any more. ``waiting``: by rank, what each waits for."""

    def __init__(self, waiting: Mapping[int, Compute | Until], workers: Sequence[Worker]) -> None:
        super().__init__(f"deadlock: ranks {sorted(waiting)} wait for ever")
        self.waiting, self.workers = waiting, workers


@dataclass(slots=True)
class MemoryTicket:
    """See `loop.ports.Ticket`."""

    done: bool = False
    table: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))
    vector: Vector = field(default_factory=lambda: np.empty(0, np.float32))


@dataclass(slots=True)
class Call:
    """One collective, for which every rank's part is awaited."""

    what: str
    parts: dict[int, Any] = field(default_factory=dict)
    tickets: dict[int, MemoryTicket] = field(default_factory=dict)


class MemoryCollectives:
    """Collectives of n ranks. ``calls``: per channel in order; ranks that disagree on it fail the test."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.calls: dict[str, list[Call]] = {}

    def of(self, rank: int) -> RankCollectives:
        """The collectives as one rank sees them."""
        return RankCollectives(self, rank)

    def join(self, channel: str, number: int, rank: int, what: str, part: Any) -> MemoryTicket:
        """Rank ``rank``'s part of the channel's call ``number``; the last one completes it for all."""
        calls = self.calls.setdefault(channel, [])
        if number == len(calls):
            calls.append(Call(what))
        call = calls[number]
        assert call.what == what, f"rank {rank} does {what} where others do {call.what} (call {number}, {channel})"
        call.parts[rank] = part
        call.tickets[rank] = MemoryTicket()
        if what.startswith("broadcast"):
            call.tickets[rank].vector = part
        if len(call.parts) == self.ranks:
            self._complete(call)
        return call.tickets[rank]

    def _complete(self, call: Call) -> None:
        parts = [call.parts[rank] for rank in range(self.ranks)]
        for ticket in call.tickets.values():
            if call.what == "gather":
                ticket.table = np.array(parts, dtype=np.float64)
            elif call.what == "reduce":
                if all(part is not None for part in parts):
                    ticket.vector = ring_sum([vector for vector, _ in parts], parts[0][1])
            else:
                ticket.vector[:] = call.parts[int(call.what.removeprefix("broadcast from "))]
            ticket.done = True


class RankCollectives:
    """See `loop.ports.Collectives`."""

    def __init__(self, shared: MemoryCollectives, rank: int) -> None:
        self._shared, self._rank = shared, rank
        self._joined: dict[str, int] = {}

    def gather(self, channel: str, record: Sequence[float]) -> MemoryTicket:
        return self._join(channel, "gather", list(record))

    def broadcast(self, channel: str, root: int, vector: Vector) -> MemoryTicket:
        return self._join(channel, f"broadcast from {root}", vector)

    def reduce(self, channel: str, vector: Vector | None, value_type: ValueType = "float32") -> MemoryTicket:
        return self._join(channel, "reduce", None if vector is None else (vector, value_type))

    def _join(self, channel: str, what: str, part: Any) -> MemoryTicket:
        number = self._joined.get(channel, 0)
        self._joined[channel] = number + 1
        return self._shared.join(channel, number, self._rank, what, part)


@dataclass(slots=True, kw_only=True)
class Weather:
    """What the network and the machines do to a run; everything is drawn from ``seed``.

    ``delay``: most ticks that a message travels. ``budget``: least and most bytes offered per message.
    ``blocked``: how often a link takes no message. ``slow``: this rank moves ``slowness`` times less often.
    ``stopped``: a rank, and the step in which it stops for ever.
    """

    seed: int = 0
    delay: int = 0
    budget: tuple[float, float] = (1e9, 1e9)
    blocked: float = 0.0
    slow: int | None = None
    slowness: int = 20
    stopped: tuple[int, int] | None = None


class Network:
    """The bytes between n workers: messages in order on every link, each after its delay; the rest at once."""

    def __init__(self, ranks: int, weather: Weather) -> None:
        self.ranks, self.weather = ranks, weather
        self.random = random.Random(weather.seed)
        self.tick = 0
        self.on_the_way: dict[tuple[int, int], deque[tuple[int, Bytes]]] = {}
        self.deliver: dict[int, Callable[[int, Channel, Bytes, Done], None]] = {}
        """By rank."""
        self.posted = [-1] * ranks
        """Per rank the newest step it has told anyone about."""

    def send(self, sender: int, receiver: int, channel: Channel, parcel: Bytes) -> None:
        if channel is not Channel.MESSAGE:
            self.deliver[receiver](sender, channel, parcel, lambda: None)
            return
        link = self.on_the_way.setdefault((sender, receiver), deque())
        due = self.tick + self.random.randint(0, self.weather.delay)
        link.append((max(due, link[-1][0] if link else 0), parcel))

    def receive(self, receiver: int) -> None:
        """Deliver the messages that are due."""
        for sender in range(self.ranks):
            link = self.on_the_way.get((sender, receiver), deque())
            while link and link[0][0] <= self.tick:
                self.deliver[receiver](sender, Channel.MESSAGE, link.popleft()[1], lambda: None)


class MemoryTransport:
    """See `loop.ports.ByteTransport`."""

    def __init__(self, network: Network, rank: int) -> None:
        self._network, self._rank = network, rank

    def open(self, deliver: Callable[[int, Channel, Bytes, Done], None]) -> None:
        self._network.deliver[self._rank] = deliver

    def expect(self, channel: Channel, size_bytes: int, buffers: int) -> None: ...

    def send(self, peer: int, channel: Channel, parcel: Bytes, done: Done) -> None:
        self._network.send(self._rank, peer, channel, parcel.copy())
        done()

    def cpu_s(self) -> float:
        return 0.0


class MemoryLinks(ByteLinks):
    """Links whose weather says which are open, and for how much."""

    def __init__(self, network: Network, rank: int, size: int, message_cpu_s: float) -> None:
        transport = MemoryTransport(network, rank)
        super().__init__(rank, network.ranks, transport, size=size, window=2, now_s=lambda: network.tick * 1e-3)
        self._network = network
        self._message_cpu_s, self._cpu_s = message_cpu_s, 0.0
        self._views = random.Random(f"{network.weather.seed} {rank}")
        self.history: list[dict[int, tuple[LinkView, int | None]]] = []
        """Per step and peer: the link as it was offered, and the entries it got (None: a header or nothing)."""

    def view(self, peers: Iterable[int], step_s: float) -> dict[int, LinkView]:
        weather = self._network.weather
        views = {
            peer: LinkView(free, self._views.uniform(*weather.budget), free)
            for peer in peers
            for free in (self._views.random() >= weather.blocked,)
        }
        self.history.append({peer: (view, None) for peer, view in views.items()})
        return views

    def post(self, messages: dict[int, Outgoing], stamp: Stamp) -> dict[int, int]:
        for peer, message in messages.items():
            if message.kind in (wire.Kind.GRADIENT, wire.Kind.WEIGHTS):
                self._network.posted[self.rank] = stamp.step
            if message.entries is not None:
                self._cpu_s += self._message_cpu_s
                if peer in self.history[-1]:  # else it has left meanwhile
                    self.history[-1][peer] = (self.history[-1][peer][0], len(message.entries))
        return super().post(messages, stamp)

    def poll(self) -> list[wire.Message]:
        self._network.receive(self.rank)
        return super().poll()

    def cpu_s(self) -> float:
        return self._cpu_s


class MemoryEncoder:
    """A `loop.ports.BackgroundEncoder` whose weather says when work is done: in time, or late."""

    def __init__(self, network: Network, rank: int) -> None:
        self._later = random.Random(f"{network.weather.seed} beside {rank}")
        self._begun: list[Callable[[], EncodedBatch]] = []
        self._made: list[EncodedBatch] = []

    def begin(self, work: Callable[[], EncodedBatch]) -> None:
        self._begun.append(work)
        self.move()

    def move(self) -> None:
        """Perhaps get on with it."""
        while self._begun and self._later.random() < 0.5:
            self._made.append(self._begun.pop(0)())

    def done(self) -> bool:
        return not self._begun

    def take(self) -> list[EncodedBatch]:
        made, self._made = self._made, []
        return made


class Quadratic:
    """A worker's share of a quadratic: loss 1/2 sum_i a_i (w_i - x_i)^2; see `loop.ports.Replica`.

    ``curvature``: (P,) the a_i. Where it is 0 this worker learns nothing by itself.
    """

    takes_gradients = True
    normalises = False
    metric_names: tuple[str, ...] = ("accuracy",)

    def __init__(self, layout: Layout, curvature: Vector, learning_rate: float) -> None:
        self.layout = layout
        self.curvature = curvature
        self.learning_rate = np.float32(learning_rate)
        self.w = np.zeros(layout.size, np.float32)

    def gradient(self, batch: npt.NDArray[Any]) -> Gradient:
        """Mean loss and mean gradient over the rows of ``batch`` (b, P)."""
        away = self.w - batch.mean(axis=0, dtype=np.float32)
        return Gradient(float(0.5 * (self.curvature * away * away).sum()), self.curvature * away)

    def movement(self, batch: npt.NDArray[Any]) -> Gradient:
        gradient = self.gradient(batch)
        return Gradient(gradient.loss, -self.learning_rate * gradient.vector)

    def move(self, movement: Vector) -> None:
        self.w += movement

    def step_alone(self, batch: npt.NDArray[Any]) -> Gradient:
        gradient = self.gradient(batch)
        if gradient.finite:
            self.apply(gradient.vector)
        return gradient.applied()

    def apply(self, gradient: Vector) -> None:
        self.w -= self.learning_rate * gradient

    def weights(self) -> Vector:
        return self.w.copy()

    def set_weights(self, weights: Vector) -> None:
        self.w[:] = weights

    knowledge, set_knowledge = weights, set_weights

    def statistics(self) -> Vector:
        return np.empty(0, np.float32)

    def set_statistics(self, statistics: Vector) -> None: ...

    def averages(self) -> Vector:
        return np.empty(0, np.float32)

    def set_averages(self, averages: Vector) -> None: ...

    def evaluate(self, knowledge: Vector, batches: Iterable[Any]) -> dict[str, float]:
        return {}

    def finish(self) -> None: ...

    def describe(self) -> str:
        return f"a quadratic of {self.layout.size}"

    def to_arrays(self) -> Arrays:
        return {"w": self.w.copy()}

    def from_arrays(self, arrays: Mapping[str, Array], *, generators: bool = True) -> None:
        self.w = vector(arrays, "w", self.layout.size)

    def save(self, path: Path) -> None:
        np.save(path, self.w)


class Rows:
    """See `loop.ports.Batches`: the rows of ``x`` (m, P) over and over."""

    def __init__(self, x: npt.NDArray[np.float32]) -> None:
        self._x, self._at = x, 0

    def take(self, size: int) -> npt.NDArray[np.float32]:
        rows = np.arange(self._at, self._at + size) % len(self._x)
        self._at += size
        return self._x[rows]

    def start_epoch(self, epoch: int) -> None:
        self._at = epoch * len(self._x)

    def state(self) -> dict[str, int]:
        return {"at": self._at}

    def restore(self, state: Mapping[str, int]) -> None:
        self._at = state["at"]


class Nothing:
    """An evaluator that never has a result and a recorder that keeps the transfers."""

    def __init__(self) -> None:
        self.transfers: list[Transfer] = []

    def pending(self) -> int:
        return 0

    def submit(self, step: int, time_s: float, knowledge: Vector) -> None: ...

    def poll(self, *, wait: bool = False) -> list[Evaluation]:
        return []

    def step(self, record: StepRecord) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def transfer(self, transfer: Transfer, time_s: float) -> None:
        self.transfers.append(transfer)

    def waited(self, waits: Sequence[Waited]) -> None: ...

    def span(self, phase: Phase, step: int, start_s: float, end_s: float) -> None: ...

    def applied(self, header: wire.Header, step: int, applied_s: float) -> None: ...


@dataclass(slots=True)
class Run:
    """A finished run: its workers, what every one of them recorded, and its collectives."""

    workers: list[Worker]
    records: list[list[StepRecord]]
    collectives: MemoryCollectives
    sent: list[list[dict[int, tuple[LinkView, int | None]]]]
    """Per rank `MemoryLinks.history`."""

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """(n, P), a row per worker."""
        return np.stack([worker.replica.weights() for worker in self.workers])


def run(
    config: Config,
    replicas: Sequence[Quadratic],
    rows: Sequence[npt.NDArray[np.float32]],
    *,
    weather: Weather | None = None,
    seconds: Callable[[int, int], float] = lambda rank, samples: 0.001 * samples,
    on_step: Callable[[Worker, Network], None] = lambda worker, network: None,
    message_cpu_s: float = 0.0,
    prepare: Callable[[Worker], None] = lambda worker: None,
) -> Run:
    """Train to the end.

    ``seconds``: (rank, samples) -> what computing a gradient takes, as it is told to the loop. ``message_cpu_s``:
    processor seconds to send a message with entries, as the links say. ``prepare``: has every worker before it begins.
    ``on_step``: has a worker that has completed a step, with that step counted.
    """
    weather = weather or Weather()
    network = Network(len(replicas), weather)
    collectives = MemoryCollectives(len(replicas))
    run = Run([], [[] for _ in replicas], collectives, [])
    for rank, replica in enumerate(replicas):
        strategy, resolved = resolve(config)
        links = MemoryLinks(network, rank, replica.layout.size, message_cpu_s)
        own = collectives.of(rank)
        worker = Worker(
            config=resolved,
            rank=rank,
            members=Membership(tuple(range(len(replicas)))),
            strategy=strategy,
            replica=replica,
            batches=Rows(rows[rank]),
            links=links,
            collectives=own,
            evaluator=Nothing(),
            recorder=Nothing(),
            clock=Clock(lambda: network.tick * 1e-3),
            training_samples=sum(len(x) for x in rows),
            metrics=replica.metric_names,
            encoder=MemoryEncoder(network, rank),
            reduce=partial(own.reduce, SUM),
        )
        run.workers.append(worker)
        run.sent.append(links.history)
        worker.on_step = run.records[rank].append
    for worker in run.workers:
        prepare(worker)
    _drive(run.workers, network, seconds, on_step)
    assert not any(network.on_the_way.values()), "a worker has left before all that was sent to it was there"
    return run


def _drive(
    workers: Sequence[Worker],
    network: Network,
    seconds: Callable[[int, int], float],
    on_step: Callable[[Worker, Network], None],
) -> None:
    """Let one worker move at a time, as the weather has it, until all have ended.

    A worker that fails leaves in good order, as in a real run; the first failure is raised in the end.
    """
    loops: dict[int, Loop] = {worker.rank: train(worker) for worker in workers}
    failures: list[RunError] = []
    waiting: dict[int, Compute | Until] = {rank: next(loop) for rank, loop in loops.items()}
    slow, slowness, stopped = network.weather.slow, network.weather.slowness, network.weather.stopped
    moved_at = 0
    while loops:
        network.tick += 1
        if network.tick - moved_at >= STUCK:
            raise Stuck(waiting, workers)
        rank = network.random.choice(sorted(loops))
        if stopped is not None and rank == stopped[0] and workers[rank].step >= stopped[1]:
            continue
        encoder = workers[rank].encoder
        assert isinstance(encoder, MemoryEncoder)
        encoder.move()  # a slow machine's too: its thread has all the time that its loop computes
        if rank == slow and len(loops) > 1 and network.random.randrange(slowness):
            continue
        request = waiting[rank]
        if isinstance(request, Until) and not request.ask():
            continue
        moved_at = network.tick
        answer = _compute(request, workers[rank].replica, rank, seconds) if isinstance(request, Compute) else None
        steps = workers[rank].step
        try:
            waiting[rank] = loops[rank].send(answer)
            if workers[rank].step > steps:
                on_step(workers[rank], network)
        except StopIteration:
            del loops[rank]
        except RunError as failure:
            failures.append(failure)
            workers[rank].stop_reason = str(failure)
            loops[rank] = leave(workers[rank])
            waiting[rank] = next(loops[rank])
    if failures:
        raise failures[0]


def _compute(request: Compute, replica: Any, rank: int, seconds: Callable[[int, int], float]) -> Computed:
    return Computed.of(compute.answer(request, replica), seconds(rank, request.samples), 0.0)
