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
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from dlion_mpi.flat import Entries, Indices, Vector, blocks

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
_HEADER = struct.Struct("<4sBBBB II QQQ II f4xd II Q")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size  # 88, a multiple of 8, so that the values are aligned

_HEADER_ONLY = frozenset({Kind.PROGRESS, Kind.CLOSE, Kind.ACK, Kind.STOP})
_VALUE_DTYPE: dict[ValueType, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),  # numpy has no bfloat16: the upper half of a float32's bits
}
_LARGEST: dict[ValueType, float] = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}
_GAP_DTYPE: dict[Encoding, np.dtype[Any]] = {
    Encoding.DELTA8: np.dtype("u1"),
    Encoding.DELTA16: np.dtype("<u2"),
}
_BLOCK = 1 << 17  # entries worked on at a time where a step needs scratch space; fits a core's cache


# ---- sizes


def capacity_bytes(size: int) -> int:
    """Bytes of the largest possible message for a vector of ``size`` entries: all of them as float32."""
    return HEADER_BYTES + 4 * size


def encoded_bytes(
    indices: Indices | None, size: int, value_type: ValueType = "float32", kind: Kind = Kind.GRADIENT
) -> int:
    """Bytes that ``encode`` writes for these entries of a vector of ``size``, header included; exact."""
    return HEADER_BYTES + _plan(indices, size, _width(kind, value_type)).payload_bytes


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
    index_bytes = min(float(_bitmap_bytes(size)), 4.0 * count)
    for dtype in _GAP_DTYPE.values():
        beyond = miss ** _escape(dtype)
        index_bytes = min(index_bytes, dtype.itemsize * count / (1.0 - beyond))
    width = _dtype(value_type).itemsize
    return HEADER_BYTES + min(width * size, width * count + math.ceil(index_bytes))


# ---- encode


def encode(header: Header, entries: Entries | None, out: Bytes, value_type: ValueType = "float32") -> int:
    """Write a message into ``out``, a contiguous uint8 buffer, and return its length in bytes.

    Values are written as ``rounded`` describes. A GRADIENT whose sparse form would not be smaller becomes
    DENSE with zeros in the gaps, which adds up to the same. Raises ValueError if ``out`` is too small, a
    header field is out of range, or the entries do not suit the kind.
    """
    parameters, values, indices = _content(header.kind, entries)
    dtype, width = _dtype(value_type), _width(header.kind, value_type)
    plan = _plan(indices, parameters, width)
    total = HEADER_BYTES + plan.payload_bytes
    if len(out) < total:
        raise ValueError(f"a message of {total} bytes does not fit a buffer of {len(out)} bytes")
    count = parameters if plan.encoding is Encoding.DENSE else len(values)
    split = HEADER_BYTES + count * width
    slots = out[HEADER_BYTES:split].view(dtype)
    if plan.encoding is Encoding.DENSE and indices is not None:
        slots.fill(0)
        slots[indices] = _to_wire(values, np.empty(len(values), dtype), value_type)
    elif width:
        _to_wire(values, slots, value_type)
    _write_indices(plan, indices, parameters, out[split:total])
    _write_header(header, plan, VALUE_TYPES.index(value_type), count, parameters, out)
    _CHECKSUM.pack_into(out.data, _HEADER.size, _checksum(out[:total]))
    return total


def encode_again(header: Header, message: Bytes, out: Bytes) -> int:
    """Write an encoded ``message`` into ``out`` under another ``header`` of its kind; cheaper than to encode it."""
    out[HEADER_BYTES : len(message)] = message[HEADER_BYTES:]
    _, _, encoding, code, *_, count, parameters, payload_bytes = _HEADER.unpack_from(message.data)
    _write_header(header, _Plan(Encoding(encoding), payload_bytes), code, count, parameters, out)
    _CHECKSUM.pack_into(out.data, _HEADER.size, _checksum(out[: len(message)]))
    return len(message)


def rounded(values: Vector, value_type: ValueType) -> Vector:
    """The float32 values the receiver will see, bit for bit; ``values`` itself for float32, else a new array.

    16-bit types round to nearest, ties to even. Finite values beyond the type's range saturate at its largest
    number instead of overflowing. What is not finite becomes NaN, which ``decode`` refuses.
    """
    if value_type == "float32":
        return values
    halves = np.empty(len(values), _dtype(value_type))
    return _from_wire(_to_wire(values, halves, value_type), value_type, copy=True)


