"""Messages come back as they were sent, at the size announced, and nothing malformed is believed."""

from __future__ import annotations

import struct
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from dlion_mpi import wire
from dlion_mpi.vector.layout import Entries, Indices, Vector
from dlion_mpi.wire import HEADER_BYTES, Bytes, Encoding, Header, Kind, ValueType, WireError

HEADER = Header(
    kind=Kind.GRADIENT,
    sender=3,
    epoch=7,
    step=2**40 + 1,
    sequence=2**33 + 5,
    acknowledged=2**63 + 9,
    lbs=48,
    gbs=192,
    quality=0.75,
    computed_at=1234.000244140625,
)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUE_TYPES = pytest.mark.parametrize("value_type", wire.VALUE_TYPES)
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
BITS = {"int8": 8, "int4": 4, "int2": 2, "sign": 1}
ENCODING_AT, VALUE_TYPE_AT, KIND_AT = 5, 6, 7
ENTRIES_AT, PARAMETERS_AT, PAYLOAD_AT, CHECKSUM_AT = 64, 68, 72, 80


def encoded(entries: Entries | None, value_type: ValueType = "float32", header: Header = HEADER) -> Bytes:
    out = np.full(wire.capacity_bytes(entries.size if entries else 0) + 8, 0xA5, np.uint8)
    length = wire.encode(header, entries, out, value_type)
    assert (out[length:] == 0xA5).all(), "wrote beyond the length returned"
    return out[:length]


def entries_at(indices: Indices, size: int, seed: int = 0) -> Entries:
    values = np.random.default_rng(seed).standard_normal(len(indices)).astype(np.float32)
    return Entries(size, values, indices)


def random_indices(count: int, size: int, seed: int = 0) -> Indices:
    return np.sort(np.random.default_rng(seed).choice(size, count, replace=False)).astype(np.uint32)


def at(*indices: int) -> Indices:
    return np.array(indices, np.uint32)


def every(step: int, stop: int, start: int = 0) -> Indices:
    return np.arange(start, stop, step, dtype=np.uint32)


def added(entries: Entries) -> Vector:
    vector = np.zeros(entries.size, np.float32)
    entries.add_to(vector, 1.0)
    return vector


def bits(values: Vector) -> Indices:
    return values.view(np.uint32)


