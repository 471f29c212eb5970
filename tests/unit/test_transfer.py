"""Who is best, who learns from it, and how weights merge."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.algorithms.transfer import best, merge, merges

NAN, INF = math.nan, math.inf
LOSSES = st.lists(st.one_of(st.floats(-1e300, 1e300), st.sampled_from([NAN, INF, -INF])), min_size=1, max_size=8)


def mergers(policy: str, losses: list[float]) -> list[int]:
    return [k for k in range(len(losses)) if merges(policy, losses, k)]


@given(LOSSES)
def test_the_best_has_the_lowest_finite_loss(losses: list[float]) -> None:
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert best(losses) == (losses.index(min(finite)) if finite else None)


def test_the_first_of_equals_is_the_best_everywhere() -> None:
    assert best([2.0, 1.0, 1.0]) == 1


@given(LOSSES, st.sampled_from(["all", "worse-than-mean", "worst", "none"]))
def test_the_best_never_merges_and_nobody_does_without_one(losses: list[float], policy: str) -> None:
    merging = mergers(policy, losses)
    assert best(losses) not in merging
    if best(losses) is None or policy == "none":
        assert merging == []


@pytest.mark.parametrize(
    ("policy", "losses", "expected"),
    [
        ("all", [3.0, 1.0, 2.0, 9.0], [0, 2, 3]),
        ("worse-than-mean", [3.0, 1.0, 2.0, 9.0], [3]),  # the mean is 3.75
        ("worse-than-mean", [3.0, 1.0, 2.0], [0]),  # not who has just the mean
        ("worst", [3.0, 1.0, 2.0, 9.0], [3]),
        ("worst", [9.0, 1.0, 9.0], [0]),
        ("none", [3.0, 1.0, 2.0, 9.0], []),
        ("worse-than-mean", [1.0, 1.0, 1.0], []),
        ("worst", [1.0, 1.0, 1.0], []),
        ("worse-than-mean", [1.0, 2.0, INF], [1, 2]),
        ("worst", [1.0, 2.0, NAN], [2]),
        ("all", [NAN, 1.0], [0]),
        ("all", [1.0], []),
    ],
)
def test_who_merges(policy: str, losses: list[float], expected: list[int]) -> None:
    assert mergers(policy, losses) == expected


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown transfer policy 'best'"):
        merges("best", [1.0, 2.0], 1)


@given(st.floats(0, 1))
def test_merging_goes_the_share_of_the_way(share: float) -> None:
    own, other = np.array([0, 8, -4], np.float32), np.array([4, 8, 4], np.float32)
    merged = merge(own, other, share)
    assert merged.dtype == np.float32
    np.testing.assert_allclose(merged, own + share * (other - own), rtol=1e-6)
    np.testing.assert_array_equal(own, [0, 8, -4])


def test_the_ends_of_the_share() -> None:
    own, other = np.array([1, 2], np.float32), np.array([5, -2], np.float32)
    np.testing.assert_array_equal(merge(own, other, 0.0), own)
    np.testing.assert_array_equal(merge(own, other, 1.0), other)
    np.testing.assert_array_equal(merge(own, other, 0.75), [4, -1])
