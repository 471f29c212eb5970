"""The layout of a message, and its size. Everything is little-endian.

    offset   bytes    field
    0        4        magic, "DLN1"
    4        1        version
    5        1        `Encoding` of the positions
    6        1        value type: its place in VALUE_TYPES
    7        1        `Kind`
    8        56       the other fields of `Header`, in their order; 4 bytes of padding after ``quality``
    64       8        number of entries (K), number of parameters (P)
    72       8        bytes after the header
    80       8        checksum: xxh3_64 of all other bytes
    88       K x 4    values, or K x 2, or those of few bits (`wire/quantize.py`); none in a message of INDICES
    ...               index stream: where the values belong, in the form that ``Encoding`` names

Of the encodings a message has the smallest, so no message is larger than the dense one.
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
from dlion_mpi.wire.quantize import BITS, stream_bytes

MAGIC = b"DLN1"
VERSION = 1
HEADER = struct.Struct("<4sBBBB II QQQ II f4xd II Q")
"""All of the header but the checksum."""
CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = HEADER.size + CHECKSUM.size
"""88, a multiple of 8, so the values are aligned."""

Bytes = npt.NDArray[np.uint8]
ValueType = Literal["float32", "float16", "bfloat16", "int8", "int4", "int2", "sign"]
VALUE_TYPES: tuple[ValueType, ...] = ("float32", "float16", "bfloat16", "int8", "int4", "int2", "sign")
VALUE_DTYPE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),  # NumPy has no bfloat16: these are the upper halves of float32
}
BLOCK = 1 << 17
"""Entries per block where a step needs scratch space: a block fits a core's cache."""


class Kind(IntEnum):
    """The purpose of a message."""

    GRADIENT = 1  # entries of a gradient or of an update; the others count as zero
    WEIGHTS = 2  # all parameters
    PROGRESS = 3  # header only: the step that the sender has reached
    CLOSE = 4  # header only: the sender leaves
    ACK = 5  # header only: acknowledges messages
    STOP = 6  # header only: the sender leaves, and the run must end on all ranks
    INDICES = 7  # the positions of the entries in the sender's next message, without values
    PROBE = 8  # header only: goes right ahead of a message, to time it


HEADER_ONLY = frozenset({Kind.PROGRESS, Kind.CLOSE, Kind.ACK, Kind.STOP, Kind.PROBE})


class Encoding(IntEnum):
    """The form of the index stream. A gap is index - previous index - 1; the first gap is the first index."""

    DENSE = 0  # empty: all entries are there
    BITMAP = 1  # one bit per parameter, lowest bit first
    DELTA8 = 2  # each gap as gap // 255 bytes of 255, then gap % 255
    DELTA16 = 3  # the same with uint16 and 65535
    PLAIN = 4  # the indices as uint32
    EMPTY = 5  # empty: no entries are there
    RANGE = 6  # consecutive entries: the first index as uint32


