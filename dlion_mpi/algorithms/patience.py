"""The time for which a step waits for the messages of its peers: as long as recent ones took. Pure."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

WORTH = 0.4
"""Share of the patience: a message whose latency takes longer is not waited for. At the default of half a step that is
a fifth of one: to wait longer costs more than a gradient of the same step brings (docs/log.md)."""
RECENT, KNOWN = 16, 4
"""Messages of a peer that tell how long the next one takes, at most and at least."""
DEVIATIONS = 4.0
"""Standard deviations for which a message is waited for beyond the median."""
LEAST = 0.25
"""Share of the patience for which every message is waited for that can be in time."""
STEPS = 64
"""Steps for which the time is kept at which this worker was ready for its peers' messages."""


@dataclass(slots=True)
class Patience:
    """The arrivals of peers' messages as one worker knows them, all by this worker's clock.

    ``lags``: by peer, how many steps late its messages are, because of the latency of the link: 0 if they can arrive in
    time. A worker waits for a message of ``lag`` steps before its own.
    """

    lags: dict[int, int] = field(default_factory=dict)
    _ready_s: dict[int, float] = field(default_factory=dict)
    _delays_s: dict[int, deque[float]] = field(default_factory=dict)

    def expect(self, latencies_s: Mapping[int, float], most_s: float, step_s: float) -> None:
        """Decide whose messages can be in time. ``most_s``: the patience. ``step_s``: a step without waiting."""
        for peer, latency_s in latencies_s.items():
            in_time = latency_s <= WORTH * most_s or not step_s
            lag = 0 if in_time else math.ceil(latency_s / step_s)
            if lag != self.lags.get(peer, 0):
                self._delays_s.pop(peer, None)
            self.lags[peer] = lag

    def ready(self, step: int, now_s: float) -> None:
        """Note that this worker has computed ``step``."""
        self._ready_s[step] = now_s
        while len(self._ready_s) > STEPS:
            del self._ready_s[next(iter(self._ready_s))]

    def arrived(self, peer: int, step: int, now_s: float) -> None:
        """Note that a message of the peer's ``step`` has arrived: how long after the step that waits for it."""
        waited_since_s = self._ready_s.get(step + self.lags.get(peer, 0), now_s)
        self._delays_s.setdefault(peer, deque(maxlen=RECENT)).append(now_s - waited_since_s)

    def longest_s(self, peers: Iterable[int], most_s: float) -> float:
        """The seconds for which a step waits: the median delay and a few deviations, of the peer that needs longest.

        At most ``most_s``, also as long as a peer is not known.
        """
        return min(most_s, max((max(self._usual_s(peer), LEAST * most_s) for peer in peers), default=0.0))

    def _usual_s(self, peer: int) -> float:
        delays_s = self._delays_s.get(peer, ())
        if len(delays_s) < KNOWN:
            return math.inf
        median_s = statistics.median(delays_s)
        deviation_s = 1.5 * statistics.median(abs(delay_s - median_s) for delay_s in delays_s)
        return median_s + DEVIATIONS * deviation_s
