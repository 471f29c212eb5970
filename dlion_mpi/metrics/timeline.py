"""What a rank keeps of when things happened: the spans of its loop, and what became of every message.

Each is a list of records in the order in which they happened, written as it happens: so what a killed run has
written is true as far as it goes, and no record is ever changed. All times are seconds of the run's common clock,
which is rank 0's. `trace` makes a timeline of them; docs/metrics.md describes the files.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dlion_mpi.wire import Header


class Phase(IntEnum):
    """What a rank did in a span of time. The first seven are the loop's and lie in or after each other."""

    COMPUTE = 1  # the gradient, and the sleep that plays a slower machine
    SELECT = 2  # selecting, encoding and posting, or waiting for EXCHANGE; in WAIT where a link became free meanwhile
    WAIT = 3  # for what the synchronisation mode and patience want; in APPLY for a sum over all
    APPLY = 4  # decoding and weighing what has arrived, and the optimizer; in WAIT what is decoded meanwhile
    AGREE = 5  # waiting for everyone's throughput or losses in sync, for new batch sizes in bounded
    PROFILE = 6  # timing two batch sizes before the first step
    LEAVE = 7  # after the last step, until nobody needs this rank any more
    EVALUATE = 8  # from the snapshot to its accuracy, beside the loop
    TRANSFER = 9  # a knowledge transfer, from the asking (in this step) to the merging, beside the loop
    EXCHANGE = 10  # selecting, encoding and posting in a thread beside the loop, which took it back in this step


PIECE, FIRST_PIECE = 0, 1 << 31
"""The ``kind`` of a piece of a sum over all, which no message of `wire` has, and the ``sequence`` of a link's first."""

RECORDS: dict[str, np.dtype[Any]] = {
    "spans": np.dtype([("phase", "u1"), ("step", "u4"), ("start_s", "f8"), ("end_s", "f8")]),
    # at the sender: handed to the link
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
    # at the receiver: all of it is there; the loop has used it
    "arrived": np.dtype([("peer", "u4"), ("sequence", "u4"), ("arrived_s", "f8")]),
    "applied": np.dtype([("peer", "u4"), ("sequence", "u4"), ("step", "u4"), ("applied_s", "f8")]),
}
"""The fields of a record, by data set. A message is known by its link and ``sequence``, which its header carries."""


class MessageLog(Protocol):
    """What links tell of their messages; see `metrics.recorder.Recorder`."""

    def sent(self, peer: int, header: Header, size_bytes: int, posted_s: float) -> None:
        """A message was handed to the link."""

    def arrived(self, peer: int, sequence: int, arrived_s: float) -> None:
        """All of a peer's message is here."""

    def piece(self, peer: int, sent_bytes: int, received_bytes: int, began_s: float, ended_s: float) -> None:
        """A piece of a sum over all went to ``peer``, or came from it, or both."""


class Unlogged:
    """For links whose messages nobody asks about."""

    def sent(self, peer: int, header: Header, size_bytes: int, posted_s: float) -> None:
        """Nothing is kept."""

    def arrived(self, peer: int, sequence: int, arrived_s: float) -> None:
        """Nothing is kept."""

    def piece(self, peer: int, sent_bytes: int, received_bytes: int, began_s: float, ended_s: float) -> None:
        """Nothing is kept."""


def checked(name: str, found: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Records that a file holds, with the fields of `RECORDS` and finite times only; None if they are none."""
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
