"""The contract between the worker's loop and a strategy, and the parts that strategies share.

A strategy is explicit state and functions of it: no MPI, no clock, no TensorFlow. So the same code runs under
`train` and in virtual time, and one contract test covers all of them. A state that was passed in is given up
by the caller: a strategy may reuse its arrays in place and hand them back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from dlion_mpi.config.options import Config
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.vector.layout import Entries, Layout, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, vectors_by_rank
from dlion_mpi.wire import Kind, Message, ValueType

BATCHING: Mapping[str, object] = {
    "batching": "auto",
    "rebalance_every": 10,
    "lbs_max": 1024,
    "gbs_schedule": "grow",
    "gbs_interval": 500,
    "gbs_warmup_step": 32,
    "gbs_warmup_limit": 0.01,
    "gbs_speedup_factor": 1.5,
    "gbs_limit": 0.10,
}
"""What a strategy has in its ``defaults`` if batch sizes are to follow the workers' speed; the loop does the rest."""
TRANSFER: Mapping[str, object] = {
    "transfer": "worse-than-mean",
    "transfer_period": 25,
    "transfer_merge": 0.75,
    "transfer_losses": 10,
}
"""What it has there if the best worker's weights are to be merged by others; the loop does the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a strategy is told at the start: the resolved Config, its rank, all ranks, the gradient's layout."""

    config: Config
    rank: int
    ranks: tuple[int, ...]
    layout: Layout


TELLING_BYTES = 2048
"""A message of about this size, or larger, tells how fast its link is; smaller ones tell about its delay alone."""
WINDOW = 2
"""``--window`` of a strategy that does not say: a message that is under way, and the one after it."""


@dataclass(frozen=True, slots=True)
class LinkView:
    """A link as a strategy sees it: may it take a message now, and what it carries in a step.

    ``idle``: nothing that was sent before is still under way. ``room_bytes``: what it can take now and have carried
    by about the next step, beside what is still under way and what goes over the other links; 0: nothing.
    ``affordable_bytes``: what a message may have so that the exchange keeps to its share of the processor.
    """

    ready: bool
    budget_bytes: float
    idle: bool = True
    room_bytes: float = math.inf
    affordable_bytes: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalGradient:
    """The worker's own mean gradient of this step: (P,) float32, over ``lbs`` of ``gbs`` samples.

    The vector is read-only and valid until the next step's `outgoing` begins.
    """

    vector: Vector
    step: int
    lbs: int
    gbs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """What goes to one peer: ``entries`` None sends the header alone, which still tells the sender's step.

    ``announced``: the peer is told first which entries are coming, and waits for them.
    """

    entries: Entries | None = None
    kind: Kind = Kind.GRADIENT
    quality: float = 0.0
    value_type: ValueType = "float32"
    announced: bool = False


@dataclass(frozen=True, slots=True)
class Effect:
    """What a step does to the replica: first new weights, then an effective gradient for the optimizer.

    Both (P,) float32, or None. ``skipped``: steps that the worker leaves out after this one. ``share``: (P,) float32,
    this worker's part of a gradient: the optimizer gets the sum of everyone's, which may be put in its place.
    """

    gradient: Vector | None = None
    weights: Vector | None = None
    skipped: int = 0
    share: Vector | None = None


