"""Messages and their bytes: a fixed header, then the values, then where in the vector they belong.

    | header, 88 bytes | values, K x 4 or 2 bytes | index stream, its form named by ``Encoding`` |

Everything is little-endian. The checksum is the header's last field: xxh3_64 over all bytes but its own. Of
the index encodings the one that is smallest for the entries at hand is taken, so no message is larger than
the dense one. ``decode`` believes nothing: whatever arrives is checked before it is used.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from dlion_mpi.vector.layout import Entries, Indices

MAGIC = b"DLN1"
VERSION = 1

Bytes = npt.NDArray[np.uint8]
ValueType = Literal["float32", "float16", "bfloat16"]
VALUE_TYPES: tuple[ValueType, ...] = ("float32", "float16", "bfloat16")  # on the wire: the position


class Kind(IntEnum):
    """What a message is for."""

    GRADIENT = 1  # entries of a gradient, or of an update; what is not sent counts as zero
    WEIGHTS = 2  # parameters, always all of them
    PROGRESS = 3  # header only: the step the sender has reached
    CLOSE = 4  # header only: the sender leaves the exchange
    ACK = 5  # header only: acknowledges a sequence number
    STOP = 6  # header only: the sender leaves, and the run must end everywhere
    INDICES = 7  # which entries the next message will carry, without their values


class Encoding(IntEnum):
    """How the positions of the values are written; gap = index - previous index - 1."""

    DENSE = 0  # nothing: every entry is there
    BITMAP = 1  # one bit per entry, lowest bit first
    DELTA8 = 2  # a gap g as g // 255 bytes of 255, then g % 255
    DELTA16 = 3  # the same with uint16 and 65535
    PLAIN = 4  # the indices as uint32
    EMPTY = 5  # nothing: no entry is there
    RANGE = 6  # successive entries: the first one's index as uint32


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a message says beside its entries.

    ``sender``: rank. ``epoch``: of the membership. ``sequence``: counts the messages of this link.
    ``acknowledged``: the highest sequence received from the addressee. ``lbs``: samples behind this gradient;
    ``gbs``: samples of all workers. ``quality``: the N of Max N (float32 on the wire). ``computed_at``:
    seconds on the run's common clock.
    """

    kind: Kind
    sender: int
    epoch: int
    step: int
    sequence: int
    acknowledged: int
    lbs: int = 0
    gbs: int = 0
    quality: float = 0.0
    computed_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """A header and its entries (none for the header-only kinds)."""

    header: Header
    entries: Entries


class WireError(ValueError):
    """What arrived is not a message for this run; says what was found and what was expected."""


# magic, version, encoding, value type; the fields of Header in their order, padded by 4 bytes after quality;
# number of entries, number of parameters, payload bytes. The checksum follows.
HEADER = struct.Struct("<4sBBBB II QQQ II f4xd II Q")
CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = HEADER.size + CHECKSUM.size  # 88, a multiple of 8, so that the values are aligned

HEADER_ONLY = frozenset({Kind.PROGRESS, Kind.CLOSE, Kind.ACK, Kind.STOP})
VALUE_DTYPE: dict[ValueType, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),  # numpy has no bfloat16: the upper half of a float32's bits
}
LARGEST: dict[ValueType, float] = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}
GAP_DTYPE: dict[Encoding, np.dtype[Any]] = {
    Encoding.DELTA8: np.dtype("u1"),
    Encoding.DELTA16: np.dtype("<u2"),
}
BLOCK = 1 << 17  # entries worked on at a time where a step needs scratch space; fits a core's cache


def capacity_bytes(size: int) -> int:
    """Bytes of the largest possible message for a vector of ``size`` entries: all of them as float32."""
    return HEADER_BYTES + 4 * size


def encoded_bytes(
    indices: Indices | None, size: int, value_type: ValueType = "float32", kind: Kind = Kind.GRADIENT
) -> int:
    """Bytes that ``encode`` writes for these entries of a vector of ``size``, header included; exact."""
    return HEADER_BYTES + plan_encoding(indices, size, value_width(kind, value_type)).payload_bytes


