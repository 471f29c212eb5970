"""A worker's links over a virtual network: what `mpi/links.py` is over MPI.

They promise the loop the same (`loop.ports.Links`), count the same bytes, acknowledge the same messages and measure
bandwidth with the same `LinkRate`. Only, no message is encoded: its size is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from dlion_mpi import wire
from dlion_mpi.algorithms.bandwidth import LinkRate
from dlion_mpi.loop.ports import EncodedBatch, LinkTotals, Stamp, link_views
from dlion_mpi.metrics.timeline import MessageLog, Unlogged
from dlion_mpi.simulation.network import Events, Network, Stream
from dlion_mpi.strategies.contract import LinkView, Outgoing
from dlion_mpi.vector.layout import Entries
from dlion_mpi.wire import HEADER_BYTES, Header, Kind, Message

RECEIVE_BUFFERS = 3
"""Messages per peer that are received before the loop takes them in; see `mpi.links.RECEIVE_BUFFERS`."""
SELECT_S, SEND_S, RECEIVE_S, DENSE_S = 2e-9, 40e-9, 10e-9, 1e-9
"""Processor seconds of an exchange: per entry of the gradient that something is selected from, per selected entry and
link that it goes to or comes from, and per entry of a message that carries all. See `benchmarks/exchange.py`; in ranks
that train, whose caches hold other things between two exchanges, sending took twice what it takes there."""


@dataclass(slots=True)
class _Parcel:
    """A message on its way. ``received``: whether its addressee had a buffer for it when it came."""

    message: Message
    size_bytes: int
    received: bool = False


@dataclass(slots=True, eq=False)
class _Link:
    """One peer, as one worker sees it. ``far``: the same link as the peer sees it."""

    owner: VirtualLinks
    peer: int
    stream: Stream
    far: _Link = field(init=False)
    rate: LinkRate = field(default_factory=LinkRate)
    sequence: int = 0
    received: int = 0
    unpolled: int = 0  # received and not yet taken in
    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def arrive(self, parcel: _Parcel) -> None:
        """A message is across. It waits outside, not acknowledged, while the peer's buffers are full."""
        if self.unpolled < RECEIVE_BUFFERS:
            self.receive(parcel)
        self.owner.arrived(self, parcel)

    def receive(self, parcel: _Parcel) -> None:
        """Take a message into a buffer, and acknowledge it at once."""
        parcel.received = True
        self.unpolled += 1
        self.received += 1
        self.messages_received += 1
        self.bytes_received += parcel.size_bytes
        self.owner.log.arrived(self.peer, parcel.message.header.sequence, self.owner.now_s())
        if not self.owner.quiet:
            self.messages_sent += 1
            self.bytes_sent += HEADER_BYTES
            self.stream.send(HEADER_BYTES, self.far.acknowledged, (self.received, self.owner.now_s()))

    def acknowledged(self, receipt: tuple[int, float]) -> None:
        """The peer has received so many messages, the last at that time."""
        self.messages_received += 1
        self.bytes_received += HEADER_BYTES
        self.owner.acknowledged(self.rate, *receipt)


