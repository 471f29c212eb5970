"""Max N by its definition, and per link the largest N that its budget pays for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dlion_mpi.algorithms import selection as select
from dlion_mpi.algorithms.selection import Selection, Selector
from dlion_mpi.vector.layout import Indices, Layout, Vector
from dlion_mpi.wire import HEADER_BYTES, VALUE_TYPES, ValueType, encoded_bytes

N_MIN = 0.85
TINY = np.float32(1e-45)  # the smallest subnormal
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 3.0, float(TINY), 1e-40, 3e38])  # ties, zeros, extremes
VECTORS = arrays(np.float32, st.integers(0, 60), elements=st.one_of(FLOATS, FEW))
TIED_VECTORS = arrays(np.float32, st.integers(0, 60), elements=FEW)


@st.composite
def vectors_with_layout(draw: st.DrawFn) -> tuple[Vector, Layout]:
    """A vector cut into variables, some of them empty, some of one entry."""
    vector = draw(st.one_of(VECTORS, TIED_VECTORS))
    cuts = sorted(draw(st.lists(st.integers(0, len(vector)), max_size=5)))
    bounds = [0, *cuts, len(vector)]
    return vector, Layout.of([(b - a,) for a, b in pairwise(bounds)])


def nested(
    vector: Vector, budgets: Sequence[float], layout: Layout | None = None, *, n_min: float, value_type: ValueType
) -> list[Selection]:
    selector = Selector(layout or Layout.of([vector.shape]))
    return selector.nested(vector, selector.measure(vector), budgets, n_min=n_min, value_type=value_type)


def max_n(vector: Vector, quality: float, layout: Layout | None = None) -> Selection:
    selector = Selector(layout or Layout.of([vector.shape]))
    return selector.max_n(vector, selector.measure(vector), quality)


def relative_of(vector: Vector, layout: Layout | None = None) -> Vector:
    """By definition: the share of the variable's largest magnitude."""
    layout = layout or Layout.of([vector.shape])
    relative = np.zeros_like(vector)
    for start, stop in pairwise(layout.starts):
        part = np.abs(vector[start:stop])
        if stop > start and part.max() > 0:
            relative[start:stop] = part / part.max()
    return relative


def chosen(selection: Selection, size: int) -> set[int]:
    return set(range(size)) if selection.indices is None else {int(i) for i in selection.indices}


def at_least(relative: Vector, threshold: float) -> set[int]:
    return {i for i, r in enumerate(relative.tolist()) if r >= np.float32(threshold)}


# ---- what entries are measured by


@given(vectors_with_layout(), st.booleans(), st.integers(1, 7))
def test_measure_finds_every_variable_s_largest_and_adds_on_the_way(
    case: tuple[Vector, Layout], adds: bool, block: int
) -> None:
    vector, layout = case
    more = np.linspace(-1, 1, len(vector), dtype=np.float32) if adds else None
    expected = vector + more if more is not None else vector.copy()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(select, "BLOCK", block)
        largest = Selector(layout).measure(vector, more)
    np.testing.assert_array_equal(vector, expected)
    parts = [np.abs(expected[segment]).max() for segment in layout.segments()]
    np.testing.assert_array_equal(largest, np.array(parts, np.float32))


@given(vectors_with_layout(), st.integers(0, 1000))
@example((np.array([TINY, -TINY, 0], np.float32), Layout.of([(3,)])), 0)
@example((np.array([3e38, 1e-40, -3e38], np.float32), Layout.of([(2,), (0,), (1,)])), 0)
def test_some_entries_are_measured_by_the_largest_of_these(case: tuple[Vector, Layout], seed: int) -> None:
    vector, layout = case
    places = np.flatnonzero(np.random.default_rng(seed).random(len(vector)) < 0.6)
    only = np.zeros_like(vector)
    only[places] = vector[places]
    got = Selector(layout).relative(places, np.abs(vector[places]))
    np.testing.assert_array_equal(got, relative_of(only, layout)[places])


# ---- Max N


@given(vectors_with_layout(), st.floats(1e-6, 99.9999))
def test_max_n_selects_by_its_definition(case: tuple[Vector, Layout], quality: float) -> None:
    vector, layout = case
    relative = relative_of(vector, layout)
    selection = max_n(vector, quality, layout)
    assert selection.quality == quality
    assert selection.indices is not None
    assert selection.indices.dtype == np.uint32
    assert selection.indices.tolist() == sorted(at_least(relative, 1 - quality / 100))


