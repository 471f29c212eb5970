"""Collectives over a virtual network: gathers, broadcasts and sums, their seconds and their bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlion_mpi.algorithms.ring import ring_bytes
from dlion_mpi.metrics.timeline import MessageLog, Unlogged
from dlion_mpi.microcloud.environments import Environment
from dlion_mpi.simulation.collectives import CHUNK, Operations, VirtualCollectives, _tree
from dlion_mpi.simulation.links import VirtualLinks
from dlion_mpi.simulation.network import Events, Network
from dlion_mpi.wire import ValueType
from tests.unit.test_simulate import BYTES_8_MBIT, cloud, run_out

Ends = tuple[Events, Network, list[VirtualCollectives], list[int]]


def collectives(environment: Environment) -> Ends:
    """The collectives of all workers. The last item: the workers woken, in order."""
    events = Events()
    woken: list[int] = []
    network = Network(environment, events, None)
    workers = environment.workers
    operations = Operations(network, linked(network, events, workers), woken.append)
    return events, network, [VirtualCollectives(k, operations) for k in range(workers)], woken


def linked(network: Network, events: Events, workers: int, log: MessageLog | None = None) -> list[VirtualLinks]:
    """The links of all workers. ``log``: of worker 0."""
    return [VirtualLinks(k, workers, network, events, size=9, window=2, log=None if k else log) for k in range(workers)]


def test_a_gather_is_done_when_the_last_record_has_come() -> None:
    events, _, everyone, woken = collectives(cloud(3, {"uplink_mbit": (8.0,) * 3}, latency_s=0.1))
    tickets = [everyone[k].gather("status", [k, 10.0 * k]) for k in range(2)]
    run_out(events)
    assert not any(ticket.done for ticket in tickets)
    asked_s = events.now_s
    tickets.append(everyone[2].gather("status", [2, 20.0]))
    assert tickets[2].done  # the others' records are there already
    run_out(events)
    assert events.now_s == pytest.approx(asked_s + 2 * 16 / BYTES_8_MBIT + 0.1)
    for ticket in tickets:
        np.testing.assert_array_equal(ticket.table, [[0, 0], [1, 10], [2, 20]])
    assert sorted(woken) == [0, 1, 2]


def test_channels_and_rounds_are_kept_apart() -> None:
    events, _, (a, b), _ = collectives(cloud(2, {"uplink_mbit": (8.0,) * 2}))
    first, second, other = a.gather("status", [1.0]), a.gather("status", [2.0]), a.gather("transfer", [3.0])
    b.gather("transfer", [30.0])
    b.gather("status", [10.0])
    run_out(events)
    assert (first.done, second.done, other.done) == (True, False, True)
    assert first.table.tolist() == [[1.0], [10.0]]
    assert other.table.tolist() == [[3.0], [30.0]]


@pytest.mark.parametrize("workers", [2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("root", [0, 1])
def test_a_broadcast_brings_the_roots_vector_to_everyone(workers: int, root: int) -> None:
    events, _, everyone, woken = collectives(cloud(workers, {"uplink_mbit": (800.0,) * workers}))
    vectors = [np.full(2 * CHUNK + 5, k, np.float32) for k in range(workers)]
    tickets = [c.broadcast("transfer", root, v) for c, v in zip(everyone, vectors, strict=True)]
    run_out(events)
    assert all(ticket.done and (ticket.vector == root).all() for ticket in tickets)
    assert sorted(woken) == list(range(workers))


def test_a_broadcast_to_few_takes_the_roots_uplink_for_each() -> None:
    events, _, everyone, _ = collectives(cloud(3, {"uplink_mbit": (8.0,) * 3}, latency_s=0.25))
    for c in everyone:
        c.broadcast("transfer", 0, np.zeros(CHUNK, np.float32))
    run_out(events)
    assert events.now_s == pytest.approx(2 * 4 * CHUNK / BYTES_8_MBIT + 0.25)


def test_a_chunk_goes_on_only_from_where_it_is() -> None:
    events, _, everyone, _ = collectives(cloud(6, {"uplink_mbit": (8.0,) * 6}))
    for c in everyone:
        c.broadcast("transfer", 0, np.zeros(CHUNK, np.float32))
    run_out(events)
    # 0 to 1, 2 and 4 takes three times a chunk's time; then 1 to 3 and 5 twice.
    assert events.now_s == pytest.approx(5 * 4 * CHUNK / BYTES_8_MBIT)


def test_a_chunk_waits_for_those_who_have_not_asked_yet() -> None:
    events, _, (root, other), _ = collectives(cloud(2, {"uplink_mbit": (8.0,) * 2}))
    ticket = root.broadcast("transfer", 0, np.ones(10, np.float32))
    run_out(events)
    assert not ticket.done
    late = other.broadcast("transfer", 0, np.zeros(10, np.float32))
    run_out(events)
    assert ticket.done
    assert late.done
    assert late.vector.tolist() == [1.0] * 10


def test_a_broadcast_competes_with_other_messages() -> None:
    def seconds(gradient_bytes: float) -> float:
        events, network, everyone, _ = collectives(cloud(3, {"uplink_mbit": (8.0,) * 3}))
        if gradient_bytes:
            network.stream(0, 1).send(gradient_bytes, lambda _: None, None)
        for c in everyone:
            c.broadcast("transfer", 0, np.zeros(CHUNK, np.float32))
        run_out(events)
        return events.now_s

    assert seconds(100_000) == pytest.approx(seconds(0) + 100_000 / BYTES_8_MBIT)


def test_beyond_four_the_tree_is_binomial() -> None:
    parent, children = _tree(0, 8)
    assert children == [[1, 2, 4], [3, 5], [6], [7], [], [], [], []]
    assert [parent[child] for child in range(1, 8)] == [0, 0, 1, 0, 1, 2, 3]
    parent, _ = _tree(2, 6)
    assert parent[2] == 2
    assert parent[3] == 2


# ---- sums


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 1000, 70_001])
@pytest.mark.parametrize("value_type", ["float32", "bfloat16"])
def test_a_sum_is_the_same_for_everyone_and_moves_what_a_ring_moves(
    workers: int, size: int, value_type: ValueType
) -> None:
    events, _, everyone, woken = collectives(cloud(workers, {"uplink_mbit": (80.0,) * workers}))
    vectors = [np.random.default_rng(k).standard_normal(size, dtype=np.float32) for k in range(workers)]
    expected = np.sum(vectors, axis=0, dtype=np.float64)
    tickets = [c.reduce("sum", vector, value_type) for c, vector in zip(everyone, vectors, strict=True)]
    run_out(events)
    assert sorted(woken) == list(range(workers))
    error = 1e-5 if value_type == "float32" or workers == 1 else 0.004 * workers * 4  # each rounding is off by 2^-9
    for ticket, vector in zip(tickets, vectors, strict=True):
        assert ticket.done
        assert ticket.vector is vector
        np.testing.assert_allclose(vector, expected, rtol=error, atol=error)
        assert vector.tobytes() == vectors[0].tobytes()
    for rank, links in enumerate(everyone[0]._operations.links):
        sent, received = ring_bytes(size, rank, workers, value_type)
        moved = {peer: [0, 0] for peer in range(workers) if peer != rank}
        if workers > 1:
            moved[(rank + 1) % workers][0] += sent
            moved[(rank - 1) % workers][1] += received
        assert {peer: [t.bytes_sent, t.bytes_received] for peer, t in links.totals().items()} == moved


RINGS: list[dict[str, Any]] = [
    {"uplink_mbit": (80.0,) * 4},
    {"uplink_mbit": (80.0, 8.0, 80.0, 80.0)},
    {"link_mbit": ((0, 80, 8, 8), (8, 0, 4, 8), (8, 8, 0, 80), (16, 8, 8, 0))},
]


@pytest.mark.parametrize("latency_s", [0.0, 0.002])
@pytest.mark.parametrize("rates", RINGS)
def test_a_sum_takes_the_slowest_link_s_time_in_every_turn(rates: dict[str, Any], latency_s: float) -> None:
    """2 (n - 1) (latency + chunk / rate), after the word that everyone takes part, which takes a latency more."""
    events, _, everyone, _ = collectives(cloud(4, rates, latency_s=latency_s))
    for c in everyone:
        c.reduce("sum", np.ones(400_000, np.float32))
    run_out(events)
    slowest = min(rates["uplink_mbit"]) if "uplink_mbit" in rates else 4
    seconds = 6 * 400_000 / (slowest / 8 * BYTES_8_MBIT) + 6 * latency_s
    assert events.now_s == pytest.approx(seconds + latency_s, rel=0.01)


def test_a_sum_begins_when_the_last_has_asked() -> None:
    events, _, (a, b), _ = collectives(cloud(2, {"uplink_mbit": (8.0,) * 2}))
    first = a.reduce("sum", np.ones(1000, np.float32))
    run_out(events)
    assert not first.done
    asked_s = events.now_s
    second = b.reduce("sum", np.ones(1000, np.float32))
    run_out(events)
    assert first.done
    assert second.done
    assert first.vector.tolist() == [2.0] * 1000
    assert events.now_s - asked_s == pytest.approx((2 * 2000 + 8) / BYTES_8_MBIT)


def test_a_worker_that_has_no_vector_ends_the_sum_for_all_and_costs_no_vector() -> None:
    events, _, everyone, woken = collectives(cloud(3, {"uplink_mbit": (8.0,) * 3}))
    vectors = [np.ones(1000, np.float32), None, np.ones(1000, np.float32)]
    tickets = [c.reduce("sum", vector) for c, vector in zip(everyone, vectors, strict=True)]
    run_out(events)
    assert all(ticket.done and not len(ticket.vector) for ticket in tickets)
    assert sorted(woken) == [0, 1, 2]
    assert all(t.bytes_sent == 0 for links in everyone[0]._operations.links for t in links.totals().values())
    assert vectors[0] is not None
    assert vectors[0].tolist() == [1.0] * 1000


def test_vectors_that_differ_in_size_are_refused() -> None:
    events, _, (a, b), _ = collectives(cloud(2, {"uplink_mbit": (8.0,) * 2}))
    a.reduce("sum", np.ones(10, np.float32))
    b.reduce("sum", np.ones(11, np.float32))
    with pytest.raises(ValueError, match=r"differ in size: \[10, 11\]"):
        run_out(events)


def test_a_sum_competes_with_other_messages() -> None:
    def seconds(message_bytes: float) -> float:
        events, network, everyone, _ = collectives(cloud(3, {"uplink_mbit": (8.0,) * 3}))
        if message_bytes:
            network.stream(1, 2).send(message_bytes, lambda _: None, None)
        for c in everyone:
            c.reduce("sum", np.ones(30_000, np.float32))
        run_out(events)
        return events.now_s

    assert seconds(100_000) == pytest.approx(seconds(0) + 100_000 / BYTES_8_MBIT, rel=0.01)


def test_every_chunk_of_a_sum_is_logged_as_it_is_over_mpi() -> None:
    class Log(Unlogged):
        def __init__(self) -> None:
            self.pieces: list[tuple[int, int, int, float, float]] = []

        def piece(self, peer: int, sent_bytes: int, received_bytes: int, began_s: float, ended_s: float) -> None:
            self.pieces.append((peer, sent_bytes, received_bytes, began_s, ended_s))

    log = Log()
    events = Events()
    network = Network(cloud(3, {"uplink_mbit": (8.0,) * 3}), events, None)
    links = linked(network, events, 3, log)
    operations = Operations(network, links, lambda rank: None)
    for rank in range(3):
        VirtualCollectives(rank, operations).reduce("sum", np.ones(3000, np.float32))
    run_out(events)
    links[0].poll()
    assert [piece[:3] for piece in log.pieces] == [(1, 4000, 0), (2, 0, 4000)] * 4
    for _, _, _, began_s, ended_s in log.pieces:
        assert ended_s - began_s == pytest.approx(4000 / BYTES_8_MBIT, rel=0.02)
