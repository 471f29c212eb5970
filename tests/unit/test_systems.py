"""The results tables: what is run again, what is not, and the figures that come out."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.metrics.records import Evaluation

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

import systems
import systems_table
from systems import Case, Measured, Results
from systems_table import Ratio, Time


def finished(
    system: str, to_80: float | None, *, env: str = "homo-b", seed: int = 0, most: float = 3000.0
) -> dict[str, Any]:
    """A line of the results file."""
    return {
        "testbed": "simulated",
        "environment": env,
        "system": system,
        "seed": seed,
        "most_seconds": most,
        "most_steps": 2000,
        "at_seconds": 120.0,
        "learning_rate": 0.1,
        "commit": "abc",
        "seconds_to": {"70%": None if to_80 is None else to_80 / 2, "80%": to_80},
        "lasted_s": most if to_80 is None else to_80,
        "accuracy_at": 0.75 + seed / 100,
        "spread_at": 0.01,
        "gigabytes_at": 1.0,
        "gigabytes_to_end": 2.0,
        "failed": None,
    }


def evaluation(step: int, time_s: float, accuracy: float) -> Evaluation:
    return Evaluation(step, time_s, {"accuracy": accuracy})


def measured(times_to_accuracy: Sequence[tuple[float, float]], lasted_s: float) -> Measured:
    """One worker with these tests, and a step every 10 s that sends 1 GB."""
    times = np.arange(10.0, lasted_s + 1, 10.0)
    tests = [evaluation(k, time_s, accuracy) for k, (time_s, accuracy) in enumerate(times_to_accuracy)]
    return Measured([tests], [times], [np.arange(1, len(times) + 1) * 10**9])


def small(seed: int, env: str = "homo-b", system: str = "ako") -> Case:
    return Case("simulated", env, system, seed, 3000.0, 2000, 120.0, 0.1)


# The results file.


def test_only_what_the_file_lacks_is_run_and_every_run_is_kept_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, begun = tmp_path / "runs.jsonl", []

    def line(case: Case, expected_s: float) -> dict[str, Any]:
        begun.append(case.seed)
        assert len(systems_table.read(path)) == len(begun) - 1
        if case.seed == 2:
            raise RuntimeError("out of memory")
        return finished(case.system, 90.0, seed=case.seed)

    monkeypatch.setattr(systems, "line", line)
    wanted = [small(seed) for seed in range(4)]
    assert systems.run_all(Results(path), wanted, jobs=1) == ["out of memory"]
    assert begun == [0, 1, 2]
    monkeypatch.setattr(systems, "line", lambda case, expected_s: finished(case.system, 90.0, seed=case.seed))
    assert [case.seed for case in Results(path).lacking(wanted)] == [2, 3]
    assert systems.run_all(Results(path), wanted, jobs=2) == []
    assert Results(path).lacking(wanted) == []
    assert sorted(run["seed"] for run in systems_table.read(path)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "other",
    [
        small(1),
        small(0, env="homo-a"),
        small(0, system="ako --ako.partitions 4"),
        Case("emulated", "homo-b", "ako", 0, 3000.0, 2000, 120.0, 0.1),
        Case("simulated", "homo-b", "ako", 0, 300.0, 2000, 120.0, 0.1),
        Case("simulated", "homo-b", "ako", 0, 3000.0, 900, 120.0, 0.1),
        Case("simulated", "homo-b", "ako", 0, 3000.0, 2000, 60.0, 0.1),
        Case("simulated", "homo-b", "ako", 0, 3000.0, 2000, 120.0, 0.2),
    ],
)
def test_a_run_is_known_by_all_that_it_depends_on(tmp_path: Path, other: Case) -> None:
    results = Results(tmp_path / "runs.jsonl")
    results.add(finished("ako", 90.0))
    assert results.lacking([small(0), other, other]) == [other]


@pytest.mark.parametrize("rest", ['{"environment": "homo-b", "sys', '{"environment": "homo-b", "sys\n', "\n", "3\n"])
def test_half_a_line_is_passed_over_and_spoils_no_other(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "runs.jsonl"
    Results(path).add(finished("ako", 90.0, seed=0))
    with path.open("a") as file:
        file.write(rest)
    Results(path).add(finished("ako", 90.0, seed=1))
    assert [run["seed"] for run in Results(path).runs] == [0, 1]


def test_runs_come_seed_by_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Case] = []
    monkeypatch.setattr(systems, "run_all", lambda results, cases, jobs: asked.extend(cases))
    systems.main(
        ["--results", str(tmp_path / "r"), "--env", "homo-a", "homo-b", "--system", "ako", " gaia  --batch-size 8 "]
    )
    assert [case.seed for case in asked] == [0] * 4 + [1] * 4 + [2] * 4
    assert {case.system for case in asked} == {"ako", "gaia --batch-size 8"}
    assert len(systems.ENVIRONMENTS) == 11


# Which runs are made.


@pytest.mark.parametrize(
    ("reached", "expected", "runs"),
    [
        (300.0, math.inf, ["long"]),
        (None, math.inf, ["long"]),
        (80.0, math.inf, ["long", "short"]),
        (80.0, 90.0, ["short"]),
        (300.0, 90.0, ["short", "long"]),
        (None, 90.0, ["short", "long"]),
        (300.0, 290.0, ["long"]),
    ],
)
def test_a_second_run_is_made_only_where_one_does_not_do(
    monkeypatch: pytest.MonkeyPatch, reached: float | None, expected: float, runs: list[str]
) -> None:
    made = []

    def run(case: Case, seconds: float, target: float) -> Measured:
        made.append("short" if seconds == 120.0 else "long")
        end_s = min(seconds, reached or math.inf) if target < 1 else seconds
        tests = [(10.0, 0.5), (100.0, 0.6)] + ([(reached, 0.8)] if reached is not None and reached <= end_s else [])
        return measured(sorted(tests), end_s)

    monkeypatch.setattr(systems, "measured", run)
    result = systems.line(small(0), expected)
    assert made == runs
    assert result["seconds_to"]["80%"] == reached
    assert result["accuracy_at"] == 0.6
    assert result["gigabytes_at"] == 12.0
    assert result["gigabytes_to_end"] == {80.0: 8.0, 300.0: 30.0, None: 300.0}[reached]


@pytest.mark.parametrize("reached", [80.0, None])
def test_one_run_does_where_none_may_last_longer_than_the_comparison(
    monkeypatch: pytest.MonkeyPatch, reached: float | None
) -> None:
    made = []

    def run(case: Case, seconds: float, target: float) -> Measured:
        made.append((seconds, target))
        return measured([(10.0, 0.5)] + ([(reached, 0.8)] if reached else []), seconds)

    monkeypatch.setattr(systems, "measured", run)
    result = systems.line(dataclasses.replace(small(0), most_seconds=120.0), math.inf)
    assert made == [(120.0, 1.0)]
    assert result["seconds_to"]["80%"] == reached


@pytest.mark.parametrize(("best", "beyond_s"), [(0.84, None), (0.86, 110.0)])
def test_what_is_beyond_the_targets_is_noted_where_a_run_gets_there(
    monkeypatch: pytest.MonkeyPatch, best: float, beyond_s: float | None
) -> None:
    monkeypatch.setattr(systems, "measured", lambda *_: measured([(60.0, 0.7), (90.0, 0.8), (110.0, best)], 120.0))
    result = systems.line(small(0), 90.0)
    assert result["seconds_to"] == {"70%": 60.0, "80%": 90.0}
    assert result["seconds_beyond"] == {"85%": beyond_s}


def test_before_everyone_s_first_test_no_accuracy_is_claimed() -> None:
    late = Measured([[evaluation(0, 100.0, 0.5)], [evaluation(0, 130.0, 0.5), evaluation(1, 140.0, 0.7)]], [], [])
    assert late.accuracies(120.0) == []
    assert late.accuracies(135.0) == [0.5, 0.5]
    assert late.accuracies(150.0) == [0.5, 0.7]


def test_mean_accuracy_is_over_time_and_workers() -> None:
    early = [evaluation(0, 10.0, 0.4), evaluation(1, 60.0, 0.8), evaluation(2, 100.0, 0.9)]
    made = Measured([early, [evaluation(0, 50.0, 0.6)], []], [], [])
    assert made.mean_accuracy(100.0) == pytest.approx((0.4 * 0.5 + 0.8 * 0.4 + 0.6 * 0.5 + 0.0) / 3)


def test_a_run_that_ends_itself_is_kept_as_not_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(case: Case, seconds: float, target: float) -> Measured:
        raise systems.Unstable("the loss is nan")

    monkeypatch.setattr(systems, "measured", run)
    results = Results(tmp_path / "runs.jsonl")
    assert systems.run_all(results, [small(0)], jobs=1) == []
    assert results.runs[0]["failed"] == "the loss is nan"
    assert "| homo-b | - |" in systems_table.markdown(results.runs)


def test_what_is_expected_is_the_median_of_other_seeds_or_else_of_other_environments(tmp_path: Path) -> None:
    results = Results(tmp_path / "runs.jsonl")
    assert results.expected_s(small(3)) == math.inf
    for env, time in (("homo-a", 90.0), ("dynamic-a", 110.0)):
        results.add(finished("ako", time, env=env))
    assert results.expected_s(small(3)) == 100.0
    for seed, to_80 in enumerate((100.0, 140.0, None)):
        results.add(finished("ako", to_80, seed=seed))
    results.add(finished("gaia", 10.0))
    results.add(finished("ako", 500.0, env="homo-a") | {"testbed": "emulated"})
    assert results.expected_s(small(3)) == 140.0
    emulated = dataclasses.replace(small(3), testbed="emulated")
    assert results.expected_s(emulated) == 140.0, "of the other testbed before that of other environments"
    results.add(finished("ako", 160.0) | {"testbed": "emulated"})
    assert results.expected_s(emulated) == 160.0
    assert results.expected_s(small(3)) == 140.0


def test_phases_of_a_dynamic_environment_do_not_depend_on_the_length_of_the_run(tmp_path: Path) -> None:
    from dlion_mpi.microcloud import environments

    dynamic = environments.load(systems._fixed_phases(small(0, env="dynamic-b"), tmp_path))
    for length in (120.0, 3000.0, None):
        assert dynamic.phase_starts_s(length) == pytest.approx((0.0, 40.0, 80.0), abs=0.1)
    assert [phase.cores for phase in dynamic.phases] == [p.cores for p in environments.load("dynamic-b").phases]
    assert environments.load(systems._fixed_phases(small(0), tmp_path)) == environments.load("homo-b")


# The tables.


@pytest.mark.parametrize(
    ("over", "under", "text"),
    [
        (Time(300, 3000), Time(100, 3000), "3.00"),
        (Time(math.inf, 3000), Time(100, 600), "> 30.00"),
        (Time(100, 3000), Time(math.inf, 200), "< 0.50"),
        (Time(math.inf, 3000), Time(math.inf, 3000), "-"),
        (None, Time(100, 3000), "-"),
        (Time(100, 3000), None, "-"),
    ],
)
def test_ratios_and_their_bounds(over: Time | None, under: Time | None, text: str) -> None:
    assert str(Ratio.of(over, under)) == text


def test_medians_count_what_was_not_reached_as_infinite() -> None:
    def median(*times: float | None) -> float | None:
        runs = [finished("ako", time, seed=seed) for seed, time in enumerate(times)]
        return float(s) if (s := systems_table.rows(runs)[0]["seconds_to"]["80%"]) is not None else None

    assert median(100.0, 300.0, 200.0) == 200.0
    assert median(100.0, None, 200.0) == 200.0
    assert median(None, None, 200.0) is None
    assert median(None, 100.0) is None


def test_the_best_rival_is_the_fastest_of_all_with_any_options() -> None:
    runs = [
        finished("free-network", 50.0),
        finished("allreduce", 400.0),
        finished("dlion", 100.0),
        finished("dlion --preset paper", 20.0),
        finished("baseline", None),
        finished("ako", 300.0),
        finished("gaia --gaia.threshold 0.1", 250.0),
        finished("hop", 260.0),
        finished("baseline", None, env="homo-a") | {"lasted_s": 500.0},  # it had taken all its steps
        finished("gaia", None, env="homo-a"),
        finished("dlion", 100.0, env="homo-a"),
    ]
    found = systems_table.ratios(systems_table.rows(runs), "80%")
    assert {name: str(ratio) for name, ratio in found["homo-b"].items()} == {
        "best rival over dlion": "2.50",
        "all-reduce over dlion": "4.00",
        "dlion over free-network": "2.00",
    }
    # A lower bound for the best of them: the one that was given less time may have needed little more.
    assert {name: str(ratio) for name, ratio in found["homo-a"].items()} == {
        "best rival over dlion": "> 5.00",
        "all-reduce over dlion": "-",
        "dlion over free-network": "-",
    }


def test_settings_stand_below_each_other_with_their_seeds_and_failures() -> None:
    ended = {"accuracy_at": None, "spread_at": None, "failed": "the loss is nan"}
    runs = [finished("dlion", 90.0, seed=0)]  # measured anew below
    runs += [finished("dlion", 100.0 + seed, seed=seed) | {"mean_accuracy_to": 0.7} for seed in range(3)]
    runs += [finished("dlion --sync sync", None) | {"mean_accuracy_to": 0.6}]
    runs += [finished("dlion --dlion.unsent drop", None, seed=seed) | (ended if seed else {}) for seed in range(3)]
    runs += [finished("dlion --dlion.unsent drop", None, env="homo-a") | ended]
    assert systems_table.settings(runs, ["homo-b", "homo-a"]).splitlines() == [
        "|  | homo-b | homo-a |",
        "| --- | --- | --- |",
        "| `dlion` | 70.0; 101; 76.0 (1.0) |  |",
        "| `dlion --sync sync` | 60.0; -; 75.0 (1.0) [1] |  |",
        "| `dlion --dlion.unsent drop` | -; -; 75.0 (1.0), 2 failed | all failed [1] |",
    ]


def test_what_is_printed() -> None:
    runs = [finished("dlion", 100.0 + seed, seed=seed) for seed in range(3)]
    runs += [finished("ako", None, seed=seed) for seed in range(2)] + [finished("dlion", None, env="homo-a")]
    text = systems_table.markdown(runs)
    assert "Medians over 1 to 3 seeds; `-`: not reached in 3000 virtual seconds or 2000 steps." in text
    real = systems_table.markdown([finished("dlion", 50.0, most=most) | {"testbed": "emulated"} for most in (160, 300)])
    assert "not reached in 160 to 300 seconds or 2000 steps." in real
    assert "\nSeconds to 80 %:" in real
    assert "| homo-b | 101 | - | > 29.70 | - | - |" in text
    assert "| homo-a | - |  | - | - | - |" in text
    assert "| homo-b | 76.0, 1.0 | 75.5, 1.0 |" in text
    whole = json.loads(systems_table.as_json(runs))
    assert whole["ratios"]["80%"]["homo-b"]["best rival over dlion"] == {
        "value": pytest.approx(29.70, abs=0.01),
        "bound": ">",
    }
    assert whole["table"][0]["seconds_to"] == {"70%": 50.5, "80%": 101.0}
    assert json.loads(systems_table.as_json([]))["runs"] == []
    assert systems_table.markdown([]) == "No runs yet."
