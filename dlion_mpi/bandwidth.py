"""How fast a link is, from what its receiver acknowledges, and what it can carry in one step. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

SMALL_BYTES = 1024
"""Messages below this tell about latency, not about bandwidth, and are not sampled."""
FIRST_BYTES = 64 * 1024
"""What an unmeasured link is offered first."""
PROBE = 1.25
"""A link that was idle before the next message came may be faster than measured: it is offered so much more."""
MEMORY_S = 2.0
"""Samples older than this are forgotten, so that a rate that changes is followed within seconds."""


@dataclass(slots=True)
class LinkRate:
    """The rate of one outgoing link in bytes per second, measured from acknowledgements.

    A message occupies the link from when it was posted, or from when the message before it was acknowledged,
    to its own acknowledgement: an `Isend` that completes says only that the bytes are in a local buffer.
    Times are seconds of any one clock. Source: DLion, section 2 (bandwidth is measured, not configured).
    """

    in_flight: deque[tuple[int, int, float]] = field(default_factory=deque)  # sequence, bytes, posted at
    samples: deque[tuple[float, int, float]] = field(default_factory=lambda: deque(maxlen=32))
    acknowledged_at: float = 0.0
    last_bytes: int = 0
    saturated: bool = False

    def posted(self, sequence: int, size_bytes: int, now_s: float) -> None:
        """A message of ``size_bytes`` was handed to the link."""
        self.in_flight.append((sequence, size_bytes, now_s))
        if size_bytes >= SMALL_BYTES:
            self.last_bytes = size_bytes

    def acknowledged(self, sequence: int, now_s: float) -> None:
        """The receiver has everything up to ``sequence``."""
        start_s, size_bytes, last = 0.0, 0, None
        while self.in_flight and self.in_flight[0][0] <= sequence:
            _, message_bytes, posted_s = self.in_flight.popleft()
            start_s = posted_s if last is None else start_s
            size_bytes += message_bytes
            last = posted_s
        if last is None:
            return
        busy_s = now_s - max(start_s, self.acknowledged_at)
        self.acknowledged_at = now_s
        if size_bytes >= SMALL_BYTES:
            self.samples.append((now_s, size_bytes, max(busy_s, 1e-6)))

    def unacknowledged(self) -> int:
        """Messages large enough to fill the link that the receiver has not acknowledged."""
        return sum(size_bytes >= SMALL_BYTES for _, size_bytes, _ in self.in_flight)

    def bytes_per_s(self, now_s: float) -> float | None:
        """The rate over the last MEMORY_S seconds (at least two samples), or None before the first."""
        while len(self.samples) > 2 and self.samples[0][0] < now_s - MEMORY_S:
            self.samples.popleft()
        if not self.samples:
            return None
        return sum(b for _, b, _ in self.samples) / sum(s for _, _, s in self.samples)

    def budget_bytes(self, step_s: float, now_s: float) -> float:
        """What to offer for the next step of ``step_s`` seconds: rate x time, more if the link stood idle."""
        rate = self.bytes_per_s(now_s)
        if rate is None:
            return FIRST_BYTES
        if self.unacknowledged() > 0:
            self.saturated = True
            return rate * step_s
        # The last message was through before the next one was there. Until the link has been full once, its
        # limit is unknown and the offer doubles; afterwards it feels its way up.
        return max(rate * step_s, self.last_bytes * (PROBE if self.saturated else 2.0))
