"""The rate and latency of links as their acknowledgements tell them, on simulated links whose values are known."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlion_mpi import wire
from dlion_mpi.algorithms.bandwidth import FIRST_BYTES, PROBE_S, SMALL_BYTES, LinkRate, rooms_bytes, uplink_bytes_per_s

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
    """Of what is on the link: sequence, bytes left, and when the first of them was carried."""
    acknowledgements: deque[tuple[float, tuple[int, float, float]]] = field(default_factory=deque)
    """(when it is back, (sequence, when the message arrived, seconds after its probe))."""
    ages: list[float] = field(default_factory=list)
    """Seconds from offer to arrival, of every message."""

    def run(self, seconds: float) -> Link:
        """Let so many seconds pass."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            while self.acknowledgements and self.acknowledgements[0][0] <= self.now_s:
                self.measured.acknowledged(*self.acknowledgements.popleft()[1], self.now_s)
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
            probed = self.measured.is_probe_due(int(size), self.now_s)
            self.measured.posted(len(self.offered), int(size), self.now_s, probed=probed)
            self.queue.append([len(self.offered), size, np.inf])

    def _carry(self, capacity: float) -> None:
        while self.queue and capacity > 0:
            rate = self.rate(self.now_s)
            carried = min(capacity, self.queue[0][1])
            moment_s = self.now_s + TICK_S - capacity / rate
            self.queue[0][1] -= carried
            self.queue[0][2] = min(self.queue[0][2], moment_s)
            capacity -= carried
            if self.queue[0][1] <= 0:
                sequence, _, began_s = self.queue.popleft()
                arrived_s = moment_s + carried / rate + self.latency_s
                self.ages.append(arrived_s - self.offered[int(sequence) - 1][0])
                answer = int(sequence), arrived_s, arrived_s - began_s - self.latency_s
                self.acknowledgements.append((arrived_s + self.back_s, answer))

    def estimate(self) -> float:
        rate = self.measured.bytes_per_s
        assert rate is not None
        return rate

    def carried_per_s(self, since_s: float) -> float:
        return sum(size for at_s, size in self.offered if at_s >= since_s) / (self.now_s - since_s)


@pytest.mark.parametrize("rate", [0.5 * MB, 2 * MB, 20 * MB])
def test_it_converges_to_the_link_s_rate(rate: float) -> None:
    link = Link(lambda s: rate).run(5)
    assert link.estimate() == pytest.approx(rate, rel=0.1)
    assert link.measured.budget_bytes(link.step_s) == pytest.approx(rate * link.step_s, rel=0.1)


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
    assert link.measured.budget_bytes(link.step_s) >= 50_000
    assert link.estimate() == pytest.approx(10 * MB, rel=0.4)  # latency is part of every sample


# ---- samples, one by one


def exchanged(
    link: LinkRate, sequence: int, size_bytes: int, posted_s: float, seconds: float, *, latency_s: float = 0.0
) -> None:
    """A probe and its message that take this long, and their acknowledgement."""
    link.posted(sequence, size_bytes, posted_s, probed=True)
    arrived_s = posted_s + latency_s + seconds
    link.acknowledged(sequence, arrived_s, seconds, arrived_s + latency_s)


def test_the_time_behind_its_probe_tells_the_rate() -> None:
    link = LinkRate()
    assert link.bytes_per_s is None
    link.posted(1, 100_000, 1.0, probed=True)
    assert link.bytes_per_s is None
    link.acknowledged(1, 9.9, 0.5, 1.7)
    assert link.bytes_per_s == pytest.approx(200_000)
    assert link.latency_s == pytest.approx(0.1)


def test_a_message_without_a_probe_tells_nothing_and_a_header_has_none() -> None:
    link = LinkRate()
    assert not link.is_probe_due(SMALL_BYTES - 1, 5.0)
    link.posted(1, 100_000, 1.0)
    link.acknowledged(1, 1.5, 0.0, 1.5)
    assert link.bytes_per_s is None
    assert link.is_probe_due(SMALL_BYTES, 5.0)
    exchanged(link, 2, 100_000, 5.0, 0.5)
    assert not link.is_probe_due(SMALL_BYTES, 5.0 + 0.5 * PROBE_S)
    assert link.is_probe_due(SMALL_BYTES, 5.0 + 1.01 * PROBE_S)


