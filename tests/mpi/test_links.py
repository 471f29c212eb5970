"""Links over real MPI: what is sent arrives whole, in order and counted; what is wrong is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from mpi4py import MPI

from dlion_mpi import wire
from dlion_mpi.errors import RunError
from dlion_mpi.loop.links import UNREAD_MESSAGES
from dlion_mpi.loop.ports import Channel, Stamp
from dlion_mpi.metrics.timeline import Unlogged
from dlion_mpi.mpi.exchange import Exchange
from dlion_mpi.mpi.ranks import Ranks
from dlion_mpi.strategies.types import Outgoing
from dlion_mpi.vector.layout import Entries

SIZE = 50_000
WINDOW = 2


class Rank:
    """An exchange with one more channel, as a test uses it."""

    def __init__(self, world: MPI.Intracomm) -> None:
        self.ranks = Ranks(world)
        self.exchange = Exchange(
            self.ranks, size=SIZE, window=WINDOW, summed_by="mpi", channels=["test"], log=Unlogged()
        )
        self.links, self.collectives = self.exchange.links, self.exchange.collectives
        self.peers = [r for r in range(self.ranks.size) if r != self.ranks.rank]

    def wait(self, ready: Callable[[], bool]) -> None:
        assert self.exchange.progress.wait_until(ready, timeout_s=60), "nothing arrived for 60 s"

    def received(self, count: int) -> list[wire.Message]:
        messages: list[wire.Message] = []

        def enough() -> bool:
            messages.extend(self.links.poll())
            return len(messages) >= count

        self.wait(enough)
        return messages

    def barrier(self) -> None:
        ticket = self.collectives.gather("test", [0.0])
        self.wait(lambda: ticket.done)

    def drain(self) -> None:
        """Leave as a run does: compare counts, receive what is missing."""
        sent = self.collectives.gather("test", [float(count) for count in self.links.fall_silent()])
        self.wait(lambda: self.links.poll() is not None and sent.done)
        expected = [int(count) for count in sent.table[:, self.ranks.rank]]
        self.wait(lambda: self.links.poll() is not None and self.links.received_counts() == expected)
        self.barrier()


@contextmanager
def exchange(world: MPI.Intracomm, *, drained: bool = True) -> Iterator[Rank]:
    """An exchange that is open, and ends as a run does."""
    e = Rank(world)
    with e.exchange.open():
        yield e
        if drained:
            e.drain()
    e.ranks.free()


def stamp(step: int) -> Stamp:
    return Stamp(epoch=0, step=step, lbs=3, gbs=12, computed_at=1.5)


def vector(rank: int, step: int) -> np.ndarray:
    return np.random.default_rng((rank, step)).standard_normal(SIZE, dtype=np.float32)


@pytest.mark.mpi(min_size=2)
def test_what_is_sent_arrives_whole_in_order_and_says_who_and_when(world: MPI.Intracomm) -> None:
    steps = 12
    with exchange(world) as e:
        for step in range(steps):
            whole = Outgoing(entries=Entries(SIZE, vector(world.Get_rank(), step)), quality=100.0)
            e.links.post(dict.fromkeys(e.peers, whole), stamp(step))
        got: dict[int, list[wire.Message]] = {peer: [] for peer in e.peers}
        for message in e.received(steps * len(e.peers)):
            got[message.header.sender].append(message)
        for peer, messages in got.items():
            assert [m.header.step for m in messages] == list(range(steps))
            assert [m.header.sequence for m in messages] == list(range(1, steps + 1))
            for m in messages:
                assert (m.header.lbs, m.header.gbs, m.header.computed_at) == (3, 12, 1.5)
                np.testing.assert_array_equal(m.entries.values, vector(peer, m.header.step))


@pytest.mark.mpi(min_size=2)
def test_a_short_message_does_not_overtake_a_long_one(world: MPI.Intracomm) -> None:
    """MPI matches them in order, but the short one may complete first."""
    with exchange(world) as e:
        for step in range(10):
            e.links.post(dict.fromkeys(e.peers, Outgoing(entries=Entries(SIZE, vector(0, 0)))), stamp(step))
            e.links.post(dict.fromkeys(e.peers, Outgoing()), stamp(step))
        messages = e.received(20 * len(e.peers))
        for peer in e.peers:
            sequences = [m.header.sequence for m in messages if m.header.sender == peer]
            assert sequences == list(range(1, 21))


@pytest.mark.mpi(min_size=2)
def test_bytes_are_counted_alike_at_both_ends(world: MPI.Intracomm) -> None:
    with exchange(world) as e:
        indices = np.arange(0, SIZE, 7, dtype=np.uint32)
        sparse = Outgoing(entries=Entries(SIZE, vector(0, 0)[indices], indices))
        sizes = e.links.post(dict.fromkeys(e.peers, sparse), stamp(0))
        e.received(len(e.peers))
        for peer in e.peers:
            assert sizes[peer] == wire.encoded_bytes(indices, SIZE)
        headers = 2 * wire.HEADER_BYTES  # a probe, and an acknowledgement
        e.wait(lambda: all(t.bytes_sent == sizes[p] + headers for p, t in e.links.totals().items()))
        e.wait(lambda: all(t.bytes_received == sizes[p] + headers for p, t in e.links.totals().items()))


@pytest.mark.mpi(min_size=2)
def test_a_link_that_is_not_acknowledged_is_not_ready_until_it_is(world: MPI.Intracomm) -> None:
    with exchange(world) as e:
        e.barrier()
        whole = Outgoing(entries=Entries(SIZE, vector(0, 0)), quality=100.0)
        peer = e.peers[0]
        assert e.links.view([peer], 1.0)[peer].ready
        # More than the reader has buffers for: it does not poll, so the last ones stay unacknowledged.
        messages = UNREAD_MESSAGES + WINDOW
        for step in range(messages):
            e.links.post(dict.fromkeys(e.peers, whole), stamp(step))
        e.wait(lambda: all(t.bytes_received > UNREAD_MESSAGES * 4 * SIZE for t in e.links.totals().values()))
        assert not e.links.view([peer], 1.0)[peer].ready
        e.barrier()
        e.received(messages * len(e.peers))
        e.wait(lambda: e.links.view([peer], 1.0)[peer].ready)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("damage", ["magic", "checksum", "short"])
def test_a_malformed_message_is_refused_and_its_sender_named(world: MPI.Intracomm, damage: str) -> None:
    buffer = np.empty(wire.capacity_bytes(SIZE), np.uint8)
    header = wire.Header(kind=wire.Kind.GRADIENT, sender=0, epoch=0, step=0, sequence=1, acknowledged=0)
    length = wire.encode(header, Entries(SIZE, vector(0, 0)), buffer)
    if damage == "magic":
        buffer[0] ^= 1
    elif damage == "checksum":
        buffer[length // 2] ^= 1
    else:
        length -= 40
    with exchange(world, drained=False) as e:
        if world.Get_rank() == 0:
            for peer in e.peers:
                e.exchange.transport.send(peer, Channel.MESSAGE, buffer[:length], lambda: None)
        else:
            with pytest.raises(RunError, match="rejected a message from rank 0"):
                e.received(1)
        e.barrier()


@pytest.mark.mpi(min_size=2)
def test_closing_leaves_nothing_behind_whoever_stops_first(world: MPI.Intracomm) -> None:
    """Many messages are still in flight when ranks fall silent at different times."""
    for _ in range(5):
        with exchange(world) as e:
            whole = Outgoing(entries=Entries(SIZE, vector(0, 0)), quality=100.0)
            for step in range(4 * world.Get_rank()):
                e.links.post(dict.fromkeys(e.peers, whole), stamp(step))
        assert world.Iprobe(tag=Channel.MESSAGE) is False