@dataclass(slots=True)
class Inbox:
    """Messages that have arrived and wait to be used, and how far every live peer is known to be."""

    newest: dict[int, int]
    """Per live peer the step of its newest message; -1 before the first."""
    held: list[Message] = field(default_factory=list)
    announced: dict[int, Entries] = field(default_factory=dict)
    """By peer, the entries whose values are on their way; until they come nobody should read them."""

    def put(self, message: Message) -> None:
        """A message has arrived; its payload, if any, waits for `take`."""
        header = message.header
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

        The order is fixed so that a sum of float32 does not depend on who came first.
        """
        taken = [m for m in self.held if m.header.step <= last_step]
        self.held = [m for m in self.held if m.header.step > last_step]
        return sorted(taken, key=lambda m: (m.header.sender, m.header.step))


@dataclass(slots=True)
class Missed:
    """What was due to peers whose links took no message: per peer a vector of ``size`` entries, float32.

    A vector is made when it is first needed. So entries that everybody gets at once are kept once, not per link.
    """

    size: int
    vectors: dict[int, Vector] = field(default_factory=dict)

    def due(self, peer: int, entries: Entries, ready: bool, *, everything: bool = False) -> Entries | None:
        """What goes to ``peer`` now that ``entries`` go to all: these, with what it has missed of them before.

        ``everything``: and of all others. None if its link is not ``ready``: then they have to wait.
        """
        waiting = self.vectors.get(peer)
        if waiting is None:
            if ready or not len(entries):
                return entries if ready else None
            waiting = self.vectors[peer] = np.zeros(self.size, np.float32)
        entries.add_to(waiting, 1.0)
        if not ready:
            return None
        if everything:
            del self.vectors[peer]
            indices = np.flatnonzero(waiting).astype(np.uint32)
            return Entries(self.size, waiting[indices], indices)
        places = entries.places()
        values = waiting[places].copy()
        waiting[places] = 0
        return Entries(self.size, values, entries.indices)

    def to_arrays(self) -> Arrays:
        """The vectors by peer."""
        return {str(peer): waiting for peer, waiting in self.vectors.items()}

    def from_arrays(self, arrays: Mapping[str, Array], prefix: str, peers: Sequence[int]) -> None:
        """Take back what `to_arrays` gave, found under ``prefix``. Raises StateError."""
        self.vectors = vectors_by_rank(arrays, prefix, peers, self.size)


class Strategy:
    """How workers exchange what they learn."""

    name: ClassVar[str]
    sync_modes: ClassVar[tuple[str, ...]]
    """The synchronisation modes it supports, its default first."""
    defaults: ClassVar[Mapping[str, Any]]
    """The technique options it uses, by their Config name, and its defaults; any other is refused."""
    Options: ClassVar[type[StrategyOptions]] = StrategyOptions
    """A frozen dataclass of the strategy's own options: ``--gaia.threshold 0.2``, ``Gaia(threshold=0.2)``."""
    options: Any
    """An instance of ``Options``."""

    def __init_subclass__(cls) -> None:
        """Give the options the name of their strategy, by which messages call them."""
        name = getattr(cls, "name", "")
        if "Options" in vars(cls):
            cls.Options.table = name
        elif cls.Options.table != name:
            cls.Options = type("Options", (cls.Options,), {"table": name})

    def __init__(self, **options: Any) -> None:
        """Take the strategy's own options by name. Raises UserError for one that it lacks or that is wrong."""
        self.options = self.Options.of(options)

    def start(self, plan: Plan) -> Any:
        """The state before the first step."""
        raise NotImplementedError

    def outgoing(
        self, state: Any, local: LocalGradient, links: Mapping[int, LinkView]
    ) -> tuple[Any, dict[int, Outgoing]]:
        """What to send to whom after computing ``local``. ``links`` has the live peers."""
        raise NotImplementedError

    def incoming(
        self, state: Any, local: LocalGradient, weights: Callable[[], Vector], messages: Sequence[Message]
    ) -> tuple[Any, Effect]:
        """What this step does to the replica, given ``local``, the own gradient, and what arrived for it."""
        raise NotImplementedError

    def may_advance(self, state: Any, step: int, inbox: Inbox) -> bool:
        """Whether step ``step``, computed and posted, may be completed with what has arrived."""
        raise NotImplementedError


@runtime_checkable
class SendsFirst(Protocol):
    """A strategy whose workers also send before they compute: not gradients, but what has become of the weights."""

    def opening(
        self, state: Any, step: int, weights: Callable[[], Vector], links: Mapping[int, LinkView]
    ) -> tuple[Any, dict[int, Outgoing]]:
        """What to send to whom before step ``step`` is computed, from ``weights``. ``links`` has the live peers.

        Asked again while the worker waits in that step, whenever something has come: other links may be free then.
        """


@runtime_checkable
class SelectsBeside(Protocol):
    """A strategy that says whether its `outgoing` may run in a thread beside all that the loop does until the next:
    `incoming`, `may_advance`, the optimizer, the next gradient."""

    def beside(self, config: Config) -> bool:
        """Whether, with this Config, `outgoing` changes nothing that those read, reads nothing that they change, and
        returns the state that it was given."""


@runtime_checkable
class Resumable(Protocol):
    """A strategy whose state can be kept in a checkpoint: all of it between two steps that a new `start` lacks."""

    restates: ClassVar[bool]
    """Whether its messages say how things are, such as weights, and not what has changed, such as gradients: then one
    that is sent again after a run was resumed does no harm."""

    def to_arrays(self, state: Any) -> Arrays:
        """The state by name. The arrays may be the state's own: the caller copies them at once."""

    def from_arrays(self, state: Any, arrays: Mapping[str, Array]) -> Any:
        """A new state of `start` with what `to_arrays` gave. Raises StateError for arrays that do not fit."""


def may_advance(config: Config, step: int, inbox: Inbox) -> bool:
    """The synchronisation modes. ``sync``: everyone's message of this step is here. ``bounded``: after this
    step the worker is at most ``staleness`` steps ahead of the slowest live peer, ``backup`` of them left out.
    ``async``: always. See docs/algorithms.md, "A step"."""
    return config.mode.may_advance(
        step, inbox.newest.values(), staleness=config.staleness or 0, backup=config.backup or 0
    )