def test_an_acknowledgement_covers_everything_before_it() -> None:
    link = LinkRate()
    for sequence in (1, 2, 3):
        link.posted(sequence, 100_000, 0.0)
    link.acknowledged(2, 2.0, 0.0, 2.0)
    assert link.unacknowledged() == 1
    link.acknowledged(2, 2.5, 0.0, 2.5)
    link.acknowledged(1, 2.5, 0.0, 2.5)
    assert link.unacknowledged() == 1
    link.acknowledged(3, 3.0, 0.0, 3.0)
    assert link.unacknowledged() == 0


def test_only_messages_that_fill_the_link_count_for_the_window() -> None:
    link = LinkRate()
    link.posted(1, SMALL_BYTES - 1, 0.0)
    assert link.unacknowledged() == 0
    link.posted(2, SMALL_BYTES, 0.0)
    assert link.unacknowledged() == 1
    link.acknowledged(1, 0.1, 0.0, 0.1)
    assert link.unacknowledged() == 1
    link.acknowledged(2, 0.2, 0.0, 0.2)
    assert link.unacknowledged() == 0


def test_a_probe_that_queued_tells_the_rate_and_nothing_about_the_latency() -> None:
    link = LinkRate()
    exchanged(link, 1, 100_000, 0.0, 0.1, latency_s=0.01)
    for sequence in range(2, 20):  # each waits for the one before it
        link.posted(sequence, 100_000, 0.1 * sequence, probed=True)
        if sequence > 2:
            link.acknowledged(sequence - 1, 0.1 * (sequence + 1), 0.1, 0.1 * (sequence + 1) + 0.01)
    assert link.bytes_per_s == pytest.approx(1e6)
    assert link.latency_s == pytest.approx(0.01)


def test_old_samples_are_forgotten() -> None:
    link = LinkRate()
    for sequence in range(1, 11):
        exchanged(link, sequence, 100_000, float(sequence), 0.1 if sequence <= 5 else 0.5)
    assert link.bytes_per_s == pytest.approx(200_000)
    for sequence in (11, 12):
        exchanged(link, sequence, 100_000, 100.0 * sequence, 1.0)
    assert link.bytes_per_s == pytest.approx(100_000), "the last two stay, whatever their age"


def test_what_arrives_at_the_same_instant_as_its_probe_is_no_infinite_rate() -> None:
    link = LinkRate()
    exchanged(link, 1, 100_000, 1.0, 0.0)
    assert link.bytes_per_s is not None
    assert np.isfinite(link.bytes_per_s)


# ---- budgets


def test_an_unmeasured_link_is_offered_something_to_measure_it_by() -> None:
    assert LinkRate().budget_bytes(10.0) == FIRST_BYTES


def acknowledged_link() -> LinkRate:
    """1 MB/s, measured by one message of 100 kB, idle."""
    link = LinkRate()
    exchanged(link, 1, 100_000, 0.0, 0.1)
    return link


def test_an_idle_link_is_offered_twice_as_much_until_it_has_been_full() -> None:
    link = acknowledged_link()
    assert link.budget_bytes(0.01) == 10_000, "no more than it had time for"
    assert link.budget_bytes(0.15) == 150_000
    link.posted(2, 10_000, 1.0, probed=True)
    assert link.room_bytes(0.1, 1.001) > 0
    link.acknowledged(2, 1.01, 0.01, 1.01)
    assert link.budget_bytes(0.015) == pytest.approx(1.25 * 10_000, rel=0.25), "then it feels its way up"
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


def measured(*, start_s: float, seconds: float, size_bytes: int) -> LinkRate:
    link = LinkRate()
    for sequence in (1, 2, 3):
        exchanged(link, sequence, size_bytes, start_s + sequence, seconds)
    return link


def test_links_that_are_busy_together_share_an_uplink() -> None:
    together = [measured(start_s=0, seconds=0.5, size_bytes=100_000) for _ in range(5)]
    assert uplink_bytes_per_s(together) == pytest.approx(1 * MB)
    in_turn = [measured(start_s=0.1 * k, seconds=0.1, size_bytes=100_000) for k in range(5)]
    assert uplink_bytes_per_s(in_turn) == pytest.approx(1 * MB)
    assert uplink_bytes_per_s([LinkRate()]) is None


