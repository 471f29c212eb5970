"""How a run begins, when it must end early, and how the parts of a resumed run are read as one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.checkpoint import folder
from dlion_mpi.checkpoint.preemption import Preemption
from dlion_mpi.checkpoint.start import NEW, Start, plan
from dlion_mpi.cli import main
from dlion_mpi.config.fields import Every
from dlion_mpi.errors import UserError
from dlion_mpi.metrics import reader as runs
from dlion_mpi.metrics.files import next_part
from dlion_mpi.metrics.recorder import Recorder
from tests import runfiles
from tests.unit.test_checkpoint_files import write_checkpoint

ON = {"checkpoint_every": "500"}


def run_of(path: Path, **options: Any) -> Path:
    """The folder of a run with one checkpoint."""
    config, _ = plan({"out": str(path), **ON, **options})
    path.mkdir()
    (path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    write_checkpoint(path, 500)
    return path


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("10m", 600), ("1.5h", 5400)])
def test_times_have_units(text: str, seconds: float) -> None:
    assert Every.parse(text) == Every(seconds=seconds)
    assert Every.parse(str(Every.parse(text))) == Every.parse(text)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"checkpoint_every": "10m"}, "--checkpoint-every needs --out"),
        ({"keep_checkpoints": "3"}, "--keep-checkpoints belongs to --checkpoint-every"),
        ({"time_limit": "1h"}, "--time-limit belongs to --checkpoint-every"),
        ({"out": "x", **ON, "time_limit": "100"}, "--time-limit 100: give a time"),
        ({"out": "x", **ON, "keep_checkpoints": "0"}, "--keep-checkpoints 0"),
        ({"save_model": "model.h5"}, "must end in .keras"),
        ({"save_model_of": "mean"}, "--save-model-of belongs to --save-model"),
        ({"requeue": True}, "--requeue needs --out and --checkpoint-every"),
        ({"requeue": True, "resume": "runs/a"}, "exclude each other"),
        ({"resume_earlier": True}, "--resume-earlier needs --resume or --requeue"),
        ({"resume": "/nowhere"}, "--resume /nowhere: holds no run"),
    ],
)
def test_mistakes_are_refused(options: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError, match=names):
        plan(options)


def test_a_run_without_a_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    path = run_of(tmp_path / "run")
    (folder.complete(path)[0] / "manifest.json").unlink()
    with pytest.raises(UserError, match="only an incomplete one"):
        plan({"resume": str(path)})


def test_a_resumed_run_has_its_own_options(tmp_path: Path) -> None:
    path = run_of(tmp_path / "run", strategy="ako", steps="700", seed="3")
    config, start = plan({"resume": str(path), "seed": "3", "learning_rate": "0.01"})
    assert (config.strategy, config.steps, config.seed, config.learning_rate) == ("ako", 700, 3, 0.01)
    assert start == Start(run=path)
    extended, _ = plan({"resume": str(path), "seconds": "60"})
    assert (extended.steps, extended.seconds) == (None, 60), "an end that is given replaces the one there was"
    for name, value in (("strategy", "gaia"), ("momentum", "0.9"), ("sync", "bounded"), ("out", "elsewhere")):
        with pytest.raises(UserError, match=f"--{name} {value}: the run in"):
            plan({"resume": str(path), name: value})


def test_a_requeued_job_starts_or_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    options = {"out": str(path), **ON, "requeue": True, "steps": "900"}
    assert plan(options)[1] == NEW
    path.mkdir()
    assert plan(options)[1] == Start(run=path, or_over=True), "killed before its first checkpoint: begin there again"
    path.rmdir()
    run_of(path, steps="900")
    config, start = plan(options)
    assert start == Start(run=path, or_over=True)
    assert (config.steps, config.out) == (900, str(path))


@pytest.mark.parametrize(
    "options",
    [["--resume", "x"], ["--requeue"], ["--resume-earlier"], ["--checkpoint-every", "5", "--out", "x"]],
)
def test_a_simulation_refuses_them(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--env", "homo-a", *options]) == 2
    assert f"{options[0]} belongs to dlion train" in capsys.readouterr().err


def test_a_signal_asks_for_room() -> None:
    preemption = Preemption(environ={})
    with preemption.listening():
        assert not preemption.look(1.0, 1.0)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.look(None, 0.0)
        assert preemption.reason == "SIGUSR1"


@pytest.mark.parametrize(
    ("checkpoint_s", "step_s", "margin_s"),
    [(None, 0.0, 60), (1.0, 0.0, 12), (40.0, 0.0, 90), (1.0, 30.0, 72)],
    ids=["not timed yet", "short", "long", "slow steps"],
)
def test_the_time_limit_leaves_room_for_a_checkpoint(
    checkpoint_s: float | None, step_s: float, margin_s: float
) -> None:
    now = [1000.0]
    for ends in ({"limit_s": 3600.0, "environ": {}}, {"environ": {"SLURM_JOB_END_TIME": "4600"}}):
        now[0] = 1000.0
        preemption = Preemption(**ends, now_s=lambda: now[0])
        now[0] = 4600 - margin_s - 1
        assert not preemption.look(checkpoint_s, step_s)
        now[0] = 4600 - margin_s
        assert preemption.look(checkpoint_s, step_s)
        assert preemption.reason == "time limit"


def resumed(path: Path, part: int, steps: list[int], time_s: float, *, workers: int, until: int) -> None:
    """Another part of a run: every rank from its step on."""
    about = {"resumed": json.dumps({"steps": steps, "time_s": time_s}), "config": "[run]\nsteps = 99\n"}
    for rank in range(workers):
        recorder = Recorder(path, rank, workers, about, part)
        for step in range(steps[min(rank, len(steps) - 1)] if steps else 0, until):
            recorder.step(runfiles.record(rank, workers, step))
        recorder.close(complete=True)


def test_the_parts_of_a_resumed_run_are_one(tmp_path: Path) -> None:
    """Killed at step 40, gone on from 31 and 30; then again, from an earlier checkpoint, at 25 and 24."""
    runfiles.make_run(tmp_path, workers=2, steps=40, ended=False)
    assert next_part(tmp_path) == 1
    resumed(tmp_path, 1, [31, 30], 16.0, workers=2, until=50)
    assert next_part(tmp_path) == 2
    for last in (None, 2):
        if last:
            resumed(tmp_path, 2, [25, 24], 12.5, workers=2, until=60)
        whole = runs.load(tmp_path)
        assert whole.ended
        assert not whole.notes
        assert whole.config["run.steps"] == 99
        for rank in whole.ranks:
            np.testing.assert_array_equal(rank.steps["step"], np.arange(60 if last else 50))
            links = rank.links()["bytes_sent"]
            np.testing.assert_array_equal(
                links[:, 1 - rank.rank], 1000 * np.arange(1, len(links) + 1) * (2 - rank.rank)
            )
            assert rank.evaluations["time_s"].max() <= (12.5 if last else 16.0)


def test_a_run_resumed_with_fewer_ranks_shows_those_that_were_there(tmp_path: Path) -> None:
    runfiles.make_run(tmp_path, workers=3, steps=40, ended=False)
    resumed(tmp_path, 1, [20, 20, 20], 30.0, workers=2, until=50)
    whole = runs.load(tmp_path)
    assert (whole.workers, whole.ended) == (3, True)
    assert [len(rank.steps["step"]) for rank in whole.ranks] == [50, 50, 20]
    assert whole.notes == ("rank 2: took part only until the run was resumed with fewer ranks",)
    links = whole.ranks[0].links()["quality"]
    assert links.shape == (50, 3)
    assert np.isnan(links[20:, 2]).all()


def test_a_run_that_began_again_shows_only_its_second_beginning(tmp_path: Path) -> None:
    runfiles.make_run(tmp_path, workers=2, steps=40, ended=False)
    resumed(tmp_path, 1, [], 0.0, workers=2, until=10)
    assert [len(rank.steps["step"]) for rank in runs.load(tmp_path).ranks] == [10, 10]
