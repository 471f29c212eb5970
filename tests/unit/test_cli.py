"""What a user sees: mistakes in one line before MPI and TensorFlow start, help at once, progress and summary."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dlion_mpi import __version__
from dlion_mpi.api import fit
from dlion_mpi.cli import main
from dlion_mpi.config.fields import declared, flag
from dlion_mpi.config.options import FIELDS, Config
from dlion_mpi.config.renamed import FIXED, RENAMED
from dlion_mpi.errors import UserError
from dlion_mpi.metrics.gauges import Totals
from dlion_mpi.metrics.records import StepRecord
from dlion_mpi.strategies.given import config_of
from dlion_mpi.strategies.registry import STRATEGIES
from dlion_mpi.view import live
from dlion_mpi.view.lines import summary

Captured = pytest.CaptureFixture[str]


class Started(Exception):
    """A run was about to start MPI."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """In place of runs: the Configs that would have been run."""
    configs: list[Config] = []

    def run(config: Config, **options: Any) -> Any:
        configs.append(config)
        raise UserError("stands in for the run", quiet=True)

    stand_in = ModuleType("dlion_mpi.run")
    stand_in.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dlion_mpi.run", stand_in)
    return configs


def refused(capsys: Captured, *argv: str) -> str:
    """The one line on stderr of a mistake; everything else about it is checked here."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("dlion: error: ")
    assert "Traceback" not in err
    return lines[0]


MISTAKES: list[tuple[list[str], str]] = [
    (["--strategy", "hope"], "--strategy hope: unknown; known are dlion, baseline"),
    (["--sync", "sometimes"], "--sync sometimes: must be one of sync, bounded, async"),
    (["--strategy", "baseline", "--sync", "async"], "baseline does not support --sync async: it supports sync"),
    (["--strategy", "baseline", "--backup", "1"], "--backup is not used by --strategy baseline"),
    (
        ["--strategy", "baseline", "--dlion.unsent", "drop"],
        "--dlion.unsent belongs to --strategy dlion, not to --strategy baseline: drop it",
    ),
    (["--gaia.threshold", "0.2"], "--gaia.threshold belongs to --strategy gaia, not to --strategy dlion: drop it"),
    (
        ["--sync", "async", "--staleness", "3"],
        "--staleness has no effect with --sync async: drop it, or choose another --sync",
    ),
    (["--dlion.max-n", "0"], "--dlion.max-n 0: must be in (0, 100]"),
    (["--dlion.max-n", "100.5"], "--dlion.max-n 100.5: must be in (0, 100]"),
    (["--dlion.max-n", "-3"], "--dlion.max-n -3: must be in (0, 100]"),
    (["--dlion.link-share", "nan"], "--dlion.link-share nan: must be a share in (0, 1]"),
    (
        ["--dlion.max-n", "10", "--dlion.link-share", "1"],
        "--dlion.link-share has no effect with --dlion.max-n 10.0: drop one of them",
    ),
    (["--strategy", "gaia", "--gaia.threshold", "lots"], "--gaia.threshold lots: must be a number"),
    (["--gaia.thresold", "1"], "unrecognized arguments: --gaia.thresold 1"),
    (["--gaia.threshold"], "argument --gaia.threshold: expected one argument"),
    (["--optimizer", "adam", "--momentum", "0.9"], "--momentum has no effect with --optimizer adam"),
    (["--transfer", "none", "--transfer-period", "5"], "--transfer-period has no effect with --transfer none"),
    (["--batch-size", "64", "--batch-size-max", "32"], "--batch-size-max 32 is below --batch-size 64"),
    (["--steps", "many"], "--steps many: must be a whole number"),
    (["--steps", "1.5"], "--steps 1.5: must be a whole number"),
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["--steps", "-5"], "--steps -5: must be at least 1"),
    (["--seconds", "soon"], "--seconds soon: must be a number"),
    (["--seconds", "inf"], "--seconds inf: must be above 0"),
    (["--learning-rate", "-0.1"], "--learning-rate -0.1: must be above 0"),
    (["--learning-rate", "0,1"], "--learning-rate 0,1: must be a number"),
    (["--momentum", "1"], "--momentum 1: must be in [0, 1)"),
    (["--target-accuracy", "0.8"], "--target-accuracy is now --target 'accuracy>=VALUE'"),
    (["--target", "accuracy>=82"], "--target: accuracy>=82: an accuracy is a share of the samples, from 0 to 1"),
    (["--target", "0.8"], "--target: '0.8' is not a metric and a bound such as"),
    (["--best", "auc"], "--best belongs to --save-model: give that too"),
    (["--batch-size", "0"], "--batch-size 0: must be at least 1 sample"),
    (["--seed", "-1"], "--seed -1: must be in 0..4294967295"),
    (["--transfer-merge", "1.5"], "--transfer-merge 1.5: must be in [0, 1]"),
    (["--value-type", "float64"], "--value-type float64: must be one of float32, float16, bfloat16"),
    (["--evaluate-every", "often"], "--evaluate-every: 'often' is not a number of steps such as 100"),
    (["--out", "run\udcff"], "must be UTF-8"),
    (["--steps"], "argument --steps: expected one argument"),
    (["--no-such-option", "1"], "unrecognized arguments: --no-such-option 1"),
    (["stray"], "unrecognized arguments: stray"),
]


