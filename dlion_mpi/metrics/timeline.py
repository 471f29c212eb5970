"""The timeline of a rank: the spans of its loop, and the life of each message.

Records are added as things happen and are never changed, so the file of a killed run is correct as far as it goes. All
times are seconds on the run's common clock, which is rank 0's. `trace` draws a timeline; docs/metrics.md describes the
data sets.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dlion_mpi.wire import Header


class Phase(IntEnum):
    """The activity of a rank during a span of time. Spans of the first seven never overlap, but may be nested."""

    COMPUTE = 1  # the gradient, with the sleep that emulates a slower machine
    SELECT = 2  # select, encode and post, or wait for EXCHANGE; within WAIT when a link becomes free
    WAIT = 3  # wait for peers as the synchronisation mode and patience require; within APPLY for a sum
    APPLY = 4  # decode and weight messages, and run the optimizer; within WAIT when messages arrive
    AGREE = 5  # wait for a collective in sync, or for new batch sizes in bounded
    PROFILE = 6  # time two batch sizes before the first step
    LEAVE = 7  # after the last step: until no other rank needs this one
    EVALUATE = 8  # test a copy of the weights, in the background
    TRANSFER = 9  # knowledge transfer, from the request to the merge, in the background
    EXCHANGE = 10  # select, encode and post in the background encoder; the step is the loop's at its end


PIECE, FIRST_PIECE = 0, 1 << 31
"""The ``kind`` of a piece of an all-reduce, which no `wire.Kind` has, and the ``sequence`` of a link's first piece."""

RECORDS: dict[str, np.dtype[Any]] = {
    "spans": np.dtype([("phase", "u1"), ("step", "u4"), ("start_s", "f8"), ("end_s", "f8")]),
    # at the sender, when the message is posted
    "sent": np.dtype(
        [
            ("peer", "u4"),
            ("kind", "u1"),
            ("step", "u4"),
            ("sequence", "u4"),
            ("size_bytes", "u8"),
            ("quality", "f4"),
            ("computed_s", "f8"),
            ("posted_s", "f8"),
        ]
    ),
    # at the receiver, when the whole message has arrived, and when the loop has applied it
    "arrived": np.dtype([("peer", "u4"), ("sequence", "u4"), ("arrived_s", "f8")]),
    "applied": np.dtype([("peer", "u4"), ("sequence", "u4"), ("step", "u4"), ("applied_s", "f8")]),
}
"""The fields of each data set. The link and the ``sequence`` in its header identify a message."""


class MessageLog(Protocol):
    """Records what happens to the messages of the links; see `metrics.recorder.Recorder`."""

    def sent(self, peer: int, header: Header, size_bytes: int, posted_s: float) -> None:
        """Record a message to ``peer``."""

    def arrived(self, peer: int, sequence: int, arrived_s: float) -> None:
        """Record the arrival of a message from ``peer``."""

    def piece(self, peer: int, sent_bytes: int, received_bytes: int, began_s: float, ended_s: float) -> None:
        """Record a piece of an all-reduce that went to ``peer``, came from it, or both."""


class Unlogged:
    """A `MessageLog` that records nothing."""

    def sent(self, peer: int, header: Header, size_bytes: int, posted_s: float) -> None:
        """Do nothing."""

    def arrived(self, peer: int, sequence: int, arrived_s: float) -> None:
        """Do nothing."""

    def piece(self, peer: int, sent_bytes: int, received_bytes: int, began_s: float, ended_s: float) -> None:
        """Do nothing."""


def checked(name: str, found: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Convert the records of a file to the fields of `RECORDS`, without those whose times are not finite.

    Returns None if a field is missing or has another type.
    """
    wanted = RECORDS[name]
    assert wanted.names is not None
    names = found.dtype.names or ()
    if any(field not in names or found.dtype[field].kind not in "iuf" for field in wanted.names):
        return None
    records = np.empty(len(found), wanted)
    usable = np.ones(len(found), np.bool_)
    for field in wanted.names:
        records[field] = found[field]
        if field.endswith("_s"):
            usable &= np.isfinite(records[field])
    return records if usable.all() else records[usable]
