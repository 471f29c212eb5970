"""How long a step waits for its peers, given when their messages have arrived."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlion_mpi.algorithms.patience import KNOWN, LEAST, RECENT, WORTH, Patience

MOST_S, STEP_S = 0.1, 0.2


def after(delays_s: list[float], *, latency_s: float = 0.0) -> Patience:
    """Peer 1's message of every step arrives with these delays after this worker has computed the step."""
    patience = Patience()
    for step in range(len(delays_s)):
        patience.expect({1: latency_s}, MOST_S, STEP_S)
        patience.ready(step, step * STEP_S)
        for earlier in range(step + 1):
            arrived_s = earlier * STEP_S + delays_s[earlier]
            if step * STEP_S <= arrived_s < (step + 1) * STEP_S:
                patience.arrived(1, earlier, arrived_s)
    return patience


def test_a_peer_that_is_not_known_gets_all_patience() -> None:
    assert Patience().longest_s([1], MOST_S) == MOST_S
    assert after([0.03] * (KNOWN - 1)).longest_s([1], MOST_S) == MOST_S
    assert Patience().longest_s([], MOST_S) == 0.0


@settings(derandomize=True, deadline=None)
@given(usual_s=st.floats(0.03, 0.06), seed=st.integers(0, 1000))
def test_messages_are_waited_for_as_long_as_recent_ones_took_and_a_little_longer(usual_s: float, seed: int) -> None:
    drawn = random.Random(seed)
    delays_s = [usual_s * (1 + drawn.uniform(-0.1, 0.1)) for _ in range(50)]
    longest_s = after(delays_s).longest_s([1], MOST_S)
    assert max(delays_s[-RECENT:]) <= longest_s <= 1.7 * usual_s


def test_one_message_that_took_long_does_not_count() -> None:
    assert after([0.04, 0.04, 0.04, 0.09, 0.04, 0.04]).longest_s([1], MOST_S) == pytest.approx(0.04)


def test_the_step_waits_for_the_peer_that_needs_longest() -> None:
    patience = after([0.03] * 8)
    for step in range(8):
        patience.arrived(2, step, step * STEP_S + 0.07)
    assert patience.longest_s([1, 2], MOST_S) == pytest.approx(0.07)


def test_a_silent_peer_costs_no_more_than_its_last_messages_did() -> None:
    patience = after([0.03] * 8)
    for step in range(8, 100):
        patience.expect({1: 0.0}, MOST_S, STEP_S)
        patience.ready(step, step * STEP_S)
    assert patience.longest_s([1], MOST_S) == pytest.approx(0.03)


def test_early_messages_are_waited_for_a_little_since_the_next_may_be_late() -> None:
    patience = Patience()
    for step in range(8):
        patience.arrived(1, step, step * STEP_S - 0.05)
        patience.ready(step, step * STEP_S)
    assert patience.longest_s([1], MOST_S) == pytest.approx(LEAST * MOST_S)


def test_a_straggler_is_waited_for_with_all_patience() -> None:
    """It is late for another reason than its link; to wait keeps the two near each other."""
    assert after([0.5] * 20).longest_s([1], MOST_S) == MOST_S


@pytest.mark.parametrize(
    ("latency_s", "lag"),
    [(0.0, 0), (0.99 * WORTH * MOST_S, 0), (1.01 * WORTH * MOST_S, 1), (0.15, 1), (0.19, 1), (0.21, 2)],
)
def test_what_cannot_be_in_time_is_expected_as_many_steps_later_as_its_latency_takes(
    latency_s: float, lag: int
) -> None:
    patience = after([latency_s] * 20, latency_s=latency_s)
    assert patience.lags == {1: lag}
    if lag:
        assert patience.longest_s([1], MOST_S) == pytest.approx(LEAST * MOST_S)


def test_a_link_that_becomes_fast_is_waited_for_again() -> None:
    patience = after([0.15] * 20, latency_s=0.15)
    patience.expect({1: 0.02}, MOST_S, STEP_S)
    assert patience.lags == {1: 0}
    assert patience.longest_s([1], MOST_S) == MOST_S, "its earlier delays say nothing"
