"""The flat vector's layout, and how entries are added to it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.vector.layout import Entries, Layout

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=6)


@given(SHAPES)
def test_a_layout_covers_the_vector_without_gap_or_overlap(shapes: list[list[int]]) -> None:
    layout = Layout.of(shapes)
    sizes = [int(np.prod(shape)) for shape in shapes]
    assert layout.size == sum(sizes)
    assert layout.shapes == tuple(tuple(shape) for shape in shapes)
    covered = [i for segment in layout.segments() for i in range(segment.start, segment.stop)]
    assert covered == list(range(layout.size))
    assert [segment.stop - segment.start for segment in layout.segments()] == [size for size in sizes if size]


def test_a_scalar_has_one_entry_and_an_empty_variable_none() -> None:
    layout = Layout.of([(), (3, 0, 2), (2, 2)])
    assert layout.starts == (0, 1, 1, 5)
    assert list(layout.segments()) == [slice(0, 1), slice(1, 5)]


def test_a_large_variable_does_not_overflow() -> None:
    assert Layout.of([(1 << 20, 1 << 20)]).size == 1 << 40


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_entries_are_added_in_place_where_they_belong(scale: float) -> None:
    vector = np.array([1, 2, 3, 4], np.float32)
    entries = Entries(4, np.array([10, 20], np.float32), np.array([1, 3], np.uint32))
    entries.add_to(vector, scale)
    np.testing.assert_array_equal(vector, [1, 2 + 10 * scale, 3, 4 + 20 * scale])
    Entries(4, np.array([1, 1, 1, 1], np.float32)).add_to(vector, scale)
    np.testing.assert_array_equal(vector, np.array([1, 2 + 10 * scale, 3, 4 + 20 * scale]) + scale)
    assert vector.dtype == np.float32


def test_adding_leaves_the_entries_as_they_were() -> None:
    values = np.array([10, 20], np.float32)
    Entries(2, values).add_to(np.zeros(2, np.float32), 3.0)
    np.testing.assert_array_equal(values, [10, 20])


def test_a_scale_is_applied_in_float32() -> None:
    values = np.array([1 / 3], np.float32)
    vector = np.zeros(1, np.float32)
    Entries(1, values).add_to(vector, 0.1)
    assert vector[0] == values[0] * np.float32(0.1)


def test_length_is_the_number_of_values() -> None:
    assert len(Entries(9, np.zeros(9, np.float32))) == 9
    assert len(Entries(9, np.zeros(2, np.float32), np.array([0, 8], np.uint32))) == 2