def test_max_n_on_whole_numbers() -> None:
    """10 % of 10 from the top is 9: the definition's >= includes the boundary, in float32 too."""
    gradient = np.array([-10, 9, 8.99, 0, 5, 4.5, 4.49], np.float32)
    layout = Layout.of([(4,), (3,)])
    selection = max_n(gradient, 10, layout)
    assert chosen(selection, 7) == {0, 1, 4, 5}


def test_n_of_100_is_everything_and_zeros_too() -> None:
    assert max_n(np.zeros(4, np.float32), 100) == Selection(None, 100.0)


@pytest.mark.parametrize("quality", [0, -1, 100.1, float("nan"), float("inf")])
def test_an_n_outside_its_range_is_refused(quality: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 100\]"):
        max_n(np.ones(3, np.float32), quality)


def test_every_variable_s_largest_is_always_in() -> None:
    vector = np.array([1e-30, 2e-30, 5, 1, 1e20], np.float32)
    layout = Layout.of([(2,), (2,), (), (0,)])
    assert chosen(max_n(vector, 1e-6, layout), 5) == {1, 2, 4}


# ---- N from budgets

BUDGETS = st.lists(st.one_of(st.floats(0, 400), st.sampled_from([0.0, 88.0, 1e18, float("inf")])), max_size=6)


@given(
    case=vectors_with_layout(),
    budgets=BUDGETS,
    n_min=st.sampled_from([1e-6, 0.85, 30.0, 100.0]),
    value_type=st.sampled_from(VALUE_TYPES),
)
@example((np.zeros(9, np.float32), Layout.of([(9,)])), [0.0, 87.0, 88.0], 0.85, "float32")
@example((np.ones(60, np.float32), Layout.of([(60,)])), [100.0, 120.0], 0.85, "float16")
def test_what_every_budget_gets(
    case: tuple[Vector, Layout], budgets: list[float], n_min: float, value_type: ValueType
) -> None:
    """All that is promised: size, floor, nesting, order, no zeros, all of a magnitude or none."""
    vector, layout = case
    relative = relative_of(vector, layout)
    size = len(relative)
    floor = at_least(relative, 1 - n_min / 100) - set(np.flatnonzero(relative == 0).tolist())
    selections = nested(vector, budgets, layout, n_min=n_min, value_type=value_type)
    assert len(selections) == len(budgets)
    for selection, budget in zip(selections, budgets, strict=True):
        indices = chosen(selection, size)
        assert 0 < selection.quality <= 100
        assert floor <= indices
        if selection.indices is None:
            assert not size or encoded_bytes(None, size, value_type) <= budget
            continue
        assert selection.indices.dtype == np.uint32
        assert selection.indices.tolist() == sorted(indices)
        assert all(relative[i] > 0 for i in indices)
        if indices != floor:
            assert encoded_bytes(selection.indices, size, value_type) <= budget
        if indices:
            smallest = min(relative[i] for i in indices)
            assert indices == at_least(relative, smallest), "entries of equal magnitude come all or none"
    for smaller, larger in pairwise(np.argsort(budgets)):
        assert chosen(selections[smaller], size) <= chosen(selections[larger], size)
        assert selections[smaller].quality <= selections[larger].quality


def random_relative(size: int, seed: int = 0) -> Vector:
    return relative_of(np.random.default_rng(seed).normal(size=size).astype(np.float32))


def sized(relative: Vector, count: int) -> Indices:
    """The ``count`` largest, ascending."""
    return np.sort(np.argsort(relative)[len(relative) - count :]).astype(np.uint32)


@given(
    size=st.integers(300, 3000),
    share=st.floats(0.01, 0.95),
    seed=st.integers(0, 50),
    value_type=st.sampled_from(VALUE_TYPES),
)
def test_a_budget_is_used_up(size: int, share: float, seed: int, value_type: ValueType) -> None:
    """Of randomly placed entries a slightly larger number (4 % and 8 entries) would not fit."""
    relative = random_relative(size, seed)
    budget = HEADER_BYTES + share * (encoded_bytes(None, size, value_type) - HEADER_BYTES)
    (selection,) = nested(relative, [budget], n_min=1e-6, value_type=value_type)
    count = len(chosen(selection, size))
    more = int(count * 1.04) + 8
    if more < size:
        assert encoded_bytes(sized(relative, more), size, value_type) > budget