class _Plan(NamedTuple):
    encoding: Encoding
    payload_bytes: int
    gaps: Indices | None = None


def _plan(indices: Indices | None, size: int, width: int) -> _Plan:
    """The smallest encoding and its exact payload, with the gaps if it needs them."""
    if size == 0 or (indices is not None and len(indices) == 0):
        return _Plan(Encoding.EMPTY, 0)
    dense = _Plan(Encoding.DENSE, width * size)
    if indices is None:
        return dense
    count = len(indices)
    best = _Plan(Encoding.BITMAP, width * count + _bitmap_bytes(size))
    if (width + 4) * count < best.payload_bytes:
        best = _Plan(Encoding.PLAIN, (width + 4) * count)
    if int(indices[-1]) - int(indices[0]) == count - 1 and width * count + 4 < best.payload_bytes:
        best = _Plan(Encoding.RANGE, width * count + 4)
    gaps: Indices | None = None
    for encoding, dtype in _GAP_DTYPE.items():
        if (width + dtype.itemsize) * count >= best.payload_bytes:
            continue  # already without escapes it is no smaller
        gaps = _gaps(indices) if gaps is None else gaps
        wide = gaps[gaps >= _escape(dtype)]  # few: an escape is worth its while only if it is rare
        units = count + int((wide // _escape(dtype)).sum(dtype=np.int64))
        if width * count + dtype.itemsize * units < best.payload_bytes:
            best = _Plan(encoding, width * count + dtype.itemsize * units, gaps)
    return best if best.payload_bytes < dense.payload_bytes or not width else dense


def _content(kind: Kind, entries: Entries | None) -> tuple[int, Vector, Indices | None]:
    """Parameters, values and indices of the message."""
    if kind in _HEADER_ONLY:
        if entries is not None and len(entries):
            raise ValueError(f"a {kind.name} message carries no entries, got {len(entries)}")
        return 0, np.empty(0, np.float32), None
    if entries is None:
        raise ValueError(f"a {kind.name} message needs entries")
    expected = entries.size if entries.indices is None else len(entries.indices)
    if len(entries) != expected:
        raise ValueError(f"{len(entries)} values for {expected} positions")
    if kind is Kind.WEIGHTS and len(entries) != entries.size:
        raise ValueError(f"a WEIGHTS message carries all {entries.size} entries, got {len(entries)}")
    return entries.size, entries.values, entries.indices


def _write_header(header: Header, plan: _Plan, code: int, count: int, parameters: int, out: Bytes) -> None:
    if not (math.isfinite(header.quality) and math.isfinite(header.computed_at)):
        raise ValueError(f"quality and computed_at must be finite: {header}")
    fields = [getattr(header, name) for name in Header.__slots__]
    front = (MAGIC, VERSION, plan.encoding, code)
    try:
        _HEADER.pack_into(out.data, 0, *front, *fields, count, parameters, plan.payload_bytes)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"a header field is out of range ({error}): {header}") from error


def _write_indices(plan: _Plan, indices: Indices | None, size: int, stream: Bytes) -> None:
    if plan.gaps is not None:
        _write_gaps(plan.gaps, stream.view(_GAP_DTYPE[plan.encoding]))
    elif indices is not None and plan.encoding is Encoding.PLAIN:
        stream.view("<u4")[:] = indices
    elif indices is not None and plan.encoding is Encoding.RANGE:
        stream.view("<u4")[:] = indices[0]
    elif indices is not None and plan.encoding is Encoding.BITMAP:
        _write_bitmap(indices, size, stream)


def _write_gaps(gaps: Indices, stream: npt.NDArray[Any]) -> None:
    if len(stream) == len(gaps):
        stream[:] = gaps
        return
    escape = _escape(stream.dtype)
    escapes = gaps // escape
    stream.fill(escape)
    stream[np.cumsum(escapes + 1, dtype=np.int64) - 1] = gaps - escapes * escape


def _write_bitmap(indices: Indices, size: int, stream: Bytes) -> None:
    scratch = np.empty(min(size, _BLOCK), np.uint8)
    start = 0
    for block in blocks(slice(0, size), _BLOCK):
        flags = scratch[: block.stop - block.start]
        flags.fill(0)
        stop = int(np.searchsorted(indices, np.uint32(block.stop)))
        flags[indices[start:stop] - block.start] = 1
        stream[block.start // 8 : _bitmap_bytes(block.stop)] = np.packbits(flags, bitorder="little")
        start = stop


def _to_wire(values: Vector, out: npt.NDArray[Any], value_type: ValueType) -> npt.NDArray[Any]:
    """Write ``values`` into ``out``, which has the value type's dtype; returns ``out``."""
    if value_type == "float32":
        out[:] = values
        return out
    values = _saturated(values, _LARGEST[value_type])
    if value_type == "float16":
        out[:] = values
        return out
    bits = values.view(np.uint32)
    for block in blocks(slice(0, len(values)), _BLOCK):
        half = bits[block] >> 16
        half &= 1  # ties go to the even neighbour
        half += 0x7FFF
        half += bits[block]
        half >>= 16
        out[block] = half
    return out


def _saturated(values: Vector, largest: float) -> Vector:
    """``values`` within +-largest; what is not finite becomes the one NaN that survives rounding."""
    with np.errstate(invalid="ignore"):  # a signalling NaN may warn, depending on numpy
        if not len(values) or (values.max() <= largest and values.min() >= -largest):
            return values  # NaN fails both comparisons
        return np.where(np.isfinite(values), np.clip(values, -largest, largest), np.float32(np.nan))


# ---- decode


class _Frame(NamedTuple):
    header: Header
    encoding: Encoding
    value_type: ValueType
    entries: int


def decode(buffer: Bytes, *, size: int, copy: bool = True) -> Message:
    """The message in ``buffer``: exactly the bytes that arrived, for a vector of ``size`` entries.

    Checks everything before it is used, and raises WireError naming what is wrong. The arrays are the
    caller's own; with ``copy=False`` they may lie in ``buffer``, valid only until that is reused. Entries
    sent DENSE have ``indices=None``; a header-only message has no entries.
    """
    frame = _read_frame(buffer, size)
    if frame.entries == 0:
        return Message(frame.header, Entries(size, np.empty(0, np.float32), np.empty(0, np.uint32)))
    dtype = _VALUE_DTYPE[frame.value_type]
    value_bytes = frame.entries * _width(frame.header.kind, frame.value_type)
    payload = buffer[HEADER_BYTES:]
    if len(payload) < value_bytes:
        raise WireError(f"bad payload of {len(payload)} bytes, expected {value_bytes} or more for the values")
    indices = _read_indices(frame, payload[value_bytes:], size, copy)
    values = _from_wire(payload[:value_bytes].view(dtype), frame.value_type, copy)
    for block in blocks(slice(0, len(values)), _BLOCK):
        finite = np.isfinite(values[block])
        if not finite.all():
            position = block.start + int(np.argmin(finite))
            raise WireError(f"bad value {values[position]} at {position}, expected finite values")
    return Message(frame.header, Entries(size, values, indices))


def _read_frame(buffer: Bytes, size: int) -> _Frame:
    """The header of an intact message whose lengths agree with each other and with the run."""
    if len(buffer) < HEADER_BYTES:
        raise WireError(f"bad length of {len(buffer)} bytes, expected {HEADER_BYTES} or more for a header")
    magic, version, encoding, value_type, *rest = _HEADER.unpack_from(buffer.data)
    *fields, count, parameters, payload_bytes = rest
    _expect("magic", magic, MAGIC)
    _expect("version", version, VERSION)
    kind = fields[0] = _member(Kind, fields[0])
    encoding = _member(Encoding, encoding)
    if value_type >= len(VALUE_TYPES):
        raise WireError(f"bad value type {value_type}, expected 0 to {len(VALUE_TYPES) - 1}")
    _expect("number of parameters", parameters, 0 if kind in _HEADER_ONLY else size)
    if count > parameters:
        raise WireError(f"bad number of entries {count}, expected at most {parameters}")
    if kind is Kind.WEIGHTS or encoding is Encoding.DENSE:
        _expect("number of entries", count, parameters)
    _expect("payload length", payload_bytes, len(buffer) - HEADER_BYTES)
    _expect("checksum", _CHECKSUM.unpack_from(buffer.data, _HEADER.size)[0], _checksum(buffer))
    if (encoding is Encoding.EMPTY) != (count == 0):
        raise WireError(f"bad encoding {encoding.name} for {count} entries")
    if count == 0:
        _expect("payload length", payload_bytes, 0)
    header = Header(**dict(zip(Header.__slots__, fields, strict=True)))
    if not (math.isfinite(header.quality) and math.isfinite(header.computed_at)):
        raise WireError(f"bad quality {header.quality} or time {header.computed_at}, expected finite numbers")
    return _Frame(header, encoding, VALUE_TYPES[value_type], count)


def _read_indices(frame: _Frame, stream: Bytes, size: int, copy: bool) -> Indices | None:
    """The indices, strictly ascending and below ``size``; None for all entries."""
    if frame.encoding is Encoding.DENSE:
        _expect("length of the index stream", len(stream), 0)
        return None
    if frame.encoding is Encoding.BITMAP:
        _expect("length of the bitmap", len(stream), _bitmap_bytes(size))
        indices = _read_bitmap(stream, frame.entries)
    elif frame.encoding is Encoding.RANGE:
        _expect("length of the index stream", len(stream), 4)
        first = int(stream.view("<u4")[0])
        if first + frame.entries > size:  # beforehand, so that every index fits uint32
            raise WireError(f"bad index {first + frame.entries - 1}, expected less than {size}")
        indices = np.arange(first, first + frame.entries, dtype=np.uint32)
    elif frame.encoding is Encoding.PLAIN:
        _expect("length of the index stream", len(stream), 4 * frame.entries)
        indices = stream.view("<u4").astype(np.uint32, copy=copy)
        if not (indices[1:] > indices[:-1]).all():
            raise WireError("bad indices, expected them strictly ascending")
    else:
        dtype = _GAP_DTYPE[frame.encoding]
        if len(stream) % dtype.itemsize:
            raise WireError(f"bad length of the index stream {len(stream)}, expected whole {dtype} units")
        indices = _read_gaps(stream.view(dtype), frame.entries, size)
    if indices[-1] >= size:
        raise WireError(f"bad index {indices[-1]}, expected less than {size}")
    return indices


def _read_gaps(stream: npt.NDArray[Any], count: int, size: int) -> Indices:
    last = int(stream.sum(dtype=np.uint64)) + count - 1
    if last >= size:  # beforehand, so that the running sum fits uint32
        raise WireError(f"bad index {last}, expected less than {size}")
    sums = np.cumsum(stream, dtype=np.uint32)
    ends = stream != _escape(stream.dtype)
    found = int(np.count_nonzero(ends))
    if found != count or not ends[-1]:
        raise WireError(f"bad index stream with {found} complete gaps, expected {count} and nothing after")
    indices: Indices = sums if found == len(sums) else sums[ends]
    indices += np.arange(count, dtype=np.uint32)
    return indices


def _read_bitmap(stream: Bytes, count: int) -> Indices:
    indices = np.empty(count, np.uint32)
    found = 0
    for block in blocks(slice(0, 8 * len(stream)), _BLOCK):
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


def _from_wire(slots: npt.NDArray[Any], value_type: ValueType, copy: bool) -> Vector:
    if value_type != "bfloat16":
        return slots.astype(np.float32, copy=copy)
    words = slots.astype(np.uint32)
    words <<= 16
    return words.view(np.float32)


# ---- shared


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


def _checksum(message: Bytes) -> int:
    digest = xxhash.xxh3_64(message[: _HEADER.size].data)
    digest.update(message[HEADER_BYTES:].data)
    return digest.intdigest()


def _dtype(value_type: ValueType) -> np.dtype[Any]:
    if value_type not in _VALUE_DTYPE:
        raise ValueError(f"unknown value type {value_type!r}, use one of {', '.join(VALUE_TYPES)}")
    return _VALUE_DTYPE[value_type]


def _width(kind: Kind, value_type: ValueType) -> int:
    """Bytes of a value."""
    return 0 if kind is Kind.INDICES else _dtype(value_type).itemsize


def _bitmap_bytes(size: int) -> int:
    return (size + 7) // 8


def _escape(dtype: np.dtype[Any]) -> int:
    return (1 << 8 * dtype.itemsize) - 1


def _gaps(indices: Indices) -> Indices:
    gaps = np.empty_like(indices)
    gaps[0] = indices[0]
    np.subtract(indices[1:], indices[:-1], out=gaps[1:])
    gaps[1:] -= 1
    return gaps
