"""A measure that is declared and recorded is stored, read and shown everywhere, without another change."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
import pytest

from dlion_mpi.metrics import records
from dlion_mpi.metrics.gauges import Totals, summary_names
from dlion_mpi.metrics.reader import Run, load
from dlion_mpi.metrics.recorder import NoRecorder, Recorder
from dlion_mpi.metrics.records import Chart, Gauge, Measure, PerLink, Reduce, StepRecord, measures_of
from dlion_mpi.metrics.series import step_parts
from dlion_mpi.report import comparison, workers
from dlion_mpi.trace.events import Window
from dlion_mpi.trace.run import write
from dlion_mpi.view.from_files import snapshot
from dlion_mpi.view.lines import summary
from dlion_mpi.view.render import render
from dlion_mpi.view.snapshot import RankSnapshot, Tally
from dlion_mpi.view.tensorboard import TensorBoard
from tests import eventfiles, runfiles, traces

WORKERS, STEPS = 3, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended(StepRecord):
    """A step with a measure of its energy, one of its cooling time, and one of the losses on each link."""

    joules: Annotated[float, Measure("f4", "J", "energy of the step", trace=True)] = 0.0
    cool_s: Annotated[float, Measure("f4", "s", "waiting for the machine to cool", part="cooling")] = 0.0
    lost: Annotated[PerLink, Measure("u4", "packets", "packets lost so far", link="to")] = field(default_factory=dict)


GAUGES = [
    Gauge("joules", "energy", Reduce.MEAN, ".1f", tag="energy/joules", summary=True),
    Gauge("joules", "power", Reduce.PER_SECOND, ".0f", name="watts", tag="energy/watts"),
    Gauge("lost", "lost", tag="link_lost"),
]
CHARTS = [
    Chart("joules", "energy", "Energy of each worker", "energy of a step (J)"),
    Chart("lost", "lost", "Packets lost on each link", "packets lost (packets)"),
]


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the declarations above were in records.py."""
    for name, measure in measures_of(Extended).items():
        monkeypatch.setitem(records.LINKS if measure.link else records.STEPS, name, measure)
    records.GAUGES.extend(GAUGES)
    records.CHARTS.extend(CHARTS)
    yield
    del records.GAUGES[-len(GAUGES) :]
    del records.CHARTS[-len(CHARTS) :]


