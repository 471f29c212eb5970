"""The links of one worker: what is in flight on each, what each has carried, and how fast each is.

`Links` keeps the books; a `Transport` moves the bytes. The worker's loop calls `view`, `post`, `poll` and the methods
after them. The transport calls `deliver`, perhaps from its own thread, so a lock guards the books.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from dlion_mpi import wire
from dlion_mpi.algorithms.bandwidth import LinkRate, rooms_bytes
from dlion_mpi.errors import RunError
from dlion_mpi.loop.ports import ByteTransport, Channel, Done, P, Stamp, Transport
from dlion_mpi.metrics.timeline import MessageLog, Unlogged
from dlion_mpi.strategies.types import LinkView, Outgoing
from dlion_mpi.wire import Bytes, Header, Kind, Message

UNREAD_MESSAGES = 3
"""Messages of a peer that are received and acknowledged before `Links.poll` returns them. Later ones wait without an
acknowledgement, so the sender's window closes: a slow reader slows its writers, and no queue grows."""


@dataclass(frozen=True, slots=True)
class LinkTotals:
    """Bytes that a link has carried each way, with headers and acknowledgements, and its measured rate."""

    bytes_sent: int
    bytes_received: int
    bytes_per_s: float


@dataclass(slots=True)
class Link:
    """The books of one link. ``peer``: the rank at the other end."""

    peer: int
    rate: LinkRate = field(default_factory=LinkRate)
    sequence: int = 0
    """Messages sent, which is the sequence number of the newest."""
    arrived: int = 0
    """Messages that have arrived."""
    received: int = 0
    """Messages received, as acknowledgements say."""
    unread: int = 0
    """Messages received that `Links.poll` has not returned."""
    probe: tuple[int, float] = (0, 0.0)
    """The newest probe: the sequence number of the message behind it, and when it arrived here."""
    parcels_sent: int = 0
    parcels_received: int = 0
    """Parcels of all channels, which both ends compare before they close."""
    bytes_sent: int = 0
    bytes_received: int = 0

    def count_sent(self, size_bytes: int) -> None:
        """Enter a parcel that was sent."""
        self.parcels_sent += 1
        self.bytes_sent += size_bytes

    def count_received(self, size_bytes: int) -> None:
        """Enter a parcel that was received."""
        self.parcels_received += 1
        self.bytes_received += size_bytes


@dataclass(slots=True)
class _Arrival(Generic[P]):
    """A message that waits for `Links.poll`. ``probed_s``: when its probe arrived, if there was one."""

    link: Link
    parcel: P
    done: Done
    arrived_s: float
    probed_s: float | None
    acknowledged: bool = False


