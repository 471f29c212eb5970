"""Draw the messages of a run: from posting to arrival at the sender, and from arrival to use at the receiver."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlion_mpi.metrics.files import Array
from dlion_mpi.metrics.rank import Rank
from dlion_mpi.metrics.reader import Run
from dlion_mpi.metrics.timeline import FIRST_PIECE, PIECE, RECORDS
from dlion_mpi.trace.events import Events, Lanes, Micros, Window, micros, number
from dlion_mpi.wire import Kind

NAMES = {int(kind): kind.name.lower() for kind in Kind} | {PIECE: "piece of a sum"}
CARRYING = (int(Kind.GRADIENT), int(Kind.WEIGHTS))
"""Kinds of messages that the loop applies."""
MOST_OPEN = 16
"""At most this many of a link's messages are drawn as in flight at the end of the run: the newest."""
PLACE = 10
"""Place of the links' tracks, below the others."""


@dataclass(slots=True)
class Tally:
    """Counts of messages. ``cut_off``: without an arrival. ``early``: arrived before they were posted."""

    messages: int = 0
    cut_off: int = 0
    early: int = 0
    early_us: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """The messages of one link by sequence, (M,) each. NaN stands for an arrival or a use that was not recorded.

    ``known``: whether the receiver's file records arrivals.
    """

    sender: int
    receiver: int
    sent: Array
    arrived_s: npt.NDArray[np.float64]
    applied_s: npt.NDArray[np.float64]
    applied_step: npt.NDArray[np.int64]
    known: bool


def draw(events: Events, run: Run, window: Window, end: int) -> Tally:
    """Draw all messages of the run. ``end``: of the run, in microseconds."""
    tally = Tally()
    senders = set()
    for sender in run.ranks:
        sent = sender.timeline("sent")
        if sent is not None:
            senders.add(sender.rank)
            for link in _links(run, sender, sent):
                _draw(events, run, link, window, end, tally)
    for receiver in run.ranks:
        _draw_unsent(events, run, receiver, senders, window, tally)
    return tally


def _links(run: Run, sender: Rank, sent: Array) -> Iterator[Link]:
    """The links of one sender that carried messages. The receivers' files are read one after the other."""
    ranks = {rank.rank: rank for rank in run.ranks}
    for peer in np.unique(sent["peer"]).tolist():
        own = sent[sent["peer"] == peer]
        own = own[np.argsort(own["sequence"], kind="stable")]
        receiver = ranks.get(peer)
        arrived = None if receiver is None else receiver.timeline("arrived")
        applied = None if receiver is None else receiver.timeline("applied")
        found = _of_peer("arrived", arrived, sender.rank)
        used = _of_peer("applied", applied, sender.rank)
        yield Link(
            sender=sender.rank,
            receiver=peer,
            sent=own,
            arrived_s=_joined(own["sequence"], found["sequence"], found["arrived_s"], np.nan),
            applied_s=_joined(own["sequence"], used["sequence"], used["applied_s"], np.nan),
            applied_step=_joined(own["sequence"], used["sequence"], used["step"], -1).astype(np.int64),
            known=arrived is not None,
        )


def _of_peer(name: str, records: Array | None, peer: int) -> Array:
    if records is None:
        return np.empty(0, RECORDS[name])
    own = records[records["peer"] == peer]
    return own[np.argsort(own["sequence"], kind="stable")]


def _joined(wanted: Array, keys: Array, values: Array, missing: float) -> npt.NDArray[np.float64]:
    """The value of each wanted key, or ``missing``. ``keys``: ascending."""
    result = np.full(len(wanted), missing, np.float64)
    if len(keys):
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        same = keys[at] == wanted
        result[same] = values[at][same]
    return result


