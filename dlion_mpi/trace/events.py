"""Write trace events, one per line, without keeping them. Times are whole microseconds since training began.

A rank is a process of the trace. Each track is a thread with a unique number, since viewers identify threads by number
alone. Slices on a track are nested or follow each other, as the format requires of complete events
(``"ph": "X"``). Source: "Trace Event Format", Chromium project; google/perfetto, src/trace_processor/importers/json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Micros = npt.NDArray[np.int64]

BUFFERED = 4096
"""Events written at a time."""
FOREVER = 1 << 62


def micros(seconds: npt.NDArray[Any] | float) -> Micros:
    """Round seconds to whole microseconds, in a way that keeps their order.

    Times before training began, which come from clocks that differ, become 0: viewers drop negative times.
    """
    return np.rint(np.maximum(np.asarray(seconds, np.float64), 0.0) * 1e6).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a run that is shown: everything that overlaps it, in microseconds."""

    begin: int = 0
    end: int = FOREVER

    @classmethod
    def of_seconds(cls, begin_s: float, end_s: float) -> Window:
        """Make a window of seconds since training began; ``end_s`` may be infinite."""
        return cls(int(micros(begin_s)), int(micros(end_s)) if math.isfinite(end_s) else FOREVER)

    def shows(self, start: Micros, end: Micros) -> npt.NDArray[np.bool_]:
        """Whether each slice is shown."""
        return (end >= self.begin) & (start <= self.end)


class Events:
    """Writes a trace to a binary file. ``processes``: number of processes. ``about``: texts for the head, by name."""

    def __init__(self, file: IO[bytes], processes: int, about: dict[str, str]) -> None:
        self._file = file
        self._lines: list[str] = []
        self._separator = ""
        # Larger than the numbers of processes, since each process has a thread with the same number.
        self._threads = 10 ** max(2, len(str(processes)))
        self.count = 0
        self.size_bytes = 0
        self._write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},"traceEvents":[\n')

    def process(self, pid: int, name: str) -> None:
        """Name a process. Processes are shown in order of their numbers."""
        self.add(f'{{"ph":"M","pid":{pid},"name":"process_name","args":{{"name":{json.dumps(name)}}}}}')
        self.add(f'{{"ph":"M","pid":{pid},"name":"process_sort_index","args":{{"sort_index":{pid}}}}}')

    def thread(self, pid: int, name: str, place: int) -> int:
        """Add a track to a process and return its number. Tracks are shown in order of ``place``."""
        self._threads += 1
        tid = self._threads
        self.add(f'{{"ph":"M","pid":{pid},"tid":{tid},"name":"thread_name","args":{{"name":{json.dumps(name)}}}}}')
        self.add(f'{{"ph":"M","pid":{pid},"tid":{tid},"name":"thread_sort_index","args":{{"sort_index":{place}}}}}')
        return tid

    def slice(self, pid: int, tid: int, start: int, end: int, name: str, args: str = "", flow: str = "") -> None:
        """Add a slice to a track. ``args``: the inside of a JSON object; ``flow``: further fields of the event."""
        self.add(
            f'{{"ph":"X","pid":{pid},"tid":{tid},"ts":{start},"dur":{end - start},"name":"{name}"{flow},'
            f'"args":{{{args}}}}}'
        )

    def counter(self, pid: int, time: int, name: str, args: str) -> None:
        """Set the values of a counter from this time on."""
        self.add(f'{{"ph":"C","pid":{pid},"ts":{time},"name":"{name}","args":{{{args}}}}}')

    def add(self, line: str) -> None:
        """Add an event."""
        self._lines.append(line)
        self.count += 1
        if len(self._lines) >= BUFFERED:
            self._flush()

    def close(self) -> None:
        """Write the end of the trace. The file stays open."""
        self._flush()
        self._write("\n]}\n")

    def _flush(self) -> None:
        if self._lines:
            self._write(self._separator + ",\n".join(self._lines))
            self._separator = ",\n"
            self._lines.clear()

    def _write(self, text: str) -> None:
        data = text.encode()
        self.size_bytes += len(data)
        self._file.write(data)


class Lanes:
    """Tracks with the same name, as many as slices overlap. Slices are added in order of start."""

    def __init__(self, events: Events, pid: int, name: str, place: int) -> None:
        self._events, self._pid, self._name, self._place = events, pid, name, place
        self._tids: list[int] = []
        self._free_at: list[int] = []

    def take(self, start: int, end: int) -> int:
        """The first track that is free for a slice."""
        for lane, free_at in enumerate(self._free_at):
            if free_at <= start:
                self._free_at[lane] = end
                return self._tids[lane]
        more = f" ({len(self._tids) + 1})" * bool(self._tids)
        self._tids.append(self._events.thread(self._pid, self._name + more, self._place))
        self._free_at.append(end)
        return self._tids[-1]


def number(value: float) -> str:
    """Format a JSON number with six digits unless it is whole; text for values that JSON cannot represent."""
    if not math.isfinite(value):
        return f'"{value}"'
    return str(int(value)) if value == int(value) else f"{value:.6g}"


def nested(start: Sequence[int], end: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Cut slices off where the slice around them ends. In order of start, outer slices first."""
    around: list[int] = []
    for begin, finish in zip(start, end, strict=True):
        while around and around[-1] <= begin:
            around.pop()
        finish = min(finish, around[-1]) if around else finish
        around.append(finish)
        yield begin, finish
