"""Tables and figures for scripts and notebooks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dlion_mpi.config.options import Config
from tests import runfiles

ROOT = Path(__file__).parents[2]
EXTRA = "pip install 'dlion-mpi[analysis]'"
pytest.importorskip("pandas", reason=f"pandas is missing: {EXTRA}")
pytest.importorskip("matplotlib", reason=f"matplotlib is missing: {EXTRA}")

import analysis  # noqa: E402
from analysis import figures  # noqa: E402
from dlion_mpi.metrics.reader import Run  # noqa: E402
from dlion_mpi.metrics.records import LINKS, STEPS  # noqa: E402

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    baseline = Config(strategy="baseline", seconds=60.0).to_toml()
    return [
        runfiles.make_run(folder / "a", workers=3),
        runfiles.make_run(folder / "b", workers=2, steps=12, config=baseline),
    ]


@pytest.fixture(scope="module")
def runs(folders: list[Path]) -> list[Run]:
    return analysis.load_all(folders)


# ---- tables


def test_a_row_for_each_step_of_each_rank(runs: list[Run]) -> None:
    table = analysis.steps(runs)
    assert list(table.columns) == ["run", "rank", *STEPS]
    assert table.groupby(["run", "rank"], observed=True).size().to_dict() == {
        **{("dlion", rank): 40 for rank in range(3)},
        **{("baseline", rank): 12 for rank in range(2)},
    }
    one = table[(table["run"] == "dlion") & (table["rank"] == 2)]
    np.testing.assert_allclose(one["time_s"], 3 * runfiles.STEP_S * np.arange(1, 41))


def test_a_row_for_each_link_and_step(runs: list[Run]) -> None:
    table = analysis.links(runs)
    assert list(table.columns) == ["run", "rank", "peer", "step", "time_s", *LINKS]
    assert len(table) == 3 * 2 * 40 + 2 * 1 * 12
    assert (table["rank"] != table["peer"]).all()
    for row in table.sample(30, random_state=1).itertuples():
        workers = 3 if row.run == "dlion" else 2
        expected = runfiles.record(row.rank, workers, row.step)
        assert row.time_s == expected.time_s
        assert row.bytes_sent == expected.bytes_sent[row.peer]
        np.testing.assert_allclose(row.quality, expected.quality.get(row.peer, np.nan))


def test_tests_and_transfers(runs: list[Run]) -> None:
    assert len(analysis.evaluations(runs)) == 3 * 10 + 2 * 3
    transfers = analysis.transfers(runs)
    assert transfers.groupby("run", observed=True)["merged"].sum().to_dict() == {"dlion": 2 * 4, "baseline": 1}


def test_tables_leave_the_runs_as_they_were(runs: list[Run]) -> None:
    first, second = analysis.steps(runs), analysis.steps(runs)
    assert first.equals(second)
    first["loss"] = 0.0
    assert runs[0].ranks[0].steps["loss"][0] == 2.0


def test_settings_say_where_runs_differ(runs: list[Run]) -> None:
    table = analysis.settings(runs)
    assert list(table.columns) == ["differs", "dlion", "baseline"]
    assert list(table.index[table["differs"]]) == ["run.strategy"]
    assert table.loc["run.seconds", "baseline"] == "60.0"


def test_a_run_that_lacks_columns_has_them_empty(tmp_path: Path) -> None:
    folder = runfiles.make_run(tmp_path / "a", workers=2, steps=3)
    (folder / "metrics-00000.h5").unlink()
    table = analysis.links([analysis.load(folder)])
    assert table["rank"].tolist() == [1] * 3
    assert table["peer"].tolist() == [0] * 3


# ---- figures


def test_every_figure_as_pdf_and_png(folders: list[Path], tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "figures"
    assert figures.main([str(folders[1]), "-o", str(out)]) == 0
    written = sorted(out.iterdir())
    assert sorted(capsys.readouterr().out.split()) == [str(path) for path in written]
    names = {path.name for path in written}
    kinds = [
        "test-accuracy-of-workers",
        "batch-size",
        "step-time",
        "parts",
        "n",
        "rate",
        "utilisation",
        "matrix",
        "age-s",
    ]
    for name in ("test-accuracy", "test-val_loss", "loss", *(f"baseline-{kind}" for kind in kinds)):
        assert {f"{name}.pdf", f"{name}.png"} <= names
    for path in written:
        start = path.read_bytes()[:8]
        assert start.startswith(b"%PDF" if path.suffix == ".pdf" else b"\x89PNG\r\n\x1a\n")
        assert b"/Type3" not in path.read_bytes()  # fonts that publishers refuse


def test_the_same_runs_give_the_same_files(folders: list[Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        drawn = figures.draw(analysis.load_all(folders))
        figures.save({"accuracy": drawn["test-accuracy"]}, tmp_path / name)
    for kind in ("pdf", "png"):
        assert (tmp_path / "one" / f"accuracy.{kind}").read_bytes() == (
            tmp_path / "two" / f"accuracy.{kind}"
        ).read_bytes()


def test_figures_show_the_numbers_and_units(runs: list[Run]) -> None:
    drawn = figures.draw(runs, target="accuracy>=0.21")
    assert list(drawn)[:4] == ["test-accuracy", "target", "test-val_loss", "loss"]
    axes = drawn["target"].axes[0]
    assert axes.get_xlabel() == "Time to test accuracy >= 21 % (s of training)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dlion", "baseline"]
    texts = [text.get_text() for text in axes.texts]
    assert any("×)" in text for text in texts) or "not reached" in texts
    step = drawn["dlion-step-time"].axes[0]
    assert drawn["dlion-step-time"].get_supylabel() == "Time of a step (s)"
    assert [np.unique(line.get_ydata()).tolist() for line in step.lines] == [[0.5], [1.0], [1.5]]
    panels = [axes for axes in drawn["dlion-rate"].axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["from worker 0", "from worker 1", "from worker 2"]


def test_a_figure_of_nothing_is_not_drawn(tmp_path: Path) -> None:
    drawn = figures.draw([analysis.load(runfiles.make_run(tmp_path / "a", workers=2, steps=2))])
    assert "test-accuracy" not in drawn
    assert "dlion-transfers" not in drawn
    assert "dlion-batch-size" in drawn


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for arguments, said in (([str(tmp_path)], "holds no run"), (["x", "--target", "accuracy>=7"], "from 0 to 1")):
        done = subprocess.run(
            [sys.executable, "-m", "analysis.figures", *arguments, "-o", str(tmp_path / "figures")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert said in done.stderr


def test_without_its_packages_one_line_names_the_extra(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['pandas'] = None\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    line = "analysis needs pandas: pip install -e '.[analysis]'"
    done = without_pandas("-m", "analysis.figures", str(folders[0]), path=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"dlion: error: {line}")
    assert done.stderr.count("\n") == 1
    done = without_pandas("-c", "import analysis", path=path)
    assert f"ImportError: {line}" in done.stderr


def without_pandas(*words: str, path: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *words], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
