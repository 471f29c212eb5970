"""A link's rate as its acknowledgements tell it, on simulated links whose rate is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from dlion_mpi import wire
from dlion_mpi.algorithms.bandwidth import FIRST_BYTES, SMALL_BYTES, LinkRate, rooms_bytes, uplink_bytes_per_s

MB = 1e6
TICK_S = 1e-3


@dataclass
class Link:
    """A worker that offers a message per step, and a link that carries them one after the other.

    ``rate``: seconds -> bytes per second. ``latency_s``: until a message arrives; ``back_s``: until its acknowledgement
    is back. ``most``: what the
    worker has to say at most, in bytes.
    """

    rate: Callable[[float], float]
    step_s: float = 0.1
    latency_s: float = 0.002
    back_s: float = 0.002
    window: int = 2
    most: float = 1e12
    measured: LinkRate = field(default_factory=LinkRate)
    now_s: float = 0.0
    next_step_s: float = 0.0
    offered: list[tuple[float, float]] = field(default_factory=list)
    """(seconds, bytes) of every message."""
    queue: deque[list[float]] = field(default_factory=deque)
    """Of what is on the link: sequence and bytes left."""
    acknowledgements: deque[tuple[float, tuple[int, float]]] = field(default_factory=deque)
    """(when it is back, (sequence, when the message arrived))."""
    ages: list[float] = field(default_factory=list)
    """Seconds from offer to arrival, of every message."""

    def run(self, seconds: float) -> Link:
        """Let so many seconds pass."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            while self.acknowledgements and self.acknowledgements[0][0] <= self.now_s:
                self.measured.acknowledged(*self.acknowledgements.popleft()[1])
            if self.now_s >= self.next_step_s:
                self.next_step_s += self.step_s
                self._step()
            self._carry(self.rate(self.now_s) * TICK_S)
            self.now_s += TICK_S
        return self

    def _step(self) -> None:
        room = rooms_bytes({1: self.measured}, self.step_s, self.now_s)[1]
        if self.measured.unacknowledged() < self.window and room > 0:
            size = min(room, self.most)
            self.offered.append((self.now_s, size))
            self.measured.posted(len(self.offered), int(size), self.now_s)
            self.queue.append([len(self.offered), size])

    def _carry(self, capacity: float) -> None:
        while self.queue and capacity > 0:
            carried = min(capacity, self.queue[0][1])
            self.queue[0][1] -= carried
            capacity -= carried
            if self.queue[0][1] <= 0:
                sequence = int(self.queue.popleft()[0])
                arrived_s = self.now_s + TICK_S + self.latency_s
                self.ages.append(arrived_s - self.offered[sequence - 1][0])
                self.acknowledgements.append((arrived_s + self.back_s, (sequence, arrived_s)))

    def estimate(self) -> float:
        rate = self.measured.bytes_per_s(self.now_s)
        assert rate is not None
        return rate

    def carried_per_s(self, since_s: float) -> float:
        return sum(size for at_s, size in self.offered if at_s >= since_s) / (self.now_s - since_s)


@pytest.mark.parametrize("rate", [0.5 * MB, 2 * MB, 20 * MB])
def test_it_converges_to_the_link_s_rate(rate: float) -> None:
    link = Link(lambda s: rate).run(5)
    assert link.estimate() == pytest.approx(rate, rel=0.1)
    assert link.measured.budget_bytes(link.step_s, link.now_s) == pytest.approx(rate * link.step_s, rel=0.1)


@pytest.mark.parametrize("rate", [0.5 * MB, 20 * MB])
def test_what_is_offered_fills_the_link_and_no_more(rate: float) -> None:
    link = Link(lambda s: rate).run(8)
    assert link.carried_per_s(since_s=3) == pytest.approx(rate, rel=0.1)