@pytest.mark.parametrize(("options", "said"), MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: Captured, runs: list[Config], options: list[str], said: str
) -> None:
    assert said in refused(capsys, "train", *options)
    assert runs == [], "refused only after MPI was started"


BAD_FILES = {
    "[run]\nstep = 5\n": "unknown key 'step' in [run]; known there: ",
    "[exchange]\nsize = 5\n": "unknown key 'size' in [exchange]; known there: ",
    "[gaia]\nsize = 5\n": "unknown key 'size' in [gaia]; known there: threshold, barrier",
    "[runs]\nsteps = 5\n": "unknown key 'steps' in [runs]; tables are run, ",
    "steps = 5\n": "'steps' stands outside a table",
    "[run\nsteps = 5\n": "not valid TOML: ",
    "[run]\nsteps = 'many'\n": "--steps many: must be a whole number",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_mistake_in_the_file_names_file_and_key(
    capsys: Captured, runs: list[Config], tmp_path: Path, text: str
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    line = refused(capsys, "train", "--config", str(path))
    assert f"--config {path}: {BAD_FILES[text]}" in line
    assert runs == []


def test_a_value_of_the_file_is_checked_as_one_of_the_command_line(
    capsys: Captured, runs: list[Config], tmp_path: Path
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[dlion]\nmax_n = 101\n")
    assert "--dlion.max-n 101: must be in (0, 100]" in refused(capsys, "train", "--config", str(path))


def test_a_file_that_is_missing_is_named(capsys: Captured, runs: list[Config], tmp_path: Path) -> None:
    path = tmp_path / "missing.toml"
    assert f"--config {path}: cannot be read (No such file or directory)" in refused(
        capsys, "train", "--config", str(path)
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "required: COMMAND (see dlion --help)"),
        (["trian"], "invalid choice: 'trian'"),
        (["data"], "required: ACTION (see dlion data --help)"),
        (["data", "split", "digits"], "required: --ranks, --out"),
        (["data", "split", "digits", "--ranks", "two", "--out", "s-{rank}.h5"], "--ranks two: must be a whole number"),
        (["data", "info", "digits", "--seed", "x"], "--seed x: must be a whole number"),
        (["data", "info", "digits", "--dirichlet-alpha", "x"], "--dirichlet-alpha x: must be a number"),
    ],
)
def test_a_mistake_in_the_command_itself(capsys: Captured, argv: list[str], said: str) -> None:
    assert said in refused(capsys, *argv)


# ---- what is run


def test_the_command_line_comes_before_the_file_and_the_file_before_the_default(
    runs: list[Config], tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[run]\nsteps = 5\nseed = 6\n[dlion]\nmax-n = 3\n")
    main(["train", "--config", str(path), "--seed", "7"])
    assert runs == [Config.of({"steps": 5, "seed": 7, "dlion.max_n": 3.0})]


OWN = {f"{cls.name}.{f.name}": f for cls in STRATEGIES.values() for f in declared(cls.Options)}
OPTIONS = FIELDS | OWN


HALVES = {"streaming-diloco.alpha": "0.5", "streaming-diloco.outer_momentum": "0.5"}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_field_is_an_option(runs: list[Config], name: str) -> None:
    examples = {"evaluate_every": "7s", "out": "runs/a", "model": "nets:build", "data": "digits", "strategy": "dlion"}
    examples |= {"save_model": "a.keras", "preset": "paper"}
    choices = OPTIONS[name].metadata["choices"]
    text = choices[-1] if choices else examples.get(name, "1")
    texts = {"batch_size_max": "64", "sync": "bounded", "momentum": "0.5", "target": "mae<=3"}
    texts |= {"time_limit": "9s", "stall_limit": "9s"}
    text = (texts | {"diloco.outer_momentum": "0.5", "dgc.momentum": "0.5"} | HALVES).get(name, text)
    owner = next((s.name for s in STRATEGIES.values() if name in s.uses), "dlion")
    if name in OWN:
        owner = name.partition(".")[0]
    chosen = {} if name == "strategy" else {"strategy": owner}
    if name in ("checkpoint_every", "keep_checkpoints", "time_limit"):
        chosen |= {"out": "runs/a", "checkpoint_every": "9"}
    if name in ("save_model_of", "best"):
        chosen["save_model"] = "a.keras"
    if name == "dirichlet_alpha":
        chosen["partition"] = "dirichlet"
    chosen.pop(name, None)
    main(["train", flag(name), text, *(word for option, value in chosen.items() for word in (flag(option), value))])
    assert runs == [config_of({name: text, **chosen})]
    assert str(runs[0].values()[name]).removesuffix(".0") == text


def test_without_options_it_is_the_default(runs: list[Config]) -> None:
    main(["train"])
    assert runs == [Config()]


def test_an_exception_is_a_failure_with_its_traceback(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("dlion_mpi.run")

    def run(config: Config, **options: Any) -> Any:
        raise Started

    stand_in.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dlion_mpi.run", stand_in)
    assert main(["train"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_another_rank_says_is_not_said_again(capsys: Captured, runs: list[Config]) -> None:
    assert main(["train"]) == 2  # the stand-in is quiet
    assert capsys.readouterr() == ("", "")


# ---- help


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"dlion-mpi {__version__}\n"


def help_of(capsys: Captured, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "simulate"])
def test_help_shows_twenty_options_and_names_the_way_to_all(capsys: Captured, command: str) -> None:
    text = help_of(capsys, command, "--help")
    shown = re.findall(r"^  (?:-h, )?(--[a-z.-]+)", text, re.M)
    assert 10 < len(shown) <= 20
    assert {"--strategy", "--steps", "--data", "--model", "--batch-size", "--out"} <= set(shown)
    assert text.strip().splitlines()[-1] == f"More options: dlion {command} --help-all"


def test_help_all_has_every_option_with_the_default_that_holds(capsys: Captured) -> None:
    text = " ".join(help_of(capsys, "train", "--help-all").split())
    for name in OPTIONS:
        assert f" {flag(name)} " in text
    assert "--strategy gaia: --gaia.threshold THRESHOLD" in text, "each strategy's own in a group"
    assert "(default: accumulate)" in text
    assert "(default: 0.15)" in text  # not the None that waits for the strategy's
    assert "(default: 20s)" in text
    assert "None" not in text
    assert "%%" not in text


@pytest.mark.parametrize("name", [*RENAMED, *FIXED])
def test_an_option_that_was_is_refused_with_what_there_is_now(
    capsys: Captured, runs: list[Config], tmp_path: Path, name: str
) -> None:
    said = refused(capsys, "train", flag(name), "5")
    assert flag(name) in said
    assert (RENAMED.get(name) or FIXED[name]) in said
    path = tmp_path / "old.toml"
    path.write_text(f"[exchange]\n{name} = 5\n")
    assert said.removeprefix("dlion: error: ") in refused(capsys, "train", "--config", str(path))
    options: Any = {name: 5}
    with pytest.raises(UserError, match=re.escape(said.removeprefix("dlion: error: "))):
        fit(None, ((), ()), ((), ()), **options)
    assert runs == []


HEAVY = ("tensorflow", "keras", "mpi4py", "sklearn", "h5py")


@pytest.mark.parametrize(
    "argv", [["--help"], ["train", "--help"], ["data", "--help"], ["emulate", "--help"], ["--version"]]
)
def test_help_loads_nothing_heavy(argv: list[str]) -> None:
    code = f"""
import json, sys
from dlion_mpi.cli import main
try:
    main({argv!r})
except SystemExit as ended:
    assert ended.code == 0
print(json.dumps(sorted(name for name in {HEAVY!r} if name in sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_module_is_the_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dlion_mpi", "train", "--strategy", "hope"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 2
    known = f"{', '.join(STRATEGIES)}, or PACKAGE.MODULE:CLASS"
    assert done.stderr == f"dlion: error: --strategy hope: unknown; known are {known}\n"
    assert done.stdout == ""


# ---- progress and summary


def record(step: int, time_s: float, **more: Any) -> StepRecord:
    zero: dict[str, Any] = dict.fromkeys(("compute_s", "paced_s", "select_encode_s", "wait_s", "apply_s"), 0.0)
    return StepRecord(step=step, time_s=time_s, loss=0.51234, lbs=32, gbs=96, step_s=1.0, **zero, **more)


@pytest.fixture
def report_every(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The lines that a reporter prints for twelve steps of a second each."""

    def report(capsys: Captured, every_s: float, accuracy: float | None = None) -> list[str]:
        test = {} if accuracy is None else {"accuracy": accuracy}
        now_s = [0.0]
        monkeypatch.setattr(live.time, "monotonic", lambda: now_s[0])
        reporter = live.Reporter(2, 3, every_s, ["accuracy"], lambda: test, live.print_line)
        for step in range(12):
            now_s[0] += 1.0
            links = {"quality": {0: 12.34} if step < 3 else {}, "bytes_sent": {0: step * 10**6, 1: 0}}
            reporter(record(step, float(step + 1), **links))
        return capsys.readouterr().err.splitlines()

    return report


def test_progress_is_one_line_now_and_then(report_every: Callable[..., list[str]], capsys: Captured) -> None:
    assert report_every(capsys, 5.0) == [
        "[2]    5.0 s  step 5  batch 32/96  loss 0.512  32 samples/s  ->0 N 12.3 4.0 MB  ->1 N 0.0 0.0 MB",
        "[2]   10.0 s  step 10  batch 32/96  loss 0.512  32 samples/s  ->0 N 12.3 9.0 MB  ->1 N 0.0 0.0 MB",
    ]


def test_progress_knows_the_latest_test_accuracy(report_every: Callable[..., list[str]], capsys: Captured) -> None:
    assert all("  accuracy 82.3%" in line for line in report_every(capsys, 5.0, 0.823))


def test_no_progress_when_it_is_not_wanted(report_every: Callable[..., list[str]], capsys: Captured) -> None:
    assert report_every(capsys, 0.0) == []


def test_the_summary_has_a_row_per_rank_and_how_it_ended() -> None:
    result = {
        "accuracy_mean": 0.8,
        "accuracy_std": 0.01,
        "val_loss_mean": 0.7,
        "val_loss_std": 0.1,
        "strategy": "dlion",
        "ranks": 2,
        "seconds": 50.0,
        "stopped": None,
        "out": None,
    }
    totals = Totals()
    for step in range(100):
        totals.add(
            StepRecord(
                step=step,
                time_s=0.5 * step,
                compute_s=0.25,
                paced_s=0.0,
                select_encode_s=0.05,
                wait_s=0.1,
                apply_s=0.025,
                step_s=0.5,
                loss=9.0 if step < 90 else 0.5,
                lbs=50,
                gbs=100,
                bytes_sent={1: 32_100 * (step + 1)},
            )
        )
    rows = [totals.row(50.0, {"val_loss": 0.612345, "accuracy": 0.81})] * 2
    metrics = ["val_loss", "accuracy"]
    lines = summary(result, rows, metrics).splitlines()
    assert re.split("  +", lines[1]) == [
        *("rank", "steps", "accuracy", "loss", "samples/s", "compute", "select", "waiting", "apply", "sent", "val_loss")
    ]
    expected = ["0", "100", "81.00%", "0.500", "100", "50.0%", "10.0%", "20.0%", "5.0%", "3.2", "MB", "0.6123"]
    assert lines[2].split() == expected
    assert lines[3].split()[0] == "1"
    assert lines[4:] == ["dlion, 2 ranks, 50.0 s: test accuracy 80.00%, standard deviation between ranks 1.00%"]
    text = summary(result | {"stopped": "SIGTERM", "out": "runs/a"}, rows, metrics)
    assert text.endswith("\nstopped early: SIGTERM\nmetrics: runs/a")
