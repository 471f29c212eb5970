"""What a gradient counts for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.algorithms.weighting import coefficient

BATCHES = st.lists(st.integers(1, 500), min_size=1, max_size=10)


@given(BATCHES)
def test_global_weights_are_a_mean_over_all_samples(batches: list[int]) -> None:
    gbs = sum(batches)
    weights = [coefficient("global", lbs, gbs, own_lbs=batches[0], workers=len(batches)) for lbs in batches]
    assert sum(weights) == pytest.approx(1)
    assert weights == [lbs / gbs for lbs in batches]


@given(BATCHES, st.integers(0, 9))
def test_paper_weights_are_relative_to_the_own_batch(batches: list[int], k: int) -> None:
    """w_k <- w_k - eta (1/n) sum_j (LBS_j / LBS_k) g_j."""
    own, n = batches[k % len(batches)], len(batches)
    weights = [coefficient("paper", lbs, sum(batches), own_lbs=own, workers=n) for lbs in batches]
    assert weights == pytest.approx([lbs / own / n for lbs in batches])


@given(st.integers(1, 500), st.integers(1, 10))
def test_they_agree_when_all_batches_are_equal(lbs: int, n: int) -> None:
    both = [coefficient(w, lbs, n * lbs, own_lbs=lbs, workers=n) for w in ("global", "paper")]
    assert both == pytest.approx([1 / n, 1 / n])


@pytest.mark.parametrize("weighting", ["mean", "", None])
def test_an_unknown_weighting_is_refused(weighting: str | None) -> None:
    with pytest.raises(ValueError, match="unknown weighting"):
        coefficient(weighting, 1, 2, own_lbs=1, workers=2)
