"""The strategies that sum gradients over all ranks, as a user starts them: the same weights, and an end for all."""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import metadata
from pathlib import Path

import h5py
import numpy as np
import pytest

from dlion_mpi.collectives import ring_bytes
from tests.system.launch import complaints, end, processes_with, run, start
from tests.system.test_train import SMALL, result_of, started_run, steps_in, wait_for

pytestmark = pytest.mark.timeout(200)
PARAMETERS = 2410


def _built() -> bool:
    return any(d.metadata["Name"] == "horovod" for d in metadata.distributions())


needs_horovod = pytest.mark.skipif(not _built(), reason="Horovod is not installed: bash env/horovod/build.sh")
both = pytest.mark.parametrize("strategy", ["allreduce", pytest.param("horovod", marks=needs_horovod)])

SAME = """
import json, sys
import numpy as np
from dlion_mpi.model import build, tensorflow
from dlion_mpi.options import config_of
from dlion_mpi.run import run
tensorflow(1)
whole = {"sync": "sync", "batching": "fixed", "gbs_schedule": "fixed", "transfer": "none", "max_n": 100}
runs = {"dlion": whole, "baseline": {}, "allreduce": {}, "horovod": {}, "horovod again": {}}
weights = {}
for name, options in runs.items():
    model = build("tests.nets:dense", (8, 8, 1), 10, 0)
    start = np.concatenate([w.ravel() for w in model.get_weights()])
    config = {"strategy": name.split()[0], "data": "digits", "model": "tests.nets:dense", "steps": 50, **options}
    outcome = run(config_of(config | {"learning_rate": 0.1}), model=model, report=False)
    assert outcome.exit_code == 0
    weights[name] = np.concatenate([w.ravel() for w in model.get_weights()])
apart = {name: float(np.abs(own - weights["dlion"]).max()) for name, own in weights.items()}
if outcome.rank == 0:
    print(json.dumps({"moved": float(np.abs(weights["dlion"] - start).max()), "apart": apart}))
"""