def test_links_share_an_uplink_also_where_steps_take_long() -> None:
    """Nothing has arrived within the last seconds: what is known of the uplink is still what is known of the links."""
    together = {k: measured(start_s=0, seconds=0.5, size_bytes=100_000) for k in range(5)}
    assert uplink_bytes_per_s(together.values()) == pytest.approx(1 * MB)
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
    assert acknowledged_link().budget_bytes(3.0) == pytest.approx(3 * MB)


def test_small_messages_do_not_shrink_the_next_offer() -> None:
    link = acknowledged_link()
    link.posted(2, wire.HEADER_BYTES, 1.0)
    link.acknowledged(2, 1.1, 0.0, 1.1)
    assert link.budget_bytes(0.2) == 200_000


# ---- latency, jitter, clocks


@dataclass
class Clock:
    """A clock that runs ``ppm`` too fast, and jumps by ``jump_s`` at ``at_s``."""

    offset_s: float = 0.0
    ppm: float = 0.0
    jump_s: float = 0.0
    at_s: float = math.inf

    def reads(self, true_s: float) -> float:
        return self.offset_s + true_s * (1 + 1e-6 * self.ppm) + (self.jump_s if true_s >= self.at_s else 0.0)


@dataclass
class Path:
    """One link, and the way back of its acknowledgements; both vary by ``jitter`` of ``latency_s``, in order."""

    bytes_per_s: float
    latency_s: float
    jitter: float = 0.0
    here: Clock = field(default_factory=Clock)
    there: Clock = field(default_factory=Clock)
    measured: LinkRate = field(default_factory=LinkRate)
    random: random.Random = field(default_factory=lambda: random.Random(7))
    free_s: float = 0.0
    arrived_s: float = 0.0
    back_s: float = 0.0
    sequence: int = 0
    answers: deque[tuple[float, int, float, float]] = field(default_factory=deque)

    def _delay_s(self) -> float:
        return self.latency_s * (1 + self.jitter * self.random.uniform(-1, 1))

    def _carry(self, size_bytes: int) -> float:
        self.free_s += size_bytes / self.bytes_per_s
        self.arrived_s = max(self.arrived_s, self.free_s + self._delay_s())
        return self.arrived_s

    def listen(self, true_s: float) -> None:
        """Take the acknowledgements that are back."""
        while self.answers and self.answers[0][0] <= true_s:
            back_s, sequence, arrived_s, took_s = self.answers.popleft()
            self.measured.acknowledged(sequence, arrived_s, took_s, self.here.reads(back_s))

    def send(self, size_bytes: int, true_s: float) -> None:
        """Post a message, with its probe if one is due."""
        now_s = self.here.reads(true_s)
        self.free_s = max(self.free_s, true_s)
        self.sequence += 1
        probed = self.measured.is_probe_due(size_bytes, now_s)
        self.measured.posted(self.sequence, size_bytes, now_s, probed=probed)
        probe_s = self._carry(wire.HEADER_BYTES) if probed else None
        arrived_s = self._carry(size_bytes)
        took_s = 0.0 if probe_s is None else self.there.reads(arrived_s) - self.there.reads(probe_s)
        self.back_s = max(self.back_s, arrived_s + self._delay_s())
        self.answers.append((self.back_s, self.sequence, self.there.reads(arrived_s), took_s))

    def exchange(self, size_bytes: int, *, every_s: float, messages: int, from_s: float = 0.0) -> float:
        """Send so many messages. Returns the true time after the last one's acknowledgement."""
        self.free_s = max(self.free_s, from_s)
        for k in range(messages):
            self.listen(from_s + k * every_s)
            self.send(size_bytes, from_s + k * every_s)
        self.listen(math.inf)
        return self.back_s


WEEK_S = 7 * 24 * 3600.0
MBIT = 1e6 / 8

