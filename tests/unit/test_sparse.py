"""The largest entries of a vector, and how they leave a memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.algorithms.sparse import largest, take_out
from dlion_mpi.wire import ValueType


@given(seed=st.integers(0, 200), cut=st.integers(1, 39), share=st.floats(0.001, 1))
def test_the_largest_of_each_segment_are_found_in_order(seed: int, cut: int, share: float) -> None:
    vector = np.random.default_rng(seed).normal(size=40).astype(np.float32)
    segments = [slice(0, cut), slice(cut, 40)]
    found = largest(vector, segments, share)
    assert (np.diff(found) > 0).all()
    for segment in segments:
        own = found[(found >= segment.start) & (found < segment.stop)]
        size = segment.stop - segment.start
        assert len(own) == int(np.ceil(share * size))
        rest = np.setdiff1d(np.arange(segment.start, segment.stop), own)
        assert np.abs(vector[own]).min() >= np.abs(vector[rest]).max(initial=0)


def test_no_segments_have_no_entries() -> None:
    assert len(largest(np.ones(4, np.float32), [], 0.5)) == 0


@pytest.mark.parametrize("value_type", ["float32", "bfloat16", "int2", "sign"])
@pytest.mark.parametrize("some", [True, False])
def test_what_is_taken_and_what_stays_is_what_was_there(value_type: ValueType, some: bool) -> None:
    memory = np.random.default_rng(1).normal(size=3000).astype(np.float32)
    before = memory.copy()
    indices = np.arange(5, 2900, 7, dtype=np.uint32) if some else None
    entries = take_out(memory, indices, value_type)
    kept = memory.copy()
    entries.add_to(memory, 1.0)
    np.testing.assert_allclose(memory, before, rtol=1e-6, atol=1e-7)
    taken = entries.places()
    assert (not kept[taken].any()) == (value_type == "float32")
    untouched = np.ones(3000, bool)
    untouched[taken] = False
    np.testing.assert_array_equal(kept[untouched], before[untouched])