class VirtualLinks:
    """All links of one worker; see `mpi.links.Links`. ``size``: entries of the gradient vector (P)."""

    def __init__(
        self,
        rank: int,
        workers: int,
        network: Network,
        events: Events,
        *,
        size: int,
        window: int,
        log: MessageLog | None = None,
    ) -> None:
        self.rank = rank
        self.log = log or Unlogged()
        self.quiet = False
        self.wake: Callable[[], None] = lambda: None
        """Called when something has come that the loop may be waiting for."""
        self._workers = workers
        self._events = events
        self._window = window
        self._nothing = Entries(size, np.empty(0, np.float32), np.empty(0, np.uint32))
        self._arrivals: list[tuple[_Link, _Parcel]] = []
        self._exchange_s = self._loop_s = 0.0
        self._beside = False
        self._free_s = 0.0  # when what makes messages beside the loop is done
        self._links = {peer: _Link(self, peer, network.stream(rank, peer)) for peer in range(workers) if peer != rank}

    def connect(self, everyone: Sequence[VirtualLinks]) -> None:
        """Join this end of every link to the other: ``everyone`` by rank."""
        for peer, link in self._links.items():
            link.far = everyone[peer]._links[self.rank]

    def view(self, peers: Iterable[int], step_s: float) -> dict[int, LinkView]:
        """Of every peer whether its link has room in its window, and what it can carry in ``step_s`` seconds."""
        rates = {peer: self._links[peer].rate for peer in peers}
        return link_views(rates, self._window, step_s, self._events.now_s)

    def post(self, messages: dict[int, Outgoing], stamp: Stamp) -> dict[int, int]:
        """Send a message per peer. Returns the bytes of each."""
        if any(m.entries is not None and m.entries.indices is not None and len(m.entries) for m in messages.values()):
            self._spend(SELECT_S * self._nothing.size)
        packed: dict[tuple[int, str, Kind], tuple[Entries, int]] = {}  # what goes to several peers is packed once
        sizes = {}
        for peer, message in messages.items():
            link = self._links[peer]
            key = (id(message.entries), message.value_type, message.kind)
            if key not in packed:
                packed[key] = self._pack(message)
            entries, size_bytes = packed[key]
            link.sequence += 1
            header = Header(
                kind=_kind(message),
                sender=self.rank,
                epoch=stamp.epoch,
                step=stamp.step,
                sequence=link.sequence,
                acknowledged=link.received,
                lbs=stamp.lbs,
                gbs=stamp.gbs,
                quality=message.quality,
                computed_at=stamp.computed_at,
            )
            sizes[peer] = size_bytes
            self._spend(_handling_s(entries, SEND_S))
            self._depart(link, header, _Parcel(Message(header, entries), size_bytes))
        return sizes

    def beside(self, work: Callable[[], EncodedBatch]) -> EncodedBatch:
        """Messages that are made beside the loop, until ``end_s``: each sets out when it has been made."""
        self._free_s = max(self._free_s, self._events.now_s)
        self._beside = True
        made = work()
        self._beside = False
        return dataclasses.replace(made, end_s=self._free_s)

    def _spend(self, seconds: float) -> None:
        """Processor time for messages: the loop's, or that of what makes them beside it."""
        self._exchange_s += seconds
        if self._beside:
            self._free_s += seconds
        else:
            self._loop_s += seconds

    def _depart(self, link: _Link, header: Header, parcel: _Parcel) -> None:
        """Send a message, when it has been made."""
        if self._beside and self._free_s > self._events.now_s:
            self._events.at(self._free_s, partial(self._send, link, header, parcel))
        else:
            self._send(link, header, parcel)

    def _send(self, link: _Link, header: Header, parcel: _Parcel) -> None:
        now_s = self._events.now_s
        link.messages_sent += 1
        link.bytes_sent += parcel.size_bytes
        link.rate.posted(header.sequence, parcel.size_bytes, now_s)
        self.log.sent(link.peer, header, parcel.size_bytes, now_s)
        link.stream.send(parcel.size_bytes, link.far.arrive, parcel)

    def _pack(self, message: Outgoing) -> tuple[Entries, int]:
        """What the receiver will see, a copy since the strategy may reuse its arrays, and its exact bytes."""
        entries = message.entries
        if entries is None:
            return self._nothing, HEADER_BYTES
        if message.kind is Kind.INDICES:
            entries = Entries(entries.size, np.empty(0, np.float32), entries.indices)
        values = wire.rounded(entries.values, message.value_type)
        if values is entries.values:
            values = values.copy()
        indices = None if entries.indices is None else entries.indices.copy()
        size_bytes = wire.encoded_bytes(indices, entries.size, message.value_type, message.kind)
        return Entries(entries.size, values, indices), size_bytes

    def announce(self, kind: Kind, stamp: Stamp) -> None:
        """Tell every peer that this worker leaves (CLOSE) or that the run must stop (STOP)."""
        self.post({peer: Outgoing(kind=kind) for peer in self._links}, stamp)

    def poll(self) -> list[Message]:
        """The messages that have arrived."""
        arrivals, self._arrivals = self._arrivals, []
        messages = []
        for link, parcel in arrivals:
            if not parcel.received:
                link.receive(parcel)
            link.unpolled -= 1
            messages.append(parcel.message)
            self._spend(_handling_s(parcel.message.entries, RECEIVE_S))
        return messages

    def totals(self) -> dict[int, LinkTotals]:
        """What every link has carried so far."""
        now_s = self._events.now_s
        return {
            peer: LinkTotals(link.bytes_sent, link.bytes_received, link.rate.bytes_per_s(now_s) or 0.0)
            for peer, link in self._links.items()
        }

    def carried(self, peer: int, sent_bytes: int, received_bytes: int, began_s: float) -> None:
        """Count what a sum has moved over a link since ``began_s``."""
        link, now_s = self._links[peer], self._events.now_s
        link.bytes_sent += sent_bytes
        link.bytes_received += received_bytes
        self.log.piece(peer, sent_bytes, received_bytes, began_s, now_s)

    def fall_silent(self) -> list[int]:
        """Send nothing more, acknowledgements included. Returns how many messages went to every rank."""
        self.quiet = True
        return [self._links[r].messages_sent if r != self.rank else 0 for r in range(self._workers)]

    def received_counts(self) -> list[int]:
        """How many messages have come from every rank."""
        return [self._links[r].messages_received if r != self.rank else 0 for r in range(self._workers)]

    def now_s(self) -> float:
        """Virtual time."""
        return self._events.now_s

    def cpu_s(self) -> float:
        """Processor seconds that messages have cost so far, as the same work takes in a real run."""
        return self._exchange_s

    def loop_s(self) -> float:
        """The part of it that has kept the loop from computing."""
        return self._loop_s

    def arrived(self, link: _Link, parcel: _Parcel) -> None:
        """A message is across and waits for `poll`."""
        self._arrivals.append((link, parcel))
        self.wake()

    def acknowledged(self, rate: LinkRate, received: int, arrived_s: float) -> None:
        """An acknowledgement is across: a link may be free, and at the end the loop waits for every one of them."""
        rate.acknowledged(received, arrived_s)
        self.wake()


class VirtualEncoder:
    """Encodes messages in virtual time; see `loop.ports.BackgroundEncoder`. ``wake``: called when a batch is done."""

    def __init__(self, links: VirtualLinks, events: Events, wake: Callable[[], None]) -> None:
        self._links, self._events, self._wake = links, events, wake
        self._done_s = 0.0
        self._made: list[EncodedBatch] = []

    def begin(self, work: Callable[[], EncodedBatch]) -> None:
        """Have ``work`` done after what was begun before."""
        made = self._links.beside(work)
        self._done_s = made.end_s
        self._made.append(made)
        self._events.at(self._done_s, self._wake)

    def done(self) -> bool:
        """Whether all that was begun is done."""
        return self._events.now_s >= self._done_s

    def take(self) -> list[EncodedBatch]:
        """What has been made since the last call."""
        made, self._made = self._made, []
        return made


def _handling_s(entries: Entries, sparse_s: float) -> float:
    return len(entries) * (DENSE_S if entries.indices is None else sparse_s)


def _kind(message: Outgoing) -> Kind:
    """A message without entries still tells the sender's step, unless it says something else."""
    bare = message.entries is None and message.kind is Kind.GRADIENT
    return Kind.PROGRESS if bare else message.kind
