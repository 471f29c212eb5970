"""Non-blocking collectives: each kind in its order, kinds independent of each other."""

from __future__ import annotations

import time

import numpy as np
import pytest
from mpi4py import MPI

from dlion_mpi.algorithms.ring import ring_bytes, ring_sum
from dlion_mpi.mpi.collectives import CHUNK
from dlion_mpi.wire import ValueType
from tests.mpi.test_links import exchange


@pytest.mark.mpi
def test_a_gather_brings_everyones_record_to_everyone(world: MPI.Intracomm) -> None:
    with exchange(world) as e:
        ticket = e.collectives.gather("test", [float(world.Get_rank()), 7.0])
        e.wait(lambda: ticket.done)
        expected = [[float(r), 7.0] for r in range(world.Get_size())]
        np.testing.assert_array_equal(ticket.table, expected)


@pytest.mark.mpi
@pytest.mark.parametrize("size", [0, 1, CHUNK, 3 * CHUNK + 5])
def test_a_broadcast_brings_the_roots_vector_whole(world: MPI.Intracomm, size: int) -> None:
    root = world.Get_size() - 1
    truth = np.random.default_rng(3).standard_normal(size, dtype=np.float32)
    own = truth.copy() if world.Get_rank() == root else np.zeros(size, np.float32)
    with exchange(world) as e:
        ticket = e.collectives.broadcast("test", root, own)
        e.wait(lambda: ticket.done)
        np.testing.assert_array_equal(ticket.vector, truth)


@pytest.mark.mpi
def test_many_asked_for_at_once_are_done_in_order(world: MPI.Intracomm) -> None:
    with exchange(world) as e:
        tickets = [e.collectives.gather("test", [float(i)]) for i in range(20)]
        e.wait(lambda: tickets[-1].done)
        assert all(t.done for t in tickets)
        assert [t.table[0, 0] for t in tickets] == list(range(20))


@pytest.mark.mpi(min_size=2)
def test_a_late_rank_holds_up_nobodys_thread(world: MPI.Intracomm) -> None:
    """The ranks that are early wait in `ready`, not inside MPI: they can still be asked."""
    with exchange(world) as e:
        if world.Get_rank() == 0:
            time.sleep(0.5)
        ticket = e.collectives.gather("test", [1.0])
        if world.Get_rank() != 0:
            assert not e.exchange.progress.wait_until(lambda: ticket.done, timeout_s=0.05) or ticket.done
        e.wait(lambda: ticket.done)
        assert ticket.table.sum() == world.Get_size()


@pytest.mark.mpi
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 300_001])
@pytest.mark.parametrize("value_type", ["float32", "bfloat16"])
def test_a_sum_is_what_the_ring_says_bit_for_bit(world: MPI.Intracomm, size: int, value_type: ValueType) -> None:
    """Also where there are fewer entries than ranks; twice, since the second begins before the first has ended."""
    everyone = [np.random.default_rng(r).standard_normal(size).astype(np.float32) for r in range(world.Get_size())]
    shares = [everyone[world.Get_rank()].copy(), 3 * everyone[world.Get_rank()]]
    with exchange(world) as e:
        tickets = [e.collectives.reduce("test", share, value_type) for share in shares]
        e.wait(lambda: all(ticket.done for ticket in tickets))
        for factor, ticket in zip((1, 3), tickets, strict=True):
            expected = ring_sum([np.float32(factor) * vector for vector in everyone], value_type)
            np.testing.assert_array_equal(ticket.vector, expected)
            error = 1e-5 if value_type == "float32" else 0.2
            np.testing.assert_allclose(expected, factor * np.sum(everyone, axis=0, dtype=np.float64), error, error)


@pytest.mark.mpi
def test_who_has_no_share_ends_the_sum_for_all_and_costs_no_vector(world: MPI.Intracomm) -> None:
    last = world.Get_size() - 1
    with exchange(world) as e:
        share = None if world.Get_rank() == last else np.ones(1000, np.float32)
        ticket = e.collectives.reduce("test", share)
        e.wait(lambda: ticket.done)
        assert len(ticket.vector) == 0
        assert all(t.bytes_sent == 0 for t in e.links.totals().values())
        e.barrier()  # the channel is as good as before


@pytest.mark.mpi
@pytest.mark.parametrize(("size", "value_type"), [(3, "float32"), (1000, "float32"), (100_003, "bfloat16")])
def test_a_sum_sends_what_a_ring_does(world: MPI.Intracomm, size: int, value_type: ValueType) -> None:
    """Each rank about 2 (n - 1) / n of the vector, to the next one only; counted where it is sent."""
    rank, ranks = world.Get_rank(), world.Get_size()
    with exchange(world) as e:
        ticket = e.collectives.reduce("test", np.ones(size, np.float32), value_type)
        e.wait(lambda: ticket.done)
        totals = e.links.totals()
    sent, received = ring_bytes(size, rank, ranks, value_type)
    each = 4 if value_type == "float32" else 2
    expected = {peer: [0, 0] for peer in range(ranks) if peer != rank}
    if ranks > 1:
        expected[(rank + 1) % ranks][0] += sent
        expected[(rank - 1) % ranks][1] += received
    assert {peer: [t.bytes_sent, t.bytes_received] for peer, t in totals.items()} == expected
    assert abs(sent - 2 * each * size * (ranks - 1) / ranks) <= 2 * each * ranks
    assert sum(world.allgather(sent)) == sum(world.allgather(received)) == 2 * each * size * (ranks - 1)


@pytest.mark.mpi(min_size=2)
def test_vectors_that_differ_in_size_are_refused_by_every_rank(world: MPI.Intracomm) -> None:
    with exchange(world, drained=False) as e:
        ticket = e.collectives.reduce("test", np.ones(10 + world.Get_rank(), np.float32))
        with pytest.raises(RuntimeError, match=f"differ in size: from 10 to {9 + world.Get_size()} entries"):
            e.wait(lambda: ticket.done)
