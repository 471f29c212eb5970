"""Ranges of successive entries, and indices that travel ahead of their values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dlion_mpi import wire
from dlion_mpi.vector.layout import Entries, Indices
from dlion_mpi.wire import HEADER_BYTES, Encoding, Kind, WireError
from tests.unit.test_wire import (
    HEADER,
    SIZE,
    assert_round_trip,
    crafted,
    encoded,
    entries_at,
    every,
    packed,
    random_indices,
    values_bytes,
)


@pytest.mark.parametrize("value_type", wire.VALUE_TYPES)
@pytest.mark.parametrize(
    ("indices", "size"),
    [
        (every(1, 300_001, start=3), 300_001),
        (every(1, 1007, start=1000), 10**6),
        (every(1, 250_000), 10**6),
        (every(1, 10**6, start=750_000), 10**6),
    ],
)
def test_successive_entries_cost_four_bytes_of_index(indices: Indices, size: int, value_type: wire.ValueType) -> None:
    entries = entries_at(indices, size)
    assert assert_round_trip(entries, value_type) is Encoding.RANGE
    assert wire.encoded_bytes(indices, size, value_type) == HEADER_BYTES + values_bytes(len(indices), value_type) + 4


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (packed("<u4", SIZE - 1), f"bad index {SIZE}, expected less than {SIZE}"),
        (packed("<u4", 2**32 - 1), f"bad index {2**32}, expected less than {SIZE}"),
        (packed("<u4", 5, 6), "index stream 8, expected 4"),
        (b"", "index stream 0, expected 4"),
    ],
)
def test_a_range_that_cannot_be_is_refused(stream: bytes, error: str) -> None:
    with pytest.raises(WireError, match=error):
        wire.decode(crafted(Encoding.RANGE, stream, count=2, size=SIZE), size=SIZE)


@pytest.mark.parametrize("count", [1, 9, 300, 899, 900])
def test_indices_travel_without_their_values(count: int) -> None:
    entries = entries_at(random_indices(count, 900), 900)
    message = encoded(entries, header=replace(HEADER, kind=Kind.INDICES))
    assert len(message) == wire.encoded_bytes(entries.indices, 900, kind=Kind.INDICES)
    assert len(message) <= HEADER_BYTES + -(-900 // 8)
    decoded = wire.decode(message, size=900).entries
    assert len(decoded.values) == 0
    assert decoded.indices is not None
    np.testing.assert_array_equal(decoded.indices, entries.indices)


def test_that_every_value_comes_is_told_by_a_header_alone() -> None:
    message = encoded(Entries(9, np.ones(9, np.float32)), header=replace(HEADER, kind=Kind.INDICES))
    assert len(message) == HEADER_BYTES
    assert wire.decode(message, size=9).entries.indices is None
