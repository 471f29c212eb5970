"""`dlion train` with checkpoints as a user and a batch system start it: resume, preemption, damage, a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.checkpoint import folder
from dlion_mpi.metrics import reader as runs
from tests.system.launch import Ended, complaints, end, run, start

pytestmark = pytest.mark.timeout(240)
SMALL = ("--data", "digits", "--model", "tests.nets:normalised", "--progress-every", "0")
SYNC = ("--strategy", "dlion", "--sync", "sync", "--batching", "fixed", "--dlion.max-n", "20", "--momentum", "0.9")


def result_of(ended: Ended) -> dict[str, object]:
    return json.loads(ended.out.splitlines()[-1])


def wait_for(ready: Callable[[], bool], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def preempted(process: subprocess.Popen[str], out: Path) -> Ended:
    """Wait for its first checkpoint, then do what Slurm's --signal=USR1 does."""
    wait_for(lambda: bool(folder.complete(out)))
    process.send_signal(signal.SIGUSR1)
    return end(process, 90)


def test_a_preempted_job_ends_with_75_and_goes_on_when_it_is_requeued(tmp_path: Path) -> None:
    """The same command each time, as in a job script; in the end the report sees one whole run."""
    out = tmp_path / "run"
    model = tmp_path / "model.keras"
    options = [*SMALL, "--out", str(out), "--requeue", "--checkpoint-every", "50", "--save-model", str(model)]
    first = preempted(start(2, "dlion", "train", *options, "--steps", "100000"), out)
    assert first.code == 75, first.err
    assert not complaints(first)
    assert "--resume" in str(result_of(first)["stopped"])
    assert not model.exists()
    newest = folder.read_manifest(folder.complete(out)[-1])
    steps = max(newest.steps)
    again = run(2, "dlion", "train", *options, "--steps", str(steps + 100))
    assert again.code == 0, again.err
    assert "resumes from" in again.err
    assert result_of(again)["steps"] == steps + 100
    whole = runs.load(out)
    assert whole.ended
    assert not whole.notes
    for rank in whole.ranks:
        np.testing.assert_array_equal(rank.steps["step"], np.arange(steps + 100))
        assert np.all(np.diff(rank.steps["time_s"]) > 0)
        assert np.all(np.diff(rank.links()["bytes_sent"][:, 1 - rank.rank]) >= 0)
    result: Any = result_of(again)
    losses, accuracies = result["val_loss_per_rank"], result["accuracy_per_rank"]
    _loads_in_plain_keras(model, accuracies[losses.index(min(losses))])


PLAIN = """
import sys, numpy as np, keras
from sklearn.datasets import load_digits
assert not any(name.startswith("dlion") for name in sys.modules)
pixels, y = load_digits(return_X_y=True)
x = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
test = np.random.default_rng(0).permutation(len(x))[: len(x) // 5]
model = keras.saving.load_model(sys.argv[1])
print((model.predict(x[test], verbose=0).argmax(1) == y[test]).mean())
"""


def _loads_in_plain_keras(model: Path, accuracy: float) -> None:
    """In a place where our package cannot even be imported."""
    script = model.with_name("plain.py")
    script.write_text(PLAIN, encoding="utf-8")
    ended = run(None, "python", str(script), str(model), cwd=model.parent, env={"PYTHONPATH": ""})
    assert ended.code == 0, ended.err
    assert abs(float(ended.out.split()[-1]) - accuracy) < 1e-6


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks in `sync` with checkpoints at 40, 80 and 120 steps."""
    out = tmp_path_factory.mktemp("kept") / "run"
    options = ["--steps", "120", "--checkpoint-every", "40", "--keep-checkpoints", "3", "--out", str(out)]
    ended = run(2, "dlion", "train", *SMALL, *SYNC, *options)
    assert ended.code == 0, ended.err
    assert [path.name for path in folder.complete(out)][-1] == "step-00000120"
    return out


def copy_of(run_: Path, target: Path) -> Path:
    subprocess.run(["cp", "-r", str(run_), str(target)], check=True)
    return target


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken_if_asked(kept: Path, tmp_path: Path) -> None:
    out = copy_of(kept, tmp_path / "run")
    path = out / "checkpoints" / "step-00000120" / "rank-00001.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    path.write_bytes(content)
    refused = run(2, "dlion", "train", "--resume", str(out), "--steps", "140")
    assert refused.code == 2
    assert len(set(complaints(refused))) == 1, refused.err
    assert str(path) in complaints(refused)[0]
    assert "--resume-earlier" in complaints(refused)[0]
    taken = run(2, "dlion", "train", "--resume", str(out), "--resume-earlier", "--steps", "140")
    assert taken.code == 0, taken.err
    assert "step-00000080" in taken.err
    assert (out / "checkpoints" / "aside-step-00000120").is_dir()
    assert [len(rank.steps["step"]) for rank in runs.load(out).ranks] == [140, 140]


def test_another_number_of_ranks_goes_on_from_the_best_of_the_old(kept: Path, tmp_path: Path) -> None:
    out = copy_of(kept, tmp_path / "run")
    ended = run(3, "dlion", "train", "--resume", str(out), "--steps", "160")
    assert ended.code == 0, ended.err
    assert "taken by 2 ranks, now there are 3" in ended.err
    result = result_of(ended)
    assert (result["ranks"], result["steps"]) == (3, 160)
    assert float(result["accuracy_mean"]) > 0.5  # type: ignore[arg-type]
    whole = runs.load(out)
    assert [len(rank.steps["step"]) for rank in whole.ranks] == [160, 160, 40]
    assert whole.ranks[0].links()["bytes_sent"].shape == (160, 3)
    assert whole.ended


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--model", "tests.nets:dense"], "--model tests.nets:dense"),
        (["--strategy", "baseline"], "--strategy baseline"),
        (["--out", "elsewhere"], "--out elsewhere"),
    ],
)
def test_what_cannot_be_changed_is_refused(kept: Path, options: list[str], names: str) -> None:
    ended = run(None, "dlion", "train", "--resume", str(kept), *options)
    assert ended.code == 2
    assert names in complaints(ended)[0]


def test_the_time_limit_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--seconds", "600", "--checkpoint-every", "1h", "--time-limit", "12s", "--out", str(out)]
    ended = run(1, "dlion", "train", *SMALL, *options)
    assert ended.code == 75, ended.err
    assert "time limit" in str(result_of(ended)["stopped"])
    assert len(folder.complete(out)) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_costs_a_checkpoint_not_the_run(small_disk: Path) -> None:
    out = small_disk / "run"
    options = ["--steps", "100000", "--checkpoint-every", "0.5s", "--keep-checkpoints", "1", "--out", str(out)]
    process = start(None, "dlion", "train", *SMALL, *options)
    wait_for(lambda: bool(folder.complete(out)))
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - (600 << 10))))
    before = folder.complete(out)
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    ended = end(process, 60)
    lines = [line for line in ended.err.splitlines() if "could not be written" in line]
    assert lines, ended.err
    assert all("No space left on device" in line and "older ones stay" in line for line in lines)
    assert ended.code == 130, ended.err
    assert folder.complete(out)
    for place in folder.complete(out):
        folder.read_manifest(place).read(0)
    assert len(before) == 1