def bytes_for_count(count: int, size: int, value_type: ValueType = "float32") -> int:
    """Expected message bytes when ``count`` of ``size`` entries are kept at uniformly random positions.

    With K kept, gaps are nearly geometric with mean (size - K) / (K + 1), so a gap g costs on average
    1 + q / (1 - q) units, q = P(g >= limit), where limit is the escape value. Clustered positions cost less.
    Raises ValueError unless 0 <= count <= size.
    """
    if not 0 <= count <= size:
        raise ValueError(f"cannot keep {count} of {size} entries")
    if count == 0:
        return HEADER_BYTES
    miss = 1.0 - (count + 1) / (size + 1)
    index_bytes = min(float(bitmap_bytes(size)), 4.0 * count)
    for dtype in GAP_DTYPE.values():
        beyond = miss ** escape_of(dtype)
        index_bytes = min(index_bytes, dtype.itemsize * count / (1.0 - beyond))
    width = dtype_of(value_type).itemsize
    return HEADER_BYTES + min(width * size, width * count + math.ceil(index_bytes))


class Plan(NamedTuple):
    encoding: Encoding
    payload_bytes: int
    gaps: Indices | None = None


def plan_encoding(indices: Indices | None, size: int, width: int) -> Plan:
    """The smallest encoding and its exact payload, with the gaps if it needs them."""
    if size == 0 or (indices is not None and len(indices) == 0):
        return Plan(Encoding.EMPTY, 0)
    dense = Plan(Encoding.DENSE, width * size)
    if indices is None:
        return dense
    count = len(indices)
    best = Plan(Encoding.BITMAP, width * count + bitmap_bytes(size))
    if (width + 4) * count < best.payload_bytes:
        best = Plan(Encoding.PLAIN, (width + 4) * count)
    if int(indices[-1]) - int(indices[0]) == count - 1 and width * count + 4 < best.payload_bytes:
        best = Plan(Encoding.RANGE, width * count + 4)
    gaps: Indices | None = None
    for encoding, dtype in GAP_DTYPE.items():
        if (width + dtype.itemsize) * count >= best.payload_bytes:
            continue  # already without escapes it is no smaller
        gaps = gaps_of(indices) if gaps is None else gaps
        wide = gaps[gaps >= escape_of(dtype)]  # few: an escape is worth its while only if it is rare
        units = count + int((wide // escape_of(dtype)).sum(dtype=np.int64))
        if width * count + dtype.itemsize * units < best.payload_bytes:
            best = Plan(encoding, width * count + dtype.itemsize * units, gaps)
    return best if best.payload_bytes < dense.payload_bytes or not width else dense


def checksum(message: Bytes) -> int:
    digest = xxhash.xxh3_64(message[: HEADER.size].data)
    digest.update(message[HEADER_BYTES:].data)
    return digest.intdigest()


def dtype_of(value_type: ValueType) -> np.dtype[Any]:
    if value_type not in VALUE_DTYPE:
        raise ValueError(f"unknown value type {value_type!r}, use one of {', '.join(VALUE_TYPES)}")
    return VALUE_DTYPE[value_type]


def value_width(kind: Kind, value_type: ValueType) -> int:
    """Bytes of a value."""
    return 0 if kind is Kind.INDICES else dtype_of(value_type).itemsize


def bitmap_bytes(size: int) -> int:
    return (size + 7) // 8


def escape_of(dtype: np.dtype[Any]) -> int:
    return (1 << 8 * dtype.itemsize) - 1


def gaps_of(indices: Indices) -> Indices:
    gaps = np.empty_like(indices)
    gaps[0] = indices[0]
    np.subtract(indices[1:], indices[:-1], out=gaps[1:])
    gaps[1:] -= 1
    return gaps
