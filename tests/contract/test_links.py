"""The books of links, over every transport that needs no MPI: `tests/mpi/test_links.py` has those over MPI."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest

from dlion_mpi import wire
from dlion_mpi.errors import RunError
from dlion_mpi.loop.links import UNREAD_MESSAGES, ByteLinks, Links
from dlion_mpi.loop.ports import Channel, Done, Stamp
from dlion_mpi.microcloud.environments import Environment, Phase
from dlion_mpi.simulation.links import VirtualLinks
from dlion_mpi.simulation.network import Events, payload_bytes_per_s
from dlion_mpi.simulation.network import Network as VirtualNetwork
from dlion_mpi.strategies.types import Outgoing
from dlion_mpi.vector.layout import Entries
from dlion_mpi.wire import HEADER_BYTES, Bytes, Header, Kind
from tests.inmemory import MemoryTransport, Network, Weather

SIZE, RANKS, WINDOW = 1000, 3, 2
DENSE_BYTES = HEADER_BYTES + 4 * SIZE


class Log:
    """Keeps what links say of their messages."""

    def __init__(self) -> None:
        self.sent_messages: list[tuple[int, int, int]] = []
        self.arrived_messages: list[tuple[int, int]] = []
        self.pieces: list[tuple[int, int, int]] = []

    def sent(self, peer: int, header: Header, size_bytes: int, posted_s: float) -> None:
        self.sent_messages.append((peer, header.sequence, size_bytes))

    def arrived(self, peer: int, sequence: int, arrived_s: float) -> None:
        self.arrived_messages.append((peer, sequence))

    def piece(self, peer: int, sent_bytes: int, received_bytes: int, began_s: float, ended_s: float) -> None:
        self.pieces.append((peer, sent_bytes, received_bytes))


class Cloud(Protocol):
    """The links of all workers, by rank, and their logs."""

    links: list[Any]
    logs: list[Log]

    def settle(self) -> None:
        """Let everything arrive that is in flight."""


class Memory:
    """Bytes that take up to five ticks."""

    def __init__(self) -> None:
        self.network = Network(RANKS, Weather(seed=3, delay=5))
        self.logs = [Log() for _ in range(RANKS)]
        self.links = [
            ByteLinks(
                rank,
                RANKS,
                MemoryTransport(self.network, rank),
                size=SIZE,
                window=WINDOW,
                now_s=lambda: 1e-3 * self.network.tick,
                log=self.logs[rank],
            )
            for rank in range(RANKS)
        ]

    def settle(self) -> None:
        self.network.tick += 100
        for rank in range(RANKS):
            self.network.receive(rank)


class ThreadedTransport:
    """Bytes that a thread of their receiver delivers; see `loop.ports.ByteTransport`."""

    def __init__(self, rank: int, inboxes: list[queue.Queue[Any]], go: threading.Event) -> None:
        self.rank, self.inboxes, self.go = rank, inboxes, go

    def open(self, deliver: Callable[[int, Channel, Bytes, Done], None]) -> None:
        threading.Thread(target=self.run, args=(deliver,), daemon=True).start()

    def expect(self, channel: Channel, size_bytes: int, buffers: int) -> None: ...

    def send(self, peer: int, channel: Channel, parcel: Bytes, done: Done) -> None:
        self.inboxes[peer].put((self.rank, channel, parcel.copy()))
        done()

    def cpu_s(self) -> float:
        return 0.0

    def run(self, deliver: Callable[[int, Channel, Bytes, Done], None]) -> None:
        inbox = self.inboxes[self.rank]
        while True:
            sender, channel, parcel = inbox.get()
            self.go.wait()
            deliver(sender, channel, parcel, lambda: None)
            inbox.task_done()


class Threaded:
    """Parcels arrive in other threads than the loop's."""

    def __init__(self) -> None:
        self.inboxes: list[queue.Queue[Any]] = [queue.Queue() for _ in range(RANKS)]
        self.go = threading.Event()
        self.logs = [Log() for _ in range(RANKS)]
        self.links = [
            ByteLinks(
                rank,
                RANKS,
                ThreadedTransport(rank, self.inboxes, self.go),
                size=SIZE,
                window=WINDOW,
                now_s=time.monotonic,
                lock=threading.Lock(),
                log=self.logs[rank],
            )
            for rank in range(RANKS)
        ]

    def settle(self) -> None:
        self.go.set()
        while any(inbox.unfinished_tasks for inbox in self.inboxes):  # a delivery may send an acknowledgement
            for inbox in self.inboxes:
                inbox.join()
        self.go.clear()


