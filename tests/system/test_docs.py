"""The documentation's own examples, run as a reader would run them: its files, its command lines."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.markdown import ROOT, blocks, write_files
from tests.system.launch import LIGHT, Ended, run

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that the pages show."""
    write_files(tmp_path)
    return tmp_path


def follow(page: str, folder: Path) -> list[Ended]:
    """Run all command lines of a page in order; each must end well."""
    ended = []
    for block in blocks(ROOT / "docs" / page):
        for line in block.text.splitlines() if block.language == "bash" else ():
            words = shlex.split(line, comments=True)
            ranks = None
            if words[:2] == ["mpirun", "-n"]:
                ranks, words = int(words[2]), words[3:]
            ended.append(run(ranks, *words, cwd=folder))
            assert ended[-1].code == 0, f"{line}\n{ended[-1].err}"
    return ended


def accuracy(ended: Ended) -> float:
    """The accuracy in a run's JSON object."""
    return float(json.loads(ended.out.splitlines()[-1])["accuracy_mean"])


def test_your_own_model_and_data(folder: Path) -> None:
    by_hand, _, info, one_file, split, shards, by_function, arrays = follow("own-model-and-data.md", folder)
    assert accuracy(by_hand) > 0.6
    assert "1000" in info.out.replace(",", "")
    assert accuracy(one_file) > 0.75
    assert split.out.split() == ["shard-0.h5", "shard-1.h5"]
    assert accuracy(shards) > 0.7
    assert accuracy(by_function) > 0.7
    assert arrays.out.count("(3, 2)") == 2  # every rank predicts with its weights


def test_your_own_strategy(folder: Path) -> None:
    simulated, trained = follow("own-strategy.md", folder)
    assert json.loads(simulated.out.splitlines()[-1])["strategy"] == "turns:Turns"
    assert accuracy(simulated) > 0.6
    assert accuracy(trained) > 0.6


def stated_accuracy(ended: Ended) -> float:
    """The accuracy that one rank of a script prints."""
    assert ended.code == 0, ended.err
    found = re.findall(r"test accuracy (\d\.\d+)$", ended.out, re.M)
    assert len(found) == 1, ended.out
    return float(found[0])


@pytest.mark.parametrize(
    ("ranks", "script"), [(None, "with_keras.py"), (2, "with_dlion.py"), (2, "with_dlion_loop.py")]
)
def test_a_script_before_and_after_the_move(folder: Path, ranks: int | None, script: str) -> None:
    assert stated_accuracy(run(ranks, "python", script, cwd=folder)) > 0.85
    assert (folder / "log.csv").exists() == (script != "with_dlion_loop.py")


def test_the_first_script(folder: Path) -> None:
    ended = run(2, "python", "first_script.py", cwd=folder)
    assert ended.code == 0, ended.err
    assert "target mae<=0.15 reached" in ended.err
    assert re.search(r"^mean absolute error 0\.\d+ after [\d.]+ s$", ended.out, re.M), ended.out


def test_a_loop_of_the_reader(folder: Path) -> None:
    (ended,) = follow("own-loop.md", folder)
    found = re.findall(r"test accuracy (\d\.\d+), [\d.]+ s$", ended.out, re.M)
    assert len(found) == 1, ended.out
    assert float(found[0]) > 0.85


@pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod is not built: env/horovod/build.sh")
def test_the_script_with_horovod(folder: Path) -> None:
    assert stated_accuracy(run(2, "python", "with_horovod.py", cwd=folder)) > 0.85


RAISES = """
import keras
import numpy as np

import dlion_mpi
from turns import Turns


class Raises(Turns):
    BACKGROUND
    def outgoing(self, state, local, links):
        if dlion_mpi.rank() == 1 and local.step == 3:
            raise ZeroDivisionError("of the strategy")
        return super().outgoing(state, local, links)


x, y = np.zeros((64, 4), "float32"), np.arange(64) % 2
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
dlion_mpi.fit(model, (x, y), (x, y), strategy=Raises, steps=1000)
print("not reached")
"""


@pytest.mark.parametrize("where", ["in the loop", "in the background"])
def test_an_exception_in_a_users_strategy_on_one_rank_ends_all(folder: Path, where: str) -> None:
    selects = "def selects_in_background(self, plan):\n        return True\n" if where == "in the background" else ""
    (folder / "raises.py").write_text(LIGHT + RAISES.replace("BACKGROUND", selects), encoding="utf-8")
    ended = run(2, "python", "raises.py", cwd=folder)
    assert ended.code != 0
    assert "not reached" not in ended.out
    assert "ZeroDivisionError: of the strategy" in ended.err
