"""The parts of a simulation: events, shared links, acknowledgements, the free network. No TensorFlow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi import wire
from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.loop.ports import Stamp
from dlion_mpi.microcloud.environments import Environment, Pace, Phase
from dlion_mpi.simulation.free_network import balanced, resolve
from dlion_mpi.simulation.links import VirtualLinks
from dlion_mpi.simulation.network import PAYLOAD_SHARE, Events, Medium, Network, Stream
from dlion_mpi.simulation.simulate import micro_cloud
from dlion_mpi.strategies.types import Outgoing
from dlion_mpi.vector.layout import Entries

STAMP = Stamp(epoch=0, step=7, lbs=32, gbs=96, computed_at=0.5)
BYTES_8_MBIT = 1e6 * PAYLOAD_SHARE
"""Payload bytes per second of 8 Mbit/s."""


def run_out(events: Events) -> None:
    """Let everything happen."""
    events.run(lambda: False)


def cloud(workers: int, *phases: dict[str, Any], latency_s: float = 0.0) -> Environment:
    """Workers of 24 cores; each phase says its network and when it starts."""
    built = tuple(Phase(cores=(24.0,) * workers, **phase) for phase in phases)
    return Environment(name="test", workers=workers, phases=built, latency_s=latency_s)


# ---- events and media


def test_events_happen_in_order_of_time_then_of_asking() -> None:
    events, seen = Events(), []
    for time_s, name in ((2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")):
        events.at(time_s, lambda name=name: seen.append((events.now_s, name)))  # type: ignore[misc]
    run_out(events)
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c"), (2.0, "d")]


def transfers(rate: float, sends: Sequence[tuple[float, int, float]], latency_s: float = 0.0) -> list[float]:
    """When each of (time, stream, bytes) is across a medium of ``rate`` bytes per second."""
    events = Events()
    medium = Medium(events, rate)
    streams: dict[int, Stream] = {}
    ends = [math.nan] * len(sends)

    def end(n: int) -> None:
        ends[n] = events.now_s

    for n, (time_s, stream, size) in enumerate(sends):
        streams.setdefault(stream, Stream(latency_s)).medium = medium
        events.at(time_s, lambda n=n, stream=stream, size=size: streams[stream].send(size, end, n))  # type: ignore[misc]
    run_out(events)
    return ends


def test_two_streams_share_an_uplink_evenly() -> None:
    # Both at 50 B/s until the short one ends at 2 s; the long one's other 200 bytes then go at 100 B/s.
    assert transfers(100, [(0, 1, 100), (0, 2, 300)]) == pytest.approx([2.0, 4.0])


def test_a_stream_that_joins_slows_the_other_from_then_on() -> None:
    assert transfers(100, [(0, 1, 200), (1, 2, 50)]) == pytest.approx([2.5, 2.0])


def test_messages_of_one_stream_wait_for_each_other() -> None:
    assert transfers(100, [(0, 1, 100), (0, 1, 100), (0, 2, 100)]) == pytest.approx([2.0, 3.0, 2.0])


def test_links_of_one_uplink_may_have_unequal_latencies() -> None:
    phase = Phase(cores=(1.0,) * 3, uplink_mbit=(8.0,) * 3)
    latencies = ((0.0, 0.5, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    events, ends = Events(), {}
    network = Network(Environment(name="test", workers=3, phases=(phase,), link_latency_s=latencies), events, None)

    def end(peer: int) -> None:
        ends[peer] = events.now_s

    for peer in (1, 2):
        network.stream(0, peer).send(BYTES_8_MBIT / 2, end, peer)
    run_out(events)
    assert ends == pytest.approx({1: 1.5, 2: 1.0})


def test_latency_comes_on_top_and_does_not_occupy_the_link() -> None:
    assert transfers(100, [(0, 1, 100), (0, 1, 100)], latency_s=0.5) == pytest.approx([1.5, 2.5])


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 3), st.integers(1, 10_000).map(float)), min_size=1, max_size=12)
)
def test_a_medium_agrees_with_a_fluid_followed_step_by_step(sends: list[tuple[float, int, float]]) -> None:
    sends = sorted(sends)
    assert transfers(1000, sends) == pytest.approx(fluid(1000, sends), rel=1e-6, abs=1e-6)


def fluid(rate: float, sends: Sequence[tuple[float, int, float]]) -> list[float]:
    """The same as `transfers`, every stream's share worked out anew at every event."""
    queues: dict[int, list[list[float]]] = {}
    ends = [math.nan] * len(sends)
    now_s, coming = 0.0, list(enumerate(sends))
    while coming or any(queues.values()):
        busy = [queue for _, queue in sorted(queues.items()) if queue]
        share = rate / max(1, len(busy))
        next_end_s = now_s + min((queue[0][1] / share for queue in busy), default=math.inf)
        next_s = min(next_end_s, coming[0][1][0] if coming else math.inf)
        for queue in busy:
            queue[0][1] -= (next_s - now_s) * share
            if queue[0][1] <= 1e-6:
                ends[int(queue.pop(0)[0])] = next_s
        now_s = next_s
        while coming and coming[0][1][0] <= now_s:
            n, (_, stream, size) = coming.pop(0)
            queues.setdefault(stream, []).append([n, size])
    return ends


