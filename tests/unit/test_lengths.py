"""How much shorter the mean of all workers' movements is than that of one."""

from __future__ import annotations

import numpy as np
import pytest

from dlion_mpi.algorithms.lengths import ENTRIES, Lengths, sampled

SIZE = 50_000


def measured(common: float, workers: int, rounds: int = 30) -> float:
    """Movements of length 1 whose parts are common to all workers, and noise."""
    rng, lengths = np.random.default_rng(3), Lengths()
    signal = rng.normal(size=SIZE)
    for step in range(0, 20 * rounds, 20):
        noise = rng.normal(size=(workers, SIZE))
        movements = (common * signal + (1 - common**2) ** 0.5 * noise).astype(np.float32)
        lengths.take(np.mean([sampled(movement, step) for movement in movements], axis=0))
    return lengths.shortened


@pytest.mark.parametrize("common", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("workers", [2, 6])
def test_the_mean_is_shorter_by_what_is_noise(common: float, workers: int) -> None:
    wanted = (common**2 + (1 - common**2) / workers) ** 0.5
    assert measured(common, workers) == pytest.approx(wanted, rel=0.06)


def test_movements_that_agree_are_not_shortened() -> None:
    assert measured(1.0, 4) == pytest.approx(1.0, abs=1e-4)


def test_before_the_first_round_and_of_what_is_no_number_nothing_is_said() -> None:
    lengths = Lengths()
    assert lengths.shortened == 1
    lengths.take(np.full(ENTRIES + 1, np.nan, np.float32))
    lengths.take(np.zeros(ENTRIES + 1, np.float32))
    assert lengths.shortened == 1


def test_it_follows_what_changes_and_comes_back_from_a_checkpoint() -> None:
    lengths = Lengths()
    half, whole = np.ones(ENTRIES + 1, np.float32), np.ones(ENTRIES + 1, np.float32)
    half[-1], whole[-1] = 4 * ENTRIES, ENTRIES
    for _ in range(20):
        lengths.take(half)
    assert lengths.shortened == pytest.approx(0.5)
    again = Lengths()
    again.from_arrays(lengths.to_arrays())
    for one in (lengths, again):
        one.take(whole)
    assert again.shortened == lengths.shortened > 0.55


def test_samples_of_a_step_are_of_the_same_entries_everywhere_and_others_in_another() -> None:
    movement = np.arange(SIZE, dtype=np.float32)
    np.testing.assert_array_equal(sampled(movement, 40), sampled(movement, 40))
    assert (sampled(movement, 40) != sampled(movement, 60)).mean() > 0.9
    assert sampled(movement, 40)[-1] == pytest.approx(np.square(sampled(movement, 40)[:-1]).sum())
