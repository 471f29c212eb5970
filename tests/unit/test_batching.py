"""The global batch's schedule, the throughput fit, and the solution for everyone's share."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dlion_mpi.algorithms.batching import GlobalBatchSchedule, ThroughputFit, equal_lbs, gain, solve_lbs

# ---- schedule

PAPER = GlobalBatchSchedule(
    start=128, interval=100, warmup_step=32, warmup_limit=600, speedup_factor=1.5, limit=6000
)  # 4 workers, 60,000 samples

schedules = st.builds(
    GlobalBatchSchedule,
    start=st.integers(1, 500),
    interval=st.integers(1, 5),
    warmup_step=st.integers(0, 64),
    warmup_limit=st.integers(0, 2000),
    speedup_factor=st.floats(1, 3),
    limit=st.integers(0, 2000),
)


def test_warm_up_adds_then_speed_up_multiplies_then_it_stays() -> None:
    adjusted = [PAPER.at(100 * k) for k in range(24)]
    assert adjusted[:15] == [128 + 32 * k for k in range(15)]  # to 576
    assert adjusted[15:21] == [600, 900, 1350, 2025, 3037, 4556]
    assert adjusted[21:] == [6000, 6000, 6000]
    assert PAPER.at(10**9) == 6000


def test_it_changes_at_adjustments_only() -> None:
    assert [PAPER.at(step) for step in (0, 99, 100, 199, 200)] == [128, 128, 160, 160, 192]


@given(schedules, st.integers(0, 300))
def test_it_never_shrinks_and_never_passes_its_limit(schedule: GlobalBatchSchedule, step: int) -> None:
    before, after = schedule.at(step), schedule.at(step + schedule.interval)
    assert schedule.start <= before <= after
    assert after <= max(schedule.start, schedule.limit)


@given(schedules)
def test_a_factor_above_one_reaches_the_limit_in_the_end(schedule: GlobalBatchSchedule) -> None:
    assume(schedule.speedup_factor > 1.01)
    assert schedule.at(10**5) == max(schedule.start, schedule.limit)


def test_a_start_above_a_limit_stays() -> None:
    schedule = GlobalBatchSchedule(
        start=700, interval=1, warmup_step=32, warmup_limit=600, speedup_factor=1.5, limit=650
    )
    assert schedule.at(50) == 700


def test_a_small_factor_adds_up_to_whole_samples() -> None:
    schedule = GlobalBatchSchedule(start=8, interval=1, warmup_step=0, warmup_limit=0, speedup_factor=1.1, limit=100)
    assert [schedule.at(k) for k in range(4)] == [8, 8, 9, 10]  # 8, 8.8, 9.68, 10.6


# ---- fit


def fitted(pairs: list[tuple[int, float]]) -> tuple[float, float]:
    fit = ThroughputFit()
    for samples, seconds in pairs:
        fit.add(samples, seconds)
    return fit.solve()


@given(
    alpha=st.floats(1e-4, 1),
    beta=st.floats(1e-5, 1e-1),
    sizes=st.lists(st.integers(1, 512), min_size=2, max_size=40).filter(lambda sizes: len(set(sizes)) > 1),
)
def test_it_recovers_alpha_and_beta(alpha: float, beta: float, sizes: list[int]) -> None:
    fit = ThroughputFit()
    for size in sizes:  # past `add`, which is about machines that change
        fit.pairs.append((size, alpha + beta * size))
    a, b = fit.solve()
    assert a == pytest.approx(alpha, rel=1e-4, abs=1e-7)
    assert b == pytest.approx(beta, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_outliers_hardly_matter(seed: int) -> None:
    generator = np.random.default_rng(seed)
    pairs = [
        (int(size), float((0.02 + 0.001 * size) * generator.normal(1, 0.02)))
        for size in generator.choice([16, 32, 64, 128], size=40)
    ]
    for k in generator.choice(40, size=3, replace=False):
        pairs[k] = (pairs[k][0], 8 * pairs[k][1])  # another process took the core
    alpha, beta = fitted(pairs)
    assert alpha == pytest.approx(0.02, abs=0.005)
    assert beta == pytest.approx(0.001, rel=0.1)
    assert alpha + beta * 64 == pytest.approx(0.02 + 0.001 * 64, rel=0.05)


def test_an_outlier_does_not_count_at_all() -> None:
    pairs = [(size, 0.02 + 0.001 * size) for size in (16, 32, 64, 128)] * 5
    alpha, beta = fitted([*pairs[:9], (64, 3.0), *pairs[9:]])
    assert alpha == pytest.approx(0.02, rel=1e-6)
    assert beta == pytest.approx(0.001, rel=1e-6)


def test_one_batch_size_tells_a_rate_only() -> None:
    assert fitted([(32, 0.1), (32, 0.12), (32, 0.11)]) == (0.0, pytest.approx(0.11 / 32))


@given(st.lists(st.tuples(st.integers(1, 256), st.floats(0, 10)), min_size=1, max_size=60))
def test_whatever_was_timed_alpha_is_not_negative_and_beta_is_positive(pairs: list[tuple[int, float]]) -> None:
    alpha, beta = fitted(pairs)
    assert alpha >= 0
    assert beta > 0
    assert math.isfinite(alpha + beta)


def test_larger_batches_that_seem_faster_are_noise() -> None:
    alpha, beta = fitted([(16, 0.2), (32, 0.1)])
    assert alpha == 0
    assert beta > 0


def test_nothing_timed_is_nothing_known() -> None:
    with pytest.raises(ValueError, match="no timings"):
        ThroughputFit().solve()


@pytest.mark.parametrize("factor", [0.5, 2, 10])
def test_a_machine_that_changes_is_followed_within_a_handful_of_steps(factor: float) -> None:
    fit = ThroughputFit()
    for step in range(40):
        fit.add((16, 32, 64)[step % 3], 0.02 + 0.001 * (16, 32, 64)[step % 3])
    for step in range(4):
        fit.add((16, 32, 64)[step % 3], factor * (0.02 + 0.001 * (16, 32, 64)[step % 3]))
    alpha, beta = fit.solve()
    assert alpha + beta * 32 == pytest.approx(factor * (0.02 + 0.001 * 32), rel=0.1)
    assert len(fit.pairs) <= 4


def test_a_single_slow_step_is_not_a_change() -> None:
    fit = ThroughputFit()
    for step in range(40):
        fit.add(32, 0.5 if step in (20, 21, 30) else 0.05)
    assert len(fit.pairs) == 40
    assert fit.solve()[1] == pytest.approx(0.05 / 32)


def test_only_the_window_is_remembered() -> None:
    fit = ThroughputFit(window=5)
    for k in range(20):
        fit.add(32, 0.1 + 0.001 * k)
    assert [seconds for _, seconds in fit.pairs] == pytest.approx([0.115, 0.116, 0.117, 0.118, 0.119])


# ---- everyone's share

WORKERS = st.lists(st.tuples(st.floats(0, 2), st.floats(1e-5, 0.1)), min_size=1, max_size=12)


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, list[tuple[float, float]], list[int]]:
    """A feasible (gbs, fits, limits)."""
    fits = draw(WORKERS)
    limits = draw(st.lists(st.integers(1, 600), min_size=len(fits), max_size=len(fits)))
    if draw(st.booleans()):
        limits = [1 << 30] * len(fits)
    return draw(st.integers(len(fits), min(sum(limits), 3000))), fits, limits


@given(problems(), st.sampled_from(["auto", "proportional"]))
def test_shares_sum_to_the_global_batch_within_everyone_s_bounds(
    problem: tuple[int, list[tuple[float, float]], list[int]], policy: str
) -> None:
    gbs, fits, limits = problem
    lbs = solve_lbs(gbs, fits, limits, policy=policy)
    assert sum(lbs) == gbs
    assert all(isinstance(size, int) and 1 <= size <= limit for size, limit in zip(lbs, limits, strict=True))


@given(problems(), st.sampled_from(["auto", "proportional"]))
def test_whoever_is_free_to_finishes_with_the_others(
    problem: tuple[int, list[tuple[float, float]], list[int]], policy: str
) -> None:
    """To within one sample; who is clamped at 1 finishes no earlier, who is clamped at its limit no later."""
    gbs, fits, limits = problem
    lbs = solve_lbs(gbs, fits, limits, policy=policy)
    times = [
        ((alpha if policy == "auto" else 0) + beta * size, beta, size, limit)
        for (alpha, beta), size, limit in zip(fits, lbs, limits, strict=True)
    ]
    can_give = [t - beta for t, beta, size, _ in times if size > 1]
    can_take = [t + beta for t, beta, size, limit in times if size < limit]
    # One sample less here and one more there would help nobody.
    assert max(can_give, default=0) <= min(can_take, default=math.inf) + 1e-9


def test_equal_finish_times_by_hand() -> None:
    """T = (GBS + sum alpha/beta) / sum 1/beta; here (90 + 10) / (1000 + 500) = 1/15 s."""
    assert solve_lbs(90, [(0.01, 0.001), (0.0, 0.002)], [1000, 1000]) == [57, 33]


def test_proportional_shares_by_samples_per_second_and_ignores_alpha() -> None:
    fits = [(5.0, 0.001), (0.0, 0.002), (0.0, 0.004)]
    assert solve_lbs(70, fits, [1000] * 3, policy="proportional") == [40, 20, 10]


def test_what_is_clamped_is_shared_among_the_rest() -> None:
    fits = [(0.0, 0.001), (0.0, 0.002), (0.0, 0.002)]
    assert solve_lbs(100, fits, [1000] * 3) == [50, 25, 25]
    assert solve_lbs(100, fits, [20, 1000, 1000]) == [20, 40, 40]
    assert solve_lbs(100, fits, [1000, 10, 1000]) == [60, 10, 30]


def test_who_is_too_slow_for_any_share_still_gets_one_sample() -> None:
    assert solve_lbs(65, [(0.0, 0.001), (9.0, 0.001), (0.0, 0.001)], [1000] * 3) == [32, 1, 32]


def test_a_floor_holds_for_the_slowest() -> None:
    assert solve_lbs(66, [(0.0, 0.001), (9.0, 0.001), (0.0, 0.001)], [1000] * 3, least=4) == [31, 4, 31]
    assert solve_lbs(66, [(0.0, 0.001), (9.0, 0.001), (0.0, 0.001)], [1000, 2, 1000], least=4) == [32, 2, 32]


def test_the_gain_is_of_the_slowest_worker() -> None:
    fits = [(0.0, 0.001), (0.01, 0.001)]
    assert gain([32, 32], [37, 27], fits) == pytest.approx(1 - 37 / 42)
    assert gain([32, 32], [27, 37], fits) < 0


def test_one_worker_gets_everything() -> None:
    assert solve_lbs(77, [(0.3, 0.01)], [100]) == [77]


@pytest.mark.parametrize(
    ("gbs", "limits"), [(2, [5, 5, 5]), (16, [5, 5, 5]), (0, [5, 5, 5]), (-1, [5]), (4, [1, 1, 1])]
)
def test_a_batch_that_cannot_be_shared_is_refused(gbs: int, limits: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"global batch of {gbs} cannot be shared by {len(limits)} workers"):
        solve_lbs(gbs, [(0.0, 0.001)] * len(limits), limits)


@pytest.mark.parametrize("gbs", [3, 15])
def test_the_outermost_batches_that_can_be_shared(gbs: int) -> None:
    assert solve_lbs(gbs, [(0.1, 0.001), (0.0, 0.2), (3.0, 0.003)], [5] * 3) == [gbs // 3] * 3


def test_remainders_go_to_whoever_is_closest_to_one_more() -> None:
    fits = [(0.0, 1 / 5.6), (0.0, 1 / 2.7), (0.0, 1 / 1.7)]  # shares 5.6, 2.7, 1.7 of 10
    assert solve_lbs(10, fits, [100] * 3) == [5, 3, 2]


@given(st.integers(1, 1000), st.integers(1, 30))
def test_equal_shares_differ_by_one_sample_at_most(gbs: int, n: int) -> None:
    shares = equal_lbs(gbs, n)
    assert sum(shares) == gbs
    assert len(shares) == n
    assert max(shares) - min(shares) <= 1
