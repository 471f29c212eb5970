"""The trace of a run in virtual time says what its metrics say, for every strategy: seconds, bytes, messages, ages."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.algorithms.bandwidth import PROBE_S, SMALL_BYTES
from dlion_mpi.cli import main
from dlion_mpi.config.fields import Every
from dlion_mpi.config.options import Config
from dlion_mpi.metrics.reader import Run, load
from dlion_mpi.microcloud.environments import Environment, Phase
from dlion_mpi.simulation.simulate import simulate
from dlion_mpi.wire import HEADER_BYTES
from tests import traces
from tests.traces import Trace

WORKERS = 3
STEPS = 15
KINDS = ("gradient", "weights")
MODES: list[tuple[str, dict[str, Any]]] = [
    ("dlion", {"transfer_period": 5}),
    ("dlion", {"sync": "sync", "transfer_period": 5}),
    ("baseline", {}),
    ("ako", {}),
    ("gaia", {}),
    ("hop", {"backup": 1, "staleness": 1}),
]


def recorded(folder: Path, strategy: str, **options: Any) -> tuple[Run, Trace]:
    """A run of unequal workers on links that it fills, and its trace."""
    phase = Phase(cores=(24.0, 12.0, 4.0), uplink_mbit=(2.0, 1.0, 1.0))
    cloud = Environment(name="test", workers=WORKERS, phases=(phase,), latency_s=0.01)
    config = Config(
        strategy=strategy,
        data="digits",
        model="tests.nets:dense",
        steps=STEPS,
        evaluate_every=Every(steps=5),
        out=str(folder / "run"),
        **options,
    )
    assert simulate(config, cloud, report=False).exit_code == 0
    assert main(["trace", str(folder / "run"), "-o", str(folder / "trace.json")]) == 0
    return load(folder / "run"), traces.read(folder / "trace.json")


@pytest.mark.parametrize(("strategy", "options"), MODES)
def test_a_trace_says_what_the_metrics_say(
    strategy: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, trace = recorded(tmp_path, strategy, **options)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines  # nothing is lacking
    for rank in run.ranks:
        steps = [s for s in trace.slices if s.rank == rank.rank and s.name.startswith("step ")]
        assert [s.args["lbs"] for s in steps] == rank.steps["lbs"].tolist()
        assert [s.name for s in steps] == [f"step {n}" for n in rank.steps["step"]]
        inside = defaultdict[str, float](float)
        for step in steps:
            for part in step.inner:
                inside[part.name] += part.own / 1e6
                for nested in part.inner:
                    inside[nested.name] += nested.own / 1e6
        for name, column in (("compute", "compute_s"), ("wait", "wait_s"), ("apply", "apply_s")):
            assert inside[name] == pytest.approx(rank.steps[column].sum(), rel=1e-6, abs=STEPS * 2e-6)
        assert sum(s.end - s.start for s in steps) / 1e6 == pytest.approx(rank.steps["step_s"].sum(), rel=1e-6)
        tests = [(s.args["step"], s.args["accuracy"]) for s in trace.named("evaluate", rank.rank)]
        assert tests == [(n, pytest.approx(a, abs=1e-5)) for n, a in zip(*_columns(rank.evaluations), strict=True)]
        moves = trace.named("knowledge transfer", rank.rank)
        assert [s.args["source"] for s in moves] == rank.transfers["source"].tolist()
        assert all(s.end > s.start for s in moves)
    if options.get("transfer_period"):
        assert trace.named("knowledge transfer")
    check_links(run, trace)


def _columns(evaluations: Any) -> tuple[list[int], list[float]]:
    return evaluations["step"].tolist(), evaluations["accuracy"].tolist()


def check_links(run: Run, trace: Trace) -> None:
    """Bytes, numbers and ages of every link's messages."""
    for rank in run.ranks:
        columns = rank.links()
        end = trace_end(rank)
        for peer in set(range(run.workers)) - {rank.rank}:
            sent, received = trace.sent(rank.rank, peer), trace.received(rank.rank, peer)
            assert [s.args["sequence"] for s in sent] == list(range(1, len(sent) + 1))
            assert [s.args["sequence"] for s in received] == [s.args["sequence"] for s in sent]
            assert all(a.out == b.into is not None for a, b in zip(sent, received, strict=True))
            own = sum(s.args["bytes"] for s in sent if s.start <= end and s.name != "close")
            acknowledged = sum(s.start <= end for s in trace.received(peer, rank.rank))
            probes, probed = 0, -math.inf
            for message in sent:
                large = message.args["bytes"] >= SMALL_BYTES
                if large and message.start <= end and message.start - probed >= 1e6 * PROBE_S:
                    probes, probed = probes + 1, message.start
            assert probes
            assert own + HEADER_BYTES * (acknowledged + probes) == columns["bytes_sent"][-1, peer]
            ages: dict[int, list[float]] = defaultdict(list)
            for s in trace.received(peer, rank.rank):
                if "age_s" in s.args and s.name in KINDS:
                    ages[s.args["used_in_step"]].append(s.args["age_s"])
            means = columns["age_s"][:, peer]
            used = means[np.isfinite(means)]
            assert len(used) == len(ages)
            assert [np.mean(ages[step]) for step in sorted(ages)] == pytest.approx(used.tolist(), rel=1e-4)


def trace_end(rank: Any) -> int:
    """The end of the last step, in microseconds."""
    return round(float(rank.steps["time_s"][-1]) * 1e6)


@pytest.mark.parametrize("strategy", ["allreduce", "powersgd"])
def test_sums_are_waits_and_pieces_whose_bytes_are_those_of_the_metrics(strategy: str, tmp_path: Path) -> None:
    run, trace = recorded(tmp_path, strategy)
    for rank in run.ranks:
        _check_steps(rank, trace)
        end, peer = trace_end(rank), (rank.rank + 1) % WORKERS
        pieces = [s for s in trace.sent(rank.rank, peer) if s.name not in ("close", "progress") and s.start < end]
        assert sum(s.args["bytes"] for s in pieces) == rank.links()["bytes_sent"][-1, peer]


def test_what_is_computed_by_formula_has_no_messages_but_steps(tmp_path: Path) -> None:
    run, trace = recorded(tmp_path, "free-network")
    for rank in run.ranks:
        _check_steps(rank, trace)
    assert not any(s.out for s in trace.slices)


def _check_steps(rank: Any, trace: Trace) -> None:
    """Steps have the seconds of the metrics; a sum is a wait within applying."""
    inside = defaultdict[str, float](float)
    for step in (s for s in trace.slices if s.rank == rank.rank and s.name.startswith("step ")):
        for slice_ in (*step.inner, *(nested for part in step.inner for nested in part.inner)):
            inside[slice_.name] += slice_.own / 1e6
    for name, column in (("compute", "compute_s"), ("wait", "wait_s")):
        assert inside[name] == pytest.approx(rank.steps[column].sum(), rel=1e-6, abs=STEPS * 4e-6)
