"""The page and its figures: what they say is what the runs did, and nothing of a run can act on the reader."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.cli import main
from dlion_mpi.config.options import Config
from dlion_mpi.config.target import Target
from dlion_mpi.metrics.reader import Run, load
from dlion_mpi.report import colours, comparison, report, workers
from dlion_mpi.report.figure import EACH, MOST, ROWS, numbers
from dlion_mpi.report.settings import settings, summary
from tests import runfiles

Captured = pytest.CaptureFixture[str]
COMPARED = ["test-accuracy", "target", "test-val_loss", "loss", "parts-of-runs"]
SINGLE = [
    "test-accuracy-of-workers",
    "test-val_loss-of-workers",
    "batch-size",
    "step-time",
    "parts",
    "n",
    "rate",
    "utilisation",
    "matrix",
]
SINGLE += ["age-s", "age-steps", "transfers"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """DLion with four workers' numbers, and a shorter Baseline with one worker less and one version newer."""
    folder = tmp_path_factory.mktemp("runs")
    baseline = Config(strategy="baseline", seconds=60.0).to_toml()
    return [
        load(runfiles.make_run(folder / "a", workers=4)),
        load(runfiles.make_run(folder / "b", steps=20, config=baseline, versions='{"numpy": "2.1"}')),
    ]


