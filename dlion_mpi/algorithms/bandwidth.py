"""The rate and the latency of a link, measured from acknowledgements, and what it can carry in one step. Pure."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

SMALL_BYTES = 1024
"""Messages below this size occupy no link: they count for no window, and no probe goes ahead of them."""
MEASURABLE_BYTES = 2048
"""The time of a message of this size tells the rate of a link whose latency does not vary."""
FIRST_BYTES = 64 * 1024
"""The first budget of a link that has not been measured."""
GROWTH = 1.25
"""Factor by which the budget of a link grows if it was idle before the next message; 2 until it has been full once."""
HORIZON = 1.2
"""Bytes that may be in flight, in steps: more than one, so that no link runs dry."""
WORTH_SENDING = 0.2
"""Room of less than this share of a step's bytes counts as none."""
MEMORY_S = 2.0
"""Samples older than this are dropped if the others suffice, so that the rate follows a change within seconds."""
PROBE_S = 0.05
"""Shortest time between two probes of a link."""
PRECISION = 0.02
"""Standard error of a rate, as a share of it, for which older samples are kept."""
DISTINCT = 6.0
"""A message tells the rate if its bytes take this many times longer than the latency varies."""
OFFSETS = 4
"""Idle probes of which the fastest tells how far apart the two clocks read."""
RENEWAL_STEPS = 200
"""A link that is never idle is let run dry after this many steps: two clocks, 50 ppm apart, have then moved by a
hundredth of a step."""
LEAST_S = 1e-6
"""Shortest time of a sample: a probe and its message may be noticed at the same instant."""


class Sent(NamedTuple):
    """A message in flight. ``idle``: the link was empty when it was posted. ``probed``: a probe went ahead of it."""

    sequence: int
    size_bytes: int
    posted_s: float
    idle: bool
    probed: bool


class Sample(NamedTuple):
    """``size_bytes`` that occupied the link for ``seconds``, until ``left_s`` of the sender's clock."""

    left_s: float
    size_bytes: int
    seconds: float


