"""One memory of the unsent for many links: what each is owed, and which of them are served together."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.algorithms.error_feedback import Budget, Choice, Residuals, Rules
from dlion_mpi.vector.layout import Layout, Vector

LAYOUT = Layout.of([(300,), (20, 30)])
PEERS = (1, 2, 3, 4, 5)
WIDE = Budget(600.0, 2400.0)
NARROW = Budget(60.0, 240.0)
"""Too narrow for what WIDE wants."""


def memory() -> Residuals:
    return Residuals(LAYOUT, Rules(max_n=None, n_min=0.85, value_type="float32"))


def gradients(seed: int, steps: int) -> list[Vector]:
    """Whole numbers add up exactly."""
    return list(np.random.default_rng(seed).integers(-1000, 1000, size=(steps, LAYOUT.size)).astype(np.float32))


def dense(choice: Choice) -> Vector:
    vector = np.zeros(LAYOUT.size, np.float32)
    choice.entries.add_to(vector, 1.0)
    return vector


BUDGETS = st.lists(
    st.fixed_dictionaries(
        {
            peer: st.none() | st.tuples(st.sampled_from([20.0, 60.0, 250.0, 1000.0, 5000.0]), st.floats(1, 4))
            for peer in PEERS
        }
    ),
    min_size=1,
    max_size=12,
)


@given(seed=st.integers(0, 1000), offers=BUDGETS)
def test_whoever_is_served_together_nothing_is_lost(seed: int, offers: list[dict[int, Any]]) -> None:
    unsent = memory()
    sent = {peer: np.zeros(LAYOUT.size) for peer in PEERS}
    own = gradients(seed, len(offers))
    for gradient, offer in zip(own, offers, strict=True):
        unsent.add(gradient)
        budgets = {peer: None if o is None else Budget(o[0], o[0] * o[1]) for peer, o in offer.items()}
        for peer, choice in unsent.take(budgets).items():
            sent[peer] += dense(choice)
    for peer in PEERS:
        np.testing.assert_array_equal(sent[peer] + unsent.of(peer), np.sum(own, axis=0, dtype=np.float64))


def test_links_of_about_the_same_width_get_the_same_entries_also_where_others_are_wider() -> None:
    unsent = memory()
    budgets = {1: WIDE, 2: NARROW, 3: Budget(45.0, 180.0), 4: Budget(59.0, 100.0), 5: Budget(8.0, 32.0)}
    for gradient in gradients(1, 5):
        unsent.add(gradient)
        choices = unsent.take(budgets)
        assert choices[2] is choices[3] is choices[4], "served once"
        assert len(choices[1].entries) > len(choices[2].entries) > 0
        assert choices[5] is not choices[2], "for whom even that is too much"
    assert unsent.by_peer[2] is unsent.by_peer[3] is unsent.by_peer[4]
    assert unsent.by_peer[5] is not unsent.by_peer[2]


def test_a_link_that_misses_a_message_is_owed_more_than_those_that_it_was_served_with() -> None:
    unsent = memory()
    own = gradients(2, 3)
    both = {1: WIDE, 2: NARROW, 3: NARROW}
    unsent.add(own[0])
    before = dense(unsent.take(both)[2])
    unsent.add(own[1])
    choices = unsent.take(both | {3: None})
    assert 3 not in choices
    np.testing.assert_array_equal(unsent.of(2) + before + dense(choices[2]), own[0] + own[1])
    np.testing.assert_array_equal(unsent.of(3) + before, own[0] + own[1])
    unsent.add(own[2])
    choices = unsent.take(both)
    assert choices[2] is not choices[3]
    assert np.count_nonzero(unsent.by_peer[3]) > np.count_nonzero(unsent.by_peer[2])


def test_links_that_were_served_together_are_so_after_a_checkpoint() -> None:
    unsent, resumed = memory(), memory()
    for gradient in gradients(3, 3):
        unsent.add(gradient)
        unsent.take({1: WIDE, 2: NARROW, 3: NARROW, 4: None})
    resumed.from_arrays(
        {f"residuals/{name}": np.array(array) for name, array in unsent.to_arrays().items()}, "residuals", PEERS
    )
    assert resumed.by_peer[2] is resumed.by_peer[3]
    assert resumed.by_peer[4] is not resumed.by_peer[2]
    for peer in PEERS:
        np.testing.assert_array_equal(resumed.of(peer), unsent.of(peer))
