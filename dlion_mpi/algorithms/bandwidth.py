"""The bandwidth of a link, measured from acknowledgements, and what the link can carry in one step. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

SMALL_BYTES = 1024
"""Messages below this size measure the latency, not the bandwidth."""
MEASURABLE_BYTES = 2048
"""The time of a message of this size tells the link's bandwidth well."""
FIRST_BYTES = 64 * 1024
"""The first budget of a link that has not been measured."""
PROBE = 1.25
"""Factor by which a link is probed: it is offered more than its last message if it was idle before the next one."""
GRAIN_S = 1e-3
"""Arrivals closer than this may have been noticed at the same time, so they make one sample."""
HORIZON = 1.2
"""Bytes that may be in flight, in steps: more than one, so that no link runs dry."""
WORTH_SENDING = 0.2
"""Room of less than this share of a step's bytes counts as none."""
MEMORY_S = 2.0
"""Samples older than this are dropped, so that the estimate follows a changed rate within seconds."""


@dataclass(slots=True)
class LinkRate:
    """The rate of one outgoing link in bytes per second, measured from acknowledgements.

    A message occupies the link from the later of two moments, when it was posted and when the message before it
    arrived, until it arrives itself. Its acknowledgement states the time of arrival: a completed `Isend` means only
    that the bytes are in a local buffer, and the acknowledgement itself may be delayed by other traffic. The latency,
    measured by the fastest small message with nothing before it, does not occupy the link. Times are seconds of the
    run's common clock. Source: DLion (HPDC 2021), per-link prioritized gradient exchange.
    """

    in_flight: deque[tuple[int, int, float]] = field(default_factory=deque)  # sequence, bytes, posted at
    samples: deque[tuple[float, int, float]] = field(default_factory=lambda: deque(maxlen=32))
    arrived_at: float = 0.0
    latency_s: float = math.inf
    last_bytes: int = 0
    last_transit_s: float = 0.0
    saturated: bool = False
    _bytes_per_s: float | None = None
    """The rate of ``samples``; None after they have changed."""

    def posted(self, sequence: int, size_bytes: int, now_s: float) -> None:
        """Note that a message of ``size_bytes`` was handed to the link."""
        self.in_flight.append((sequence, size_bytes, now_s))

    def acknowledged(self, sequence: int, arrived_s: float) -> None:
        """Note that the receiver has everything up to ``sequence``, the last of it since ``arrived_s``."""
        start_s, size_bytes, last = 0.0, 0, None
        while self.in_flight and self.in_flight[0][0] <= sequence:
            _, message_bytes, posted_s = self.in_flight.popleft()
            start_s = posted_s if last is None else start_s
            size_bytes += message_bytes
            last = posted_s
        if last is None:
            return
        if size_bytes < SMALL_BYTES:
            if start_s >= self.arrived_at:  # no message was before it in the queue
                self.latency_s = min(self.latency_s, max(0.0, arrived_s - start_s))
        else:
            self.last_bytes, self.last_transit_s = size_bytes, arrived_s - start_s
            latency_s = self.latency_s if math.isfinite(self.latency_s) else 0.0
            busy_s = max(arrived_s - max(start_s + latency_s, self.arrived_at), 1e-6)
            if self.samples and arrived_s - self.samples[-1][0] < GRAIN_S:
                _, earlier_bytes, earlier_s = self.samples.pop()
                size_bytes, busy_s = size_bytes + earlier_bytes, busy_s + earlier_s
            self.samples.append((arrived_s, size_bytes, busy_s))
            self._bytes_per_s = None
        self.arrived_at = arrived_s

    def unacknowledged(self) -> int:
        """The number of messages of at least SMALL_BYTES that the receiver has not acknowledged."""
        return sum(size_bytes >= SMALL_BYTES for _, size_bytes, _ in self.in_flight)

    def bytes_per_s(self, now_s: float) -> float | None:
        """The rate over the last MEMORY_S seconds, of at least two samples; None before the first sample."""
        while len(self.samples) > 2 and self.samples[0][0] < now_s - MEMORY_S:
            self.samples.popleft()
            self._bytes_per_s = None
        if self._bytes_per_s is None and self.samples:
            self._bytes_per_s = sum(b for _, b, _ in self.samples) / sum(s for _, _, s in self.samples)
        return self._bytes_per_s

    def budget_bytes(self, step_s: float, now_s: float) -> float:
        """The bytes that the link carries in a step of ``step_s`` seconds: rate x time, more if it was idle."""
        rate = self.bytes_per_s(now_s)
        if rate is None:
            return FIRST_BYTES
        if self.unacknowledged() > 0:
            return rate * step_s
        # The last message arrived before the next one was posted. Until the link has been full once, its limit is
        # unknown and the budget doubles. Afterwards the budget grows slowly, as far as the last message left time.
        growth = min(PROBE if self.saturated else 2.0, step_s / max(self.last_transit_s, 1e-6))
        return max(rate * step_s, self.last_bytes * growth)

    def room_bytes(self, step_s: float, now_s: float) -> float:
        """The bytes that the link can take now so that it is busy until the next step, but not much longer.

        HORIZON steps' bytes less those in flight; 0 if that is not worth a message; infinite if nothing is in flight.
        So the queue never grows, however the messages of many steps are spread.
        """
        large = [message for message in self.in_flight if message[1] >= SMALL_BYTES]
        if not large:
            return math.inf
        rate = self.bytes_per_s(now_s)
        if rate is None:
            return 0.0
        _, first_bytes, posted_s = large[0]
        busy_s = max(0.0, now_s - max(posted_s, self.arrived_at))
        if busy_s > step_s:  # an acknowledgement may take a step; a message that takes longer has not arrived
            rate = min(rate, first_bytes / (busy_s - step_s))
        left_bytes = max(0.0, sum(size_bytes for _, size_bytes, _ in large) - rate * busy_s)
        self.saturated = self.saturated or left_bytes > 0
        room_bytes = HORIZON * rate * step_s - left_bytes
        return room_bytes if room_bytes >= WORTH_SENDING * rate * step_s else 0.0


