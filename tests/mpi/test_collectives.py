"""Non-blocking collectives: each kind in its order, kinds independent of each other."""

from __future__ import annotations

import time

import numpy as np
import pytest
from mpi4py import MPI

from dlion_mpi.collectives import CHUNK
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
            assert not e.progress.wait_until(lambda: ticket.done, timeout_s=0.05) or ticket.done
        e.wait(lambda: ticket.done)
        assert ticket.table.sum() == world.Get_size()
