"""A link's rate as its acknowledgements tell it, on simulated links whose rate is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from dlion_mpi import wire
from dlion_mpi.bandwidth import FIRST_BYTES, SMALL_BYTES, LinkRate

MB = 1e6
TICK_S = 1e-3


@dataclass
class Link:
    """A worker that offers a message per step, and a link that carries them one after the other.

    ``rate``: seconds -> bytes per second. ``latency_s``: until the acknowledgement is back. ``most``: what the
    worker has to say at most, in bytes.
    """

    rate: Callable[[float], float]
    step_s: float = 0.1
    latency_s: float = 0.002
    window: int = 2
    most: float = 1e12
    measured: LinkRate = field(default_factory=LinkRate)
    now_s: float = 0.0
    next_step_s: float = 0.0
    offered: list[tuple[float, float]] = field(default_factory=list)
    """(seconds, bytes) of every message."""
    queue: deque[list[float]] = field(default_factory=deque)
    """Of what is on the link: sequence and bytes left."""
    acknowledgements: deque[tuple[float, int]] = field(default_factory=deque)
    """(when it is back, sequence)."""

    def run(self, seconds: float) -> Link:
        """Let so many seconds pass."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            while self.acknowledgements and self.acknowledgements[0][0] <= self.now_s:
                self.measured.acknowledged(self.acknowledgements.popleft()[1], self.now_s)
            if self.now_s >= self.next_step_s:
                self.next_step_s += self.step_s
                self._step()
            self._carry(self.rate(self.now_s) * TICK_S)
            self.now_s += TICK_S
        return self

    def _step(self) -> None:
        if self.measured.unacknowledged() < self.window:
            size = min(self.measured.budget_bytes(self.step_s, self.now_s), self.most)
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
                self.acknowledgements.append((self.now_s + TICK_S + self.latency_s, sequence))

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


def test_headers_tell_nothing_about_the_rate() -> None:
    link = LinkRate()
    link.posted(1, wire.HEADER_BYTES, 0.0)
    link.acknowledged(1, 0.5)
    assert link.bytes_per_s(0.5) is None
    link.posted(2, 100_000, 1.0)
    link.acknowledged(2, 2.0)
    for sequence in range(3, 30):
        link.posted(sequence, wire.HEADER_BYTES, sequence)
        link.acknowledged(sequence, sequence + 0.5)
    assert link.bytes_per_s(30.0) == pytest.approx(100_000)


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
    assert link.budget_bytes(0.01, 1.0) == 200_000
    link.posted(2, 200_000, 1.0)
    assert link.budget_bytes(0.1, 1.1) == pytest.approx(100_000), "not through: rate x time"
    link.acknowledged(2, 1.2)
    assert link.budget_bytes(0.01, 2.0) == pytest.approx(1.25 * 200_000), "then it feels its way up"


def test_a_budget_is_rate_times_step() -> None:
    assert acknowledged_link().budget_bytes(3.0, 1.0) == pytest.approx(3 * MB)


def test_small_messages_do_not_shrink_the_next_offer() -> None:
    link = acknowledged_link()
    link.posted(2, wire.HEADER_BYTES, 1.0)
    link.acknowledged(2, 1.1)
    assert link.budget_bytes(0.01, 2.0) == 200_000