latencies = st.sampled_from([0.0, 0.001, 0.005, 0.02, 0.05, 0.1, 0.2])
rates = st.floats(0, 3).map(lambda power: 10**power * MBIT)
sizes = st.floats(3.1, 8).map(lambda power: int(10**power))
skews = st.builds(Clock, offset_s=st.floats(-5, 5), ppm=st.floats(-50, 50))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rate=rates, latency_s=latencies, size_bytes=sizes, here=skews, there=skews, start=st.sampled_from([0.0, WEEK_S]))
def test_rate_and_latency_are_right_whatever_the_latency_the_size_and_the_clocks(
    rate: float, latency_s: float, size_bytes: int, here: Clock, there: Clock, start: float
) -> None:
    path = Path(rate, latency_s, here=here, there=there)
    for from_s in (0.0, start):  # the same link a week later, too
        seconds = size_bytes / rate
        path.exchange(size_bytes, every_s=0.5 + 1.3 * seconds, messages=10, from_s=from_s)
        assert path.measured.bytes_per_s == pytest.approx(rate, rel=0.01)
        drifted_s = 100e-6 * seconds  # a round trip less the message, by two clocks
        assert path.measured.latency_s == pytest.approx(latency_s, rel=0.01, abs=1e-3 + drifted_s)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rate=rates, latency_s=latencies, here=skews, there=skews, seed=st.integers(0, 1000))
def test_with_jitter_they_are_within_a_tenth_once_messages_are_large_enough_to_tell(
    rate: float, latency_s: float, here: Clock, there: Clock, seed: int
) -> None:
    """A sender of the size that the link asks for. Delays are independent, which is harsh: two parcels that follow
    each other are usually delayed alike."""
    path, true_s = Path(rate, latency_s, 0.2, here, there, random=random.Random(seed)), 0.0
    for _ in range(200):
        size_bytes = int(path.measured.measurable_bytes)
        true_s = path.exchange(size_bytes, every_s=0.3, messages=1, from_s=true_s + 0.3)
    assert path.measured.bytes_per_s == pytest.approx(rate, rel=0.1)
    assert path.measured.latency_s == pytest.approx(latency_s, rel=0.1, abs=1e-3)


@pytest.mark.parametrize("jump_s", [-1.0, 1.0])
@pytest.mark.parametrize("end", ["here", "there"])
@pytest.mark.parametrize("latency_s", [0.0, 0.02, 0.2])
def test_a_clock_that_jumps_by_a_second_spoils_one_message_at_most(jump_s: float, end: str, latency_s: float) -> None:
    path = Path(2 * MB, latency_s)
    setattr(path, end, Clock(jump_s=jump_s, at_s=10.05 + latency_s))
    true_s = path.exchange(100_000, every_s=0.5, messages=30)
    true_s = path.exchange(100_000, every_s=0.5, messages=20, from_s=true_s + 0.5)
    assert path.measured.bytes_per_s == pytest.approx(2 * MB, rel=0.01)
    assert path.measured.latency_s == pytest.approx(latency_s, rel=0.01, abs=1e-3)
    path.send(200_000, true_s + 1.0)
    room_bytes = path.measured.room_bytes(0.1, path.here.reads(true_s + 1.0 + 0.05))
    assert room_bytes == pytest.approx(1.2 * 200_000 - (200_000 - 100_000), rel=0.15)


@pytest.mark.parametrize("ppm", [-50.0, 0.0, 50.0])
@pytest.mark.parametrize("latency_s", [0.0, 0.05, 0.2])
def test_a_link_that_is_kept_full_for_hours_stays_full_and_does_not_queue(ppm: float, latency_s: float) -> None:
    path, step_s = Path(2 * MB, latency_s, there=Clock(ppm=ppm)), 5.0
    carried, waits = 0, []
    for k in range(4000):  # 5.5 hours
        true_s = k * step_s
        path.listen(true_s)
        room = min(path.measured.room_bytes(step_s, path.here.reads(true_s)), path.measured.budget_bytes(step_s))
        if room > 0:
            waits.append(max(0.0, path.free_s - true_s))
            path.send(int(room), true_s)
            carried += int(room) if k > 1000 else 0
    assert carried / (3000 * step_s) > 0.97 * 2 * MB
    assert np.percentile(waits, 99) < 0.5 * step_s


def test_a_small_model_on_a_fast_far_link_is_never_held_back_by_what_cannot_be_measured() -> None:
    """A message of 3 kB takes 24 microseconds, and the latency varies by 40 milliseconds."""
    path = Path(1000 * MBIT, 0.2, 0.2)
    true_s = 0.0
    for _ in range(200):
        true_s += 0.5
        path.listen(true_s)
        assert path.measured.budget_bytes(0.5) >= 3000
        path.send(3000, true_s)