@dataclass(slots=True)
class LinkRate:
    """The rate and the latency of one outgoing link.

    At most every PROBE_S a *probe*, a bare header, goes right ahead of a message. The message arrives later than its
    probe by its bytes over the rate, whatever the latency and the queue. The receiver's clock alone measures that time,
    and the acknowledgement brings it back. What the round trip takes beyond it, by the sender's clock, is twice the
    latency, if the link was idle. So no measure depends on two clocks that agree. To tell how much of a message is
    still on its way, the receiver's times are converted by the fastest of the last few idle probes, which is renewed
    all the time.

    A completed `Isend` means only that the bytes are in a local buffer, and an acknowledgement may be delayed by other
    traffic: hence the receiver's times. Source: packet pairs (S. Keshav, SIGCOMM 1991); windows and patience, ours.
    """

    in_flight: deque[Sent] = field(default_factory=deque)
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=128))
    transits_s: deque[float] = field(default_factory=lambda: deque(maxlen=32))
    """From an idle probe's post, by the sender's clock, to its arrival, by the receiver's."""
    round_trips_s: deque[float] = field(default_factory=lambda: deque(maxlen=32))
    """Of idle probes, by the sender's clock."""
    left_s: float = -math.inf
    """When the newest acknowledged message had left the link, by the sender's clock."""
    probed_s: float = -math.inf
    idle_s: float = -math.inf
    """When the newest idle probe was posted."""
    saturated: bool = False
    bytes_per_s: float | None = None
    """The rate of ``samples``; None before the first."""
    noise_s: float = 0.0
    """How much the latency varies from probe to probe: the median difference."""

    def is_probe_due(self, size_bytes: int, now_s: float) -> bool:
        """Whether a probe goes ahead of a message of ``size_bytes``."""
        return size_bytes >= SMALL_BYTES and now_s - self.probed_s >= PROBE_S

    def posted(self, sequence: int, size_bytes: int, now_s: float, *, probed: bool = False) -> None:
        """Note that a message of ``size_bytes`` was handed to the link."""
        idle = self.unacknowledged() == 0
        self.in_flight.append(Sent(sequence, size_bytes, now_s, idle, probed))
        if probed:
            self.probed_s = now_s
            if idle:
                self.idle_s = now_s

    def acknowledged(self, sequence: int, arrived_s: float, took_s: float, now_s: float) -> None:
        """Note that the receiver has everything up to ``sequence``.

        ``arrived_s``: when the last of it arrived, and ``took_s``: how long after its probe, by the receiver's clock.
        """
        sent = None
        while self.in_flight and self.in_flight[0].sequence <= sequence:
            sent = self.in_flight.popleft()
        if sent is None:
            return
        took_s = max(took_s, LEAST_S)
        if sent.probed and sent.idle:
            self.transits_s.append(arrived_s - took_s - sent.posted_s)
            self.round_trips_s.append(max(0.0, now_s - sent.posted_s - took_s))
        if not self.transits_s:
            self.transits_s.append(arrived_s - now_s)
        if arrived_s - self._apart_s > now_s:  # one of the clocks has jumped: nothing arrives after its acknowledgement
            self.transits_s.clear()
            self.transits_s.append(arrived_s - now_s)
        self.noise_s = _noise(self.transits_s)
        self.left_s = min(max(arrived_s - self._apart_s, sent.posted_s), now_s)
        if sent.probed:
            self._add(Sample(self.left_s, sent.size_bytes, took_s))

    def unacknowledged(self) -> int:
        """The number of messages of at least SMALL_BYTES that the receiver has not acknowledged."""
        return sum(sent.size_bytes >= SMALL_BYTES for sent in self.in_flight)

    @property
    def latency_s(self) -> float:
        """Seconds from when the last byte of a message leaves until it arrives: half a round trip; 0 before the first.

        Of recent round trips the one that two fifths are faster than: an acknowledgement may have waited for others.
        """
        round_trips_s = sorted(self.round_trips_s)
        return round_trips_s[2 * len(round_trips_s) // 5] / 2 if round_trips_s else 0.0

    @property
    def measurable_bytes(self) -> float:
        """The size of a message whose time tells the rate. Twice the last size if that was not enough."""
        if self.bytes_per_s is None or not self.noise_s:
            return MEASURABLE_BYTES
        return max(MEASURABLE_BYTES, DISTINCT * self.noise_s * self.bytes_per_s, self._doubled_bytes)

    def budget_bytes(self, step_s: float) -> float:
        """The bytes that the link carries in a step of ``step_s`` seconds: rate x time, more if it was idle."""
        rate = self.bytes_per_s
        if rate is None:
            return FIRST_BYTES
        if self.unacknowledged() > 0:
            return max(rate * step_s, self._doubled_bytes)
        # The last message arrived before the next one was posted. Until the link has been full once, its limit is
        # unknown and the budget doubles. Afterwards the budget grows slowly, as far as the last message left time.
        last = self.samples[-1]
        growth = min(GROWTH if self.saturated else 2.0, step_s / last.seconds)
        return max(rate * step_s, last.size_bytes * growth)

    def room_bytes(self, step_s: float, now_s: float) -> float:
        """The bytes that the link can take now so that it is busy until the next step, but not much longer.

        HORIZON steps' bytes less those that have not left the link; 0 if that is not worth a message; infinite if
        nothing is in flight. So the queue never grows, however the messages of many steps are spread.
        """
        large = [sent for sent in self.in_flight if sent.size_bytes >= SMALL_BYTES]
        if not large:
            return math.inf
        rate = self.bytes_per_s
        if rate is None or now_s - self.idle_s > RENEWAL_STEPS * step_s:
            return 0.0
        busy_s = max(0.0, now_s - max(large[0].posted_s, self.left_s))
        # An acknowledgement takes a round trip, and may take a step more. After that the message has not arrived.
        overdue_s = busy_s - step_s - 2 * self.latency_s
        if overdue_s > 0:
            rate = min(rate, large[0].size_bytes / overdue_s)
        left_bytes = max(0.0, sum(sent.size_bytes for sent in large) - rate * busy_s)
        self.saturated = self.saturated or left_bytes > 0
        room_bytes = HORIZON * rate * step_s - left_bytes
        return room_bytes if room_bytes >= WORTH_SENDING * rate * step_s else 0.0

    @property
    def _apart_s(self) -> float:
        """The difference of a receiver's time and the sender's time at which the same message left the link."""
        return min(list(self.transits_s)[-OFFSETS:])

    @property
    def _doubled_bytes(self) -> float:
        """Twice the last message, if the latency varies too much to tell the rate by messages like the recent ones."""
        recent = list(self.samples)[-OFFSETS:]
        vague = sum(sample.seconds for sample in recent) < DISTINCT / 2 * self.noise_s * len(recent)
        return 2.0 * recent[-1].size_bytes if vague else 0.0

    def _add(self, sample: Sample) -> None:
        """Add a sample, drop those that are too old, and compute the rate."""
        samples = self.samples
        samples.append(sample)
        seconds = sum(sample.seconds for sample in samples)
        while len(samples) > 2 and samples[0].left_s < sample.left_s - MEMORY_S:
            rest_s = seconds - samples[0].seconds
            if self.noise_s * math.sqrt(2 * (len(samples) - 1)) > PRECISION * rest_s:
                break
            samples.popleft()
            seconds = rest_s
        self.bytes_per_s = sum(sample.size_bytes for sample in samples) / sum(sample.seconds for sample in samples)


def _noise(transits_s: Iterable[float]) -> float:
    """Return the median difference of neighbours: neither drift nor a jump of a clock counts."""
    differences_s = [abs(later - earlier) for earlier, later in pairwise(transits_s)]
    return statistics.median(differences_s) if len(differences_s) > 2 else 0.0


def uplink_bytes_per_s(rates: Iterable[LinkRate]) -> float | None:
    """The bytes per second that all links of a worker have carried together while any of them was busy.

    Computed from the samples of the links' rates. None before the first sample.
    """
    samples = [sample for rate in rates for sample in rate.samples]
    busy_s, until_s = 0.0, -math.inf
    for start_s, end_s in sorted((sample.left_s - sample.seconds, sample.left_s) for sample in samples):
        busy_s += max(0.0, end_s - max(start_s, until_s))
        until_s = max(until_s, end_s)
    return sum(sample.size_bytes for sample in samples) / busy_s if samples else None


def rooms_bytes(rates: Mapping[int, LinkRate], step_s: float, now_s: float) -> dict[int, float]:
    """The bytes that each peer's link can take now so that all links are busy until the next step, and not much longer.

    Links may share an uplink, and then each is faster while others are idle. So together they get no more than all of
    them have carried together, in equal parts, except for links that cannot take their part (max-min fairness).
    """
    rooms = {peer: min(rate.budget_bytes(step_s), rate.room_bytes(step_s, now_s)) for peer, rate in rates.items()}
    together = uplink_bytes_per_s(rates.values())
    if together is None:
        return rooms
    left_bytes, others = HORIZON * together * step_s, len(rooms)
    for peer, room in sorted(rooms.items(), key=lambda item: item[1]):
        rooms[peer] = min(room, left_bytes / others)
        left_bytes -= rooms[peer]
        others -= 1
    return rooms
