"""A strategy of the user's own: found by name, held to the contract, refused in one line where it is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.cli import main
from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.simulation.simulate import micro_cloud, simulate
from dlion_mpi.strategies.registry import STRATEGIES, find, resolve
from tests.contract.problem import OPTIMUM, ROUGH, trained
from tests.markdown import write_files

MODULE = """
from dlion_mpi.strategies.allreduce import AllReduce, Horovod
from dlion_mpi.strategies.baseline import Baseline
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.dlion import Dlion

number = 3


def function():
    return Baseline()


class Nothing:
    name, modes = "none", ("sync",)


class NoMethods(Strategy):
    pass


class NoIncoming(Strategy):
    name, modes = "none", ("sync",)


class Text(Baseline):
    start = "start"


class Modes(Baseline):
    modes = "sync"


class OtherModes(Baseline):
    modes = ("sync", "sometimes")


class List(Baseline):
    uses = ["staleness"]


class Unknown(Baseline):
    uses = {"staleness": 5, "lbs": 64}


class Arguments(Baseline):
    def __init__(self, temperature):
        self.temperature = temperature


class Wrong(Dlion):
    uses = {**Dlion.uses, "n_min": 0.0}


class Sum(AllReduce):
    name = "sum"


class ByHorovod(Horovod):
    name = "by-horovod"


class Fine(Dlion):
    uses = {"staleness": 2}
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With a module of strategies, good and bad, and the files that the documentation shows."""
    import sys

    (tmp_path / "brought.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken.py").write_text("import no_such_module\n", encoding="utf-8")
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in ("brought", "broken", "turns"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("brought", "--strategy brought: unknown; known are dlion, baseline, "),
        ("brought:", "--strategy brought:: unknown; give dlion, baseline, "),
        (":Fine", "--strategy :Fine: unknown; give dlion, baseline, "),
        ("nowhere:Fine", "cannot import nowhere (No module named 'nowhere')"),
        ("broken:Fine", "cannot import broken (No module named 'no_such_module')"),
        ("brought:Missing", "brought has no class Missing"),
        ("brought:number", "brought has no class number"),
        ("brought:function", "is a function, but must be a class"),
        ("brought:Nothing", "the class must inherit from dlion_mpi.strategies.contract.Strategy"),
        ("brought:NoMethods", "the class lacks name, modes, incoming"),
        ("brought:NoIncoming", "the class lacks incoming"),
        ("brought:Text", "start must be methods"),
        ("brought:Modes", "modes is 'sync', but must be a tuple of some of sync, bounded, async"),
        ("brought:OtherModes", "modes is ('sync', 'sometimes'), but must be"),
        ("brought:List", "uses must be a dictionary"),
        ("brought:Unknown", "uses has lbs, but the shared options are "),
        ("brought:Arguments", "it must be possible to make one without arguments"),
        ("brought:Wrong", "--n-min 0: must be in (0, 100]"),
    ],
)
def test_what_is_no_strategy_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], spec: str, said: str) -> None:
    assert main(["train", "--strategy", spec]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert said in err


def test_its_defaults_and_options_hold() -> None:
    strategy, config = resolve(Config(strategy="brought:Fine"))
    assert type(strategy).__name__ == "Fine"
    assert (config.sync, config.staleness, config.n_min) == ("bounded", 2, None)
    assert resolve(config)[1] == config
    assert resolve(Config(strategy="brought:Fine", staleness=7))[1].staleness == 7
    with pytest.raises(UserError, match="--n-min is not used by --strategy"):
        resolve(Config(strategy="brought:Fine", n_min=3.0))


def test_a_name_without_a_module_is_one_of_ours() -> None:
    assert {name: find(name) for name in STRATEGIES} == STRATEGIES


def test_a_sum_by_a_library_cannot_be_simulated() -> None:
    with pytest.raises(UserError, match="--strategy brought:ByHorovod needs real processes, because horovod"):
        simulate(Config(strategy="brought:ByHorovod", data="digits"), micro_cloud("homo-b"), report=False)


def test_a_sum_over_all_is_simulated() -> None:
    done = simulate(Config(strategy="brought:Sum", data="digits", steps=2), micro_cloud("homo-b"), report=False)
    assert done.summary["steps"] == 2
    assert done.summary["bytes_sent"] > 0


@pytest.mark.parametrize("mode", ["bounded", "async"])
def test_the_documentations_strategy_reaches_what_only_all_together_know(mode: str) -> None:
    """On links that are late and often busy: so nothing of a gradient is lost, or applied twice."""
    settings: dict[str, Any] = {"strategy": "turns:Turns", "sync": mode, "steps": 400, "lbs": 8}
    result = trained(Config(**settings), weather=ROUGH)
    np.testing.assert_allclose(result.weights, np.tile(OPTIMUM, (3, 1)), atol=0.02)
