"""Read messages. Everything is checked before it is used."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from dlion_mpi.vector.layout import Entries, Indices, blocks
from dlion_mpi.wire.format import (
    BLOCK,
    CHECKSUM,
    GAP_DTYPE,
    HEADER,
    HEADER_BYTES,
    HEADER_ONLY,
    MAGIC,
    VALUE_TYPES,
    VERSION,
    Bytes,
    Encoding,
    Header,
    Kind,
    Message,
    ValueType,
    WireError,
    bitmap_bytes,
    checksum,
    escape_of,
    values_bytes,
)
from dlion_mpi.wire.values import from_wire


class _Frame(NamedTuple):
    """The header of a message, and the form of its entries."""

    header: Header
    encoding: Encoding
    value_type: ValueType
    entries: int


def decode(buffer: Bytes, *, size: int, copy: bool = True) -> Message:
    """Return the message in ``buffer``, which holds exactly the received bytes, for a vector of ``size`` entries.

    Without ``copy``, the arrays of the message may lie in ``buffer``. Entries that were sent DENSE have
    ``indices=None``; a message of a header alone has no entries. Raises WireError naming the first thing that is wrong.
    """
    frame = _read_frame(buffer, size)
    if frame.entries == 0:
        return Message(frame.header, Entries(size, np.empty(0, np.float32), np.empty(0, np.uint32)))
    stored = None if frame.header.kind is Kind.INDICES else frame.value_type
    value_bytes = values_bytes(frame.entries, stored)
    payload = buffer[HEADER_BYTES:]
    if len(payload) < value_bytes:
        raise WireError(f"bad payload of {len(payload)} bytes, expected {value_bytes} or more for the values")
    indices = _read_indices(frame, payload[value_bytes:], size, copy)
    values = from_wire(payload[:value_bytes], frame.entries, stored, copy) if stored else np.empty(0, np.float32)
    for block in blocks(slice(0, len(values)), BLOCK):
        finite = np.isfinite(values[block])
        if not finite.all():
            position = block.start + int(np.argmin(finite))
            raise WireError(f"bad value {values[position]} at {position}, expected finite values")
    return Message(frame.header, Entries(size, values, indices))


def _read_frame(buffer: Bytes, size: int) -> _Frame:
    """Read the header. Raises WireError unless the message is intact and its lengths agree with each other."""
    if len(buffer) < HEADER_BYTES:
        raise WireError(f"bad length of {len(buffer)} bytes, expected {HEADER_BYTES} or more for a header")
    magic, version, encoding, value_type, *rest = HEADER.unpack_from(buffer.data)
    *fields, count, parameters, payload_bytes = rest
    _expect("magic", magic, MAGIC)
    _expect("version", version, VERSION)
    kind = fields[0] = _member(Kind, fields[0])
    encoding = _member(Encoding, encoding)
    if value_type >= len(VALUE_TYPES):
        raise WireError(f"bad value type {value_type}, expected 0 to {len(VALUE_TYPES) - 1}")
    _expect("number of parameters", parameters, 0 if kind in HEADER_ONLY else size)
    if count > parameters:
        raise WireError(f"bad number of entries {count}, expected at most {parameters}")
    if kind is Kind.WEIGHTS or encoding is Encoding.DENSE:
        _expect("number of entries", count, parameters)
    _expect("payload length", payload_bytes, len(buffer) - HEADER_BYTES)
    _expect("checksum", CHECKSUM.unpack_from(buffer.data, HEADER.size)[0], checksum(buffer))
    if (encoding is Encoding.EMPTY) != (count == 0):
        raise WireError(f"bad encoding {encoding.name} for {count} entries")
    if count == 0:
        _expect("payload length", payload_bytes, 0)
    header = Header(**dict(zip(Header.__slots__, fields, strict=True)))
    if not (math.isfinite(header.quality) and math.isfinite(header.computed_at)):
        raise WireError(f"bad quality {header.quality} or time {header.computed_at}, expected finite numbers")
    return _Frame(header, encoding, VALUE_TYPES[value_type], count)


def _read_indices(frame: _Frame, stream: Bytes, size: int, copy: bool) -> Indices | None:
    """Read the indices, strictly ascending and below ``size``; None for all entries. Raises WireError."""
    if frame.encoding is Encoding.DENSE:
        _expect("length of the index stream", len(stream), 0)
        return None
    if frame.encoding is Encoding.BITMAP:
        _expect("length of the bitmap", len(stream), bitmap_bytes(size))
        indices = _read_bitmap(stream, frame.entries)
    elif frame.encoding is Encoding.RANGE:
        _expect("length of the index stream", len(stream), 4)
        first = int(stream.view("<u4")[0])
        if first + frame.entries > size:  # checked first, so that every index fits uint32
            raise WireError(f"bad index {first + frame.entries - 1}, expected less than {size}")
        indices = np.arange(first, first + frame.entries, dtype=np.uint32)
    elif frame.encoding is Encoding.PLAIN:
        _expect("length of the index stream", len(stream), 4 * frame.entries)
        indices = stream.view("<u4").astype(np.uint32, copy=copy)
        if not (indices[1:] > indices[:-1]).all():
            raise WireError("bad indices, expected them strictly ascending")
    else:
        dtype = GAP_DTYPE[frame.encoding]
        if len(stream) % dtype.itemsize:
            raise WireError(f"bad length of the index stream {len(stream)}, expected whole {dtype} units")
        indices = _read_gaps(stream.view(dtype), frame.entries, size)
    if indices[-1] >= size:
        raise WireError(f"bad index {indices[-1]}, expected less than {size}")
    return indices


def _read_gaps(stream: npt.NDArray[Any], count: int, size: int) -> Indices:
    last = int(stream.sum(dtype=np.uint64)) + count - 1
    if last >= size:  # checked first, so that the running sum fits uint32
        raise WireError(f"bad index {last}, expected less than {size}")
    sums = np.cumsum(stream, dtype=np.uint32)
    ends = stream != escape_of(stream.dtype)
    found = int(np.count_nonzero(ends))
    if found != count or not ends[-1]:
        raise WireError(f"bad index stream with {found} complete gaps, expected {count} and nothing after")
    indices: Indices = sums if found == len(sums) else sums[ends]
    indices += np.arange(count, dtype=np.uint32)
    return indices


def _read_bitmap(stream: Bytes, count: int) -> Indices:
    indices = np.empty(count, np.uint32)
    found = 0
    for block in blocks(slice(0, 8 * len(stream)), BLOCK):
        flags = np.unpackbits(stream[block.start // 8 : block.stop // 8], bitorder="little")
        positions = np.flatnonzero(flags.view(np.bool_))
        if found + len(positions) > count:
            raise WireError(f"bad bitmap with more than {count} bits set, expected {count}")
        target = indices[found : found + len(positions)]
        target[:] = positions
        target += np.uint32(block.start)
        found += len(positions)
    _expect("number of bits set", found, count)
    return indices


_Code = TypeVar("_Code", bound=IntEnum)


def _member(codes: type[_Code], code: int) -> _Code:
    try:
        return codes(code)
    except ValueError:
        name = codes.__name__.lower()
        raise WireError(f"bad {name} {code}, expected {min(codes)} to {max(codes)}") from None


def _expect(name: str, found: object, expected: object) -> None:
    if found != expected:
        raise WireError(f"bad {name} {found!r}, expected {expected!r}")
