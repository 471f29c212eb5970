"""`dlion train` as a user starts it: what it prints, how it ends, what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.shards import write_shard
from tests.system.launch import LIGHT, Ended, complaints, end, processes_with, ranks_with, run, start

pytestmark = pytest.mark.timeout(200)
SMALL = ("--data", "digits", "--model", "tests.nets:dense", "--progress-every", "0")
TESTS = [f"{metric}_{part}" for metric in ("val_loss", "accuracy") for part in ("mean", "std", "per_rank")]
KEYS = ["strategy", "ranks", "steps", "seconds", *TESTS, "loss", "bytes_sent", "target_reached_s", "stopped", "out"]


def result_of(ended: Ended) -> dict[str, object]:
    return json.loads(ended.out.splitlines()[-1])


@pytest.mark.parametrize("ranks", [None, 1, 3])
def test_a_run_ends_with_one_json_line_and_whole_metrics(ranks: int | None, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    ended = run(ranks, "dlion", "train", *SMALL, "--steps", "40", "--out", str(out))
    assert ended.code == 0, ended.err
    assert len(ended.out.strip().splitlines()) == 1
    result = result_of(ended)
    assert list(result) == KEYS
    assert (result["ranks"], result["steps"], result["out"]) == (ranks or 1, 40, str(out))
    for rank in range(ranks or 1):
        with h5py.File(out / f"metrics-{rank:05d}.h5", "r", swmr=True) as file:
            assert file["steps/step"].shape == (40,)
            assert file["ended"][()] == 1
            assert json.loads(file.attrs["versions"])["dlion-mpi"]


def test_progress_has_a_line_per_rank_and_a_summary() -> None:
    ended = run(2, "dlion", "train", *SMALL[:-1], "0.2", "--seconds", "1.5")
    for rank in range(2):
        lines = [line for line in ended.err.splitlines() if line.startswith(f"[{rank}]")]
        assert lines
        assert all(word in lines[-1] for word in ("step", "batch", "loss", "samples/s", f"->{1 - rank} N", "MB"))
    assert "test accuracy" in ended.err
    assert "\x1b" not in ended.err  # through a pipe nothing is drawn


@pytest.mark.parametrize(
    ("options", "names"),
    [(["--dlion.max-n", "101"], "--dlion.max-n 101"), (["--model", "tests.nets:missing"], "missing")],
    ids=["before MPI starts", "after"],
)
def test_a_mistake_gets_one_line_and_code_2_on_all_ranks(options: list[str], names: str) -> None:
    """For the mistakes see tests/unit/test_cli.py, tests/mpi/test_mistakes.py."""
    ended = run(2, "dlion", "train", *SMALL[: 4 if "--model" not in options else 2], *options, "--steps", "5")
    assert ended.code == 2, ended.err
    lines = set(complaints(ended))
    assert len(lines) == 1, ended.err
    assert names in lines.pop()
    assert "Traceback" not in ended.err


def test_shard_files_give_every_rank_its_own_rows(tmp_path: Path) -> None:
    for rank, rows in enumerate((40, 70)):
        write_shard(tmp_path / f"shard-{rank}.h5", rows)
    shards = str(tmp_path / "shard-{rank}.h5")
    ended = run(2, "dlion", "train", *SMALL, "--data", shards, "--steps", "5", "--out", str(tmp_path / "run"))
    assert ended.code == 0, ended.err
    samples = []
    for rank in range(2):
        with h5py.File(tmp_path / "run" / f"metrics-{rank:05d}.h5", "r", swmr=True) as file:
            samples.append(int(file.attrs["samples"]))
    assert samples == [40, 70]


def test_a_bad_shard_on_one_rank_ends_all_with_one_line(tmp_path: Path) -> None:
    bad: dict[str, Any] = {"y_train": np.full(60, -1)}
    for rank in range(3):
        write_shard(tmp_path / f"shard-{rank}.h5", **(bad if rank == 1 else {}))
    ended = run(3, "dlion", "train", *SMALL, "--data", str(tmp_path / "shard-{rank}.h5"), "--steps", "5")
    assert ended.code == 2, ended.err
    assert len(complaints(ended)) == 1, ended.err
    assert "label" in complaints(ended)[0]


def test_different_options_on_different_ranks_are_named(tmp_path: Path) -> None:
    script = tmp_path / "rank.sh"
    script.write_text(
        '#!/bin/sh\nexec dlion train "$@" --seed ${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}\n', encoding="utf-8"
    )
    script.chmod(0o755)
    ended = run(2, str(script), *SMALL, "--steps", "5")
    assert ended.code == 2, ended.err
    assert "rank 1 has 'seed = 1' where rank 0 has 'seed = 0'" in complaints(ended)[0]


def test_a_loss_that_is_not_finite_ends_the_run_with_step_and_rank() -> None:
    ended = run(2, "dlion", "train", *SMALL, "--learning-rate", "1e30", "--steps", "50")
    assert ended.code == 1
    assert len(complaints(ended)) == 1
    assert "step" in complaints(ended)[0]
    assert "rank" in complaints(ended)[0]
    assert "Traceback" not in ended.err


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def steps_in(folder: Path, rank: int) -> int:
    """Steps that a reader finds in the metrics of a run that continues, or has been killed."""
    path = folder / f"metrics-{rank:05d}.h5"
    try:
        with h5py.File(path, "r", swmr=True) as file:
            return int(file["steps/step"].shape[0])
    except OSError:
        return 0


def started_run(folder: Path, ranks: int = 2, *options: str) -> subprocess.Popen[str]:
    process = start(ranks, "dlion", "train", *SMALL, "--seconds", "600", "--out", str(folder), *options)
    wait_for(lambda: all(steps_in(folder, rank) > 0 for rank in range(ranks)))
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_mpirun_ends_all_ranks_with_whole_metrics(tmp_path: Path, number: signal.Signals) -> None:
    process = started_run(tmp_path / "run")
    process.send_signal(number)
    ended = end(process, 30)
    assert ended.code != 0
    assert "Traceback" not in ended.err
    wait_for(lambda: not processes_with(str(tmp_path)), 10)  # mpirun kills ranks that take long
    for rank in range(2):
        with h5py.File(tmp_path / "run" / f"metrics-{rank:05d}.h5", "r", swmr=True) as file:
            columns = {file[f"steps/{name}"].shape[0] for name in file["steps"]}
            assert len(columns) == 1
            assert np.all(np.diff(file["steps/step"][:]) == 1)


def test_a_signal_to_one_rank_ends_all_in_good_order(tmp_path: Path) -> None:
    """As a batch system's `scancel --signal` to one task: the run ends everywhere, and is summed up."""
    process = started_run(tmp_path / "run")
    os.kill(max(ranks_with(str(tmp_path))), signal.SIGTERM)
    ended = end(process, 60)
    assert result_of(ended)["stopped"] == "SIGTERM"
    assert ended.code == 128 + signal.SIGTERM
    for rank in range(2):
        with h5py.File(tmp_path / "run" / f"metrics-{rank:05d}.h5", "r", swmr=True) as file:
            assert file["steps/step"].shape[0] > 0