# ---- networks


def ends_of(environment: Environment, sends: Sequence[tuple[int, int, float]]) -> list[float]:
    """When each of (source, destination, bytes), sent at 0, is across."""
    events = Events()
    network = Network(environment, events, None)
    ends = [math.nan] * len(sends)

    def end(n: int) -> None:
        ends[n] = events.now_s

    for n, (source, destination, size) in enumerate(sends):
        network.stream(source, destination).send(size, end, n)
    run_out(events)
    return ends


def test_an_uplink_is_shared_and_a_downlink_is_free() -> None:
    environment = cloud(3, {"uplink_mbit": (8.0, 8.0, 80.0)})
    sends = [(0, 1, BYTES_8_MBIT), (0, 2, BYTES_8_MBIT), (1, 2, BYTES_8_MBIT), (2, 1, BYTES_8_MBIT)]
    assert ends_of(environment, sends) == pytest.approx([2.0, 2.0, 1.0, 0.1])


def test_links_of_a_matrix_do_not_share() -> None:
    environment = cloud(3, {"link_mbit": ((0, 8, 16), (8, 0, 8), (8, 8, 0))})
    assert ends_of(environment, [(0, 1, BYTES_8_MBIT), (0, 2, BYTES_8_MBIT)]) == pytest.approx([1.0, 0.5])


def test_a_rate_that_changes_counts_from_then_on() -> None:
    environment = cloud(2, {"uplink_mbit": (8.0, 8.0), "start_s": 0}, {"uplink_mbit": (2.0, 8.0), "start_s": 0.5})
    sends = [(0, 1, BYTES_8_MBIT), (0, 1, BYTES_8_MBIT), (1, 0, BYTES_8_MBIT)]
    # Half of it in 0.5 s, the other half at a quarter of the rate; the next one behind it.
    assert ends_of(environment, sends) == pytest.approx([2.5, 6.5, 1.0])


def test_an_uplink_can_become_a_matrix_while_bytes_are_under_way() -> None:
    matrix = ((0.0, 8.0, 8.0), (8.0, 0.0, 8.0), (8.0, 8.0, 0.0))
    environment = cloud(3, {"uplink_mbit": (8.0,) * 3, "start_s": 0}, {"link_mbit": matrix, "start_s": 1.0})
    # A second of half the rate each, then both at the whole.
    assert ends_of(environment, [(0, 1, BYTES_8_MBIT), (0, 2, BYTES_8_MBIT)]) == pytest.approx([1.5, 1.5])


# ---- links


class Ends:
    """The links of some workers on one network, and how often each was woken."""

    def __init__(self, environment: Environment, *, size: int = 1000, window: int = 2) -> None:
        self.events = Events()
        self.network = Network(environment, self.events, None)
        n = environment.workers
        self.links = [VirtualLinks(k, n, self.network, self.events, size=size, window=window) for k in range(n)]
        self.woken = [0] * n
        for k, links in enumerate(self.links):
            links.connect(self.links)
            links.wake = lambda k=k: self.woken.__setitem__(k, self.woken[k] + 1)  # type: ignore[misc]

    def until(self, time_s: float) -> None:
        """Let happen what is due by then."""
        reached: list[bool] = []
        self.events.at(time_s, lambda: reached.append(True))
        self.events.run(lambda: bool(reached))


def dense(size: int = 1000) -> Outgoing:
    return Outgoing(entries=Entries(size, np.arange(size, dtype=np.float32)), quality=100.0)


@pytest.mark.parametrize("value_type", wire.VALUE_TYPES)
@pytest.mark.parametrize("indices", [None, [], [3], list(range(0, 1000, 7)), list(range(990))])
def test_a_message_is_as_long_and_says_the_same_as_on_the_wire(
    indices: list[int] | None, value_type: wire.ValueType
) -> None:
    ends = Ends(cloud(2, {"uplink_mbit": (8.0, 8.0)}))
    places = None if indices is None else np.array(indices, np.uint32)
    values = np.random.default_rng(0).standard_normal(1000 if indices is None else len(indices), dtype=np.float32)
    message = Outgoing(entries=Entries(1000, values, places), quality=12.5, value_type=value_type)
    sizes = ends.links[0].post({1: message}, STAMP)
    run_out(ends.events)
    (got,) = ends.links[1].poll()
    buffer = np.empty(wire.capacity_bytes(1000), np.uint8)
    length = wire.encode(got.header, message.entries, buffer, value_type)
    wanted = wire.decode(buffer[:length], size=1000)
    assert sizes == {1: length}
    assert got.header == wanted.header
    assert (got.header.sender, got.header.step, got.header.sequence, got.header.kind) == (0, 7, 1, wire.Kind.GRADIENT)
    sums = [np.zeros(1000, np.float32) for _ in range(2)]
    got.entries.add_to(sums[0], 1.0)
    wanted.entries.add_to(sums[1], 1.0)
    np.testing.assert_array_equal(sums[0], sums[1])