class Simulated:
    """A virtual network."""

    def __init__(self, mbit: float = 8.0, latency_s: float = 0.0) -> None:
        phase = Phase(cores=(24.0,) * RANKS, uplink_mbit=(mbit,) * RANKS)
        self.events = Events()
        environment = Environment(name="test", workers=RANKS, phases=(phase,), latency_s=latency_s)
        network = VirtualNetwork(environment, self.events, None)
        self.logs = [Log() for _ in range(RANKS)]
        self.links = [
            VirtualLinks(rank, RANKS, network, self.events, size=SIZE, window=WINDOW, log=self.logs[rank])
            for rank in range(RANKS)
        ]
        for links in self.links:
            links.connect(self.links)

    def settle(self) -> None:
        self.events.run(lambda: False)

    def pass_time(self, seconds: float) -> None:
        """Let so many virtual seconds pass."""
        passed: list[bool] = []
        self.events.at(self.events.now_s + seconds, lambda: passed.append(True))
        self.events.run(lambda: bool(passed))


@pytest.fixture(params=[Memory, Threaded, Simulated])
def cloud(request: pytest.FixtureRequest) -> Cloud:
    made: Cloud = request.param()
    return made


def stamp(step: int) -> Stamp:
    return Stamp(epoch=0, step=step, lbs=3, gbs=12, computed_at=1.5)


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SIZE, dtype=np.float32)


def dense(seed: int = 0) -> Outgoing:
    return Outgoing(entries=Entries(SIZE, vector(seed)), quality=100.0)


def is_open(links: Links[Any], peer: int) -> bool:
    return links.view([peer], 1.0)[peer].ready


def test_messages_arrive_whole_and_in_order_and_say_who_and_when(cloud: Cloud) -> None:
    for step in range(5):
        cloud.links[0].post(dict.fromkeys([1, 2], dense(step)), stamp(step))
    cloud.settle()
    for peer in (1, 2):
        messages = cloud.links[peer].poll()
        assert [m.header.sequence for m in messages] == [1, 2, 3, 4, 5]
        for step, message in enumerate(messages):
            header = message.header
            assert (header.sender, header.kind, header.step) == (0, Kind.GRADIENT, step)
            assert (header.lbs, header.gbs, header.computed_at, header.quality) == (3, 12, 1.5, 100.0)
            np.testing.assert_array_equal(message.entries.values, vector(step))
    assert cloud.links[0].poll() == []


def test_each_link_has_a_sequence_of_its_own_and_headers_acknowledge(cloud: Cloud) -> None:
    cloud.links[0].post({1: dense()}, stamp(0))
    cloud.links[0].post({1: dense(), 2: dense()}, stamp(1))
    cloud.settle()
    assert [m.header.sequence for m in cloud.links[1].poll()] == [1, 2]
    assert [m.header.sequence for m in cloud.links[2].poll()] == [1]
    cloud.links[1].post({0: Outgoing(), 2: Outgoing()}, stamp(1))
    cloud.settle()
    assert [m.header.acknowledged for m in cloud.links[0].poll()] == [2]
    assert [m.header.acknowledged for m in cloud.links[2].poll()] == [0]


def test_a_message_without_entries_says_how_far_its_sender_is_unless_it_says_more(cloud: Cloud) -> None:
    cloud.links[0].post({1: Outgoing()}, stamp(4))
    cloud.links[0].announce(Kind.CLOSE, stamp(5))
    cloud.settle()
    assert [(m.header.kind, m.header.step) for m in cloud.links[1].poll()] == [(Kind.PROGRESS, 4), (Kind.CLOSE, 5)]
    assert [m.header.kind for m in cloud.links[2].poll()] == [Kind.CLOSE]


def test_a_message_does_not_change_with_its_senders_arrays(cloud: Cloud) -> None:
    message = dense()
    assert message.entries is not None
    cloud.links[0].post({1: message}, stamp(0))
    message.entries.values[:] = -1
    cloud.settle()
    np.testing.assert_array_equal(cloud.links[1].poll()[0].entries.values, vector(0))