class Links(ABC, Generic[P]):
    """All links of one worker.

    ``ranks``: workers of the run. ``window``: unacknowledged messages that a link may have before it takes no more.
    ``now_s``: the run's common clock. ``lock``: guards the books where ``transport`` delivers from another thread.
    ``log``: records each message; only the loop's thread calls it.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        transport: Transport[P],
        *,
        window: int,
        now_s: Callable[[], float],
        lock: AbstractContextManager[Any] | None = None,
        log: MessageLog | None = None,
    ) -> None:
        self.rank = rank
        self._ranks = ranks
        self._transport = transport
        self._window = window
        self.now_s = now_s
        self._lock = lock or nullcontext()
        self._log = log or Unlogged()
        self._links = {peer: Link(peer) for peer in range(ranks) if peer != rank}
        self._arrivals: deque[_Arrival[P]] = deque()
        self._pieces: deque[tuple[int, int, int, float, float]] = deque()
        self._silent = False
        transport.open(self.deliver)

    @abstractmethod
    def encode(self, peer: int, header: Header, message: Outgoing, same: P | None) -> P:
        """Make a parcel of a message. ``same``: a parcel with the same entries and another header, if there is one."""

    @abstractmethod
    def decode(self, parcel: P) -> Message:
        """Return the message in a parcel. Raises WireError if there is none."""

    @abstractmethod
    def cpu_s(self) -> float:
        """Processor seconds that moving messages has taken outside the loop's thread."""

    def reuse(self, peer: int, parcel: P) -> None:
        """Take back the parcel of a message that has been sent."""

    def view(self, peers: Iterable[int], step_s: float) -> dict[int, LinkView]:
        """Return for each peer whether its window is open, and what its link can carry in ``step_s`` seconds."""
        now_s = self.now_s()
        with self._lock:
            rates = {peer: self._links[peer].rate for peer in peers}
            rooms = rooms_bytes(rates, step_s, now_s)
            return {
                peer: LinkView(
                    ready=rate.unacknowledged() < self._window + 2 * rate.latency_s // (step_s or math.inf),
                    budget_bytes=rate.budget_bytes(step_s),
                    idle=not rate.unacknowledged(),
                    room_bytes=rooms[peer],
                    measurable_bytes=rate.measurable_bytes,
                )
                for peer, rate in rates.items()
            }

    def post(self, messages: dict[int, Outgoing], stamp: Stamp) -> dict[int, int]:
        """Encode and send a message per peer. Returns the bytes of each."""
        sizes = {}
        encoded: dict[tuple[int, str, Kind], P] = {}  # entries that go to several peers are encoded once
        for peer, message in messages.items():
            link = self._links[peer]
            kind = Kind.PROGRESS if message.entries is None and message.kind is Kind.GRADIENT else message.kind
            with self._lock:
                link.sequence += 1
                header = self._header(link, kind, stamp, message.quality)
            content = id(message.entries), message.value_type, kind
            parcel = self.encode(peer, header, message, encoded.get(content))
            encoded.setdefault(content, parcel)
            self.depart(link, header, parcel)
            sizes[peer] = parcel.nbytes
        return sizes

    def depart(self, link: Link, header: Header, parcel: P) -> None:
        """Enter a message in the books, and hand it to the transport. A probe goes ahead if one is due."""
        now_s = self.now_s()
        with self._lock:
            probed = link.rate.is_probe_due(parcel.nbytes, now_s)
            if probed:
                link.count_sent(wire.HEADER_BYTES)
            link.count_sent(parcel.nbytes)
            link.rate.posted(header.sequence, parcel.nbytes, now_s, probed=probed)
        if probed:
            probe = replace(header, kind=Kind.PROBE, quality=0.0)
            self._transport.send(
                link.peer, Channel.ACK, self.encode(link.peer, probe, Outgoing(kind=Kind.PROBE), None), _nothing
            )
        self._log.sent(link.peer, header, parcel.nbytes, now_s)
        self._transport.send(link.peer, Channel.MESSAGE, parcel, partial(self.reuse, link.peer, parcel))

    def announce(self, kind: Kind, stamp: Stamp) -> None:
        """Send every peer a header: this worker leaves (CLOSE), or the run must stop (STOP)."""
        self.post({peer: Outgoing(kind=kind) for peer in self._links}, stamp)

    def poll(self) -> list[Message]:
        """Return the messages that have arrived. Raises RunError for a malformed one, naming its sender."""
        messages = []
        while self._pieces:
            self._log.piece(*self._pieces.popleft())
        while self._arrivals:
            arrival = self._arrivals.popleft()
            if not arrival.acknowledged:
                self._receive(arrival)
            message = self._decode(arrival.link, arrival.parcel)
            with self._lock:
                arrival.link.unread -= 1
            arrival.done()
            self._log.arrived(arrival.link.peer, message.header.sequence, arrival.arrived_s)
            messages.append(message)
        return messages

    def totals(self) -> dict[int, LinkTotals]:
        """Return what each link has carried so far."""
        with self._lock:
            return {
                peer: LinkTotals(link.bytes_sent, link.bytes_received, link.rate.bytes_per_s or 0.0)
                for peer, link in self._links.items()
            }

    def latencies(self) -> dict[int, float]:
        """Return the measured latency of each link, in seconds one way."""
        with self._lock:
            return {peer: link.rate.latency_s for peer, link in self._links.items()}

    def posted(self) -> dict[int, int]:
        """Return how many messages were posted to each peer."""
        return {peer: link.sequence for peer, link in self._links.items()}

    def carried(self, peer: int, sent_bytes: int, received_bytes: int, began_s: float | None = None) -> None:
        """Count bytes of a link that were no parcels. ``began_s``: when a piece of a sum began, to log it."""
        if peer == self.rank:
            return
        link = self._links[peer]
        with self._lock:
            link.bytes_sent += sent_bytes
            link.bytes_received += received_bytes
        if began_s is not None:
            self._pieces.append((peer, sent_bytes, received_bytes, began_s, self.now_s()))

    def fall_silent(self) -> list[int]:
        """Send nothing more, acknowledgements included. Returns the number of parcels sent to each rank."""
        with self._lock:
            self._silent = True
            return [self._links[r].parcels_sent if r != self.rank else 0 for r in range(self._ranks)]

    def received_counts(self) -> list[int]:
        """Return the number of parcels received from each rank."""
        return [self._links[r].parcels_received if r != self.rank else 0 for r in range(self._ranks)]

    def deliver(self, peer: int, channel: Channel, parcel: P, done: Done) -> None:
        """Take a parcel that has arrived; called by the transport."""
        link, now_s = self._links[peer], self.now_s()
        if channel is Channel.MESSAGE:
            link.arrived += 1
            sequence, probed_s = link.probe
            arrival = _Arrival(link, parcel, done, now_s, probed_s if sequence == link.arrived else None)
            if link.unread < UNREAD_MESSAGES:
                self._receive(arrival)
            self._arrivals.append(arrival)
            return
        with self._lock:
            link.count_received(parcel.nbytes)
        if channel is Channel.ACK:
            header = self._decode(link, parcel).header
            if header.kind is Kind.PROBE:
                link.probe = header.sequence, now_s
            else:
                with self._lock:
                    link.rate.acknowledged(header.acknowledged, header.computed_at, header.quality, now_s)
        done()

    def _receive(self, arrival: _Arrival[P]) -> None:
        """Count a message, and acknowledge it at once: when it arrived, and how long after its probe."""
        link = arrival.link
        arrival.acknowledged = True
        took_s = 0.0 if arrival.probed_s is None else arrival.arrived_s - arrival.probed_s
        with self._lock:
            link.unread += 1
            link.received += 1
            link.count_received(arrival.parcel.nbytes)
            if self._silent:
                return
            link.count_sent(wire.HEADER_BYTES)
            header = self._header(link, Kind.ACK, Stamp(0, 0, 0, 0, arrival.arrived_s), took_s)
        parcel = self.encode(link.peer, header, Outgoing(kind=Kind.ACK), None)
        self._transport.send(link.peer, Channel.ACK, parcel, _nothing)

    def _decode(self, link: Link, parcel: P) -> Message:
        try:
            message = self.decode(parcel)
        except wire.WireError as error:
            raise RunError(f"rejected a message from rank {link.peer}: {error}") from None
        if message.header.sender != link.peer:
            sender = message.header.sender
            raise RunError(f"rejected a message from rank {link.peer}: it says it is from rank {sender}")
        return message

    def _header(self, link: Link, kind: Kind, stamp: Stamp, quality: float = 0.0) -> Header:
        return Header(
            kind=kind,
            sender=self.rank,
            epoch=stamp.epoch,
            step=stamp.step,
            sequence=link.sequence,
            acknowledged=link.received,
            lbs=stamp.lbs,
            gbs=stamp.gbs,
            quality=quality,
            computed_at=stamp.computed_at,
        )


