"""Ranks that are stopped, as a frozen machine is: the others say so, wait, or end the run; see `mpi.stall`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import h5py
import pytest

from dlion_mpi.checkpoint import folder
from dlion_mpi.metrics import reader as runs
from tests.system.launch import LIGHT, Ended, end, run, start

pytestmark = pytest.mark.timeout(240)

FIT = (
    LIGHT
    + """
import json, os, signal, sys
import numpy as np
import keras
import dlion_mpi
from dlion_mpi.mpi import stall

stall.LEAST_S, stall.FIRST_S, stall.FIRST_LIMIT_S = 1.0, 1.0, 2.0
place, victim, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
ours = dlion_mpi.rank() == victim


def stop():
    if ours:
        os.kill(os.getpid(), signal.SIGSTOP)


class Stop(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        if place == "train_begin":
            stop()

    def on_train_batch_end(self, batch, logs=None):
        if place == "step" and batch == 20:
            stop()

    def on_epoch_end(self, epoch, logs=None):
        if place == "epoch" and epoch == 1:
            stop()

    def on_train_end(self, logs=None):
        if place == "end":
            stop()


g = np.random.default_rng(5)
x = g.normal(size=(1600, 16)).astype("float32")
y = (x @ g.normal(size=(16, 4))).argmax(1)
model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(4)])
if place == "start":
    stop()
parts = ((x[:1200], y[:1200]), (x[1200:], y[1200:]))
if place == "exchange":
    with dlion_mpi.Exchange(model, progress_every=0, **options) as exchange:
        done = 0
        while exchange.running:
            if done == 20:
                stop()
            done += 1
            exchange.step(loss=1.0)
else:
    dlion_mpi.fit(model, *parts, callbacks=[Stop()], steps_per_epoch=40, progress_every=0, **options)
"""
)


def fitted(tmp_path: Path, place: str, victim: int, **options: object) -> subprocess.Popen[str]:
    script = tmp_path / "fit.py"
    script.write_text(FIT, encoding="utf-8")
    given = {"steps": 2000, "batch_size": 8, "seed": 1, **options}
    return start(2, "python", str(script), place, str(victim), json.dumps(given))


def lines(ended: Ended, word: str) -> list[str]:
    return [line for line in ended.err.splitlines() if word in line]


@pytest.mark.parametrize(
    ("place", "victim", "options"),
    [
        ("start", 0, {}),
        ("start", 1, {}),
        ("train_begin", 1, {}),
        ("step", 0, {}),
        ("step", 1, {"strategy": "allreduce"}),
        ("step", 1, {"strategy": "powersgd"}),
        ("step", 0, {"strategy": "diloco"}),
        ("epoch", 1, {"sync": "async"}),
        ("end", 1, {"steps": 80}),
        ("exchange", 1, {}),
    ],
)
def test_wherever_a_rank_is_stopped_the_limit_ends_the_run(
    place: str, victim: int, options: dict[str, object], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ended = end(fitted(tmp_path, place, victim, stall_limit="3s", out=str(out), **options), 120)
    assert ended.code == 1, ended.err
    peer = "the other ranks to start" if place == "start" else f"rank {victim}"
    assert lines(ended, f"rank {1 - victim}: waiting") or lines(ended, f"rank {1 - victim} has waited"), ended.err
    assert any(peer in line for line in lines(ended, "has waited")), ended.err
    assert "Traceback" not in ended.err
    if place in ("step", "epoch", "end", "exchange"):
        with h5py.File(out / f"metrics-{1 - victim:05d}.h5", "r") as file:  # closed in order
            assert len(file["steps/step"]) >= 20
            assert not file["ended"][()]
        assert [rank.rank for rank in runs.load(out).ranks][1 - victim] == 1 - victim


def wait_for(path: Path, rows: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            with h5py.File(path, "r", swmr=True) as file:
                if len(file["steps/step"]) >= rows:
                    return
        except (OSError, KeyError):
            pass
        time.sleep(0.1)
    raise AssertionError("no steps")


def stopped(out: Path, rank: int) -> int:
    """Stop a rank once it trains. Returns its process id."""
    wait_for(out / f"metrics-{rank:05d}.h5", 10)
    with h5py.File(out / f"metrics-{rank:05d}.h5", "r", swmr=True) as file:
        pid = int(file.attrs["pid"])
    os.kill(pid, signal.SIGSTOP)
    return pid


TRAIN = ("dlion", "train", "--data", "digits", "--model", "tests.nets:dense", "--progress-every", "0")


def test_a_rank_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(3, *TRAIN, "--out", str(out), "--steps", "2000", "--batch-size", "256")
    pid = stopped(out, 2)
    time.sleep(7)
    watched = run(None, "dlion", "watch", str(out), "--once")
    os.kill(pid, signal.SIGCONT)
    ended = end(process, 150)
    assert ended.code == 0, ended.err
    for rank in (0, 1):
        assert any("for rank 2, last heard of at step" in line for line in lines(ended, f"rank {rank}: waiting"))
        assert lines(ended, f"rank {rank}: continues after")
        assert f"rank {rank}: waiting" in watched.out
    assert not lines(ended, "rank 2: waiting")
    result = json.loads(ended.out.splitlines()[-1])
    assert (result["ranks"], result["steps"], result["stopped"]) == (3, 2000, None)
    assert runs.load(out).ended
    assert not any("waiting" in line for line in run(None, "dlion", "watch", str(out), "--once").out.splitlines())


@pytest.mark.parametrize("sync", ["sync", "bounded"])
def test_those_who_are_there_end_with_a_checkpoint_and_the_run_resumes(sync: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--out", str(out), "--requeue", "--checkpoint-every", "10m", "--batch-size", "256", "--sync", sync]
    process = start(3, *TRAIN, *options, "--steps", "100000", "--stall-limit", "5s")
    stopped(out, 0)
    ended = end(process, 60)
    assert ended.code == 75, ended.err
    result = json.loads(ended.out.splitlines()[-1])
    assert f"--resume {out}" in result["stopped"]
    assert "rank 0" in result["stopped"]
    checkpoint = folder.read_manifest(folder.complete(out)[-1])
    assert (checkpoint.ranks, checkpoint.missing) == (3, [0])
    assert not list((out / "checkpoints").glob("*.h5")), "a part lies outside of its checkpoint"
    last = max(checkpoint.steps) + 20
    again = run(3, *TRAIN, *options, "--steps", str(last))
    assert again.code == 0, again.err
    assert "was taken without rank 0" in again.err
    assert json.loads(again.out.splitlines()[-1])["steps"] == last
