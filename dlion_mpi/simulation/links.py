"""A worker's links over a virtual network, and what its messages cost its processor.

The books are those of a real run, `loop.links.Links`. Only, no message is encoded: its size is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dlion_mpi import wire
from dlion_mpi.loop.links import Link, Links
from dlion_mpi.loop.ports import Channel, Done, EncodedBatch, Stamp
from dlion_mpi.metrics.timeline import MessageLog
from dlion_mpi.simulation.network import Events, Network
from dlion_mpi.strategies.types import Outgoing
from dlion_mpi.vector.layout import Entries
from dlion_mpi.wire import HEADER_BYTES, Header, Kind, Message

SELECT_S, SEND_S, RECEIVE_S, DENSE_S = 2e-9, 40e-9, 10e-9, 1e-9
"""Processor seconds of an exchange: per entry of the gradient that something is selected from, per selected entry and
link that it goes to or comes from, and per entry of a message that carries all. See `benchmarks/exchange.py`; in ranks
that train, whose caches hold other things between two exchanges, sending took twice what it takes there."""


@dataclass(frozen=True, slots=True)
class VirtualParcel:
    """A message, and its bytes on the wire."""

    message: Message
    nbytes: int


class VirtualTransport:
    """One worker's streams; see `loop.ports.Transport`."""

    def __init__(self, rank: int, network: Network) -> None:
        self._rank, self._network = rank, network
        self._transports: Sequence[VirtualTransport] = ()
        self._deliver: Callable[[int, Channel, VirtualParcel, Done], None] = lambda *parcel: None

    def open(self, deliver: Callable[[int, Channel, VirtualParcel, Done], None]) -> None:
        """Call ``deliver`` for each parcel that arrives."""
        self._deliver = deliver

    def connect(self, transports: Sequence[VirtualTransport]) -> None:
        """Join the ends of every link. ``transports``: of all workers, by rank."""
        self._transports = transports

    def send(self, peer: int, channel: Channel, parcel: VirtualParcel, done: Done) -> None:
        """Begin to send a parcel, behind what the peer's stream holds already."""
        stream = self._network.stream(self._rank, peer)
        stream.send(parcel.nbytes, self._transports[peer].arrive, (self._rank, channel, parcel, done))

    def arrive(self, parcel: tuple[int, Channel, VirtualParcel, Done]) -> None:
        """Deliver a parcel that is across: its sender, its channel, the parcel."""
        self._deliver(*parcel)


class Processor:
    """Processor seconds that a worker's messages take: of its loop, or of the background."""

    def __init__(self, events: Events) -> None:
        self.spent_s = 0.0
        self.loop_s = 0.0
        """The part that has kept the loop from computing."""
        self._events = events
        self._in_background = False
        self._free_s = 0.0  # when the background has done what was begun

    def spend(self, seconds: float) -> None:
        """Work on messages for some time."""
        self.spent_s += seconds
        if self._in_background:
            self._free_s += seconds
        else:
            self.loop_s += seconds

    def in_background(self, work: Callable[[], EncodedBatch]) -> EncodedBatch:
        """Encode messages in the background, until ``end_s``. Each departs when it has been encoded."""
        self._free_s = max(self._free_s, self._events.now_s)
        self._in_background = True
        batch = work()
        self._in_background = False
        return dataclasses.replace(batch, end_s=self._free_s)

    def then(self, action: Callable[[], None]) -> None:
        """Call ``action`` when the work so far is done."""
        if self._in_background and self._free_s > self._events.now_s:
            self._events.at(self._free_s, action)
        else:
            action()