def _draw(events: Events, run: Run, link: Link, window: Window, end: int, tally: Tally) -> None:
    sent, arrived = link.sent, np.isfinite(link.arrived_s)
    posted = micros(sent["posted_s"])
    there = micros(np.where(arrived, link.arrived_s, sent["posted_s"]))
    early = there < posted
    tally.early += int(early.sum())
    tally.early_us = max(tally.early_us, int((posted - there).max(initial=0)))
    there = np.maximum(there, posted)
    if link.known:
        open_ = np.flatnonzero(~arrived & np.isin(sent["kind"], CARRYING))[-MOST_OPEN:]
        there[open_] = np.maximum(end, posted[open_])
    used = np.isfinite(link.applied_s) & arrived
    gone = np.maximum(micros(np.where(used, link.applied_s, sent["posted_s"])), there)
    shown = np.flatnonzero(window.shows(posted, gone))
    tally.messages += len(shown)
    tally.cut_off += int((~arrived[shown]).sum()) if link.known else 0
    _write(events, run, link, shown, posted, there, gone, arrived)


def _write(
    events: Events,
    run: Run,
    link: Link,
    shown: npt.NDArray[np.int64],
    posted: Micros,
    there: Micros,
    gone: Micros,
    arrived: npt.NDArray[np.bool_],
) -> None:
    """Write two slices per message: in flight at the sender, and waiting to be used at the receiver."""
    outgoing = Lanes(events, link.sender + 1, f"to rank {link.receiver}", PLACE + link.receiver)
    incoming = _incoming(events, run, link.receiver, link.sender)
    first = (link.sender * run.workers + link.receiver) << 32
    no_file = f"unknown, no metrics of rank {link.receiver}"
    lost = f'"arrival":"{"in flight at the end" if link.known else no_file}"'
    columns = zip(
        posted[shown].tolist(),
        there[shown].tolist(),
        gone[shown].tolist(),
        arrived[shown].tolist(),
        link.applied_step[shown].tolist(),
        (link.applied_s - link.sent["computed_s"])[shown].tolist(),
        link.sent[shown].tolist(),
        strict=True,
    )
    for start, stop, use, here, applied_step, age_s, record in columns:
        _, kind, step, sequence, size_bytes, quality, _, _ = record
        name = NAMES.get(kind, f"kind {kind}")
        if kind == PIECE:
            args = f'"bytes":{size_bytes},"sequence":{sequence - FIRST_PIECE + 1}'
        else:
            args = f'"bytes":{size_bytes},"step":{step},"sequence":{sequence}'
        if kind in CARRYING:
            args += f',"N":{number(quality)}'
        if not here:
            events.slice(link.sender + 1, outgoing.take(start, stop), start, stop, name, f"{args},{lost}")
            continue
        flow = f',"cat":"message","bind_id":"0x{(first + sequence) & 0xFFFFFFFFFFFFFFFF:x}"'
        events.slice(link.sender + 1, outgoing.take(start, stop), start, stop, name, args, f'{flow},"flow_out":true')
        if applied_step >= 0:
            args += f',"age_s":{number(age_s)},"age_steps":{applied_step - step},"used_in_step":{applied_step}'
        events.slice(link.receiver + 1, incoming.take(stop, use), stop, use, name, args, f'{flow},"flow_in":true')


def _incoming(events: Events, run: Run, receiver: int, sender: int) -> Lanes:
    return Lanes(events, receiver + 1, f"from rank {sender}", PLACE + run.workers + sender)


def _draw_unsent(events: Events, run: Run, receiver: Rank, senders: set[int], window: Window, tally: Tally) -> None:
    """Draw messages from ranks whose files are missing: from their arrival until they were used."""
    arrived, applied = receiver.timeline("arrived"), receiver.timeline("applied")
    if arrived is None:
        return
    for peer in sorted(set(np.unique(arrived["peer"]).tolist()) - senders):
        found, used = _of_peer("arrived", arrived, peer), _of_peer("applied", applied, peer)
        start = micros(found["arrived_s"])
        used_s = _joined(found["sequence"], used["sequence"], used["applied_s"], np.nan)
        end = np.maximum(start, micros(np.where(np.isfinite(used_s), used_s, found["arrived_s"])))
        lanes = _incoming(events, run, receiver.rank, peer)
        shown = np.flatnonzero(window.shows(start, end))
        tally.messages += len(shown)
        for row in shown.tolist():
            a, b = int(start[row]), int(end[row])
            args = f'"sequence":{int(found["sequence"][row])},"sender":"unknown, no metrics of rank {peer}"'
            events.slice(receiver.rank + 1, lanes.take(a, b), a, b, "message", args)
