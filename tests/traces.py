"""Traces as a test reads them: every rule of the format that a viewer relies on, and the slices by rank and track."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn


@dataclass(slots=True)
class Slice:
    """A slice in microseconds. ``inner``: of those that lie directly in it."""

    rank: int
    track: str
    name: str
    start: int
    end: int
    args: dict[str, Any]
    out: str | None = None
    into: str | None = None
    inner: list[Slice] = field(default_factory=list)

    @property
    def own(self) -> int:
        """What is not spent in others that lie in it."""
        return self.end - self.start - sum(inner.end - inner.start for inner in self.inner)


@dataclass(slots=True)
class Trace:
    """All slices, outer ones before those in them; counters by (rank, name, argument); processes by rank."""

    slices: list[Slice]
    counters: dict[tuple[int, str, str], list[tuple[int, float]]]
    processes: dict[int, str]
    about: dict[str, str]

    def named(self, name: str, rank: int | None = None) -> list[Slice]:
        """The slices of a name."""
        return [s for s in self.slices if s.name == name and rank in (None, s.rank)]

    def sent(self, sender: int, receiver: int) -> list[Slice]:
        """One link's messages, as their sender's tracks show them."""
        return list(self._on(sender, f"to rank {receiver}"))

    def received(self, sender: int, receiver: int) -> list[Slice]:
        """One link's messages, as their receiver's tracks show them."""
        return list(self._on(receiver, f"from rank {sender}"))

    def _on(self, rank: int, track: str) -> Iterator[Slice]:
        return (s for s in self.slices if s.rank == rank and s.track.split(" (")[0] == track)


def read(path: Path) -> Trace:
    """A trace that keeps the rules; fails where it breaks one."""
    data = path.read_bytes()
    return parse(gzip.decompress(data) if path.suffix == ".gz" else data)


def parse(data: bytes) -> Trace:
    """See `read`."""
    document = json.loads(data, parse_constant=_refuse)
    assert set(document) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert all(isinstance(text, str) for text in document["otherData"].values())
    events = document["traceEvents"]
    assert {event["ph"] for event in events} <= {"M", "X", "C"}
    processes, tracks = _names(events)
    counters: dict[tuple[int, str, str], list[tuple[int, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            for name, value in event["args"].items():
                assert isinstance(value, int | float)
                counters[event["pid"] - 1, event["name"], name].append((event["ts"], value))
    for values in counters.values():
        assert values == sorted(values, key=lambda item: item[0])
    trace = Trace(_slices(events, tracks), dict(counters), processes, document["otherData"])
    _check_flows(trace.slices)
    assert {s.rank for s in trace.slices} | {key[0] for key in counters} <= set(processes)
    return trace


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is no JSON")


def _names(events: list[dict[str, Any]]) -> tuple[dict[int, str], dict[int, tuple[int, str]]]:
    """Names of processes by rank, rank and name of tracks by thread: each is named once, before it is used."""
    processes: dict[int, str] = {}
    tracks: dict[int, tuple[int, str]] = {}
    for event in events:
        if event["name"] == "process_name":
            assert event["pid"] > 0  # 0 is the idle process
            assert event["pid"] - 1 not in processes
            processes[event["pid"] - 1] = event["args"]["name"]
        elif event["name"] == "thread_name":
            assert event["tid"] not in tracks  # viewers know threads by number alone
            tracks[event["tid"]] = (event["pid"] - 1, event["args"]["name"])
        elif event["ph"] == "X":
            assert tracks[event["tid"]][0] == event["pid"] - 1
    assert not set(tracks) & {rank + 1 for rank in processes}
    return processes, tracks


def _slices(events: list[dict[str, Any]], tracks: dict[int, tuple[int, str]]) -> list[Slice]:
    """On every track in order of start, each in or after those before it."""
    slices, around, latest = [], defaultdict[int, list[Slice]](list), defaultdict[int, int](int)
    for event in events:
        if event["ph"] != "X":
            continue
        start, end = event["ts"], event["ts"] + event["dur"]
        assert isinstance(start, int)
        assert end >= start
        rank, track = tracks[event["tid"]]
        out = event["bind_id"] if event.get("flow_out") else None
        into = event["bind_id"] if event.get("flow_in") else None
        new = Slice(rank, track, event["name"], start, end, event["args"], out, into)
        stack = around[event["tid"]]
        assert start >= latest[event["tid"]], f"{new} begins before the one before it"
        latest[event["tid"]] = start
        while stack and stack[-1].end <= start:
            stack.pop()
        if stack:
            assert end <= stack[-1].end, f"{new} reaches out of {stack[-1]}"
            stack[-1].inner.append(new)
        stack.append(new)
        slices.append(new)
    return slices


def _check_flows(slices: list[Slice]) -> None:
    """Every arrow has one beginning and, later in the file and not earlier in time, one end."""
    begun: dict[str, Slice] = {}
    ended = set()
    for s in slices:
        if s.out is not None:
            assert s.out not in begun
            begun[s.out] = s
        if s.into is not None:
            assert s.into not in ended
            ended.add(s.into)
            assert begun[s.into].end == s.start
            assert begun[s.into].start <= s.start
            assert begun[s.into].track.split(" (")[0] == f"to rank {s.rank}"
            assert s.track.split(" (")[0] == f"from rank {begun[s.into].rank}"
    assert ended == set(begun)
