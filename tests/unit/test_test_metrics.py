"""Test metrics of any name, from the evaluation to files, tables, pages and the JSON result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dlion_mpi.checkpoint import snapshot
from dlion_mpi.config.options import Config
from dlion_mpi.config.target import Target
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.evaluate import differing_tests, digest_of_tests
from dlion_mpi.learner.given import shard_of_fit
from dlion_mpi.learner.shards import Shard
from dlion_mpi.metrics.gauges import Totals, summary_gauges, summary_names
from dlion_mpi.metrics.reader import Run, load
from dlion_mpi.metrics.recorder import Recorder
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.metrics.series import curve
from dlion_mpi.metrics.targets import reached_s
from dlion_mpi.report import comparison, report, workers
from dlion_mpi.report.settings import summary
from dlion_mpi.report.tests import metrics_of
from dlion_mpi.result import Finish, sum_up
from dlion_mpi.trace.events import Window
from dlion_mpi.trace.run import write
from dlion_mpi.vector.named_arrays import part, under
from dlion_mpi.view.from_files import snapshot as snapshot_of
from dlion_mpi.view.lines import progress_line
from dlion_mpi.view.render import render

METRICS = ('top "5" <b>/%', "val_loss", "loss", "Größe", "quality")
"""Awkward names, and names of other measures."""


def values(rank: int, n: int) -> dict[str, float]:
    """Of the nth test of a rank; every metric of every rank has other values."""
    return {name: 8.0 * (k + 1) + 2.0 * rank - 0.25 * n for k, name in enumerate(METRICS)}


def write_run(folder: Path, ranks: int = 2, tests: int = 5, **more: Any) -> Path:
    folder.mkdir()
    for rank in range(ranks):
        recorder = Recorder(folder, rank, ranks, {"config": Config(steps=5).to_toml()}, metrics=METRICS, **more)
        for n in range(tests):
            recorder.evaluation(Evaluation(10 * n, float(n), values(rank, n)))
        recorder.close(complete=True)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(write_run(tmp_path_factory.mktemp("one") / "run"))


def test_each_has_a_data_set(tmp_path: Path) -> None:
    with h5py.File(write_run(tmp_path / "run") / "metrics-00001.h5") as file:
        names = {'top "5" <b>%2F%25', "val_loss", "loss", "Größe", "quality"}
        assert set(file["evaluations"]) == {"step", "time_s"} | names
        assert all(file[f"evaluations/{name}"].dtype == np.float32 for name in names)
        assert file["evaluations/Größe"][:].tolist() == [34 - 0.25 * n for n in range(5)]


def test_each_is_read_by_its_name(run: Run) -> None:
    for rank in run.ranks:
        assert set(rank.metrics) == set(METRICS)
        for name in METRICS:
            assert rank.evaluations[name].tolist() == [values(rank.rank, n)[name] for n in range(5)]
    assert run.metrics[0] == "val_loss"
    assert set(run.metrics) == set(METRICS)
    assert not run.notes


def test_a_file_of_an_earlier_version_has_accuracy(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, 1, {"config": "[run]\ntarget_accuracy = 0.75\n"})
    recorder.close(complete=True)
    with h5py.File(recorder.path, "r+") as file:
        del file["evaluations"]
        for name, column in {"step": [1, 2], "time_s": [1.0, 2.0], "accuracy": [0.5, 0.8]}.items():
            file[f"evaluations/{name}"] = column
    run = load(tmp_path)
    assert run.metrics == ["accuracy"]
    assert run.target == Target("accuracy", ">=", 0.75)
    assert curve(run, "accuracy").reached_s(run.target) == 2.0
    report([tmp_path], tmp_path / "page.html")


def test_what_is_no_column_is_no_metric(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with h5py.File(folder / "metrics-00000.h5", "r+") as file:
        file["evaluations/table"] = np.zeros((5, 2))
        file["evaluations/text"] = "no number"
        file.create_group("evaluations/group")
    assert set(load(folder).ranks[0].metrics) == set(METRICS)


def test_a_metric_of_one_part_only_is_nan_in_the_other(tmp_path: Path) -> None:
    for number, name in enumerate(("mae", "auc")):
        about = {"resumed": json.dumps({"steps": [1], "time_s": 9.0})} if number else {}
        recorder = Recorder(tmp_path, 0, 1, about, number, metrics=["val_loss", name])
        recorder.evaluation(Evaluation(1, 1.0 + number, {"val_loss": 3.0 - number, name: 7.0 + number}))
        recorder.close(complete=True)
    columns = load(tmp_path).ranks[0].evaluations
    assert columns["val_loss"].tolist() == [3.0, 2.0]
    np.testing.assert_array_equal(columns["mae"], [7.0, np.nan])
    np.testing.assert_array_equal(columns["auc"], [np.nan, 8.0])


# ---- reports and views


def test_each_has_a_curve_that_is_the_mean_of_the_workers(run: Run) -> None:
    figures = {figure["title"]: figure for figure in comparison.figures([run], ["a"], None)}
    for name in METRICS:
        line = figures[f"Test {name} over time"]["panels"][0]["series"][0]
        for row, expected in ((0, 0), (-1, 4)):
            pair = [values(rank, expected)[name] for rank in range(2)]
            assert (line["y"][row], line["low"][row], line["high"][row]) == (sum(pair) / 2, min(pair), max(pair))
    own = {figure["title"]: figure for figure in workers.figures(run)}
    for name in METRICS:
        lines = own[f"Test {name} of each worker"]["panels"][0]["series"]
        assert [line["y"][-1] for line in lines] == [values(rank, 4)[name] for rank in range(2)]
    keys = [figure["key"] for figure in workers.figures(run)]
    assert len(set(keys)) == len(keys)


def test_the_table_has_them_and_the_worst_is_the_one_with_the_greatest_loss(run: Run) -> None:
    row = summary(run, workers.links_of(run), run.metrics)
    assert row["val_loss ± std"] == "16 ± 1"
    assert row["worst to best"] == "17 to 15"
    assert row["Größe ± std"] == "32 ± 1"


def test_the_time_to_a_loss_is_the_first_below_it(tmp_path: Path) -> None:
    runs = [load(write_run(tmp_path / name, tests=tests)) for name, tests in (("a", 5), ("b", 3))]
    figure = next(
        f for f in comparison.figures(runs, ["a", "b"], Target("val_loss", "<=", 16.5)) if f["key"] == "target"
    )
    assert (figure["targets"][figure["chosen"]], figure["sign"], figure["unit"]) == (16.5, "<=", "")
    assert [row[figure["chosen"]] for row in figure["reached"]] == [2.0, 2.0]
    assert figure["targets"] == sorted(figure["targets"], reverse=True)
    for row in figure["reached"]:  # harder targets take longer
        reached = [time for time in row if time is not None]
        assert reached == sorted(reached)
        assert row[: len(reached)] == reached
    assert figure["reached"][0][-1] is not None
    assert figure["reached"][1][-1] is None


def test_the_default_target_is_what_the_worse_of_two_runs_reached(tmp_path: Path) -> None:
    runs = [load(write_run(tmp_path / name, tests=tests)) for name, tests in (("a", 5), ("b", 3))]
    figure = next(f for f in comparison.figures(runs, ["a", "b"], None) if f["key"] == "target")
    assert (figure["metric"], figure["sign"]) == ("val_loss", "<=")
    assert figure["targets"][figure["chosen"]] == 17  # 16.5, rounded to two digits that both reached
    assert None not in [row[figure["chosen"]] for row in figure["reached"]]


def test_runs_with_different_metrics_are_compared_by_those_that_both_have(tmp_path: Path, run: Run) -> None:
    recorder = Recorder(tmp_path, 0, 1, {}, metrics=["accuracy", "val_loss"])
    recorder.evaluation(Evaluation(1, 1.0, {"accuracy": 0.5, "val_loss": 17.0}))
    recorder.close(complete=True)
    both = [run, load(tmp_path)]
    assert metrics_of(both)[0] == "accuracy"
    figures = {figure["key"]: figure for figure in comparison.figures(both, ["a", "b"], None)}
    assert figures["target"]["metric"] == "val_loss"
    assert [line["name"] for line in figures["test-accuracy"]["panels"][0]["series"]] == ["b"]
    rows = [summary(one, workers.links_of(one), metrics_of(both)) for one in both]
    assert [row["accuracy ± std (%)"] for row in rows] == ["–", "50.00 ± 0.00"]
    assert list(rows[0]) == list(rows[1])


def test_the_page_is_valid_and_its_names_are_no_markup(run: Run, tmp_path: Path) -> None:
    page = report([run.path], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>/%" not in page


def test_the_view_has_the_main_one_first_and_the_others_last(run: Run) -> None:
    shown = snapshot_of(run)
    head, first = render(shown, 200, 30, colour=False).splitlines()[2:4]
    assert head.split()[:3] == ["rank", "steps", "val_loss"]
    assert first.split()[2] == "15"
    assert "Größe" in head
    assert "  val_loss 15  " not in progress_line(shown.ranks[0])
    assert progress_line(shown.ranks[1]).endswith("val_loss 17")


def test_a_trace_is_json_whatever_the_names(run: Run, tmp_path: Path) -> None:
    with open(tmp_path / "trace.json", "wb") as file:
        write(run, Window(), file)
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    tests = [event["args"] for event in events if event.get("name") == "evaluate" and event["pid"] == 2]
    assert {name: tests[1][name] for name in METRICS} == values(1, 1)


def test_tables_have_a_column_for_each(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    import analysis

    other = tmp_path / "other"
    other.mkdir()
    recorder = Recorder(other, 0, 1, {}, metrics=["auc"])
    recorder.evaluation(Evaluation(3, 1.0, {"auc": 0.75}))
    recorder.close(complete=True)
    table = analysis.evaluations([run, load(other)])
    assert table["Größe"].tolist()[:10] == [values(rank, n)["Größe"] for rank in range(2) for n in range(5)]
    assert math.isnan(table["Größe"].iloc[-1])
    assert table["auc"].iloc[-1] == 0.75
    assert table["auc"].isna().sum() == 10


# ---- the result


def finish(rank: int, **changes: float) -> Finish:
    metrics = values(rank, 4) | changes
    row = Totals().row(1.0, metrics, step=5, bytes_sent=0)
    return Finish(row=row, evaluations=[Evaluation(5, 1.0, metrics)], stop_reason=None, exit_code=0)


def test_the_json_result_has_mean_spread_and_each_rank() -> None:
    found = sum_up(Config(), [finish(0), finish(1), finish(2)], report=False).summary
    for name in METRICS:
        expected = [values(rank, 4)[name] for rank in range(3)]
        assert found[f"{name}_per_rank"] == expected
        assert found[f"{name}_mean"] == pytest.approx(np.mean(expected))
        assert found[f"{name}_std"] == pytest.approx(np.std(expected), rel=1e-6)
    assert found["loss"] is None  # of training, which had no step


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_json_result_is_valid_if_a_loss_is_not_finite(value: float) -> None:
    finishes = [Finish.from_text(finish(0, val_loss=value).to_text()), finish(1)]
    found = sum_up(Config(target=Target("val_loss", ">=", 1.0)), finishes, report=True).summary
    assert json.loads(json.dumps(found, allow_nan=False))["val_loss_per_rank"] == [None, 16.0 + 1.0]
    assert (found["val_loss_mean"], found["val_loss_std"]) == (None, None)


def test_small_and_large_values_keep_their_digits() -> None:
    found = sum_up(Config(), [finish(0, val_loss=1.25e-9, Größe=1234567.0)], report=False).summary
    assert (found["val_loss_mean"], found["Größe_mean"]) == (1.25e-9, 1234567.0)


def test_a_run_without_tests_has_no_keys_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    row = Totals().row(1.0, {}, step=5, bytes_sent=0)
    finishes = [Finish(row=row, evaluations=[], stop_reason=None, exit_code=0)] * 2
    found = sum_up(Config(), finishes, report=True).summary
    assert not [key for key in found if key.endswith(("_mean", "_std", "_per_rank"))]
    assert found["target_reached_s"] is None
    said = capsys.readouterr().err
    assert "no validation data" in said
    assert "accuracy" not in said


def test_a_run_without_tests_is_shown(tmp_path: Path) -> None:
    Recorder(tmp_path, 0, 1, {}).close(complete=True)
    run = load(tmp_path)
    assert run.metrics == []
    assert [figure["key"] for figure in comparison.figures([run, run], ["a", "b"], None)] == ["loss", "parts-of-runs"]
    report([tmp_path, write_run(tmp_path / "other")], tmp_path / "page.html")


def test_the_summary_has_columns_for_all() -> None:
    heads = [gauge.head for gauge in summary_gauges(METRICS)]
    assert heads[:2] == ["steps", "val_loss"]
    assert set(METRICS) <= set(heads)
    row = dict(zip(summary_names(METRICS), Totals().row(1.0, values(1, 0), step=5), strict=True))
    assert row["test/loss"] == 26
    assert math.isnan(row["loss"])


# ---- checkpoints


def test_a_checkpoint_keeps_all_evaluations() -> None:
    before = [Evaluation(10 * n, 0.1 + n, values(1, n)) for n in range(3)]
    saved = under("evaluations", snapshot._tests(before))
    assert list(snapshot.evaluations_of(saved)) == before
    assert all("/" not in name for name in part(saved, "evaluations/metrics"))
    assert list(snapshot.evaluations_of(under("evaluations", snapshot._tests([])))) == []


def test_a_checkpoint_of_unlike_evaluations_has_the_latest_metrics() -> None:
    mixed = [Evaluation(1, 1.0, {"mae": 1.0}), Evaluation(2, 2.0, {"val_loss": 0.5})]
    found = list(snapshot.evaluations_of(under("evaluations", snapshot._tests(mixed))))
    assert math.isnan(found[0].metrics["val_loss"])
    assert reached_s([found], Target("val_loss", "<=", 0.5)) == 2.0


# ---- test sets that differ between ranks


def shard(seed: int, rows: int = 1000) -> Shard:
    x = np.random.default_rng(seed).random((rows, 3), np.float32)
    y = np.arange(rows) % 3
    return shard_of_fit((x, y), (x, y))


def test_different_test_sets_have_different_digests() -> None:
    digests = [digest_of_tests(shard(seed)) for seed in (1, 1, 2)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 2
    assert digest_of_tests(shard(1, 999)) not in digests
    assert differing_tests(digests).startswith("rank 2: another test set than rank 0's")
    assert differing_tests([digests[0], *digests[2:] * 3]).startswith("ranks 1 to 3:")
    assert differing_tests(digests[:2]) == ""


def test_equal_inputs_with_other_labels_are_another_test_set() -> None:
    x = np.zeros((300, 2), np.float32)
    first, second = (shard_of_fit((x, y), (x, y)) for y in (np.zeros(300, int), np.arange(300) % 2))
    assert digest_of_tests(first) != digest_of_tests(second)


def test_without_test_rows_there_is_nothing_to_compare() -> None:
    none = Shard(name="none", source="none", train=shard(1).train, test=None)
    assert digest_of_tests(none) == ""
    assert next(none.tests(10), None) is None
    assert differing_tests(["", "ab"]) == ""  # refused elsewhere, with a reason
    assert isinstance(none.example(), Batch)
