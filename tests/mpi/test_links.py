"""Links over real MPI: what is sent arrives whole, in order and counted; what is wrong is named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from mpi4py import MPI

from dlion_mpi import wire
from dlion_mpi.errors import RunError
from dlion_mpi.loop.links import UNREAD_MESSAGES, ByteLinks, Channel
from dlion_mpi.loop.ports import Stamp
from dlion_mpi.mpi.collectives import Collectives
from dlion_mpi.mpi.progress import ProgressThread
from dlion_mpi.mpi.transport import MpiTransport
from dlion_mpi.strategies.types import Outgoing
from dlion_mpi.vector.layout import Entries

SIZE = 50_000
WINDOW = 2


class Exchange:
    """Links, collectives and their thread, as a run has them."""

    def __init__(self, world: MPI.Intracomm) -> None:
        self.communicator = world.Dup()
        self.progress = ProgressThread()
        self.transport = MpiTransport(self.communicator, self.progress.wake)
        self.links = ByteLinks(
            world.Get_rank(),
            world.Get_size(),
            self.transport,
            size=SIZE,
            window=WINDOW,
            now_s=time.monotonic,
            lock=threading.Lock(),
        )
        self.collectives = Collectives(self.communicator, ["test"], self.progress.wake, self.links.carried)
        self.peers = [r for r in range(world.Get_size()) if r != world.Get_rank()]
        self.progress.start(self.transport.progress, self.collectives.progress)

    def wait(self, ready: Callable[[], bool]) -> None:
        assert self.progress.wait_until(ready, timeout_s=60), "nothing arrived for 60 s"

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

    def close(self) -> None:
        self.progress.stop()
        self.transport.close()
        self.collectives.free()
        self.communicator.Free()


@contextmanager
def exchange(world: MPI.Intracomm) -> Iterator[Exchange]:
    """An exchange that ends as a run does: count, drain, cancel."""
    e = Exchange(world)
    yield e
    sent = e.collectives.gather("test", [float(c) for c in e.links.fall_silent()])
    e.wait(lambda: e.links.poll() is not None and sent.done)
    expected = [int(c) for c in sent.table[:, world.Get_rank()]]

    def drained() -> bool:
        e.links.poll()
        return e.links.received_counts() == expected

    e.wait(drained)
    e.barrier()
    e.close()


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
def test_bytes_are_counted_alike_at_both_ends(world: MPI.Intracomm) -> None:
    with exchange(world) as e:
        indices = np.arange(0, SIZE, 7, dtype=np.uint32)
        sparse = Outgoing(entries=Entries(SIZE, vector(0, 0)[indices], indices))
        sizes = e.links.post(dict.fromkeys(e.peers, sparse), stamp(0))
        e.received(len(e.peers))
        for peer in e.peers:
            assert sizes[peer] == wire.encoded_bytes(indices, SIZE)
        e.wait(lambda: all(t.bytes_sent == sizes[p] + wire.HEADER_BYTES for p, t in e.links.totals().items()))
        e.wait(lambda: all(t.bytes_received == sizes[p] + wire.HEADER_BYTES for p, t in e.links.totals().items()))


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
    rank = world.Get_rank()
    e = Exchange(world)
    if rank == 0:
        buffer = np.empty(wire.capacity_bytes(SIZE), np.uint8)
        header = wire.Header(kind=wire.Kind.GRADIENT, sender=0, epoch=0, step=0, sequence=1, acknowledged=0)
        length = wire.encode(header, Entries(SIZE, vector(0, 0)), buffer)
        if damage == "magic":
            buffer[0] ^= 1
        elif damage == "checksum":
            buffer[length // 2] ^= 1
        else:
            length -= 40
        for peer in e.peers:
            e.transport.send(peer, Channel.MESSAGE, buffer[:length], lambda: None)
    if rank == 1:
        with pytest.raises(RunError, match="rejected a message from rank 0"):
            e.received(1)
    elif rank > 1:
        with pytest.raises(RunError, match="rank 0"):
            e.received(1)
    e.barrier()
    e.close()


@pytest.mark.mpi(min_size=2)
def test_closing_leaves_nothing_behind_whoever_stops_first(world: MPI.Intracomm) -> None:
    """Many messages are still under way when ranks fall silent at different times."""
    for _ in range(5):
        with exchange(world) as e:
            whole = Outgoing(entries=Entries(SIZE, vector(0, 0)), quality=100.0)
            for step in range(4 * world.Get_rank()):
                e.links.post(dict.fromkeys(e.peers, whole), stamp(step))
        assert world.Iprobe(tag=Channel.MESSAGE) is False
