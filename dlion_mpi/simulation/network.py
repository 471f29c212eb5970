"""Discrete events in virtual time, and a network with finite rates. Uses no wall clock and no randomness.

Simulates the micro-clouds of docs/environments.md.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from dlion_mpi.microcloud.environments import Environment, Phase

PAYLOAD_SHARE = 0.949
"""Payload of MPI as a fraction of the set rate. Headers take 4.4 %; TCP acknowledgements of the opposite direction take
the rest. Mean over emulated links (`benchmarks/results/emulate.json`)."""
RESOLUTION_S = 1e-9
"""Transfers that end within a nanosecond of each other end together, so that rounding cannot separate them."""

Deliver = Callable[[Any], None]


class Events:
    """Event queue in virtual seconds. Events at the same time run in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Call ``action`` at ``time_s``, which must not be in the past."""
        heapq.heappush(self._heap, (time_s, next(self._order), action))

    def run(self, ended: Callable[[], bool]) -> None:
        """Process events until ``ended()`` is true or the queue is empty."""
        while self._heap and not ended():
            self.now_s, _, action = heapq.heappop(self._heap)
            action()


class Stream:
    """Messages from one worker to another, first in first out, as in a TCP connection.

    ``latency_s``: from when the last byte of a message has been transferred until it is delivered.
    """

    __slots__ = ("latency_s", "medium", "queue")

    def __init__(self, latency_s: float = 0.0) -> None:
        self.latency_s = latency_s
        self.medium: Medium | None = None
        self.queue: deque[tuple[float, Deliver, Any]] = deque()

    def send(self, size_bytes: float, deliver: Deliver, parcel: Any) -> None:
        """Call ``deliver(parcel)`` when another ``size_bytes`` have been transferred."""
        self.queue.append((size_bytes, deliver, parcel))
        if len(self.queue) == 1:
            assert self.medium is not None
            self.medium.add(self, size_bytes)


class Medium:
    """A rate in payload bytes per second, shared evenly by the streams that have data to send.

    With even shares every busy stream transfers the same number of bytes. One counter, the bytes per stream since the
    medium was idle, describes the progress of all streams: a message ends when the counter has grown by its size. A
    stream that begins or ends costs O(log streams).
    """

    def __init__(self, events: Events, bytes_per_s: float) -> None:
        self._events = events
        self._bytes_per_s = bytes_per_s
        self._served = 0.0
        self._served_at_s = 0.0
        self._busy: list[tuple[float, int, Stream]] = []  # heap, by the counter at the end of the first message
        self._order = itertools.count()
        self._due_s = math.inf

    def add(self, stream: Stream, size_bytes: float) -> None:
        """Add an idle stream with a message of ``size_bytes``."""
        self._serve()
        heapq.heappush(self._busy, (self._served + size_bytes, next(self._order), stream))
        if self._busy[0][2] is stream:  # otherwise the next end is only delayed, and `_finish` reschedules it
            self._schedule()

    def release(self) -> list[tuple[Stream, float]]:
        """Remove all streams. Returns the busy ones, each with the bytes left of its first message."""
        self._serve()
        busy, self._busy, self._due_s = sorted(self._busy), [], math.inf
        return [(stream, max(0.0, end - self._served)) for end, _, stream in busy]

    def _serve(self) -> None:
        """Update ``_served`` to the current time."""
        now_s = self._events.now_s
        if now_s == self._served_at_s:
            return
        if self._busy:
            self._served += (now_s - self._served_at_s) * self._bytes_per_s / len(self._busy)
        else:
            self._served = 0.0
        self._served_at_s = now_s

    def _schedule(self) -> None:
        """Schedule `_finish` for the end of the next message, or earlier."""
        if not self._busy:
            return
        left = max(0.0, self._busy[0][0] - self._served)
        due_s = self._served_at_s + left * len(self._busy) / self._bytes_per_s
        if due_s < self._due_s:
            self._due_s = due_s
            self._events.at(due_s, self._finish)

    def _finish(self) -> None:
        """Deliver the messages that have ended. There may be none if streams were added after it was scheduled."""
        if self._events.now_s != self._due_s:
            return  # an earlier call was scheduled later
        self._due_s = math.inf
        self._serve()
        busy = self._busy
        reach = self._served + RESOLUTION_S * self._bytes_per_s / len(busy)
        ended: dict[float, list[tuple[Deliver, Any]]] = {}  # by latency
        while busy and busy[0][0] <= reach:
            end, order, stream = busy[0]
            _, deliver, parcel = stream.queue.popleft()
            if stream.queue:
                heapq.heapreplace(busy, (end + stream.queue[0][0], order, stream))
            else:
                heapq.heappop(busy)
            ended.setdefault(stream.latency_s, []).append((deliver, parcel))
        self._schedule()
        for latency_s, parcels in ended.items():
            if latency_s:
                self._events.at(self._events.now_s + latency_s, partial(_deliver, parcels))
            else:
                _deliver(parcels)


def _deliver(ended: list[tuple[Deliver, Any]]) -> None:
    for deliver, parcel in ended:
        deliver(parcel)


class Network:
    """All streams of a micro-cloud. A new phase changes the rates of messages in flight too.

    ``run_seconds``: planned length of the run, for phases given as shares of it; None if unknown.
    """

    def __init__(self, environment: Environment, events: Events, run_seconds: float | None) -> None:
        self._environment = environment
        self._events = events
        workers = range(environment.workers)
        self._streams = {(a, b): Stream(environment.latency_of(a, b)) for a in workers for b in workers if a != b}
        self._media: list[Medium] = []
        self._shape(environment.phases[0])
        starts_s = environment.phase_starts_s(run_seconds)
        for start_s, phase in list(zip(starts_s, environment.phases, strict=True))[1:]:
            if math.isfinite(start_s):
                events.at(start_s, partial(self._shape, phase))

    def stream(self, source: int, destination: int) -> Stream:
        """Return the stream from ``source`` to ``destination``."""
        return self._streams[source, destination]

    def _shape(self, phase: Phase) -> None:
        """Apply a phase's rates: one medium per uplink, or one per link of a matrix."""
        in_flight = [busy for medium in self._media for busy in medium.release()]
        self._media = []
        if phase.uplink_mbit is not None:
            uplinks = [self._medium(mbit) for mbit in phase.uplink_mbit]
            for (source, _), stream in self._streams.items():
                stream.medium = uplinks[source]
        else:
            for (source, destination), stream in self._streams.items():
                stream.medium = self._medium(self._environment.rate_mbit(source, destination, phase))
        for stream, left_bytes in in_flight:
            assert stream.medium is not None
            stream.medium.add(stream, left_bytes)

    def _medium(self, mbit: float) -> Medium:
        medium = Medium(self._events, payload_bytes_per_s(mbit))
        self._media.append(medium)
        return medium


def payload_bytes_per_s(mbit: float) -> float:
    """Return the payload bytes per second of a link that is set to ``mbit`` Mbit/s."""
    return mbit * 1e6 / 8 * PAYLOAD_SHARE