def test_a_link_is_ready_again_when_the_acknowledgement_is_back() -> None:
    ends = Ends(cloud(2, {"uplink_mbit": (8.0, 8.0)}, latency_s=0.5))
    ends.links[0].post({1: dense()}, STAMP)
    ends.links[0].post({1: dense()}, STAMP)
    message_s, ack_s = 4088 / BYTES_8_MBIT, 88 / BYTES_8_MBIT
    ends.until(message_s + 0.5 + ack_s + 0.499)
    assert not ends.links[0].view([1], 0.2)[1].ready
    ends.until(message_s + 0.5 + ack_s + 0.501)
    assert ends.links[0].view([1], 0.2)[1].ready
    assert ends.woken == [1, 2]  # by the acknowledgement, since the link is free now, and by two messages


def test_the_measured_rate_is_the_links() -> None:
    ends = Ends(cloud(3, {"uplink_mbit": (8.0, 8.0, 8.0)}))
    for n in range(40):  # more than the uplink carries
        ends.until(0.1 * n)
        ready = [peer for peer, link in ends.links[0].view([1, 2], 0.1).items() if link.ready]
        ends.links[0].post({peer: dense() for peer in ready * 20}, STAMP)
        ends.links[1].poll(), ends.links[2].poll()
        ends.links[0].post({peer: Outgoing(entries=dense(100_000).entries) for peer in ready}, STAMP)
    for link in ends.links[0].totals().values():
        assert link.bytes_per_s == pytest.approx(BYTES_8_MBIT / 2, rel=0.02)


def test_in_silence_an_acknowledgement_still_wakes_the_loop() -> None:
    """It may be the last parcel that the loop waits for."""
    ends = Ends(cloud(2, {"uplink_mbit": (8.0, 8.0)}, latency_s=0.5))
    ends.links[0].post({1: dense()}, STAMP)
    ends.until(0.6)
    assert (ends.woken, ends.links[0].fall_silent()) == ([0, 1], [0, 2])  # a probe wakes no loop
    run_out(ends.events)
    assert ends.woken == [1, 1]


# ---- the free network


def test_perfect_balance_lets_all_finish_together() -> None:
    paces = [Pace(alpha_s=0.02, beta_s=beta) for beta in (0.01, 0.02, 0.06)]
    shares = balanced(300, paces, 1024)
    assert sum(shares) == 300
    times = [pace.seconds(lbs) for pace, lbs in zip(paces, shares, strict=True)]
    assert max(times) - min(times) < 0.06


def test_the_free_network_refuses_what_it_does_not_use() -> None:
    for options, word in (
        ({"dlion.max_n": 10.0}, "--dlion.max-n belongs to --strategy dlion"),
        ({"preset": "paper"}, "--preset paper"),
        ({"sync": "async"}, "--sync async"),
        ({"transfer": "all"}, "--transfer"),
    ):
        with pytest.raises(UserError, match=word):
            resolve(Config.of({"strategy": "free-network", **options}))
    assert resolve(Config(strategy="free-network")).global_batch == "fixed"
    assert resolve(Config(strategy="free-network", global_batch="grow")).global_batch == "grow"


# ---- micro-clouds


def test_workers_that_are_all_alike_can_be_more_or_fewer() -> None:
    environment = micro_cloud("homo-b", "100")
    assert environment.workers == 100
    assert set(environment.phases[0].cores) == {24.0}
    assert environment.phases[0].uplink_mbit == (50.0,) * 100
    assert micro_cloud("homo-a", 2).workers == 2
    assert micro_cloud("hetero-sys-a", "6").workers == 6
    assert micro_cloud("hetero-sys-a").workers == 6


@pytest.mark.parametrize(
    ("name", "workers", "word"),
    [
        ("hetero-sys-a", "7", "workers of environment hetero-sys-a differ"),
        ("hetero-net-b", "3", "workers of environment hetero-net-b differ"),
        ("dynamic-a", "12", "workers of environment dynamic-a differ"),
        ("homo-b", "0", "at least 1"),
        ("homo-b", "many", "whole number"),
        ("homo-z", None, "unknown environment"),
    ],
)
def test_a_micro_cloud_that_cannot_be_is_refused(name: str, workers: str | None, word: str) -> None:
    with pytest.raises(UserError, match=word):
        micro_cloud(name, workers)


def test_a_matrix_of_equal_links_can_grow(tmp_path: Any) -> None:
    path = tmp_path / "even.toml"
    path.write_text("workers = 2\n[[phases]]\ncores = 24\nlink_mbit = [[0, 5], [5, 0]]\n")
    assert micro_cloud(str(path), 3).phases[0].link_mbit == ((0, 5, 5), (5, 0, 5), (5, 5, 0))