def test_a_window_closes_until_the_receiver_has_acknowledged(cloud: Cloud) -> None:
    links = cloud.links[0]
    for step in range(WINDOW):
        assert is_open(links, 1)
        links.post({1: dense()}, stamp(step))
    assert not is_open(links, 1)
    assert is_open(links, 2)
    cloud.settle()
    assert is_open(links, 1)


def test_a_message_without_entries_takes_no_room_in_the_window(cloud: Cloud) -> None:
    for step in range(10):
        cloud.links[0].post({1: Outgoing()}, stamp(step))
    assert is_open(cloud.links[0], 1)


def test_a_reader_that_does_not_poll_slows_its_writers(cloud: Cloud) -> None:
    writer, reader = cloud.links[0], cloud.links[1]
    messages = UNREAD_MESSAGES + WINDOW
    for step in range(messages):
        writer.post({1: dense()}, stamp(step))
    cloud.settle()
    assert reader.received_counts() == [1 + UNREAD_MESSAGES, 0, 0]  # a probe went ahead of the first
    assert writer.received_counts() == [0, UNREAD_MESSAGES, 0]  # their acknowledgements
    assert not is_open(writer, 1)
    assert len(reader.poll()) == messages
    cloud.settle()
    assert reader.received_counts() == [1 + messages, 0, 0]
    assert writer.received_counts() == [0, messages, 0]
    assert is_open(writer, 1)
    writer.post({1: dense()}, stamp(messages))
    cloud.settle()
    assert writer.received_counts() == [0, messages + 1, 0]  # there is room for unread messages again


def test_bytes_are_counted_where_they_are_sent_and_are_the_same_at_both_ends(cloud: Cloud) -> None:
    sizes = cloud.links[0].post({1: dense(), 2: Outgoing()}, stamp(0))
    assert sizes == {1: DENSE_BYTES, 2: HEADER_BYTES}
    sizes[1] += HEADER_BYTES  # its probe
    assert {peer: t.bytes_sent for peer, t in cloud.links[0].totals().items()} == sizes
    cloud.settle()
    assert [t.bytes_received for t in cloud.links[0].totals().values()] == [HEADER_BYTES, HEADER_BYTES]
    for peer, size_bytes in sizes.items():
        totals = cloud.links[peer].totals()[0]
        assert (totals.bytes_sent, totals.bytes_received) == (HEADER_BYTES, size_bytes)


def test_other_bytes_of_a_link_are_counted_too(cloud: Cloud) -> None:
    links = cloud.links[0]
    links.carried(1, 100, 20)
    links.carried(2, 7, 0, began_s=0.0)
    links.carried(0, 1000, 1000)  # to itself
    assert {peer: (t.bytes_sent, t.bytes_received) for peer, t in links.totals().items()} == {1: (100, 20), 2: (7, 0)}
    assert cloud.logs[0].pieces == []
    links.poll()
    assert cloud.logs[0].pieces == [(2, 7, 0)]


def test_every_message_is_logged_once_at_each_end(cloud: Cloud) -> None:
    for step in range(UNREAD_MESSAGES + 1):
        cloud.links[0].post({1: dense()}, stamp(step))
    cloud.settle()
    cloud.links[1].poll()
    sequences = list(range(1, UNREAD_MESSAGES + 2))
    assert cloud.logs[0].sent_messages == [(1, sequence, DENSE_BYTES) for sequence in sequences]
    assert cloud.logs[1].arrived_messages == [(0, sequence) for sequence in sequences]
    assert cloud.logs[1].sent_messages == []  # acknowledgements are not messages


@pytest.mark.parametrize("unread", [0, UNREAD_MESSAGES + 2])
def test_links_drain_by_counts_and_nothing_is_sent_in_silence(cloud: Cloud, unread: int) -> None:
    for links in cloud.links:
        links.post({peer: dense() for peer in range(RANKS) if peer != links.rank}, stamp(0))
    for _ in range(unread):
        cloud.links[0].post({1: dense()}, stamp(1))
    sent = [links.fall_silent() for links in cloud.links]
    cloud.settle()
    for links in cloud.links:
        links.poll()
    cloud.settle()
    assert [[row[rank] for row in sent] for rank in range(RANKS)] == [links.received_counts() for links in cloud.links]
    assert sent[0] == [0, 2 + unread, 2]  # with a probe for each
    for a in range(RANKS):
        for b in set(range(RANKS)) - {a}:
            assert cloud.links[a].totals()[b].bytes_sent == cloud.links[b].totals()[a].bytes_received


