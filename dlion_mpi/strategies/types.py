"""Arguments and answers of a strategy: the types that the training loop and a strategy exchange."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from dlion_mpi.algorithms.bandwidth import MEASURABLE_BYTES
from dlion_mpi.config.options import Config
from dlion_mpi.vector.layout import Entries, Layout, Vector
from dlion_mpi.wire import Kind, Message, ValueType

# ---- what a strategy is given


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The facts known before the first step: the resolved Config, this rank, all ranks, the layout of the weights."""

    config: Config
    rank: int
    ranks: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class LinkView:
    """The state of the link to one peer.

    ``ready``: it takes a message now. ``budget_bytes``: what it carries in a step, as measured. ``idle``: nothing is in
    flight on it. ``room_bytes``: what it can take now and deliver by about the next step, given what is in flight here
    and on the other links. ``affordable_bytes``: the message size that the processor time granted to the exchange pays
    for (``--exchange-share``). ``measurable_bytes``: the message size whose time tells the link's rate.
    """

    ready: bool
    budget_bytes: float
    idle: bool = True
    room_bytes: float = math.inf
    affordable_bytes: float = math.inf
    measurable_bytes: float = MEASURABLE_BYTES


LinkViews = Mapping[int, LinkView]
"""By live peer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalUpdate:
    """The result of this worker's step, from ``lbs`` of the ``gbs`` samples of all workers.

    ``vector``: (P,) float32, the mean gradient, or the movement of the weights by the worker's own optimizer, as
    `Strategy.exchanges` says. Read-only, and valid until the next step's `outgoing` begins. ``shortened``: the length
    of the mean of all workers' movements as a share of one worker's, as measured, 1 at first; None if the optimizer
    does not normalise, or `Strategy.lengthens` does not ask for it.
    """

    vector: Vector
    step: int
    lbs: int
    gbs: int
    shortened: float | None = None


Weights = Callable[[], Vector]
"""Returns a copy of the replica's weights, (P,) float32."""


@dataclass(slots=True)
class Inbox:
    """Messages that have arrived and are not used yet, and how far every live peer is known to be."""

    newest: dict[int, int]
    """By live peer, the step of its newest message; -1 before the first."""
    held: list[Message] = field(default_factory=list)
    announced: dict[int, Entries] = field(default_factory=dict)
    """By peer, the entries whose values are in flight: they should not be read before the values arrive."""

    received: dict[int, int] = field(default_factory=dict)
    """By peer, the sequence number of its newest message: the messages that it has sent so far."""

    def put(self, message: Message) -> None:
        """Add a message that has arrived. Its payload, if any, is held for `take`."""
        header = message.header
        self.received[header.sender] = header.sequence
        if header.kind is Kind.INDICES:
            self.announced[header.sender] = message.entries
        elif header.kind is Kind.GRADIENT:
            self.announced.pop(header.sender, None)
        if header.sender in self.newest:
            self.newest[header.sender] = max(self.newest[header.sender], header.step)
        if header.kind in (Kind.GRADIENT, Kind.WEIGHTS):
            self.held.append(message)

    def take(self, last_step: float) -> list[Message]:
        """Remove and return the messages of steps up to ``last_step``, by sender and step.

        The order is fixed, so that a sum of float32 does not depend on which message arrived first.
        """
        taken = [m for m in self.held if m.header.step <= last_step]
        self.held = [m for m in self.held if m.header.step > last_step]
        return sorted(taken, key=lambda m: (m.header.sender, m.header.step))


# ---- what a strategy answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A message to one peer. Without ``entries`` it is a header, which tells the peer this worker's step.

    ``quality``: the N in (0, 100] that is recorded with the message. ``announced``: the indices go ahead of the values,
    and the peer waits for the values.
    """

    entries: Entries | None = None
    kind: Kind = Kind.GRADIENT
    quality: float = 0.0
    value_type: ValueType = "float32"
    announced: bool = False


Outbox = dict[int, Outgoing]
"""By peer, the message that it gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A change of the replica: set ``weights``, add ``movement``, give the optimizer ``gradient``, in this order.

    Each is (P,) float32 or None. ``skipped``: the number of steps to leave out after this one.
    """

    weights: Vector | None = None
    movement: Vector | None = None
    gradient: Vector | None = None
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Sum:
    """A request for the sum of all workers' ``vector``, (K,) float32 with the same K everywhere.

    Every worker must ask for the same sums in the same order. The sum may take the vector's place in memory.
    ``value_type``: of the values that travel. Each is rounded before it is sent, and added as float32.
    """

    vector: Vector
    value_type: ValueType = "float32"


T = TypeVar("T")
Sums = Generator[Sum, Vector, T]
"""A generator that yields every `Sum` it needs, is sent the sum of each, and returns a T."""