class VirtualLinks(Links[VirtualParcel]):
    """All links of one worker. ``size``: entries of the gradient vector (P)."""

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
        self.transport = VirtualTransport(rank, network)
        super().__init__(rank, workers, self.transport, window=window, now_s=lambda: events.now_s, log=log)
        self.processor = Processor(events)
        self.wake: Callable[[], None] = lambda: None
        """Called when a parcel has arrived that the loop may be waiting for."""
        self._no_entries = Entries(size, np.empty(0, np.float32), np.empty(0, np.uint32))

    def connect(self, all_links: Sequence[VirtualLinks]) -> None:
        """Join the ends of every link. ``all_links``: of all workers, by rank."""
        self.transport.connect([links.transport for links in all_links])

    def post(self, messages: dict[int, Outgoing], stamp: Stamp) -> dict[int, int]:
        """Send a message per peer. Returns the bytes of each."""
        if any(m.entries is not None and m.entries.indices is not None and len(m.entries) for m in messages.values()):
            self.processor.spend(SELECT_S * self._no_entries.size)
        return super().post(messages, stamp)

    def encode(self, peer: int, header: Header, message: Outgoing, same: VirtualParcel | None) -> VirtualParcel:
        """Make a parcel of the entries that the receiver will see, and of the message's exact bytes."""
        entries, size_bytes = self._packed(message) if same is None else (same.message.entries, same.nbytes)
        self.processor.spend(_handling_s(entries, SEND_S))
        return VirtualParcel(Message(header, entries), size_bytes)

    def decode(self, parcel: VirtualParcel) -> Message:
        """Return the message."""
        return parcel.message

    def depart(self, link: Link, header: Header, parcel: VirtualParcel) -> None:
        """Send a message when it has been encoded."""
        self.processor.then(partial(super().depart, link, header, parcel))

    def poll(self) -> list[Message]:
        """Return the messages that have arrived."""
        messages = super().poll()
        for message in messages:
            self.processor.spend(_handling_s(message.entries, RECEIVE_S))
        return messages

    def deliver(self, peer: int, channel: Channel, parcel: VirtualParcel, done: Done) -> None:
        """Take a parcel that has arrived. Also an acknowledgement may be what the loop waits for."""
        super().deliver(peer, channel, parcel, done)
        if parcel.message.header.kind is not Kind.PROBE:
            self.wake()

    def cpu_s(self) -> float:
        """Processor seconds that messages have cost so far, as in a real run."""
        return self.processor.spent_s

    def _packed(self, message: Outgoing) -> tuple[Entries, int]:
        """Copy the entries, since the strategy may reuse its arrays, and compute their bytes."""
        entries = message.entries
        if entries is None:
            return self._no_entries, HEADER_BYTES
        if message.kind is Kind.INDICES:
            entries = Entries(entries.size, np.empty(0, np.float32), entries.indices)
        received = wire.rounded_entries(entries, message.value_type)
        values = received.values.copy() if received is entries else received.values
        indices = None if entries.indices is None else entries.indices.copy()
        size_bytes = wire.encoded_bytes(indices, entries.size, message.value_type, message.kind)
        return Entries(entries.size, values, indices), size_bytes


class VirtualEncoder:
    """Encodes messages in virtual time; see `loop.ports.BackgroundEncoder`. ``wake``: called when a batch is done."""

    def __init__(self, processor: Processor, events: Events, wake: Callable[[], None]) -> None:
        self._processor, self._events, self._wake = processor, events, wake
        self._done_s = 0.0
        self._batches: list[EncodedBatch] = []

    def begin(self, work: Callable[[], EncodedBatch]) -> None:
        """Do ``work`` in the background, after what was begun before."""
        batch = self._processor.in_background(work)
        self._done_s = batch.end_s
        self._batches.append(batch)
        self._events.at(self._done_s, self._wake)

    def done(self) -> bool:
        """Whether all work is done."""
        return self._events.now_s >= self._done_s

    def take(self) -> list[EncodedBatch]:
        """Return the batches encoded since the last call."""
        batches, self._batches = self._batches, []
        return batches


def _handling_s(entries: Entries, sparse_s: float) -> float:
    return len(entries) * (DENSE_S if entries.indices is None else sparse_s)