def test_a_signal_that_is_repeated_until_the_end_costs_nothing(tmp_path: Path) -> None:
    """`srun` and `scancel` repeat theirs; one may come while the run is summed up, or after."""
    process = started_run(tmp_path / "run")
    pids = ranks_with(str(tmp_path))
    assert len(pids) == 2
    while process.poll() is None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.002)
    ended = end(process, 60)
    assert result_of(ended)["stopped"] == "SIGTERM"
    assert ended.code == 128 + signal.SIGTERM


def test_a_killed_rank_ends_all_and_its_metrics_can_be_read(tmp_path: Path) -> None:
    process = started_run(tmp_path / "run", 3)
    os.kill(max(ranks_with(str(tmp_path))), signal.SIGKILL)
    ended = end(process, 30)
    assert ended.code != 0
    wait_for(lambda: not processes_with(str(tmp_path)), 10)
    for rank in range(3):
        assert steps_in(tmp_path / "run", rank) > 0


FAILING = """
from dlion_mpi.strategies.dlion import Dlion
from dlion_mpi.cli import main
import sys
original = Dlion.incoming
def incoming(self, state, local, weights, messages):
    if state.plan.rank == 1 and local.step == 7:
        raise ZeroDivisionError("planted")
    return original(self, state, local, weights, messages)
Dlion.incoming = incoming
sys.exit(main(sys.argv[1:]))
"""