def values_bytes(count: int, value_type: ValueType) -> int:
    """Bytes of values; those of few bits have a step of 4 bytes for each 1,024."""
    if value_type in WIDTH:
        return WIDTH[value_type] * count
    return 4 * -(-count // 1024) + -(-BITS[value_type] * count // 8)


def smallest_payload(entries: Entries, value_type: ValueType) -> int:
    """Payload bytes by the definition of each encoding, a gap at a time."""
    dense = values_bytes(entries.size, value_type)
    if entries.indices is None or not len(entries):
        return dense if len(entries) else 0
    indices = [-1, *entries.indices.tolist()]
    gaps = [index - previous - 1 for previous, index in pairwise(indices)]
    deltas = (sum(g // 255 + 1 for g in gaps), 2 * sum(g // 65535 + 1 for g in gaps))
    plain = 4 * len(entries) if any(gaps[1:]) else 4
    sparse = values_bytes(len(entries), value_type) + min(-(-entries.size // 8), plain, *deltas)
    return min(dense, sparse) if value_type in WIDTH else sparse  # values of few bits cannot be zero


def assert_round_trip(entries: Entries, value_type: ValueType) -> Encoding:
    """The message has the announced and smallest size, and comes back bit for bit; its encoding."""
    message = encoded(entries, value_type)
    assert len(message) == wire.encoded_bytes(entries.indices, entries.size, value_type)
    assert len(message) == HEADER_BYTES + smallest_payload(entries, value_type)
    decoded = wire.decode(message, size=entries.size)
    assert decoded.header == HEADER
    expected = Entries(entries.size, wire.rounded(entries.values, value_type), entries.indices)
    encoding = Encoding(int(message[ENCODING_AT]))
    assert (decoded.entries.indices is None) == (encoding is Encoding.DENSE)
    np.testing.assert_array_equal(bits(added(decoded.entries)), bits(added(expected)))
    if decoded.entries.indices is not None and entries.indices is not None:
        assert decoded.entries.indices.dtype == np.uint32
        np.testing.assert_array_equal(decoded.entries.indices, entries.indices)
    return encoding


@st.composite
def some_entries(draw: st.DrawFn) -> Entries:
    """Up to 20 positions with gaps short and long."""
    gaps = draw(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 70_000)), max_size=20))
    indices = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    size = int(indices[-1] if gaps else 0) + draw(st.integers(1, 5000))
    values = draw(st.lists(FINITE, min_size=len(gaps), max_size=len(gaps)))
    return Entries(size, np.array(values, np.float32), indices.astype(np.uint32))


@given(entries=some_entries(), value_type=st.sampled_from(wire.VALUE_TYPES))
def test_any_selection_comes_back(entries: Entries, value_type: ValueType) -> None:
    assert_round_trip(entries, value_type)


@VALUE_TYPES
@given(size=st.integers(1, 3000), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_density_comes_back(value_type: ValueType, size: int, density: float, seed: int) -> None:
    indices = random_indices(round(density * size), size, seed)
    assert_round_trip(entries_at(indices, size, seed), value_type)


@given(values=st.lists(FINITE, max_size=60), value_type=st.sampled_from(wire.VALUE_TYPES))
def test_whole_vectors_come_back(values: list[float], value_type: ValueType) -> None:
    assert_round_trip(Entries(len(values), np.array(values, np.float32)), value_type)


@VALUE_TYPES
@pytest.mark.parametrize(
    ("indices", "size", "encoding"),
    [
        (at(), 1000, Encoding.EMPTY),
        (at(0), 1000, Encoding.DELTA8),
        (at(999), 1000, Encoding.DELTA16),  # 2 bytes against 4 in one-byte gaps
        (at(2**32 - 2), 2**32 - 1, Encoding.PLAIN),  # the last index of the largest vector
        (at(254, 509), 10**6, Encoding.DELTA8),  # gaps of 254: the largest without escape
        (every(512, 512 * 2000), 2 * 10**6, Encoding.DELTA16),
        (at(65534, 131069, 131200), 10**6, Encoding.DELTA16),  # gaps of 65534
        (every(65536, 9 * 65536, start=65535), 10**9, Encoding.PLAIN),  # gaps of 65535: an escape
        (every(300, 300_001), 300_001, Encoding.DELTA8),  # from first to last
        (every(4, 300_001), 300_001, Encoding.BITMAP),  # across the borders of blocks
        (every(1, 300_001, start=1), 300_001, Encoding.DENSE),  # all but one
        (every(1, 300_001), 300_001, Encoding.DENSE),
    ],
)
def test_smallest_is_taken(indices: Indices, size: int, encoding: Encoding, value_type: ValueType) -> None:
    if value_type in BITS and encoding is Encoding.DENSE:
        encoding = Encoding.RANGE  # only all entries are sent as such: zero has no code
    if size < 10**8:
        assert assert_round_trip(entries_at(indices, size), value_type) is encoding
        return
    message = np.empty(1000, np.uint8)  # a dense vector of this size would not fit the memory
    length = wire.encode(HEADER, entries_at(indices, size), message, value_type)
    assert Encoding(int(message[ENCODING_AT])) is encoding
    assert length == wire.encoded_bytes(indices, size, value_type)
    np.testing.assert_array_equal(wire.decode(message[:length], size=size).entries.indices, indices)


@pytest.mark.parametrize("encoding", [Encoding.DELTA8, Encoding.DELTA16])
@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_gaps_at_the_escape_value(encoding: Encoding, multiple: int, offset: int) -> None:
    """One gap at a multiple of the escape value among many small ones, so that this encoding is taken."""
    small, escape = (1, 255) if encoding is Encoding.DELTA8 else (256, 65535)
    gap = escape * multiple + offset
    indices = np.cumsum([small + 1] * 300 + [gap + 1] + [small + 1] * 300).astype(np.uint32)
    assert assert_round_trip(entries_at(indices, 10**6), "float32") is encoding


@VALUE_TYPES
def test_weights_come_back_within_capacity(value_type: ValueType) -> None:
    weights = Entries(1001, np.linspace(-1, 1, 1001, dtype=np.float32))
    header = replace(HEADER, kind=Kind.WEIGHTS)
    message = encoded(weights, value_type, header)
    assert len(message) == HEADER_BYTES + values_bytes(1001, value_type) <= wire.capacity_bytes(1001)
    assert HEADER_BYTES % 8 == 0, "the payload is aligned"
    decoded = wire.decode(message, size=1001)
    assert decoded.header == header
    np.testing.assert_array_equal(decoded.entries.values, wire.rounded(weights.values, value_type))


@pytest.mark.parametrize("kind", [Kind.PROGRESS, Kind.CLOSE, Kind.ACK, Kind.STOP])
@pytest.mark.parametrize("entries", [None, Entries(50, np.empty(0, np.float32), at())])
def test_header_only_messages(kind: Kind, entries: Entries | None) -> None:
    message = encoded(entries, header=replace(HEADER, kind=kind))
    assert len(message) == HEADER_BYTES
    decoded = wire.decode(message, size=50)
    assert decoded.header == replace(HEADER, kind=kind)
    assert len(decoded.entries) == 0
    assert len(added(decoded.entries)) == 50


@VALUE_TYPES
@pytest.mark.parametrize("size", [7, 200, 300_000])
def test_decoded_arrays_are_the_callers_own(value_type: ValueType, size: int) -> None:
    for entries in (Entries(size, np.ones(size, np.float32)), entries_at(at(size - 1), size)):
        message = encoded(entries, value_type)
        decoded = wire.decode(message, size=size).entries
        before = added(decoded)
        message[:] = 0xFF
        np.testing.assert_array_equal(added(decoded), before)
        decoded.values[0] = 5.0


def test_without_copy_dense_values_lie_in_the_buffer() -> None:
    message = encoded(Entries(9, np.arange(9, dtype=np.float32)))
    decoded = wire.decode(message, size=9, copy=False)
    assert np.shares_memory(decoded.entries.values, message)
    np.testing.assert_array_equal(decoded.entries.values, np.arange(9))


@VALUE_TYPES
@pytest.mark.parametrize("indices", [at(3, 70, 90_000), every(7, 3000), None])
def test_unaligned_and_readonly_buffers(indices: Indices | None, value_type: ValueType) -> None:
    size = 100_000
    entries = Entries(size, np.ones(size, np.float32)) if indices is None else entries_at(indices, size)
    aligned = encoded(entries, value_type)
    buffer = np.empty(len(aligned) + 1, np.uint8)
    assert wire.encode(HEADER, entries, buffer[1:], value_type) == len(aligned)
    np.testing.assert_array_equal(buffer[1:], aligned)
    buffer.setflags(write=False)
    decoded = wire.decode(buffer[1:], size=size).entries
    np.testing.assert_array_equal(added(decoded), added(wire.decode(aligned, size=size).entries))


@given(values=st.lists(FINITE, max_size=50), value_type=st.sampled_from(wire.VALUE_TYPES))
@example(values=[65504.0, 65519.0, 65520.0, 1e30, -1e30, 0.0, -0.0, 1e-45, 6e-8], value_type="float16")
@example(values=[3.4028234663852886e38, -3.4028234663852886e38, 1e-45, -0.0], value_type="bfloat16")
@example(values=[3.4028234663852886e38, -3.4028234663852886e38], value_type="int4")
@example(values=[3.4028234663852886e38, -3.4028234663852886e38], value_type="sign")
def test_rounded_is_what_the_receiver_sees(values: list[float], value_type: ValueType) -> None:
    vector = np.array(values, np.float32)
    sent = wire.rounded(vector, value_type)
    assert sent is vector if value_type == "float32" else sent.dtype == np.float32
    assert np.isfinite(sent).all()
    received = wire.decode(encoded(Entries(len(vector), vector), value_type), size=len(vector)).entries.values
    np.testing.assert_array_equal(bits(received), bits(sent))


@given(values=st.lists(FINITE, min_size=1, max_size=50), value_type=st.sampled_from(wire.VALUE_TYPES))
@example(values=[1.0, -2.0, 3.0, 40.0], value_type="int4")
@example(values=[1.0, -2.0, 3.0, 40.0], value_type="int2")
def test_what_was_rounded_arrives_as_it_is(values: list[float], value_type: ValueType) -> None:
    """The sender keeps the error of one rounding: a message must not round once more."""
    entries = Entries(100, np.array(values, np.float32), np.arange(len(values), dtype=np.uint32) * 2)
    sent = wire.rounded_entries(entries, value_type)
    received = wire.decode(encoded(sent, value_type), size=100).entries
    np.testing.assert_array_equal(added(received), added(sent))
    assert wire.rounded_entries(sent, value_type).values.tobytes() == sent.values.tobytes()


@pytest.mark.parametrize(
    ("value_type", "least", "most"), [("int8", 0, 1e-3), ("int4", 0.01, 0.04), ("int2", 0.1, 0.22)]
)
@pytest.mark.parametrize("distribution", ["standard_normal", "laplace"])
def test_values_of_few_bits_leave_little_behind(
    value_type: ValueType, least: float, most: float, distribution: str
) -> None:
    """As a share of the squared values; Max's best quantizers of 4 and 2 bits leave 0.012 and 0.12 of normal values."""
    values = getattr(np.random.default_rng(1), distribution)(size=50_000).astype(np.float32)
    left = values - wire.rounded(values, value_type)
    assert least <= float(left @ left) / float(values @ values) <= most


def test_a_sign_has_the_mean_magnitude_of_its_block() -> None:
    values = np.concatenate([np.full(1024, -3.0), np.arange(1024) - 100.0, [0.5, -1.5]]).astype(np.float32)
    sent = wire.rounded(values, "sign")
    np.testing.assert_array_equal(sent[:1024], -3.0)
    np.testing.assert_allclose(np.abs(sent[1024:2048]), np.abs(values[1024:2048]).mean(), rtol=1e-6)
    np.testing.assert_array_equal(sent[1024:2048] >= 0, values[1024:2048] >= 0)
    assert sent[2048:].tolist() == [1.0, -1.0]
    assert not wire.rounded(np.zeros(5, np.float32), "sign").any()


def test_float16_rounds_as_numpy_and_saturates() -> None:
    values = np.array([1 / 3, -2e-7, 65519.0, 65520.0, -1e20], np.float32)
    expected = np.array([1 / 3, -2e-7, 65504, 65504, -65504]).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(wire.rounded(values, "float16"), expected)


def test_bfloat16_rounds_to_nearest_even() -> None:
    pairs = {
        0x3F800000: 0x3F800000,
        0x3F807FFF: 0x3F800000,  # below half: down
        0x3F808000: 0x3F800000,  # half: to the even neighbour, down
        0xBF818000: 0xBF820000,  # half: to the even neighbour, up
        0x3F808001: 0x3F810000,  # above half: up
        0x3FFFFFFF: 0x40000000,  # carries into the exponent
        0x00008001: 0x00010000,  # subnormal
        0x80000000: 0x80000000,
        0x7F7FFFFF: 0x7F7F0000,  # saturates instead of becoming infinite
        0xFF7FFFFF: 0xFF7F0000,
    }
    values = np.array(list(pairs), np.uint32).view(np.float32)
    assert bits(wire.rounded(values, "bfloat16")).tolist() == list(pairs.values())


@pytest.mark.filterwarnings("error")
@VALUE_TYPES
@pytest.mark.parametrize("word", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("indices", [None, at(0, 1000, 3000)])
def test_not_finite_is_refused(word: int, value_type: ValueType, indices: Indices | None) -> None:
    values = np.ones(200_000 if indices is None else len(indices), np.float32)
    values[-1:] = np.array([word], np.uint32).view(np.float32)
    message = encoded(Entries(200_000, values, indices), value_type)
    # Of values with a common step all are lost.
    at_most = len(values) - 1 if value_type in WIDTH else (len(values) - 1) // 1024 * 1024
    with pytest.raises(WireError, match=rf"bad value (nan|inf|-inf) at {at_most}, expected finite"):
        wire.decode(message, size=200_000)


@VALUE_TYPES
@pytest.mark.parametrize("size", [40_000, 1_040_000])
@pytest.mark.parametrize("density", [0.0001, 0.001, 0.004, 0.01, 0.02, 0.05, 0.12, 0.13, 0.5, 0.96, 0.99])
def test_expected_size_for_random_positions(value_type: ValueType, size: int, density: float) -> None:
    count = round(density * size)
    exact = wire.encoded_bytes(random_indices(count, size), size, value_type)
    assert wire.bytes_for_count(count, size, value_type) == pytest.approx(exact, rel=0.02)


@VALUE_TYPES
def test_expected_size_never_falls_as_more_is_kept(value_type: ValueType) -> None:
    sizes = [wire.bytes_for_count(count, 50_000, value_type) for count in range(0, 50_001, 7)]
    assert sizes == sorted(sizes)
    assert sizes[0] == HEADER_BYTES
    for count in (-1, 50_001):
        with pytest.raises(ValueError, match=f"cannot keep {count} of 50000 entries"):
            wire.bytes_for_count(count, 50_000, value_type)
    if value_type in WIDTH:
        assert wire.bytes_for_count(50_000, 50_000, value_type) == HEADER_BYTES + 50_000 * WIDTH[value_type]


@pytest.mark.parametrize(("value_type", "most"), [("float32", 5.3), ("float16", 3.3), ("bfloat16", 3.3)])
def test_one_per_cent_kept_is_cheap(value_type: ValueType, most: float) -> None:
    indices = random_indices(10_400, 1_040_000)
    payload = wire.encoded_bytes(indices, 1_040_000, value_type) - HEADER_BYTES
    assert payload / 10_400 <= most


def test_small_buffer_is_refused_untouched() -> None:
    entries = entries_at(at(1, 5), 100)
    need = wire.encoded_bytes(entries.indices, 100)
    out = np.zeros(need - 1, np.uint8)
    with pytest.raises(ValueError, match=f"message of {need} bytes does not fit a buffer of {need - 1}"):
        wire.encode(HEADER, entries, out)
    assert not out.any()


@pytest.mark.parametrize(
    ("header", "entries", "error"),
    [
        (HEADER, None, "GRADIENT message needs entries"),
        (replace(HEADER, kind=Kind.ACK), entries_at(at(1), 3), "ACK message carries no entries, got 1"),
        (replace(HEADER, kind=Kind.WEIGHTS), entries_at(at(1), 3), "carries all 3 entries, got 1"),
        (HEADER, Entries(3, np.ones(2, np.float32)), "2 values for 3 positions"),
        (HEADER, Entries(9, np.ones(2, np.float32), at(1)), "2 values for 1 positions"),
        (replace(HEADER, sender=-1), entries_at(at(1), 3), "out of range"),
        (replace(HEADER, lbs=2**32), entries_at(at(1), 3), "out of range"),
        (replace(HEADER, quality=1e300), entries_at(at(1), 3), "out of range"),
        (replace(HEADER, computed_at=float("nan")), entries_at(at(1), 3), "must be finite"),
    ],
)
def test_what_does_not_suit_the_kind_is_refused(header: Header, entries: Entries | None, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        wire.encode(header, entries, np.empty(1000, np.uint8))


def test_unknown_value_type_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown value type 'float8', use one of float32, float16"):
        wire.rounded(np.ones(3, np.float32), "float8")  # type: ignore[arg-type]


SIZE = 1998  # two padding bits in a bitmap
SAMPLES = {
    Encoding.DENSE: Entries(40, np.ones(40, np.float32)),
    Encoding.BITMAP: entries_at(every(3, 70), 70),
    Encoding.DELTA8: entries_at(at(0, 3, 600, 700, 900), SIZE),
    Encoding.DELTA16: entries_at(at(500, 1000, 1997), SIZE),
    Encoding.PLAIN: entries_at(at(1_900_000, 1_990_000), 2_000_000),
    Encoding.EMPTY: entries_at(at(), SIZE),
    Encoding.RANGE: entries_at(every(1, 1600, start=1590), SIZE),
}


def sample(encoding: Encoding, value_type: ValueType = "float32") -> tuple[Bytes, int]:
    """A small message in this encoding, and the size of its vector."""
    entries = SAMPLES[encoding]
    out = np.empty(1000, np.uint8)
    message = out[: wire.encode(HEADER, entries, out, value_type)]
    assert message[ENCODING_AT] == encoding
    return message, entries.size


@pytest.mark.parametrize("encoding", wire.Encoding)
def test_a_message_under_another_header_is_as_if_encoded_under_it(encoding: Encoding) -> None:
    message, size = sample(encoding)
    other = replace(HEADER, sequence=77, acknowledged=3, quality=12.5)
    out = np.full(len(message) + 8, 0xA5, np.uint8)
    assert wire.encode_again(other, message, out) == len(message)
    assert (out[len(message) :] == 0xA5).all()
    again, before = wire.decode(out[: len(message)], size=size), wire.decode(message, size=size)
    assert again.header == other
    np.testing.assert_array_equal(added(again.entries), added(before.entries))


def signed(message: Bytes) -> Bytes:
    """The same bytes with lengths and checksum made right, as a liar would."""
    message = message.copy()
    struct.pack_into("<Q", message.data, PAYLOAD_AT, len(message) - HEADER_BYTES)
    covered = message[:CHECKSUM_AT].tobytes() + message[HEADER_BYTES:].tobytes()
    struct.pack_into("<Q", message.data, CHECKSUM_AT, xxhash.xxh3_64_intdigest(covered))
    return message


def packed(dtype: str, *units: int) -> bytes:
    return np.array(units, dtype).tobytes()


def crafted(encoding: Encoding, stream: bytes, *, count: int, size: int) -> Bytes:
    """A message of ``count`` ones with this index stream and a valid checksum."""
    head = encoded(None, header=replace(HEADER, kind=Kind.ACK)).copy()
    head[KIND_AT], head[ENCODING_AT] = Kind.GRADIENT, encoding
    struct.pack_into("<II", head.data, ENTRIES_AT, count, size)
    payload = np.frombuffer(np.ones(count, "<f4").tobytes() + stream, np.uint8)
    return signed(np.concatenate([head, payload]))


@VALUE_TYPES
@pytest.mark.parametrize("encoding", Encoding)
def test_every_corrupt_byte_is_noticed(encoding: Encoding, value_type: ValueType) -> None:
    message, size = sample(encoding, value_type)
    wire.decode(message, size=size)
    for position in range(len(message)):
        for flip in (0x01, 0x80, 0xFF):
            message[position] ^= flip
            with pytest.raises(WireError):
                wire.decode(message, size=size)
            message[position] ^= flip


@pytest.mark.parametrize("encoding", Encoding)
def test_truncated_and_extended_messages(encoding: Encoding) -> None:
    message, size = sample(encoding)
    longer = np.concatenate([message, np.zeros(8, np.uint8)])
    for length in {*range(len(longer) + 1)} - {len(message)}:
        with pytest.raises(WireError, match="bad payload length" if length >= HEADER_BYTES else "bad length"):
            wire.decode(longer[:length], size=size)
        if length >= HEADER_BYTES:
            with pytest.raises(WireError):
                wire.decode(signed(longer[:length]), size=size)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(np.frombuffer(noise, np.uint8), size=10)


@pytest.mark.parametrize("encoding", [Encoding.BITMAP, Encoding.DELTA8, Encoding.DELTA16, Encoding.PLAIN])
@given(stream=st.binary(max_size=24), count=st.integers(1, 12), size=st.integers(1, 100))
def test_signed_noise_is_valid_or_refused(encoding: Encoding, stream: bytes, count: int, size: int) -> None:
    try:
        message = wire.decode(crafted(encoding, stream, count=count, size=size), size=size)
    except WireError:
        return
    indices = message.entries.indices
    assert indices is not None
    assert len(indices) == len(message.entries) == count
    assert indices[-1] < size
    assert (np.diff(indices.astype(np.int64)) > 0).all()


@pytest.mark.parametrize(
    ("at", "form", "value", "error"),
    [
        (0, "4s", b"XXXX", "bad magic b'XXXX', expected b'DLN1'"),
        (4, "B", 2, "bad version 2, expected 1"),
        (ENCODING_AT, "B", 7, "bad encoding 7, expected 0 to 6"),
        (VALUE_TYPE_AT, "B", 7, "bad value type 7, expected 0 to 6"),
        (KIND_AT, "B", 0, "bad kind 0, expected 1 to 8"),
        (KIND_AT, "B", Kind.ACK, f"bad number of parameters {SIZE}, expected 0"),
        (KIND_AT, "B", Kind.WEIGHTS, f"bad number of entries 5, expected {SIZE}"),
        (ENTRIES_AT, "I", SIZE + 1, f"bad number of entries {SIZE + 1}, expected at most {SIZE}"),
        (PARAMETERS_AT, "I", SIZE - 1, f"bad number of parameters {SIZE - 1}, expected {SIZE}"),
        (PAYLOAD_AT, "Q", 2**63, f"bad payload length {2**63}, expected "),
        (CHECKSUM_AT, "Q", 17, "bad checksum 17, expected "),
    ],
)
def test_what_is_wrong_is_named(at: int, form: str, value: object, error: str) -> None:
    message, size = sample(Encoding.DELTA8)
    message = message.copy()
    struct.pack_into("<" + form, message.data, at, value)
    with pytest.raises(WireError) as caught:
        wire.decode(message, size=size)
    assert str(caught.value).startswith(error)


@pytest.mark.parametrize(("at", "form"), [(48, "f"), (56, "d")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_header_numbers_are_finite(at: int, form: str, value: float) -> None:
    message, size = sample(Encoding.EMPTY)
    struct.pack_into("<" + form, message.data, at, value)
    with pytest.raises(WireError, match="expected finite numbers"):
        wire.decode(signed(message), size=size)


@pytest.mark.parametrize(
    ("encoding", "stream", "count", "error"),
    [
        (Encoding.PLAIN, packed("<u4", 5, 5), 2, "strictly ascending"),
        (Encoding.PLAIN, packed("<u4", 6, 5), 2, "strictly ascending"),
        (Encoding.PLAIN, packed("<u4", 5, SIZE), 2, f"bad index {SIZE}, expected less than {SIZE}"),
        (Encoding.PLAIN, packed("<u4", 5), 2, "index stream 4, expected 8"),
        (Encoding.PLAIN, packed("<u4", 5, 6, 7), 2, "index stream 12, expected 8"),
        (Encoding.DENSE, b"", 2, f"number of entries 2, expected {SIZE}"),
        (Encoding.EMPTY, b"", 2, "bad encoding EMPTY for 2 entries"),
        (Encoding.EMPTY, b"x", 0, "payload length 1, expected 0"),
        (Encoding.BITMAP, b"", 0, "bad encoding BITMAP for 0 entries"),
        (Encoding.DELTA8, b"", 0, "bad encoding DELTA8 for 0 entries"),
        (Encoding.BITMAP, b"\x03" + bytes(249), 3, "number of bits set 2, expected 3"),
        (Encoding.BITMAP, b"\x0f" + bytes(249), 3, "more than 3 bits set"),
        (Encoding.BITMAP, bytes(249) + b"\x40", 1, f"bad index {SIZE}, expected less than {SIZE}"),
        (Encoding.BITMAP, b"\x07" + bytes(248), 3, "bitmap 249, expected 250"),
        (Encoding.BITMAP, b"\x07" + bytes(250), 3, "bitmap 251, expected 250"),
        (Encoding.DELTA8, b"", 2, "0 complete gaps, expected 2"),
        (Encoding.DELTA8, b"\x01", 2, "1 complete gaps, expected 2"),
        (Encoding.DELTA8, b"\x01\x02\x03", 2, "3 complete gaps, expected 2"),
        (Encoding.DELTA8, b"\x01\x02\xff", 2, "expected 2 and nothing after"),
        (Encoding.DELTA8, b"\xff" * 7 + b"\xd5", 1, f"bad index {SIZE}, expected"),
        (Encoding.DELTA8, b"\xff" * 600, 2, "bad index"),
        (Encoding.DELTA16, b"\x01\x00\x02", 2, "index stream 3, expected whole uint16 units"),
        (Encoding.DELTA16, packed("<u2", 65535, 1), 1, "bad index 65536"),
        (Encoding.DELTA16, packed("<u2", SIZE - 1, 0), 2, f"bad index {SIZE}, expected"),
    ],
)
def test_signed_lies_are_refused(encoding: Encoding, stream: bytes, count: int, error: str) -> None:
    with pytest.raises(WireError, match=error):
        wire.decode(crafted(encoding, stream, count=count, size=SIZE), size=SIZE)


def test_running_sum_of_gaps_cannot_wrap_around() -> None:
    """Escapes that add up to 2**32 + 5 would look like index 5 in uint32."""
    stream = packed("<u2", *[65535] * 65537, 6)
    with pytest.raises(WireError, match=f"bad index {65535 * 65537 + 6}"):
        wire.decode(crafted(Encoding.DELTA16, stream, count=1, size=SIZE), size=SIZE)


def test_announced_entries_allocate_nothing_before_the_check() -> None:
    """4 billion entries announced by a message of some 100 bytes: refused, not allocated."""
    size = 2**32 - 1
    for encoding in (Encoding.BITMAP, Encoding.DELTA8, Encoding.PLAIN):
        message = crafted(encoding, b"\x00" * 20, count=1, size=size)
        struct.pack_into("<I", message.data, ENTRIES_AT, size)
        with pytest.raises(WireError, match=f"expected {4 * size} or more for the values"):
            wire.decode(signed(message), size=size)