def _nothing() -> None:
    """No memory waits for this parcel."""


class ByteLinks(Links[Bytes]):
    """Links of a real run: messages are encoded as `wire` describes. ``size``: entries of the gradient vector (P)."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        transport: ByteTransport,
        *,
        size: int,
        window: int,
        now_s: Callable[[], float],
        lock: AbstractContextManager[Any] | None = None,
        log: MessageLog | None = None,
    ) -> None:
        super().__init__(rank, ranks, transport, window=window, now_s=now_s, lock=lock, log=log)
        self.reports: dict[int, npt.NDArray[np.float64]] = {}
        """The newest report of each peer that has sent one."""
        self._size = size
        self._bytes = transport
        self._capacity_bytes = wire.capacity_bytes(size)
        self._spare: dict[int, deque[Bytes]] = {peer: deque() for peer in self._links}
        self._report_bytes = 0
        self._report_in_flight = False
        transport.expect(Channel.MESSAGE, self._capacity_bytes, UNREAD_MESSAGES)
        transport.expect(Channel.ACK, wire.HEADER_BYTES, 3)

    def encode(self, peer: int, header: Header, message: Outgoing, same: Bytes | None) -> Bytes:
        """Encode a message into one of the peer's buffers."""
        if message.entries is None:
            buffer = np.empty(wire.HEADER_BYTES, np.uint8)
        else:
            try:
                buffer = self._spare[peer].popleft()
            except IndexError:
                buffer = np.empty(self._capacity_bytes, np.uint8)
        if same is None:
            length = wire.encode(header, message.entries, buffer, message.value_type)
        else:
            length = wire.encode_again(header, same, buffer)
        return buffer[:length]

    def decode(self, parcel: Bytes) -> Message:
        """Return the message that these bytes are. Raises WireError."""
        return wire.decode(parcel, size=self._size)

    def cpu_s(self) -> float:
        """Processor seconds of the transport's own thread."""
        return self._bytes.cpu_s()

    def reuse(self, peer: int, parcel: Bytes) -> None:
        """Keep the parcel's buffer for a later message; as many per peer as its window has messages."""
        buffer, spare = parcel.base, self._spare[peer]
        if buffer is not None and len(buffer) == self._capacity_bytes and len(spare) < self._window:
            spare.append(buffer)

    def expect_reports(self, length: int) -> None:
        """Keep the newest report, of ``length`` numbers, of each peer. Before the transport starts."""
        self._report_bytes = 8 * length
        self._bytes.expect(Channel.REPORT, self._report_bytes, 1)

    def report(self, peer: int, numbers: npt.NDArray[np.float64]) -> None:
        """Send measures of this worker to a peer that expects them.

        A report takes no room in the link's window. None is sent while the previous one is in flight.
        """
        parcel = numbers.astype("<f8").view(np.uint8)
        with self._lock:
            if self._silent or self._report_in_flight:
                return
            self._report_in_flight = True
            self._links[peer].count_sent(parcel.nbytes)
        self._transport.send(peer, Channel.REPORT, parcel, self._report_sent)

    def _report_sent(self) -> None:
        self._report_in_flight = False

    def deliver(self, peer: int, channel: Channel, parcel: Bytes, done: Done) -> None:
        """Take a parcel that has arrived; called by the transport."""
        if channel is Channel.REPORT:
            if parcel.nbytes != self._report_bytes:
                raise RunError(
                    f"rejected a report of {parcel.nbytes} bytes from rank {peer}, expected {self._report_bytes}"
                )
            self.reports[peer] = parcel.view("<f8").astype(np.float64)
        super().deliver(peer, channel, parcel, done)