def test_an_exception_on_one_rank_ends_all_with_its_traceback(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING, encoding="utf-8")
    ended = run(3, "python", str(script), "train", *SMALL, "--seconds", "600")
    assert ended.code != 0
    assert "ZeroDivisionError: planted" in ended.err


BEFORE_FIT = """
import dlion_mpi
if dlion_mpi.rank() == 1:
    raise ZeroDivisionError("planted")
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
"""


def test_an_exception_on_one_rank_outside_fit_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(BEFORE_FIT, encoding="utf-8")
    ended = run(2, "python", str(script))
    assert ended.code == 1
    assert "ZeroDivisionError: planted" in ended.err


OVERSIZED = """
import itertools, sys
import numpy as np
from dlion_mpi.cli import main
from dlion_mpi.loop.ports import Channel
from dlion_mpi.mpi.transport import MpiTransport
messages, original = itertools.count(), MpiTransport.send
def send(self, peer, channel, parcel, done):
    if channel is Channel.MESSAGE and next(messages) == 5:
        parcel = np.zeros(1 << 15, np.uint8)
    original(self, peer, channel, parcel, done)
MpiTransport.send = send
sys.exit(main(sys.argv[1:]))
"""


def test_a_message_larger_than_any_can_be_ends_the_run(tmp_path: Path) -> None:
    script = tmp_path / "oversized.py"
    script.write_text(OVERSIZED, encoding="utf-8")
    ended = run(2, "python", str(script), "train", *SMALL, "--seconds", "600")
    assert ended.code != 0
    assert "more than any message of this run may hold" in ended.err


CORRUPTED = """
from dlion_mpi.loop import links
from dlion_mpi.cli import main
import sys
original = links.wire.encode
def encode(header, entries, out, *more):
    length = original(header, entries, out, *more)
    if header.sender == 1 and header.step >= 5 and entries is not None:
        out[length // 2] ^= 4
    return length
links.wire.encode = encode
sys.exit(main(sys.argv[1:]))
"""


def test_a_corrupted_message_ends_the_run_and_its_sender_is_named(tmp_path: Path) -> None:
    script = tmp_path / "corrupted.py"
    script.write_text(CORRUPTED, encoding="utf-8")
    ended = run(2, "python", str(script), "train", *SMALL, "--seconds", "600")
    assert ended.code == 1
    assert len(complaints(ended)) == 1
    assert "rejected a message from rank 1" in complaints(ended)[0]
    assert "Traceback" not in ended.err


FIT = """
import numpy as np, keras, dlion_mpi, json, sys
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(2)])
model.compile(optimizer=keras.optimizers.SGD(0.3), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
x = np.random.default_rng(2).standard_normal((400, 4)).astype("float32")
y = (x[:, 0] + x[:, 1] > 0).astype("int64")
before = model.get_weights()[0].copy()
result = dlion_mpi.fit(model, (x[:300], y[:300]), (x[300:], y[300:]), steps=150, progress_every=0)
hits = (model.predict(x[300:], verbose=0).argmax(1) == y[300:]).mean()
assert abs(hits - result["accuracy_per_rank"][int(sys.argv[1])]) < 1e-6 if len(sys.argv) > 1 else True
assert hits > 0.9, hits
assert not np.array_equal(before, model.get_weights()[0])
if len(sys.argv) > 1: print(json.dumps(result))
"""


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_handful_of_lines_with_an_existing_keras_model(tmp_path: Path, ranks: int | None) -> None:
    script = tmp_path / "mine.py"
    script.write_text(FIT, encoding="utf-8")
    ended = run(ranks, "python", str(script), *(["0"] if ranks is None else []))
    assert ended.code == 0, ended.err