GAP_DTYPE: dict[Encoding, np.dtype[Any]] = {Encoding.DELTA8: np.dtype("u1"), Encoding.DELTA16: np.dtype("<u2")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The fields of a message, without its entries.

    ``sender``: rank. ``epoch``: of the membership. ``sequence``: number of the message on its link, from 1.
    ``acknowledged``: number of messages that the sender has received on this link. ``lbs``: samples of this gradient.
    ``gbs``: samples of all workers. ``quality``: N of Max N, a float32; of an ACK, the seconds from the message's probe
    to its arrival. ``computed_at``: seconds on the run's clock; of an ACK, when the message arrived.
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
    """A header and its entries. The kinds of HEADER_ONLY have none."""

    header: Header
    entries: Entries


class WireError(ValueError):
    """Error: received bytes are no message of this run. Says what was found and what was expected."""


class Plan(NamedTuple):
    """An encoding, and the bytes after the header with it. ``gaps``: (K,) uint32, if the encoding needs them."""

    encoding: Encoding
    payload_bytes: int
    gaps: Indices | None = None


def plan_encoding(indices: Indices | None, size: int, value_type: ValueType | None) -> Plan:
    """Choose the smallest encoding for these indices of a vector of ``size`` entries, all if None.

    ``value_type``: None for a message without values. Values of few bits cannot be zero, so they are never sent for
    entries that are not there.
    """
    if size == 0 or (indices is not None and len(indices) == 0):
        return Plan(Encoding.EMPTY, 0)
    dense = Plan(Encoding.DENSE, values_bytes(size, value_type))
    if indices is None:
        return dense
    count = len(indices)
    values = values_bytes(count, value_type)
    best = Plan(Encoding.BITMAP, values + bitmap_bytes(size))
    if values + 4 * count < best.payload_bytes:
        best = Plan(Encoding.PLAIN, values + 4 * count)
    if int(indices[-1]) - int(indices[0]) == count - 1 and values + 4 < best.payload_bytes:
        best = Plan(Encoding.RANGE, values + 4)
    gaps: Indices | None = None
    for encoding, dtype in GAP_DTYPE.items():
        if values + dtype.itemsize * count >= best.payload_bytes:
            continue  # no smaller even if no gap needs an escape
        gaps = _gaps(indices) if gaps is None else gaps
        wide = gaps[gaps >= escape_of(dtype)]
        units = count + int((wide // escape_of(dtype)).sum(dtype=np.int64))
        if values + dtype.itemsize * units < best.payload_bytes:
            best = Plan(encoding, values + dtype.itemsize * units, gaps)
    return dense if value_type in VALUE_DTYPE and best.payload_bytes >= dense.payload_bytes else best


def capacity_bytes(size: int) -> int:
    """Bytes that no message for a vector of ``size`` entries exceeds.

    All entries as float32, or very few entries of few bits.
    """
    return HEADER_BYTES + 4 * size + 16


def encoded_bytes(
    indices: Indices | None, size: int, value_type: ValueType = "float32", kind: Kind = Kind.GRADIENT
) -> int:
    """Exact bytes of the message with these entries of a vector of ``size``."""
    return HEADER_BYTES + plan_encoding(indices, size, None if kind is Kind.INDICES else value_type).payload_bytes


def bytes_for_count(count: int, size: int, value_type: ValueType = "float32") -> int:
    """Expected bytes of a message with ``count`` of ``size`` entries at uniformly random positions.

    Gaps are nearly geometric with mean (P - K) / (K + 1), so a gap costs on average 1 + q / (1 - q) units, where q is
    the probability that it reaches the escape value. Clustered positions cost less. Raises ValueError unless
    0 <= count <= size.
    """
    if not 0 <= count <= size:
        raise ValueError(f"cannot keep {count} of {size} entries")
    if count == 0:
        return HEADER_BYTES
    miss = 1.0 - (count + 1) / (size + 1)
    index_bytes = min(float(bitmap_bytes(size)), 4.0 * count)
    for dtype in GAP_DTYPE.values():
        escape_probability = miss ** escape_of(dtype)
        index_bytes = min(index_bytes, dtype.itemsize * count / (1.0 - escape_probability))
    sparse = values_bytes(count, value_type) + math.ceil(index_bytes)
    return HEADER_BYTES + (min(values_bytes(size, value_type), sparse) if value_type in VALUE_DTYPE else sparse)


def checksum(message: Bytes) -> int:
    """Checksum of a message, without the bytes of the checksum itself."""
    digest = xxhash.xxh3_64(message[: HEADER.size].data)
    digest.update(message[HEADER_BYTES:].data)
    return digest.intdigest()


def values_bytes(count: int, value_type: ValueType | None) -> int:
    """Bytes of ``count`` values; None: of none. Raises ValueError for an unknown type."""
    if value_type is None:
        return 0
    if value_type in BITS:
        return stream_bytes(count, BITS[value_type])
    if value_type not in VALUE_DTYPE:
        raise ValueError(f"unknown value type {value_type!r}, use one of {', '.join(VALUE_TYPES)}")
    return VALUE_DTYPE[value_type].itemsize * count


def bitmap_bytes(size: int) -> int:
    """Bytes of a bitmap of ``size`` entries."""
    return (size + 7) // 8


def escape_of(dtype: np.dtype[Any]) -> int:
    """Return the unit that says that a gap continues: the largest of its type."""
    return (1 << 8 * dtype.itemsize) - 1


def _gaps(indices: Indices) -> Indices:
    gaps = np.empty_like(indices)
    gaps[0] = indices[0]
    np.subtract(indices[1:], indices[:-1], out=gaps[1:])
    gaps[1:] -= 1
    return gaps