@pytest.mark.parametrize("value_type", VALUE_TYPES)
@pytest.mark.parametrize("share", [0.0005, 0.01, 0.1, 0.4])
def test_a_sampled_threshold_is_close(share: float, value_type: ValueType) -> None:
    """Above SAMPLE entries thresholds come from a sample: a tenth more would still not fit."""
    size = 8 * select.SAMPLE + 3
    relative = random_relative(size)
    budgets = [share * 4 * size, 1.5 * share * 4 * size]
    selections = nested(relative, budgets, n_min=1e-6, value_type=value_type)
    for selection, budget in zip(selections, budgets, strict=True):
        count = len(chosen(selection, size))
        if count < size:
            assert encoded_bytes(selection.indices, size, value_type) <= budget
        more = int(count * 1.1) + 60
        if more < size:
            assert encoded_bytes(sized(relative, more), size, value_type) > budget
    assert chosen(selections[0], size) <= chosen(selections[1], size)


@given(
    above=st.integers(1, 60),
    tied=st.integers(500, 3000),
    budgets=st.lists(st.floats(HEADER_BYTES, 3000), min_size=2, max_size=4),
)
def test_ties_that_do_not_fit_cost_only_themselves(above: int, tied: int, budgets: list[float]) -> None:
    """What is larger than a crowd of equals is still sent, as far as it fits, and smaller budgets get no more."""
    relative = np.full(above + tied, 0.1, np.float32)
    relative[::2][:above] = np.linspace(1, 0.5, above)
    selections = nested(relative, budgets, n_min=N_MIN, value_type="float32")
    for selection, budget in zip(selections, budgets, strict=True):
        best = max(
            (n for n in range(1, above + 1) if encoded_bytes(sized(relative, n), len(relative)) <= budget), default=1
        )
        assert len(chosen(selection, len(relative))) >= 0.9 * best - 1
    order = np.argsort(budgets)
    sets = [chosen(selections[k], len(relative)) for k in order]
    assert all(a <= b for a, b in pairwise(sets))


def test_sparse_gradients_are_sent_whole_where_all_that_is_not_zero_fits() -> None:
    relative = np.zeros(5000, np.float32)
    relative[[3, 77, 4999]] = [0.001, 1, 0.5]
    (selection,) = nested(relative, [HEADER_BYTES + 40], n_min=N_MIN, value_type="float32")
    assert chosen(selection, 5000) == {3, 77, 4999}
    assert selection.quality == pytest.approx(99.9)


def test_a_large_sparse_gradient_is_found_although_the_sample_misses_it() -> None:
    """Every entry that is not zero lies between the sampled ones."""
    size = 4 * select.SAMPLE
    relative = np.zeros(size, np.float32)
    relative[1:4000:4] = np.linspace(0.1, 1, 1000)
    (selection,) = nested(relative, [HEADER_BYTES + 8000], n_min=N_MIN, value_type="float32")
    assert chosen(selection, size) == set(range(1, 4000, 4))


@pytest.mark.parametrize("size", [1000, 3 * select.SAMPLE])
def test_all_equal_is_all_or_the_least(size: int) -> None:
    """Nothing tells them apart, and n_min includes the largest, so all go even if they do not fit."""
    relative = np.ones(size, np.float32)
    for budget in (0, 500, 4 * size):
        (selection,) = nested(relative, [budget], n_min=N_MIN, value_type="float32")
        assert chosen(selection, size) == set(range(size))


def test_n_min_is_sent_by_a_link_that_cannot_afford_it() -> None:
    relative = random_relative(2000)
    (selection,) = nested(relative, [0.0], n_min=40, value_type="float32")
    assert chosen(selection, 2000) == at_least(relative, 0.6)
    assert selection.quality == pytest.approx(40)


def test_quality_is_the_n_of_what_was_selected() -> None:
    relative = random_relative(2000)
    budgets = [0.0, 400.0, 2000.0, 6000.0, 1e9]
    selections = nested(relative, budgets, n_min=N_MIN, value_type="float32")
    for selection in selections[:-1]:
        assert selection.quality < 100
        np.testing.assert_array_equal(selection.indices, max_n(relative, selection.quality + 1e-6).indices)
    assert selections[-1] == Selection(None, 100.0)


def test_no_budgets_and_no_entries() -> None:
    assert nested(random_relative(10), [], n_min=N_MIN, value_type="float32") == []
    (selection,) = nested(np.empty(0, np.float32), [0.0], n_min=N_MIN, value_type="float32")
    assert chosen(selection, 0) == set()