@pytest.mark.parametrize("back_s", [0.0, 0.09, 0.2])
def test_a_full_link_does_not_queue(back_s: float) -> None:
    """Also where acknowledgements are late: they wait behind what goes the other way."""
    link = Link(lambda s: 2 * MB, back_s=back_s, window=4).run(8)
    assert link.carried_per_s(since_s=3) == pytest.approx(2 * MB, rel=0.1 if back_s < link.step_s else 0.2)
    assert np.percentile(link.ages[len(link.ages) // 3 :], 95) < 2 * link.step_s


def test_after_a_long_wait_no_more_is_offered_than_a_step_s_worth() -> None:
    """A message that took many steps, and was through when the worker looked again, was no small one."""
    link = Link(lambda s: 2 * MB).run(3)
    link.next_step_s += 5
    link.most = 1e7
    link.measured.saturated = False
    link.run(0.2)
    before = len(link.offered)
    link.run(7)
    assert max(size for _, size in link.offered[before:]) < 3 * 2 * MB * link.step_s


def test_slow_start_reaches_a_fast_link_within_a_second() -> None:
    link = Link(lambda s: 400 * MB).run(1)
    assert link.offered[0][1] == FIRST_BYTES
    assert link.offered[-1][1] > 0.8 * 400 * MB * link.step_s


@pytest.mark.parametrize("factor", [0.1, 0.3, 3, 10])
def test_a_rate_that_changes_is_followed_within_three_seconds(factor: float) -> None:
    before = 5 * MB
    link = Link(lambda s: before if s < 4 else factor * before).run(4)
    assert link.estimate() == pytest.approx(before, rel=0.1)
    link.run(3)
    assert link.estimate() == pytest.approx(factor * before, rel=0.25)


def test_a_worker_with_little_to_say_does_not_make_the_link_look_slow() -> None:
    link = Link(lambda s: 10 * MB, most=50_000).run(3)
    assert link.measured.budget_bytes(link.step_s, link.now_s) >= 50_000
    assert link.estimate() == pytest.approx(10 * MB, rel=0.4)  # latency is part of every sample


# ---- samples, one by one


def test_the_time_from_posting_to_acknowledgement_counts() -> None:
    link = LinkRate()
    assert link.bytes_per_s(0.0) is None
    link.posted(1, 100_000, 1.0)
    assert link.bytes_per_s(1.5) is None
    link.acknowledged(1, 1.5)
    assert link.bytes_per_s(1.5) == pytest.approx(200_000)


def test_a_message_that_queues_counts_from_the_acknowledgement_before_it() -> None:
    link = LinkRate()
    link.posted(1, 100_000, 0.0)
    link.posted(2, 100_000, 0.1)
    link.acknowledged(1, 1.0)
    link.acknowledged(2, 2.0)
    assert link.bytes_per_s(2.0) == pytest.approx(100_000)


def test_an_acknowledgement_covers_everything_before_it() -> None:
    link = LinkRate()
    for sequence in (1, 2, 3):
        link.posted(sequence, 100_000, 0.0)
    link.acknowledged(2, 2.0)
    assert link.unacknowledged() == 1
    assert link.bytes_per_s(2.0) == pytest.approx(100_000)
    link.acknowledged(2, 2.5)
    link.acknowledged(1, 2.5)
    assert link.unacknowledged() == 1
    link.acknowledged(3, 3.0)
    assert link.unacknowledged() == 0
    assert link.bytes_per_s(3.0) == pytest.approx(100_000)


def test_only_messages_that_fill_the_link_count_for_the_window() -> None:
    link = LinkRate()
    link.posted(1, SMALL_BYTES - 1, 0.0)
    assert link.unacknowledged() == 0
    link.posted(2, SMALL_BYTES, 0.0)
    assert link.unacknowledged() == 1
    link.acknowledged(1, 0.1)
    assert link.unacknowledged() == 1
    link.acknowledged(2, 0.2)
    assert link.unacknowledged() == 0


def test_headers_tell_latency_and_nothing_about_the_rate() -> None:
    link = LinkRate()
    link.posted(1, wire.HEADER_BYTES, 0.0)
    link.acknowledged(1, 0.5)
    assert link.bytes_per_s(0.5) is None
    assert link.latency_s == 0.5
    link.posted(2, 100_000, 1.0)
    link.acknowledged(2, 2.5)
    for sequence in range(3, 30):
        link.posted(sequence, wire.HEADER_BYTES, sequence)
        link.acknowledged(sequence, sequence + 0.5)
    assert link.bytes_per_s(30.0) == pytest.approx(100_000)


def test_a_header_that_queued_tells_nothing_about_latency() -> None:
    """Else what it waited for would be taken off every message, which would then seem to take no time."""
    link = LinkRate()
    for sequence in range(1, 20, 2):
        link.posted(sequence, 100_000, 0.1 * sequence)
        link.posted(sequence + 1, wire.HEADER_BYTES, 0.1 * sequence)
        link.acknowledged(sequence, 0.1 * (sequence + 2))
        link.acknowledged(sequence + 1, 0.1 * (sequence + 2))
    assert link.bytes_per_s(2.0) == pytest.approx(100_000 / 0.2, rel=0.01)


def test_old_samples_are_forgotten() -> None:
    link = LinkRate()
    for sequence in range(1, 11):
        link.posted(sequence, 100_000, float(sequence))
        link.acknowledged(sequence, sequence + (0.1 if sequence <= 5 else 0.5))
    assert link.bytes_per_s(10.6) == pytest.approx(200_000, rel=0.5)
    assert link.bytes_per_s(100.0) == pytest.approx(200_000), "the last four stay, whatever their age"


def test_an_acknowledgement_at_the_same_instant_is_no_infinite_rate() -> None:
    link = LinkRate()
    link.posted(1, 100_000, 1.0)
    link.acknowledged(1, 1.0)
    rate = link.bytes_per_s(1.0)
    assert rate is not None
    assert np.isfinite(rate)


# ---- budgets


def test_an_unmeasured_link_is_offered_something_to_measure_it_by() -> None:
    assert LinkRate().budget_bytes(10.0, 0.0) == FIRST_BYTES


def acknowledged_link() -> LinkRate:
    """1 MB/s, measured by one message of 100 kB, idle."""
    link = LinkRate()
    link.posted(1, 100_000, 0.0)
    link.acknowledged(1, 0.1)
    return link


def test_an_idle_link_is_offered_twice_as_much_until_it_has_been_full() -> None:
    link = acknowledged_link()
    assert link.budget_bytes(0.01, 1.0) == 10_000, "no more than it had time for"
    assert link.budget_bytes(0.15, 1.0) == 150_000
    link.posted(2, 10_000, 1.0)
    assert link.room_bytes(0.1, 1.001) > 0
    link.acknowledged(2, 1.01)
    assert link.budget_bytes(0.015, 2.0) == pytest.approx(1.25 * 10_000, rel=0.25), "then it feels its way up"
    assert link.saturated


def test_what_is_under_way_leaves_less_room() -> None:
    link = acknowledged_link()
    assert link.room_bytes(0.1, 1.0) == float("inf")
    link.posted(2, 100_000, 1.0)
    assert link.room_bytes(0.1, 1.0) == pytest.approx(20_000, rel=0.01)
    assert link.room_bytes(0.1, 1.05) == pytest.approx(70_000, rel=0.01)
    assert link.room_bytes(0.1, 1.1) == pytest.approx(120_000, rel=0.01)
    assert link.room_bytes(0.1, 1.5) < 50_000, "it should have arrived long ago: the link has become slower"
    link.posted(3, 100_000, 1.05)
    assert link.room_bytes(0.1, 1.06) == 0.0, "not worth a message"


def test_an_unmeasured_link_gets_nothing_more_before_its_first_message_is_through() -> None:
    link = LinkRate()
    link.posted(1, FIRST_BYTES, 0.0)
    assert link.room_bytes(10.0, 5.0) == 0.0


def test_messages_that_are_noticed_together_make_one_sample() -> None:
    """The second took no time by itself."""
    link = LinkRate()
    for sequence in range(1, 8):
        link.posted(sequence, 100_000, 0.0)
    for pair in (1, 2, 3):
        link.acknowledged(2 * pair - 1, float(pair))
        link.acknowledged(2 * pair, float(pair) + 1e-5)
    link.acknowledged(7, 3.5)
    assert link.bytes_per_s(100.0) == pytest.approx(200_000, rel=0.01)


def measured(*, start_s: float, seconds: float, size_bytes: int) -> LinkRate:
    link = LinkRate()
    for sequence in (1, 2, 3):
        link.posted(sequence, size_bytes, start_s + sequence)
        link.acknowledged(sequence, start_s + sequence + seconds)
    return link


def test_links_that_are_busy_together_share_an_uplink() -> None:
    together = [measured(start_s=0, seconds=0.5, size_bytes=100_000) for _ in range(5)]
    assert uplink_bytes_per_s(together, 4.0) == pytest.approx(1 * MB)
    in_turn = [measured(start_s=0.1 * k, seconds=0.1, size_bytes=100_000) for k in range(5)]
    assert uplink_bytes_per_s(in_turn, 4.0) == pytest.approx(1 * MB)
    assert uplink_bytes_per_s([LinkRate()], 4.0) is None


def test_links_share_an_uplink_also_where_steps_take_long() -> None:
    """Nothing has arrived within the last seconds: what is known of the uplink is still what is known of the links."""
    together = {k: measured(start_s=0, seconds=0.5, size_bytes=100_000) for k in range(5)}
    for now_s in (4.0, 30.0):
        assert uplink_bytes_per_s(together.values(), now_s) == pytest.approx(1 * MB)
    in_turn = {k: measured(start_s=0.1 * k, seconds=0.1, size_bytes=100_000) for k in range(5)}
    assert sum(rooms_bytes(in_turn, 3.0, 30.0).values()) == pytest.approx(1.2 * 3.0 * MB, rel=0.01)


def test_links_of_one_uplink_are_not_all_offered_what_each_has_alone() -> None:
    in_turn = {k: measured(start_s=0.1 * k, seconds=0.1, size_bytes=100_000) for k in range(5)}
    rooms = rooms_bytes(in_turn, 0.1, 4.0)
    assert sum(rooms.values()) == pytest.approx(1.2 * 0.1 * MB, rel=0.01)
    assert max(rooms.values()) == pytest.approx(min(rooms.values()))
    in_turn[0] = measured(start_s=0, seconds=1.0, size_bytes=10_000)
    rooms = rooms_bytes(in_turn, 0.1, 4.0)
    assert rooms[0] < rooms[1] == pytest.approx(rooms[4]), "what one cannot use is for the others"


def test_a_budget_is_rate_times_step() -> None:
    assert acknowledged_link().budget_bytes(3.0, 1.0) == pytest.approx(3 * MB)


def test_small_messages_do_not_shrink_the_next_offer() -> None:
    link = acknowledged_link()
    link.posted(2, wire.HEADER_BYTES, 1.0)
    link.acknowledged(2, 1.1)
    assert link.budget_bytes(0.2, 2.0) == 200_000
