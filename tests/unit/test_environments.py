"""Environments: what the built-in ones say, phases and paces over time, and files with mistakes in them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dlion_mpi.errors import UserError
from dlion_mpi.microcloud import environments
from dlion_mpi.microcloud.environments import Environment, PaceClock, Phase

TABLE: dict[str, tuple[list[float], list[float] | None]] = {  # cores, uplinks (None: a matrix)
    "homo-a": ([24] * 6, [1000] * 6),
    "homo-b": ([24] * 6, [50] * 6),
    "hetero-cpu-a": ([24, 24, 12, 12, 6, 6], [1000] * 6),
    "hetero-cpu-b": ([24, 24, 24, 24, 24, 4], [1000] * 6),
    "hetero-net-a": ([24] * 6, [50, 50, 35, 35, 20, 20]),
    "hetero-net-b": ([24] * 6, None),
    "hetero-sys-a": ([24, 24, 12, 12, 4, 4], [50, 50, 35, 35, 20, 20]),
    "hetero-sys-b": ([24, 24, 12, 12, 4, 4], [20, 20, 35, 35, 50, 50]),
    "gpu-homo": ([1] * 6, [1000] * 6),
    "gpu-hetero": ([8, 1, 1, 1, 1, 1], None),
}
GOOD = """
name = "two"
workers = 2
[[phases]]
cores = [24, 6]
uplink_mbit = 50
"""


def write(folder: Path, text: str) -> str:
    path = folder / "cloud.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_all_thirteen_are_built_in() -> None:
    assert set(environments.names()) == {*TABLE, "dynamic-a", "dynamic-b", "wan-world"}


def test_wan_world_has_four_regions_that_are_fast_within_and_far_apart() -> None:
    environment = environments.load("wan-world")
    (phase,) = environment.phases
    assert environment.workers == 16
    assert environment.pace(0, 0.0, None).seconds(32) == pytest.approx(0.238 / 0.232, rel=1e-3)
    for a in range(16):
        for b in set(range(16)) - {a}:
            rate, latency_s = environment.rate_mbit(a, b, phase), environment.latency_of(a, b)
            assert (rate, latency_s) == (environment.rate_mbit(b, a, phase), environment.latency_of(b, a))
            if a // 4 == b // 4:
                assert (rate, latency_s) == (1490.0, 0.0005)
            else:
                assert 1.7 < rate < 14
                assert 0.02 <= latency_s <= 0.15
    assert environment.rate_mbit(0, 15, phase) == pytest.approx(202 * 4.16 / 280, rel=0.01)


@pytest.mark.parametrize("name", TABLE)
def test_static_environments_say_what_the_table_says(name: str) -> None:
    cores, uplinks = TABLE[name]
    environment = environments.load(name)
    assert environment.name == name
    (phase,) = environment.phases
    assert list(phase.cores) == cores
    if uplinks is not None:
        assert list(phase.uplink_mbit or ()) == uplinks
        return
    assert phase.link_mbit is not None
    rates = [rate for row in phase.link_mbit for rate in row if rate]
    assert (min(rates), max(rates), len(rates)) == (20, 190, 30)
    assert any(phase.link_mbit[a][b] != phase.link_mbit[b][a] for a in range(6) for b in range(a))


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("dynamic-a", ["homo-b", "hetero-sys-a", "hetero-sys-b"]),
        ("dynamic-b", ["hetero-sys-b", "hetero-sys-a", "homo-b"]),
    ],
)
def test_dynamic_environments_pass_through_the_static_ones(name: str, order: list[str]) -> None:
    environment = environments.load(name)
    for third, source in enumerate(order):
        phase, expected = environment.phase_at(30.0 * third + 1.0, 90.0), environments.load(source).phases[0]
        assert (phase.cores, phase.uplink_mbit) == (expected.cores, expected.uplink_mbit)
    assert environment.phase_starts_s(90.0) == pytest.approx((0.0, 30.0, 60.0))


def test_pace_follows_the_model() -> None:
    environment = environments.load("hetero-sys-a")
    assert environment.pace(0, 0.0, None).seconds(32) == pytest.approx(0.2)
    assert environment.pace(4, 0.0, None).seconds(32) == pytest.approx(0.02 + 0.18 * 6)
    assert environment.pace(4, 0.0, None).seconds(0) == pytest.approx(0.02)


def test_link_rates() -> None:
    shared, matrix = environments.load("hetero-net-a"), environments.load("hetero-net-b")
    assert shared.rate_mbit(0, 5, shared.phases[0]) == 10.0
    assert shared.rate_mbit(5, 0, shared.phases[0]) == 4.0
    assert matrix.rate_mbit(0, 1, matrix.phases[0]) == 190.0
    assert matrix.rate_mbit(1, 0, matrix.phases[0]) == 170.0
    with pytest.raises(ValueError, match="no link to itself"):
        shared.rate_mbit(2, 2, shared.phases[0])


def phases(*, share: list[float] | None = None, start_s: list[float] | None = None) -> tuple[Phase, ...]:
    """Phases of one worker, with 1, 2, 3... cores."""
    if share is not None:
        return tuple(Phase(cores=(n,), uplink_mbit=(1,), share=value) for n, value in enumerate(share, 1))
    return tuple(Phase(cores=(n,), uplink_mbit=(1,), start_s=value) for n, value in enumerate(start_s or [], 1))


def test_a_phase_begins_exactly_at_its_time() -> None:
    environment = Environment(name="x", workers=1, phases=phases(start_s=[0.0, 10.0, 30.0]))
    cores = [environment.phase_at(t, None).cores[0] for t in (-1.0, 0.0, 9.999, 10.0, 29.0, 30.0, 1e9)]
    assert cores == [1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_without_the_length_of_the_run_the_first_share_stays(unknown: float | None) -> None:
    environment = Environment(name="x", workers=1, phases=phases(share=[0.25, 0.75]))
    assert environment.phase_at(1e9, unknown).cores == (1.0,)
    assert environment.phase_at(1e9, 100.0).cores == (2.0,)
    assert environment.phase_starts_s(100.0) == (0.0, 25.0)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    environment = environments.load(write(tmp_path, GOOD))
    assert (environment.name, environment.workers, environment.latency_s) == ("two", 2, 0.0)
    assert environment.phases[0].uplink_mbit == (50.0, 50.0)


MISTAKES = [
    ("workers = 2", "workers = 0", "line 3: workers: 0 workers"),
    ("workers = 2", "workers = 2.5", "line 3: workers: give the number"),
    ("workers = 2", "workers = true", "line 3: workers: give the number"),
    ('name = "two"', "name = 2", "line 2: name: give a string"),
    ("workers = 2", "workers = 2\nalpha_s = -1", "line 4: alpha_s: -1 seconds"),
    ("workers = 2", "workers = 2\nlatency_s = nan", "line 4: latency_s: nan seconds"),
    ("workers = 2", "workers = 2\nlink_latency_s = 0.1", "line 4: link_latency_s: give 2 rows of 2"),
    ("workers = 2", "workers = 2\nlink_latency_s = [[0, 1]]", "line 4: link_latency_s: give 2 rows of 2"),
    ("workers = 2", "workers = 2\nlink_latency_s = [[0, 1], [-1, 0]]", "link_latency_s: -1 seconds from worker 1 to 0"),
    ("workers = 2", "workers = 2\nlink_latency_s = [[1, 1], [1, 0]]", "link_latency_s: 1 from worker 0 to 0; the"),
    (
        "workers = 2",
        "workers = 2\nlatency_s = 1\nlink_latency_s = [[0, 1], [1, 0]]",
        "line 5: link_latency_s: give latency_s or link_latency_s",
    ),
    ("workers = 2", "workers = 2\nseconds_per_sample_24 = 0", "line 4: seconds_per_sample_24: 0 seconds"),
    ("workers = 2", "workers = 2\nworker = 2", "line 4: worker: unknown key"),
    ("workers = 2", "workers = 3", r"line 5: phases\[0\].cores: 2 values for 3 workers"),
    ("[24, 6]", "[24, 0]", r"line 5: phases\[0\].cores: 0 is not above zero"),
    ("[24, 6]", "[24, inf]", r"line 5: phases\[0\].cores: inf is not above zero"),
    ("[24, 6]", '[24, "six"]', r"line 5: phases\[0\].cores: 'six' is not a number"),
    ("cores = [24, 6]\n", "", r"line 4: phases\[0\].cores: missing"),
    ("= 50", "= [50, -1]", r"line 6: phases\[0\].uplink_mbit: -1 is not above zero"),
    ("uplink_mbit", "uplink", r"line 6: phases\[0\].uplink: unknown key"),
    ("uplink_mbit = 50", "", r"phases\[0\].uplink_mbit: give uplink_mbit or link_mbit"),
    ("uplink_mbit = 50", "link_mbit = [[0, 1]]", r"line 6: phases\[0\].link_mbit: give 2 rows of 2"),
    ("uplink_mbit = 50", "link_mbit = 5", r"line 6: phases\[0\].link_mbit: give 2 rows of 2"),
    ("uplink_mbit = 50", "link_mbit = [[0, 1], [0, 0]]", "link_mbit: 0 from worker 1 to 0"),
    ("uplink_mbit = 50", "link_mbit = [[3, 1], [1, 0]]", "link_mbit: 3 from worker 0 to 0; the diagonal"),
    ("= 50", "= 50\nshare = 0.5", r"line 7: phases\[0\].share: the shares of all phases add up to 0.5"),
    ("= 50", "= 50\nstart_s = 3", r"line 7: phases\[0\].start_s: 3; the first phase starts at 0"),
    ("= 50", "= 50\n[[phases]]\ncores = 1\nuplink_mbit = 1", r"phases\[0\].share: give share in every"),
    ("[[phases]]", "[phases]", "phases: write each phase as a"),
    ("workers = 2", "workers = ", "not valid TOML: .*line 3.*key workers"),
    ("uplink_mbit = 50", "cores = 3", "not valid TOML: .*line 6.*key cores"),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_mistakes_are_named_with_key_and_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(UserError, match=message) as raised:
        environments.load(write(tmp_path, GOOD.replace(old, new)))
    assert "\n" not in str(raised.value)
    assert "cloud.toml" in str(raised.value)


def test_the_line_is_that_of_the_right_phase(tmp_path: Path) -> None:
    second = '[[phases]]\nstart_s = 5\ncores = 24\nuplink_mbit = "fast"\n'
    text = GOOD + "start_s = 0\n" + second
    with pytest.raises(UserError, match=r"line 11: phases\[1\].uplink_mbit: 'fast'"):
        environments.load(write(tmp_path, text))


@pytest.mark.parametrize("starts_s", [[0.0, 5.0, 5.0], [0.0, 7.0, 6.0], [0.0, math.inf]])
def test_starts_must_follow_each_other(starts_s: list[float]) -> None:
    with pytest.raises(UserError, match="does not follow"):
        Environment(name="x", workers=1, phases=phases(start_s=starts_s))


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown environment 'homo-z'.*homo-a, homo-b"):
        environments.load("homo-z")
    with pytest.raises(UserError, match="No such file"):
        environments.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        environments.load(tmp_path / "binary.toml")


def test_pace_clock_of_an_emulation(tmp_path: Path) -> None:
    text = GOOD + "share = 0.5\n[[phases]]\nshare = 0.5\ncores = [12, 12]\nuplink_mbit = 50\n"
    environ = {environments.ENVIRONMENT_VARIABLE: write(tmp_path, text)}
    clock = PaceClock.from_environ(1, run_seconds=100.0, environ=environ)
    assert clock is not None
    assert clock.seconds(32, 49.0) == pytest.approx(0.02 + 0.18 * 4)
    assert clock.seconds(32, 51.0) == pytest.approx(0.02 + 0.18 * 2)
    environ[environments.SECONDS_VARIABLE] = "40.0"  # what `dlion emulate` was given comes first
    clock = PaceClock.from_environ(1, run_seconds=100.0, environ=environ)
    assert clock is not None
    assert clock.seconds(32, 21.0) == pytest.approx(0.02 + 0.18 * 2)
    with pytest.raises(UserError, match=r"rank 2.*2 workers"):
        PaceClock.from_environ(2, environ=environ)
    assert PaceClock.from_environ(0, environ={}) is None


def test_the_clock_file(tmp_path: Path) -> None:
    path = tmp_path / "clock"
    environ = {environments.CLOCK_VARIABLE: str(path)}
    assert environments.read_clock(path) is None
    environments.start_clock(12.5, started_s=1.7e9 + 0.1, environ=environ)
    assert environments.read_clock(path) == environments.Clock(started_s=1.7e9 + 0.1, run_seconds=12.5)
    environments.start_clock(None, environ=environ)
    clock = environments.read_clock(path)
    assert clock is not None
    assert clock.run_seconds is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["clock"]  # it replaced the file, and left no other
    path.write_text("not a clock\n", encoding="utf-8")
    assert environments.read_clock(path) is None
    environments.start_clock(1.0, environ={})  # outside an emulation: no file to write