def data_of(page: str) -> Any:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def figure(figures: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return next(one for one in figures if one["key"] == key)


# ---- the command


def test_the_command_writes_the_page_and_says_where(tmp_path: Path, capsys: Captured) -> None:
    folder = runfiles.make_run(tmp_path / "a")
    out = tmp_path / "page.html"
    assert main(["report", str(folder), "-o", str(out)]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    data = data_of(out.read_text(encoding="utf-8"))
    assert [one["key"] for one in data["comparison"]] == [
        "test-accuracy",
        "test-val_loss",
        "loss",
    ]  # one run is not compared
    assert [one["key"] for one in data["runs"][0]["figures"]] == SINGLE


def test_several_runs_are_compared(tmp_path: Path) -> None:
    folders = [runfiles.make_run(tmp_path / name) for name in ("a", "b")]
    data = data_of(report(folders, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [one["key"] for one in data["comparison"]] == COMPARED
    assert [run["label"] for run in data["runs"]] == ["a", "b"]


def test_one_worker_has_no_links(tmp_path: Path) -> None:
    figures = workers.figures(load(runfiles.make_run(tmp_path / "a", workers=1)))
    assert [one["key"] for one in figures] == SINGLE[:5]


def test_what_cannot_be_shown_is_said_on_the_page_and_on_stderr(tmp_path: Path, capsys: Captured) -> None:
    folder = runfiles.make_run(tmp_path / "a", ended=False)
    (folder / "metrics-00001.h5").unlink()
    out = tmp_path / "page.html"
    assert main(["report", str(folder), "-o", str(out)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("dlion report: dlion: rank 1: no metrics file")
    assert said[1].startswith("dlion report: dlion: ranks 0, 2: not ended: still running")
    page = out.read_text(encoding="utf-8")
    assert "Missing data" in page
    assert "rank 1: no metrics file" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}"], "holds no run"),
        (["{tmp}/none"], "no such folder"),
        (["{run}", "{tmp}"], "holds no run"),
        (["{run}/metrics-00000.h5"], "is a file"),
        (["{run}", "-o", "{run}/metrics-00000.h5"], "must end in .html"),
        (["{run}", "-o", "{tmp}/no/page.html"], "cannot be written (No such file or directory)"),
        (["{run}", "--target-accuracy", "0.8"], "--target-accuracy is now --target 'accuracy>=VALUE'"),
        (
            ["{run}", "--target", "auc>=0.8"],
            "--target auc>=0.8: no run has the metric auc; they have accuracy, val_loss",
        ),
        (["{run}", "--target", "high"], "--target: 'high' is not a metric and a bound"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: Captured, arguments: list[str], said: str
) -> None:
    run = runfiles.make_run(tmp_path / "deep" / "a", workers=1, steps=2)
    words = [word.format(tmp=tmp_path, run=run) for word in arguments]
    assert main(["report", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("dlion: error: ")
    assert said in err
    assert not list(tmp_path.glob("*.html"))


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("old")
    main(["report", str(tmp_path / "none"), "-o", str(out)])
    assert out.read_text() == "old"
    folder = runfiles.make_run(tmp_path / "a", workers=1, steps=2)
    main(["report", str(folder), "-o", str(out)])
    assert out.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "page.html"]


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from dlion_mpi.cli import main
try:
    main(["report", "--help"])
except SystemExit as ended:
    assert ended.code == 0
print([name for name in ("h5py", "pandas", "matplotlib", "dlion_mpi.metrics.reader") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ---- what the figures say


def test_accuracy_is_the_mean_with_the_spread_in_per_cent(runs: list[Run]) -> None:
    line = figure(comparison.figures(runs, ["a", "b"], None), "test-accuracy")["panels"][0]["series"][1]
    ends = [runfiles.STEP_S * (rank + 1) * 20 for rank in range(3)]
    last = [100 * (0.01 * ends[rank] ** 0.5 + 0.1 * (3 - rank)) for rank in range(3)]
    assert line["t"][-1] == max(ends)
    assert line["y"][-1] == pytest.approx(np.mean(last), rel=1e-3)
    assert (line["low"][-1], line["high"][-1]) == pytest.approx((min(last), max(last)), rel=1e-3)


def test_the_time_to_target_of_every_run(runs: list[Run]) -> None:
    shown = figure(comparison.figures(runs, ["a", "b"], None), "target")
    best = [
        max(line["y"])
        for line in figure(comparison.figures(runs, ["a", "b"], None), "test-accuracy")["panels"][0]["series"]
    ]
    assert shown["targets"][shown["chosen"]] == math.floor(min(best))  # both reach what the lesser one can
    assert None not in [row[shown["chosen"]] for row in shown["reached"]]
    assert shown["targets"][-1] == math.floor(max(best))
    assert shown["reached"][1][-1] is None
    assert shown["seconds"] == [80, 30]
    for row in shown["reached"]:
        reached = [time for time in row if time is not None]
        assert reached == sorted(reached)


def test_the_users_target_is_among_them(runs: list[Run]) -> None:
    shown = figure(comparison.figures(runs, ["a", "b"], Target("accuracy", ">=", 0.215)), "target")
    assert shown["targets"][shown["chosen"]] == 21.5
    shown = figure(comparison.figures(runs, ["a", "b"], Target("accuracy", ">=", 0.99)), "target")
    assert [row[shown["chosen"]] for row in shown["reached"]] == [None, None]


def test_the_runs_own_target_comes_first(tmp_path: Path) -> None:
    config = Config(target=Target("accuracy", ">=", 0.2)).to_toml()
    both = [load(runfiles.make_run(tmp_path / name, config=config)) for name in "ab"]
    shown = figure(comparison.figures(both, ["a", "b"], None), "target")
    assert shown["targets"][shown["chosen"]] == 20


def test_runs_without_evaluations_have_no_time_to_target(tmp_path: Path) -> None:
    both = [load(runfiles.make_run(tmp_path / name, steps=2)) for name in "ab"]
    assert [one["key"] for one in comparison.figures(both, ["a", "b"], None)] == [
        key for key in COMPARED if key != "target"
    ]


def test_each_link_has_a_line_in_its_senders_panel(runs: list[Run]) -> None:
    shown = figure(workers.figures(runs[0]), "rate")
    assert [panel["title"] for panel in shown["panels"]] == [f"from worker {k}" for k in range(4)]
    for sender, panel in enumerate(shown["panels"]):
        peers = [peer for peer in range(4) if peer != sender]
        assert [line["name"] for line in panel["series"]] == [f"to worker {peer}" for peer in peers]
        for peer, line in zip(peers, panel["series"], strict=True):
            expected = 1000 * (peer + 1) / (runfiles.STEP_S * (sender + 1)) / 1e6
            assert line["y"][0] == pytest.approx(expected, rel=1e-3)
            assert len(line["y"]) == len(shown["t"])


def test_the_bytes_matrix_is_in_megabytes(runs: list[Run]) -> None:
    values = figure(workers.figures(runs[1]), "matrix")["values"]
    assert values == [[None, 0.04, 0.06], [0.02, None, 0.06], [0.02, 0.04, None]]


def test_transfers_say_who_gave_and_who_merged(runs: list[Run]) -> None:
    shown = figure(workers.figures(runs[1]), "transfers")
    assert len(shown["items"]) == 3 * 2
    row, asked, done, source, merged, megabytes = shown["items"][-1]
    assert (row, source, merged, megabytes) == (2, 0, True, 4)
    assert asked < done == 30
    assert [item[4] for item in shown["items"]] == [False, False, True, True, True, True]


def test_many_workers_become_a_median_and_a_band(tmp_path: Path) -> None:
    run = load(runfiles.make_run(tmp_path / "a", workers=EACH + 1))
    figures = {one["key"]: one for one in workers.figures(run)}
    for key in ("test-accuracy-of-workers", "batch-size", "step-time", "n", "rate", "utilisation", "age-s"):
        panels = figures[key]["panels"]
        assert [[line["name"] for line in panel["series"]] for panel in panels] == [["median worker"]], key
        assert "middle 80 %" in figures[key]["says"]
    line = figures["step-time"]["panels"][0]["series"][0]
    assert line["y"][0] == pytest.approx(5 * runfiles.STEP_S)  # of 1 to 9 times a step
    assert line["low"][0] == pytest.approx(1.8 * runfiles.STEP_S)
    assert line["high"][0] == pytest.approx(8.2 * runfiles.STEP_S)


def test_more_workers_than_rows_are_cut_and_it_is_said(tmp_path: Path) -> None:
    run = load(runfiles.make_run(tmp_path / "a", workers=ROWS + 2, steps=4))
    figures = {one["key"]: one for one in workers.figures(run)}
    for key in ("parts", "matrix", "transfers"):
        assert len(figures[key]["rows"]) == ROWS
        assert f"The first {ROWS} of {ROWS + 2} workers." in figures[key]["says"]
    assert max(len(row) for row in figures["matrix"]["values"]) == ROWS


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    run = load(runfiles.make_run(tmp_path / "a", workers=2, steps=3000))
    figures = [*workers.figures(run), *comparison.figures([run], ["a"], None)]
    for one in figures:
        for panel in one.get("panels", []):
            assert max(len(line["y"]) for line in panel["series"]) <= MOST
    for key in ("test-accuracy", "test-val_loss-of-workers"):
        line = figure(figures, key)["panels"][0]["series"][-1]
        assert line["t"][-1] == run.seconds
    assert len(json.dumps(figures)) < 100_000


def test_every_figure_says_quantity_and_unit(runs: list[Run]) -> None:
    for one in [*comparison.figures(runs, ["a", "b"], None), *workers.figures(runs[0])]:
        said = [one["x"], one.get("y", ""), one.get("unit", "")]
        if one["key"].startswith("test-val_loss"):  # a model's own metric: its unit is not known
            continue
        assert re.search(r"\((%|s|s of training|MB/s|samples|steps|no unit)\)|MB", " ".join(said)), one["key"]
        assert one["says"].endswith(".")


def test_numbers_are_rounded_and_never_nan() -> None:
    assert numbers(np.array([1234567.0, 0.000123456, np.nan, np.inf, 3.0])) == [1235000, 0.0001235, None, None, 3]
    assert json.dumps(numbers(np.array([3.0]))) == "[3]"


# ---- tables


def test_settings_that_differ_come_first_and_are_marked(runs: list[Run]) -> None:
    rows = settings(runs)
    differing = [name for name, _, differs in rows if differs]
    assert differing == ["run.strategy", "version of numpy"]
    assert [differs for *_, differs in rows] == sorted((differs for *_, differs in rows), reverse=True)
    assert rows[0] == ("run.strategy", ["dlion", "baseline"], True)


def test_the_folder_of_a_run_is_no_difference(tmp_path: Path) -> None:
    made = [
        load(runfiles.make_run(tmp_path / name, workers=1, steps=1, config=Config(out=name).to_toml()))
        for name in ("a", "b")
    ]
    assert not any(differs for *_, differs in settings(made))
    assert ("run.out", ["a", "b"], False) in settings(made)


def test_a_setting_that_one_run_lacks_is_a_difference(runs: list[Run], tmp_path: Path) -> None:
    adaptive = load(runfiles.make_run(tmp_path / "c", workers=4, config=Config(seconds=60.0, patience=0.85).to_toml()))
    assert ("run.patience", ["–", "0.85"], True) in settings([runs[0], adaptive])


def test_the_phases_of_a_micro_cloud_are_settings(tmp_path: Path) -> None:
    environment = {
        "name": "mine",
        "phases": [{"cores": [24.0, 4.0], "uplink_mbit": None}, {"link_mbit": [[0, 1], [2, 0]]}],
    }
    run = load(runfiles.make_run(tmp_path / "a", workers=2, steps=1, environment=json.dumps(environment)))
    rows = {name: values[0] for name, values, _ in settings([run])}
    assert rows["micro-cloud: name"] == "mine"
    assert rows["micro-cloud, phase 1: cores"] == "24, 4"
    assert rows["micro-cloud, phase 2: link_mbit"] == "0, 1; 2, 0"
    assert "micro-cloud, phase 1: uplink_mbit" not in rows


@pytest.mark.parametrize(("attribute", "how"), [("environment", "simulated"), ("emulated", "emulated")])
def test_where_a_micro_cloud_was_played(tmp_path: Path, attribute: str, how: str) -> None:
    attributes: dict[str, Any] = {attribute: '{"name": "homo-b"}'}
    run = load(runfiles.make_run(tmp_path / "a", workers=2, steps=1, **attributes))
    assert summary(run, workers.links_of(run), run.metrics)["where"] == f"homo-b, {how}"
    assert ("micro-cloud: name", ["homo-b"], False) in settings([run])


def test_the_summary(runs: list[Run]) -> None:
    row = summary(runs[1], workers.links_of(runs[1]), runs[1].metrics)
    assert row["strategy"] == "baseline"
    assert row["steps"] == "20"
    assert row["time (s)"] == "30.0"
    assert row["waiting (%)"] == "25.0"
    assert row["sent (MB)"] == "0.2"
    assert row["samples/s"] == f"{20 * (32 + 16 + 10) / 30:.0f}"
    assert row["ended"] == "yes"


def test_a_run_that_has_just_begun_has_a_summary(tmp_path: Path) -> None:
    run = load(runfiles.make_run(tmp_path / "a", steps=0))
    row = summary(run, workers.links_of(run), run.metrics)
    assert (row["accuracy ± std (%)"], row["loss"], row["samples/s"]) == ("–", "–", "–")


# ---- the page as such


def test_nothing_of_a_run_is_markup(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    config = f"[run]\nstrategy = '{evil}'\nextra = '{evil}'\n"
    folders = [
        runfiles.make_run(tmp_path / name, config=config, host=evil, versions=json.dumps({evil: evil}))
        for name in ("<b>a", "<b>b")
    ]
    (folders[0] / "metrics-00001.h5").unlink()
    page = report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "<b>a" not in page
    assert data_of(page)["runs"][0]["label"] == "<b>a"


def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = report([runfiles.make_run(tmp_path / "a")], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href|action)\s*=\s*["']?(https?:)?//""", page)
    assert not re.search(r"@import|url\(\s*['\"]?http", page)


def test_the_library_is_the_published_one() -> None:
    library = resources.files("dlion_mpi.report").joinpath("assets", "echarts.min.js").read_bytes()
    assert hashlib.sha256(library).hexdigest() == "b66b25aeb4df84e33199dc21694014d336d222cbd9deb0e5a7c14bd6aa0d0fd0"
    for notice in ("echarts-LICENSE", "echarts-LICENSE-d3", "echarts-NOTICE"):
        assert resources.files("dlion_mpi.report").joinpath("assets", notice).is_file()


# ---- colours

# Linear RGB as seen with a kind of cones missing (Machado, Oliveira and Fernandes 2009, severity 1).
SIGHT = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Oklab (Ottosson 2020): linear RGB to cones, their cube roots to lightness and two colour axes.
TO_CONES = [
    [0.41222147, 0.53633254, 0.05144599],
    [0.21190350, 0.68069954, 0.10739696],
    [0.08830246, 0.28171884, 0.6299787],
]
TO_LAB = [
    [0.21045426, 0.79361778, -0.00407205],
    [1.97799850, -2.42859221, 0.45059371],
    [0.02590404, 0.78277177, -0.80867577],
]


def linear(colour: str) -> Any:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("palette", [colours.LIGHT, colours.DARK])
def test_colours_stay_apart_for_everyone(palette: tuple[str, ...], sight: str) -> None:
    seen = [np.clip(np.array(SIGHT[sight]) @ linear(colour), 0, 1) for colour in palette]
    places = [np.array(TO_LAB) @ np.cbrt(np.array(TO_CONES) @ colour) for colour in seen]
    distances = [np.linalg.norm(a - b) for n, a in enumerate(places) for b in places[:n]]
    assert min(distances) > 0.1


@pytest.mark.parametrize(("palette", "page"), [(colours.LIGHT, "#ffffff"), (colours.DARK, "#16181d")])
def test_colours_stand_out_from_the_page(palette: tuple[str, ...], page: str) -> None:
    css = resources.files("dlion_mpi.report").joinpath("assets", "page.css").read_text(encoding="utf-8")
    assert f"--ground: {page}" in css
    luminance = {colour: float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (*palette, page)}
    for colour in palette:
        low, high = sorted((luminance[colour], luminance[page]))
        assert (high + 0.05) / (low + 0.05) >= 2.99, colour