def record(rank: int, step: int) -> Extended:
    known = runfiles.record(rank, WORKERS, step)
    values: dict[str, Any] = {name: getattr(known, name) for name in measures_of(StepRecord)}
    peers = [peer for peer in range(WORKERS) if peer != rank]
    return Extended(
        **values, joules=5.0 + rank, cool_s=0.01 * (rank + 1), lost={peer: step + 10 * peer for peer in peers}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rank in range(WORKERS):
        recorder = runfiles.write(tmp_path / "run", rank, WORKERS, 0)
        for step in range(STEPS):
            recorder.step(record(rank, step))
        recorder.close(complete=True)
    return tmp_path / "run"


@pytest.fixture
def run(folder: Path) -> Run:
    return load(folder)


def tallied(rank: int = 1) -> RankSnapshot:
    tally = Tally(rank, WORKERS)
    for step in range(STEPS):
        tally.add(record(rank, step))
    return tally.take({})


def test_it_is_in_the_file(folder: Path) -> None:
    with h5py.File(folder / "metrics-00001.h5", "r") as file:
        assert file["steps/joules"].dtype == np.float32
        np.testing.assert_array_equal(file["steps/joules"], np.full(STEPS, 6.0))
        assert file["links/lost"].shape == (STEPS, WORKERS)
        np.testing.assert_array_equal(file["links/lost"][-1], [39, 0, 59])


def test_it_is_read(run: Run) -> None:
    np.testing.assert_array_equal(run.ranks[1].steps["joules"], np.full(STEPS, 6.0))
    np.testing.assert_array_equal(run.ranks[1].links()["lost"][:, 2], 20 + np.arange(STEPS))


def test_a_file_without_it_is_read_too(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, 1, {})
    recorder.close(complete=True)
    with h5py.File(recorder.path, "r+") as file:
        del file["steps/joules"]
    run = load(tmp_path)
    assert "rank 0: steps/joules missing: left empty" in run.notes
    assert np.isnan(run.ranks[0].steps["joules"]).all()


def test_it_is_in_the_live_view_and_comes_from_another_rank() -> None:
    before = tallied()
    after = RankSnapshot.from_vector(1, before.to_vector(), [])
    assert after["joules"] == pytest.approx(6.0)
    assert after["watts"] == pytest.approx(6.0)  # steps of a second
    np.testing.assert_array_equal(after.links["lost"], [39, np.nan, 59])


def test_it_is_in_the_view_of_files(run: Run) -> None:
    heads, *rows = render(snapshot(run), 140, 30, colour=False).splitlines()[2:]
    assert heads.split()[-3:] == ["energy", "power", "val_loss"]
    assert [row.split()[-3:-1] for row in rows[:3]] == [["5.0", "10"], ["6.0", "6"], ["7.0", "5"]]
    assert rows[3].split()[-1] == "lost"
    assert rows[4].split()[0] == "0->1"
    assert rows[4].split()[-1] == "49"


def test_it_is_in_tensorboard(tmp_path: Path) -> None:
    board = TensorBoard(NoRecorder(), tmp_path, 1, WORKERS)
    for step in range(STEPS):
        board.step(record(1, step))
    board.close(complete=True)
    found = eventfiles.scalars(tmp_path / "rank-1")
    assert found["energy/joules"][-1][2] == pytest.approx(6.0)
    assert found["energy/watts"][-1][2] == pytest.approx(6.0)
    assert found["link_lost/to_2"][-1][2] == 59


def test_it_is_in_the_summary_also_of_a_run_that_was_resumed() -> None:
    before, after = Totals(), Totals()
    for step in range(STEPS):
        before.add(record(1, step))
    after.from_arrays(before.to_arrays())
    for totals in (before, after):
        row = totals.row(40.0, {}, step=STEPS, bytes_sent=1.0)
        assert dict(zip(summary_names([]), row, strict=True))["joules"] == pytest.approx(6.0)
        result = {"ranks": 1, "strategy": "x", "seconds": 1.0, "stopped": None, "out": None}
        head, first, *_ = summary(result, [row], []).splitlines()[1:]
        assert (head.split()[-1], first.split()[-1]) == ("energy", "6.0")


def test_it_is_in_the_report(run: Run) -> None:
    figures = {figure["key"]: figure for figure in workers.figures(run)}
    assert [line["y"][0] for line in figures["energy"]["panels"][0]["series"]] == [5.0, 6.0, 7.0]
    assert [panel["title"] for panel in figures["lost"]["panels"]] == [f"from worker {rank}" for rank in range(3)]
    (cooling,) = [part for part in figures["parts"]["parts"] if part["name"] == "cooling"]
    assert cooling["values"] == [0.01, 0.02, 0.03]
    assert "cooling" in json.dumps(comparison.figures([run, run], ["a", "b"], None))
    assert step_parts(run.ranks[0])[-1] == pytest.approx(0.05 * runfiles.STEP_S - 0.01, rel=1e-4)  # what is left


def test_it_is_in_the_trace(run: Run) -> None:
    file = io.BytesIO()
    write(run, Window(), file)
    step = traces.parse(file.getvalue()).named("step 7", rank=1)[0]
    assert step.args["joules"] == 6
    assert "cool_s" not in step.args


def test_it_is_in_the_tables_of_the_analysis(run: Run) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    import analysis

    assert analysis.steps([run])["joules"].tolist() == [5.0] * STEPS + [6.0] * STEPS + [7.0] * STEPS
    assert analysis.links([run])["lost"].max() == 59


def test_it_is_in_the_documentation() -> None:
    assert "| `steps/joules` | float32 | J | Energy of the step. |" in records.table("steps")
    assert "| `links/lost` | uint32 | packets | Packets lost so far. |" in records.table("links")
