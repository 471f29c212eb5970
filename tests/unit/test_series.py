"""What is derived from metrics: against the definitions, written down once more the slow way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.config.target import Target
from dlion_mpi.metrics.grid import Grid, grid, nanmean
from dlion_mpi.metrics.rank import Rank
from dlion_mpi.metrics.reader import Run, load
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.metrics.series import (
    bytes_matrix,
    curve,
    evaluation_period_s,
    links,
    part_names,
    per_worker,
    requested_s,
    step_parts,
)
from dlion_mpi.metrics.targets import reached_s
from tests import runfiles


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return load(runfiles.make_run(tmp_path / "run"))


def of_tests(evaluations: list[list[tuple[float, float]]]) -> Run:
    """A run of which only the evaluations matter: time and accuracy by rank."""
    ranks = [
        Rank(
            rank=rank,
            workers=len(evaluations),
            path=Path("none"),
            attributes={},
            steps={},
            evaluations={"time_s": np.array([t for t, _ in own]), "accuracy": np.array([a for _, a in own])},
            transfers={},
            waits={},
            ended=True,
        )
        for rank, own in enumerate(evaluations)
    ]
    return Run(
        path=Path("none"),
        workers=len(ranks),
        ranks=ranks,
        config={},
        versions={},
        environment=None,
        emulated=None,
        ended=True,
        notes=(),
    )


# ---- accuracy

times = st.lists(st.integers(1, 1000).map(float), unique=True, max_size=8).map(sorted)
tests_of_a_worker = times.flatmap(lambda ts: st.tuples(*(st.tuples(st.just(t), st.floats(0, 1)) for t in ts)).map(list))


@given(st.lists(tests_of_a_worker, min_size=1, max_size=4), st.floats(0.01, 1), st.sampled_from([">=", "<="]))
def test_a_target_is_reached_when_the_run_itself_would_say_so(
    evaluations: list[list[tuple[float, float]]], value: float, sign: str
) -> None:
    target = Target("accuracy", sign, value)
    own = [[Evaluation(0, t, {"accuracy": a}) for t, a in worker] for worker in evaluations]
    assert curve(of_tests(evaluations), "accuracy").reached_s(target) == reached_s(own, target)


def test_mean_and_spread_are_of_everyones_latest() -> None:
    found = curve(of_tests([[(1.0, 0.1), (4.0, 0.5)], [(2.0, 0.3), (5.0, 0.9)]]), "accuracy")
    assert found.time_s.tolist() == [2, 4, 5]  # nothing before everyone was tested
    np.testing.assert_allclose(found.mean, [0.2, 0.4, 0.7])
    np.testing.assert_allclose(found.std, [0.1, 0.1, 0.2])
    np.testing.assert_allclose(found.low, [0.1, 0.3, 0.5])
    np.testing.assert_allclose(found.high, [0.3, 0.5, 0.9])
    assert found.by_round().time_s.tolist() == [2, 5]


def test_a_worker_that_is_gone_does_not_end_the_curve() -> None:
    tests = [[(float(t), 0.5) for t in range(10, 110, 10)], [(11.0, 0.1)]]
    rounds = curve(of_tests(tests), "accuracy").by_round()
    assert rounds.time_s[0] == 11
    assert rounds.time_s[-1] == 100
    assert len(rounds.time_s) >= 5


def test_without_evaluations_there_is_no_curve() -> None:
    found = curve(of_tests([[], [(1.0, 0.5)]]), "accuracy")
    assert len(found.mean) == 0
    assert found.reached_s(Target("accuracy", ">=", 0.1)) is None
    assert len(found.by_round().mean) == 0
    assert evaluation_period_s(of_tests([[], []])) == 0


# ---- spans of time


@given(
    st.lists(st.tuples(st.floats(0, 99), st.none() | st.floats(-5, 5)), max_size=30),
    st.sampled_from([0.5, 3.0, 100.0]),
)
def test_means_are_those_of_the_finite_values_of_each_span(
    rows: list[tuple[float, float | None]], width_s: float
) -> None:
    on = Grid(width_s, int(np.ceil(100 / width_s)))
    values = [np.nan if value is None else value for _, value in rows]
    means = on.means(np.array([t for t, _ in rows]), np.array(values, dtype=float))
    for span, mean in enumerate(means):
        inside = [v for t, v in rows if v is not None and int(t / width_s) == span]
        assert np.isnan(mean) if not inside else mean == pytest.approx(np.mean(inside))


def test_rates_add_up_to_the_total() -> None:
    rng = np.random.default_rng(1)
    time_s = np.cumsum(rng.random(500))
    total = np.cumsum(rng.integers(0, 10**6, 500))
    on = Grid(5.0, int(np.ceil(time_s[-1] / 5.0)))
    rates = on.rates(time_s, total)
    lengths = np.minimum(5.0, time_s[-1] - 5.0 * np.arange(on.count))
    assert (rates * lengths).sum() == pytest.approx(total[-1])


def test_rates_end_where_a_worker_ended() -> None:
    rates = Grid(1.0, 5).rates(np.array([1.0, 2.0]), np.array([10, 30]))
    np.testing.assert_allclose(rates, [10, 20, np.nan, np.nan, np.nan])
    assert np.isnan(Grid(1.0, 2).rates(np.zeros(0), np.zeros(0))).all()


@pytest.mark.parametrize(("steps", "points"), [(40, 10), (40, 200), (2000, 200), (1, 200)])
def test_the_grid_is_round_covers_the_run_and_has_steps_of_the_slowest(tmp_path: Path, steps: int, points: int) -> None:
    run = load(runfiles.make_run(tmp_path / "run", workers=2, steps=steps))
    on = grid(run, points)
    assert on.count <= points + 1
    assert on.width_s * on.count >= run.seconds > on.width_s * (on.count - 1)
    assert on.width_s >= 1.5 * 2 * runfiles.STEP_S
    assert f"{on.width_s:.0e}"[0] in "125"


# ---- workers and links


def test_values_over_time_stand_by_worker(run: Run) -> None:
    on = grid(run)
    lbs = per_worker(run, on, "lbs")
    assert lbs.shape == (3, on.count)
    assert [set(row[np.isfinite(row)]) for row in lbs] == [{32}, {16}, {10}]


def test_the_parts_of_a_step_are_what_was_recorded_and_sum_to_it(run: Run) -> None:
    for rank in run.ranks:
        parts = step_parts(rank)
        step_s = runfiles.STEP_S * (rank.rank + 1)
        np.testing.assert_allclose(parts / step_s, [0.3, 0.2, 0.1, 0.25, 0.1, 0.05], rtol=1e-6)
        assert len(parts) == len(part_names())


def test_in_virtual_time_all_computing_is_computing(tmp_path: Path) -> None:
    run = load(runfiles.make_run(tmp_path / "run", environment="{}"))
    np.testing.assert_allclose(step_parts(run.ranks[0])[:2] / runfiles.STEP_S, [0.5, 0.0], atol=1e-6)


def test_links_of_a_rank(run: Run) -> None:
    on = grid(run, 10)
    own = links(run.ranks[0], on)
    quality = own.over_time["quality"]
    assert np.isnan(quality[0]).all()  # to itself
    inside = np.isfinite(quality[1])
    assert set(quality[1][inside]) == {11.0}
    np.testing.assert_allclose(own.over_time["bytes_sent"][2][inside], 3000 / runfiles.STEP_S)
    np.testing.assert_allclose(own.utilisation[2][inside], 3000 / runfiles.STEP_S / 8000)
    np.testing.assert_allclose(own.over_time["age_s"][inside], 0.25)
    np.testing.assert_allclose(own.over_time["age_steps"][inside], 1.5)
    np.testing.assert_array_equal(own.bytes_sent, [np.nan, 80_000, 120_000])


def test_bytes_from_whom_to_whom_are_the_senders_or_else_the_receivers_count(tmp_path: Path) -> None:
    folder = runfiles.make_run(tmp_path / "run")
    expected = np.tile([40_000.0, 80_000.0, 120_000.0], (3, 1))
    np.fill_diagonal(expected, np.nan)
    for lost in (None, "metrics-00001.h5"):
        if lost:
            (folder / lost).unlink()
        run = load(folder)
        matrix = bytes_matrix(run, [links(rank, grid(run)) for rank in run.ranks])
        np.testing.assert_array_equal(matrix, expected)


def test_a_transfer_is_requested_at_the_end_of_a_step(run: Run) -> None:
    rank = run.ranks[1]
    # Requested after `started_step` steps, so at the end of the step with the number before.
    expected = [rank.steps["time_s"][s - 1] for s in rank.transfers["started_step"]]
    np.testing.assert_allclose(requested_s(rank), expected)


def test_the_mean_of_nothing_is_not_a_number_and_no_warning() -> None:
    np.testing.assert_array_equal(nanmean(np.array([[np.nan, np.inf], [1.0, np.nan]])), [np.nan, 1.0])