@needs_horovod
@pytest.mark.parametrize("ranks", [2, 4])
def test_with_equal_batches_all_give_the_same_weights_after_50_steps(ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "same.py"
    script.write_text(SAME, encoding="utf-8")
    ended = run(ranks, "python", str(script))
    assert ended.code == 0, ended.err
    found = json.loads(ended.out.splitlines()[-1])
    assert found["moved"] > 0.05
    assert set(found["apart"]) == {"dlion", "baseline", "allreduce", "horovod", "horovod again"}
    assert max(found["apart"].values()) < 2e-6, found


WITHOUT = """
import sys
sys.modules["horovod"] = None
from dlion_mpi.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_horovod_one_line_names_the_script_that_builds_it(tmp_path: Path) -> None:
    script = tmp_path / "without.py"
    script.write_text(WITHOUT, encoding="utf-8")
    ended = run(2, "python", str(script), "train", *SMALL, "--strategy", "horovod", "--steps", "5")
    assert ended.code == 2, ended.err
    assert len(complaints(ended)) == 1
    assert "bash env/horovod/build.sh" in complaints(ended)[0]
    assert "Traceback" not in ended.err


def test_a_horovod_that_does_not_load_is_to_be_built_again(tmp_path: Path) -> None:
    package = tmp_path / "horovod" / "tensorflow"
    package.mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").touch()
    (package / "__init__.py").write_text("raise ImportError('undefined symbol: planted')\n", encoding="utf-8")
    script = tmp_path / "broken.py"
    script.write_text("import sys\nfrom dlion_mpi.cli import main\nsys.exit(main(sys.argv[1:]))\n", encoding="utf-8")
    ended = run(2, "python", str(script), "train", *SMALL, "--strategy", "horovod", "--steps", "5")
    assert ended.code == 2, ended.err
    assert len(complaints(ended)) == 1
    assert all(part in complaints(ended)[0] for part in ("undefined symbol: planted", "bash env/horovod/build.sh"))


@both
@pytest.mark.parametrize("options", [["--sync", "bounded"], ["--max-n", "50"], ["--transfer", "all"]])
def test_what_it_does_not_support_is_refused(strategy: str, options: list[str]) -> None:
    ended = run(None, "dlion", "train", *SMALL, "--strategy", strategy, *options)
    assert ended.code == 2
    assert f"--strategy {strategy}" in complaints(ended)[0]


@both
@pytest.mark.parametrize("ranks", [None, 3])
def test_a_run_has_whole_metrics_and_a_ring_s_bytes(strategy: str, ranks: int | None, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = run(ranks, "dlion", "train", *SMALL, "--strategy", strategy, "--steps", "20", "--out", str(out))
    assert ended.code == 0, ended.err
    result = result_of(ended)
    assert (result["strategy"], result["ranks"], result["steps"]) == (strategy, ranks or 1, 20)
    for rank in range(ranks or 1):
        with h5py.File(out / f"metrics-{rank:05d}.h5", "r", swmr=True) as file:
            assert file["ended"][()] == 1
            sent = file["links/bytes_sent"][:].astype(np.int64)
            assert sent.shape == (20, ranks or 1)
            per_step = ring_bytes(PARAMETERS, rank, ranks or 1)[0]
            expected = np.zeros_like(sent)
            expected[:, (rank + 1) % (ranks or 1)] = per_step * np.arange(1, 21)
            # At the last step another rank may have said already that it leaves, and been answered.
            np.testing.assert_array_equal(sent[:-1], expected[:-1])


@both
def test_ctrl_c_ends_all_ranks(strategy: str, tmp_path: Path) -> None:
    process = started_run(tmp_path / "run", 2, "--strategy", strategy)
    process.send_signal(signal.SIGINT)
    ended = end(process, 30)
    assert ended.code != 0
    assert "Traceback" not in ended.err
    wait_for(lambda: not processes_with(str(tmp_path)), 10)


@both
def test_a_signal_to_one_rank_ends_all_after_the_same_step(strategy: str, tmp_path: Path) -> None:
    process = started_run(tmp_path / "run", 3, "--strategy", strategy)
    os.kill(max(_ranks(tmp_path)), signal.SIGTERM)
    ended = end(process, 60)
    assert result_of(ended)["stopped"] == "SIGTERM"
    assert ended.code == 128 + signal.SIGTERM
    assert len({steps_in(tmp_path / "run", rank) for rank in range(3)}) == 1


@both
def test_a_killed_rank_ends_all(strategy: str, tmp_path: Path) -> None:
    process = started_run(tmp_path / "run", 3, "--strategy", strategy)
    os.kill(max(_ranks(tmp_path)), signal.SIGKILL)
    ended = end(process, 30)
    assert ended.code != 0
    wait_for(lambda: not processes_with(str(tmp_path)), 10)
    assert all(steps_in(tmp_path / "run", rank) > 0 for rank in range(3))


def _ranks(folder: Path) -> list[int]:
    """The process ids of the ranks of a run that writes to ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in line and b"train" in line and b"mpirun" not in line:
                found.append(int(entry.name))
    return found


FAILING = """
import sys
from dlion_mpi.cli import main
from dlion_mpi.errors import RunError
from dlion_mpi.strategies.allreduce import AllReduce
original = AllReduce.outgoing
def outgoing(self, state, local, links):
    from mpi4py import MPI
    if local.step == 7 and MPI.COMM_WORLD.rank == 1:
        raise {error}("planted")
    return original(self, state, local, links)
AllReduce.outgoing = outgoing
sys.exit(main(sys.argv[1:]))
"""


@both
@pytest.mark.parametrize(("error", "code"), [("RunError", 1), ("ZeroDivisionError", None)])
def test_a_rank_that_fails_ends_all(strategy: str, error: str, code: int | None, tmp_path: Path) -> None:
    """In good order if it can say why, at once if it cannot."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(error=error), encoding="utf-8")
    ended = end(start(3, "python", str(script), "train", *SMALL, "--strategy", strategy, "--seconds", "600"), 150)
    assert ended.code == code if code is not None else ended.code != 0
    assert "planted" in ended.err
    if code is not None:
        assert [line for line in complaints(ended) if "planted" in line]
        assert result_of(ended)["steps"] == 7


TWO = """
name = "two"
workers = 2
[[phases]]
cores = 24
uplink_mbit = 10
"""


@needs_horovod
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make network namespaces")
def test_it_runs_in_an_emulated_micro_cloud(tmp_path: Path) -> None:
    """One rank per namespace, and computing is paced: a step of a model this small would take milliseconds."""
    environment = tmp_path / "cloud.toml"
    environment.write_text(TWO, encoding="utf-8")
    words = ["--strategy", "horovod", "--steps", "5", "--out", str(tmp_path / "run")]
    train = [str(Path(sys.executable).parent / "dlion"), "train", *SMALL, *words]
    ended = run(None, "dlion", "emulate", "run", "--env", str(environment), "--", *train)
    assert ended.code == 0, ended.err
    assert result_of(ended)["steps"] == 5
    with h5py.File(tmp_path / "run" / "metrics-00000.h5", "r", swmr=True) as file:
        assert np.all(file["steps/compute_s"][:] > 0.199)
        assert json.loads(file.attrs["emulated"])["name"] == "two"