# ---- links that carry real bytes


def damaged(change: Callable[[np.ndarray], object], *, sender: int = 0, cut: int = 0) -> np.ndarray:
    """A message of ``sender`` after ``change``, without its last ``cut`` bytes."""
    buffer = np.empty(wire.capacity_bytes(SIZE), np.uint8)
    header = Header(kind=Kind.GRADIENT, sender=sender, epoch=0, step=0, sequence=1, acknowledged=0)
    length = wire.encode(header, dense().entries, buffer)
    change(buffer)
    return buffer[: length - cut]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (damaged(lambda b: b.__setitem__(0, b[0] ^ 1)), "magic"),
        (damaged(lambda b: b.__setitem__(500, b[500] ^ 1)), "checksum"),
        (damaged(lambda b: None, cut=40), "payload length"),
        (damaged(lambda b: None, sender=2), "it says it is from rank 2"),
    ],
)
def test_a_malformed_message_is_rejected_and_its_sender_named(message: np.ndarray, problem: str) -> None:
    memory = Memory()
    MemoryTransport(memory.network, 0).send(1, Channel.MESSAGE, message, lambda: None)
    memory.settle()
    with pytest.raises(RunError, match=f"rejected a message from rank 0: .*{problem}"):
        memory.links[1].poll()


def test_a_malformed_acknowledgement_is_rejected_too() -> None:
    memory = Memory()
    with pytest.raises(RunError, match=r"rejected a message from rank 0: .*magic"):
        MemoryTransport(memory.network, 0).send(1, Channel.ACK, np.zeros(HEADER_BYTES, np.uint8), lambda: None)


def test_the_newest_report_of_each_peer_is_kept_and_counted() -> None:
    memory = Memory()
    first, second, third = memory.links
    first.expect_reports(2)
    for n in range(3):
        second.report(0, np.array([n, 10.0 * n]))
    third.report(0, np.array([7.0, 8.0]))
    assert {peer: numbers.tolist() for peer, numbers in first.reports.items()} == {1: [2.0, 20.0], 2: [7.0, 8.0]}
    assert [t.bytes_received for t in first.totals().values()] == [48, 16]
    assert first.received_counts() == [0, 3, 1]
    assert second.fall_silent() == [3, 0, 0]
    second.report(0, np.array([9.0, 90.0]))
    assert first.reports[1].tolist() == [2.0, 20.0]
    with pytest.raises(RunError, match="report of 8 bytes from rank 2, expected 16"):
        third.report(0, np.array([1.0]))


# ---- measured rates


def test_a_message_is_timed_from_its_probe_by_the_receiver(cloud: Cloud) -> None:
    """A bare header needs no probe, and neither does a message soon after the last one."""
    links = cloud.links[0]
    links.post({1: Outgoing()}, stamp(0))
    cloud.settle()
    assert links.totals()[1].bytes_per_s == 0.0
    for step in range(3):
        links.post({1: dense()}, stamp(step))
    assert links.fall_silent() == [0, 1 + 3 + 1, 0]
    cloud.settle()
    assert links.totals()[1].bytes_per_s > 0.0


@pytest.mark.parametrize("latency_s", [0.0, 0.03, 0.2])
@pytest.mark.parametrize("mbit", [1.0, 1000.0])
def test_rate_and_latency_of_a_virtual_link_are_those_that_were_set(mbit: float, latency_s: float) -> None:
    simulated = Simulated(mbit, latency_s)
    links = simulated.links[0]
    for step in range(40):
        links.post({1: dense()}, stamp(step))
        simulated.pass_time(0.25)
        simulated.links[1].poll()
    rate = links.view([1], 0.2)[1].budget_bytes / 0.2
    assert links.totals()[1].bytes_per_s == pytest.approx(payload_bytes_per_s(mbit), rel=0.01)
    assert rate >= links.totals()[1].bytes_per_s
    assert links.latencies()[1] == pytest.approx(latency_s, rel=0.01, abs=1e-3)
