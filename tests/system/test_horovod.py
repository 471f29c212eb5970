"""The strategies that sum gradients over all ranks, as a user starts them: the same weights, and an end for all."""

from __future__ import annotations

import os
import signal
from importlib import metadata
from pathlib import Path

import pytest

from tests.system.launch import complaints, end, processes_with, ranks_with, run, start
from tests.system.test_train import SMALL, result_of, started_run, steps_in, wait_for

pytestmark = pytest.mark.timeout(200)


def _built() -> bool:
    return any(d.metadata["Name"] == "horovod" for d in metadata.distributions())


needs_horovod = pytest.mark.skipif(not _built(), reason="Horovod is not installed: bash env/horovod/build.sh")
both = pytest.mark.parametrize("strategy", ["allreduce", pytest.param("horovod", marks=needs_horovod)])

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
@pytest.mark.parametrize("options", [["--sync", "bounded"], ["--dlion.max-n", "50"], ["--transfer", "all"]])
def test_what_it_does_not_support_is_refused(strategy: str, options: list[str]) -> None:
    ended = run(None, "dlion", "train", *SMALL, "--strategy", strategy, *options)
    assert ended.code == 2
    assert f"--strategy {strategy}" in complaints(ended)[0]


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
    os.kill(max(ranks_with(str(tmp_path))), signal.SIGTERM)
    ended = end(process, 60)
    assert result_of(ended)["stopped"] == "SIGTERM"
    assert ended.code == 128 + signal.SIGTERM
    assert len({steps_in(tmp_path / "run", rank) for rank in range(3)}) == 1


@both
def test_a_killed_rank_ends_all(strategy: str, tmp_path: Path) -> None:
    process = started_run(tmp_path / "run", 3, "--strategy", strategy)
    os.kill(max(ranks_with(str(tmp_path))), signal.SIGKILL)
    ended = end(process, 30)
    assert ended.code != 0
    wait_for(lambda: not processes_with(str(tmp_path)), 10)
    assert all(steps_in(tmp_path / "run", rank) > 0 for rank in range(3))


FAILING = """
import sys
from dlion_mpi.cli import main
from dlion_mpi.strategies.allreduce import AllReduce
original = AllReduce.outgoing
def outgoing(self, state, local, links):
    from mpi4py import MPI
    if local.step == 7 and MPI.COMM_WORLD.rank == 1:
        raise ZeroDivisionError("planted")
    return original(self, state, local, links)
AllReduce.outgoing = outgoing
sys.exit(main(sys.argv[1:]))
"""


@both
def test_a_rank_that_fails_ends_all(strategy: str, tmp_path: Path) -> None:
    """At once: it cannot say why. One that can: tests/mpi/test_sums.py."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING, encoding="utf-8")
    ended = end(start(3, "python", str(script), "train", *SMALL, "--strategy", strategy, "--seconds", "600"), 150)
    assert ended.code != 0
    assert "planted" in ended.err
