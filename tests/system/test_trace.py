"""The trace of runs over MPI: what the ranks recorded together makes one timeline, and adds up to their metrics."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

import pytest

from dlion_mpi.cli import main
from dlion_mpi.metrics.reader import Rank, Run, load
from dlion_mpi.wire import HEADER_BYTES
from tests import traces
from tests.system.launch import run as launch
from tests.traces import Trace

pytestmark = pytest.mark.timeout(200)
SMALL = ("--data", "digits", "--model", "tests.nets:dense", "--progress-every", "0", "--threads", "1")
UNDER_WAY = 8
"""Acknowledgements that may be counted a moment before or after the step in which they are sent."""


def trained(folder: Path, ranks: int, *options: str) -> tuple[Run, Trace]:
    ended = launch(ranks, "dlion", "train", *SMALL, *options, "--out", str(folder / "run"))
    assert ended.code == 0, ended.err
    assert main(["trace", str(folder / "run"), "-o", str(folder / "trace.json.gz")]) == 0
    return load(folder / "run"), traces.read(folder / "trace.json.gz")


def check_seconds(rank: Rank, trace: Trace) -> None:
    """What a rank's steps were spent on."""
    inside: dict[str, float] = defaultdict(float)
    steps = [s for s in trace.slices if s.rank == rank.rank and s.name.startswith("step ")]
    assert len(steps) == len(rank.steps["step"])
    for step in steps:
        for part in step.inner:
            for s in (part, *part.inner):
                inside[s.name] += s.own / 1e6
    inside["wait"] += inside["wait for a collective"]  # in bounded: for shares of the batch that are late
    columns = {"compute": "compute_s", "select, encode": "select_encode_s", "wait": "wait_s", "apply": "apply_s"}
    for name, column in columns.items():
        # Each is a difference of times that are whole microseconds in the trace.
        assert inside[name] == pytest.approx(rank.steps[column].sum(), rel=1e-3, abs=5e-6 * len(steps)), name


def test_a_trace_of_workers_that_exchange_messages(tmp_path: Path) -> None:
    options = ("--steps", "40", "--evaluate-every", "10", "--transfer-period", "10", "--exchange-share", "0")
    run, trace = trained(tmp_path, 2, *options)
    for rank in run.ranks:
        check_seconds(rank, trace)
        made = [s for s in trace.slices if s.rank == rank.rank and s.track == "exchange"]
        assert len(made) == 40
        assert all(b.start >= a.end for a, b in itertools.pairwise(made))
        assert len(trace.named("evaluate", rank.rank)) == len(rank.evaluations["step"]) > 1
        assert all(s.end > s.start for s in trace.named("evaluate", rank.rank))
        assert len(trace.named("knowledge transfer", rank.rank)) == len(rank.transfers["step"]) > 0
        end = round(float(rank.steps["time_s"][-1]) * 1e6)
        for peer in {1 - rank.rank}:
            sent, received = trace.sent(rank.rank, peer), trace.received(rank.rank, peer)
            assert len(sent) > 5
            # A run that ends as it should leaves nothing under way.
            assert [s.args["sequence"] for s in received] == list(range(1, len(sent) + 1))
            assert all(a.out == b.into is not None for a, b in zip(sent, received, strict=True))
            acknowledged = sum(s.start <= end for s in trace.received(peer, rank.rank))
            own = sum(s.args["bytes"] for s in sent if s.start <= end)
            counted = int(rank.links()["bytes_sent"][-1, peer])
            assert abs(own + HEADER_BYTES * acknowledged - counted) <= UNDER_WAY * HEADER_BYTES


def test_a_trace_of_a_sum_over_all(tmp_path: Path) -> None:
    run, trace = trained(tmp_path, 3, "--strategy", "allreduce", "--steps", "20")
    for rank in run.ranks:
        check_seconds(rank, trace)
        following = (rank.rank + 1) % 3
        sent = [s for s in trace.sent(rank.rank, following) if s.name == "piece of a sum"]
        assert len(sent) == 20 * 2 * (3 - 1)
        # The follower may have ended, and that been acknowledged, before this rank's last step was recorded.
        more = rank.links()["bytes_sent"][-1, following] - sum(s.args["bytes"] for s in sent)
        assert more in (0, HEADER_BYTES)
        assert all(s.out is not None for s in sent)