ENDLESS = """
import numpy as np, keras, dlion_mpi, sys
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
model.compile("sgd", "mse")
x, y = np.zeros((64, 4), "float32"), np.zeros((64, 2), "float32")

def batches():
    yield x, y
    if sys.argv[2] == "fails" and dlion_mpi.rank() == 1:
        raise OSError("the disk is gone")
    print("steps", flush=True)
    while True:
        yield x, y

if sys.argv[1] == "fit":
    dlion_mpi.fit(model, batches, steps=10**9, progress_every=0)
source = batches()
with dlion_mpi.Exchange(model, steps=10**9, progress_every=0) as exchange:
    while exchange.running or sys.argv[1] == "for":
        try:
            model.train_on_batch(*next(source))
        except OSError as error:
            raise dlion_mpi.RunError(f"the training data fails: OSError: {error}")
        exchange.step()
"""


def ours(ended: Ended) -> list[str]:
    assert "Traceback" not in ended.err, ended.err
    return [line for line in ended.err.splitlines() if line.startswith("dlion: ")]


@pytest.mark.parametrize(("how", "number"), [("fit", signal.SIGINT), ("while", signal.SIGINT), ("for", signal.SIGTERM)])
def test_a_signal_ends_a_script_with_its_number(tmp_path: Path, how: str, number: signal.Signals) -> None:
    script = tmp_path / "endless.py"
    script.write_text(LIGHT + ENDLESS, encoding="utf-8")
    process = start(None, "dlion", "launch", "-n", "2", str(script), how, "goes on")
    out = process.stdout
    assert out is not None
    wait_for(lambda: out.readline().startswith("steps"), 60)
    time.sleep(2)
    process.send_signal(number)
    ended = end(process, 60)
    assert ended.code == 128 + number, ended.err
    assert ours(ended).count(f"dlion: {number.name}") == 1


@pytest.mark.parametrize("how", ["fit", "while"])
def test_a_failure_in_a_script_is_said_once(tmp_path: Path, how: str) -> None:
    script = tmp_path / "endless.py"
    script.write_text(LIGHT + ENDLESS, encoding="utf-8")
    ended = run(None, "dlion", "launch", "-n", "2", str(script), how, "fails")
    assert ended.code == 1
    assert sum("the disk is gone" in line for line in ours(ended)) == 1, ended.err


def test_fit_refuses_an_option_that_there_is_not() -> None:
    call = "import dlion_mpi; dlion_mpi.fit(None, (1, 2), (3, 4), lerning_rate=3)"
    ended = run(None, "python", "-c", call)
    assert (ended.code, ended.err.startswith("dlion: fit() has no option lerning_rate")) == (1, True), ended.err


def test_a_config_file_gives_the_options_and_the_command_line_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[run]\nsteps = 7\nseed = 3\nprogress_every = 0\n[data]\ndata = "digits"\n'
        '[model]\nmodel = "tests.nets:dense"\n[dlion]\nmax-n = 50\n',
        encoding="utf-8",
    )
    ended = run(None, "dlion", "train", "--config", str(file), "--steps", "9", "--out", str(tmp_path / "run"))
    assert ended.code == 0, ended.err
    assert result_of(ended)["steps"] == 9
    written = (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
    assert "seed = 3" in written
    assert "max_n = 50" in written
    again = run(None, "dlion", "train", "--config", str(tmp_path / "run" / "config.toml"))
    assert again.code == 2, "the written configuration names an --out that exists by now"
    assert "exists already" in complaints(again)[0]
