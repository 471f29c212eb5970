"""Trace events, one a line, as they come: nothing is kept. Times are whole microseconds since training began.

A rank is a process; every track is a thread with a number of its own, since viewers know threads by number alone.
On a track slices lie in or after each other, as the format wants of complete events (``"ph": "X"``).
Source: "Trace Event Format", Chromium project; google/perfetto, src/trace_processor/importers/json.
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
"""Events that are written at a time."""
FOREVER = 1 << 62


def micros(seconds: npt.NDArray[Any] | float) -> Micros:
    """Seconds as whole microseconds. What comes later is never rounded to something earlier.

    What happened before training began, by a clock that is a little off, is put at 0: viewers drop negative times.
    """
    return np.rint(np.maximum(np.asarray(seconds, np.float64), 0.0) * 1e6).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Window:
    """What is shown: all that lies at least partly between two times, in microseconds."""

    begin: int = 0
    end: int = FOREVER

    @classmethod
    def of_seconds(cls, begin_s: float, end_s: float) -> Window:
        """Of seconds since training began; ``end_s`` may be infinite."""
        return cls(int(micros(begin_s)), int(micros(end_s)) if math.isfinite(end_s) else FOREVER)

    def shows(self, start: Micros, end: Micros) -> npt.NDArray[np.bool_]:
        """Of slices, which are shown."""
        return (end >= self.begin) & (start <= self.end)


class Events:
    """Writes a trace of so many processes to a binary file. ``about``: texts by name that go to its head."""

    def __init__(self, file: IO[bytes], processes: int, about: dict[str, str]) -> None:
        self._file = file
        self._lines: list[str] = []
        self._separator = ""
        # Above all numbers of processes, since a process has a thread of its own number.
        self._threads = 10 ** max(2, len(str(processes)))
        self.count = 0
        self.size_bytes = 0
        self._write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},"traceEvents":[\n')

    def process(self, pid: int, name: str) -> None:
        """Name a process; they are shown in the order of their numbers."""
        self.add(f'{{"ph":"M","pid":{pid},"name":"process_name","args":{{"name":{json.dumps(name)}}}}}')
        self.add(f'{{"ph":"M","pid":{pid},"name":"process_sort_index","args":{{"sort_index":{pid}}}}}')

    def thread(self, pid: int, name: str, place: int) -> int:
        """A new track of a process. Those of the lowest ``place`` are shown first. Returns its number."""
        self._threads += 1
        tid = self._threads
        self.add(f'{{"ph":"M","pid":{pid},"tid":{tid},"name":"thread_name","args":{{"name":{json.dumps(name)}}}}}')
        self.add(f'{{"ph":"M","pid":{pid},"tid":{tid},"name":"thread_sort_index","args":{{"sort_index":{place}}}}}')
        return tid

    def slice(self, pid: int, tid: int, start: int, end: int, name: str, args: str = "", flow: str = "") -> None:
        """A slice of a track. ``args``: the inside of a JSON object; ``flow``: further fields of the event."""
        self.add(
            f'{{"ph":"X","pid":{pid},"tid":{tid},"ts":{start},"dur":{end - start},"name":"{name}"{flow},'
            f'"args":{{{args}}}}}'
        )

    def counter(self, pid: int, time: int, name: str, args: str) -> None:
        """Values from this time on."""
        self.add(f'{{"ph":"C","pid":{pid},"ts":{time},"name":"{name}","args":{{{args}}}}}')

    def add(self, line: str) -> None:
        """An event."""
        self._lines.append(line)
        self.count += 1
        if len(self._lines) >= BUFFERED:
            self._flush()

    def close(self) -> None:
        """Write what is left. The file stays open."""
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
    """As many tracks of one name as slices overlap: each slice goes to the first that is free. In order of start."""

    def __init__(self, events: Events, pid: int, name: str, place: int) -> None:
        self._events, self._pid, self._name, self._place = events, pid, name, place
        self._tids: list[int] = []
        self._free_at: list[int] = []

    def take(self, start: int, end: int) -> int:
        """The track for a slice."""
        for lane, free_at in enumerate(self._free_at):
            if free_at <= start:
                self._free_at[lane] = end
                return self._tids[lane]
        more = f" ({len(self._tids) + 1})" * bool(self._tids)
        self._tids.append(self._events.thread(self._pid, self._name + more, self._place))
        self._free_at.append(end)
        return self._tids[-1]


def number(value: float) -> str:
    """A JSON number, of six digits if it is not whole; a text for what JSON has no number for."""
    if not math.isfinite(value):
        return f'"{value}"'
    return str(int(value)) if value == int(value) else f"{value:.6g}"


def fitted(start: Sequence[int], end: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Slices in order of their start, outer ones first, each cut off where the one around it ends."""
    around: list[int] = []
    for begin, finish in zip(start, end, strict=True):
        while around and around[-1] <= begin:
            around.pop()
        finish = min(finish, around[-1]) if around else finish
        around.append(finish)
        yield begin, finish