def uplink_bytes_per_s(rates: Iterable[LinkRate], now_s: float) -> float | None:
    """The bytes per second that all links of a worker have carried together while any of them was busy.

    Computed from the samples of the links' rates. None before the first sample.
    """
    samples = [sample for rate in rates if rate.bytes_per_s(now_s) is not None for sample in rate.samples]
    busy_s, until_s = 0.0, -math.inf
    for start_s, end_s in sorted((arrived_s - taken_s, arrived_s) for arrived_s, _, taken_s in samples):
        busy_s += max(0.0, end_s - max(start_s, until_s))
        until_s = max(until_s, end_s)
    return sum(size_bytes for _, size_bytes, _ in samples) / busy_s if samples else None


def rooms_bytes(rates: Mapping[int, LinkRate], step_s: float, now_s: float) -> dict[int, float]:
    """The bytes that each peer's link can take now so that all links are busy until the next step, and not much longer.

    Links may share an uplink, and then each is faster while others are idle. So together they get no more than all of
    them have carried together, in equal parts, except for links that cannot take their part (max-min fairness).
    """
    rooms = {
        peer: min(rate.budget_bytes(step_s, now_s), rate.room_bytes(step_s, now_s)) for peer, rate in rates.items()
    }
    together = uplink_bytes_per_s(rates.values(), now_s)
    if together is None:
        return rooms
    left_bytes, others = HORIZON * together * step_s, len(rooms)
    for peer, room in sorted(rooms.items(), key=lambda item: item[1]):
        rooms[peer] = min(room, left_bytes / others)
        left_bytes -= rooms[peer]
        others -= 1
    return rooms
