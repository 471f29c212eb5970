"""A strategy of the user's own: found by name, held to the contract, refused in one line where it is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.cli import main
from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.simulation.simulate import micro_cloud, simulate
from dlion_mpi.strategies.given import config_of
from dlion_mpi.strategies.registry import STRATEGIES, find, resolve
from dlion_mpi.strategies.types import LinkView, Plan
from tests.contract.problem import LAYOUT, OPTIMUM, ROUGH, local, trained
from tests.markdown import write_files

MODULE = """
from dataclasses import dataclass

from dlion_mpi.config.fields import Bounds, option
from dlion_mpi.strategies.allreduce import AllReduce, Horovod
from dlion_mpi.strategies.baseline import Baseline
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.dlion import Dlion
from dlion_mpi.strategies.options import StrategyOptions

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
    uses = {"staleness": 5, "seed": 64}


class Arguments(Baseline):
    def __init__(self, temperature):
        self.temperature = temperature


class Wrong(Dlion):
    uses = {**Dlion.uses, "backup": -1}


class Sum(AllReduce):
    name = "sum"


class ByHorovod(Horovod):
    name = "by-horovod"


class Fine(Dlion):
    uses = {"staleness": 2}


class Mild(Baseline):
    name = "mild"

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        share: float = option(0.5, "share of the gradient", bounds=Bounds(0, 1, "in [0, 1]"))
        most_steps: int = option(9, "steps")
        kind: str = option("plain", "kind", choices=("plain", "odd"))

    def incoming(self, state, local, weights, messages):
        effect = super().incoming(state, local, weights, messages)
        effect.gradient[:] *= self.options.share
        return effect


class Milder(Mild):
    name = "milder"


class Named(Mild):
    name = "data"


class Spaced(Mild):
    name = "two words"


class Loose(Baseline):
    name = "loose"

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        share: list = option(None, "no such type")


class NoOptions(Baseline):
    name = "none"
    Options = 3
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
        if name in ("brought", "broken", "turns", "summed"):
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
        ("brought:Unknown", "uses has seed, but the shared options are "),
        ("brought:Arguments", "it must be possible to make one without arguments"),
        ("brought:Wrong", "--backup -1: must be 0 or more workers"),
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
    assert (config.sync, config.staleness, config.exchange_share) == ("bounded", 2, None)
    assert resolve(config)[1] == config
    assert resolve(Config(strategy="brought:Fine", staleness=7))[1].staleness == 7
    with pytest.raises(UserError, match="--exchange-share is not used by --strategy"):
        resolve(Config(strategy="brought:Fine", exchange_share=3.0))


def simulated(*words: str) -> list[str]:
    common = ("--env", "homo-b", "--data", "digits", "--model", "tests.nets:dense", "--steps", "3")
    return ["simulate", *common, "--strategy", "brought:Mild", "--out", "run", *words]


def test_its_own_options_hold_on_the_command_line_and_in_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(simulated("--mild.share", "0.25", "--mild.most-steps=7")) == 0
    written = Path("run/config.toml").read_text(encoding="utf-8")
    assert written.endswith('[mild]\nshare = 0.25\nmost_steps = 7\nkind = "plain"\n')
    again = config_of({"config": "run/config.toml"})
    strategy, resolved = resolve(again)
    assert (strategy.options.share, strategy.options.most_steps) == (0.25, 7)
    assert resolved == again
    assert config_of({"config": "run/config.toml", "mild.share": "0.75"}).strategy_options["mild.share"] == 0.75
    losses = []
    for share in ("0", "1"):
        capsys.readouterr()
        assert main([*simulated("--mild.share", share), "--out", f"run{share}", "--learning-rate", "0.3"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["accuracy_mean"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mild.share", "2"], "--mild.share 2: must be in [0, 1]"),
        (["--mild.share", "x"], "--mild.share x: must be a number"),
        (["--mild.kind", "x"], "--mild.kind x: must be one of plain, odd"),
        (["--mild.shar", "1"], "unrecognized arguments: --mild.shar 1"),
        (["--hop.skip", "1"], "--hop.skip belongs to --strategy hop, not to --strategy mild: drop it"),
        (["--strategy", "brought:Milder", "--milder.share", "2"], "--milder.share 2: must be in [0, 1]"),
        (["--strategy", "brought:Milder", "--mild.share", "1"], "unrecognized arguments: --mild.share 1"),
        (
            ["--strategy", "brought:Named"],
            "name is 'data', but options need a name of letters and digits that is none of ",
        ),
        (["--strategy", "brought:Spaced"], "name is 'two words', but options need a name"),
        (["--strategy", "brought:Loose"], "the option share is a list, but must be an int, a float, a str or an Every"),
        (["--strategy", "brought:NoOptions"], "Options must be a dataclass that inherits from StrategyOptions"),
    ],
)
def test_a_mistake_in_its_own_options_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(simulated(*words)) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert said in err


def test_help_shows_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*simulated(), "--help-all"])
    assert "--mild.share SHARE    share of the gradient (default: 0.5)" in capsys.readouterr().out


def test_in_python_its_own_options_are_arguments() -> None:
    cls: Any = find("brought:Mild")
    assert cls(share="0.1").options == cls.Options(share=0.1)
    for options in ({"share": 2}, {"size": 2}, {"most_steps": 0.5}):
        with pytest.raises(UserError, match=r"--mild\."):
            cls(**options)


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
@pytest.mark.parametrize("peers", [1, 2])
def test_the_documentations_strategy_reaches_what_only_all_together_know(mode: str, peers: int) -> None:
    """On links that are late and often busy: so nothing of a gradient is lost, or applied twice."""
    options = {"strategy": "turns:Turns", "sync": mode, "steps": 400, "batch_size": 8, "turns.peers": peers}
    result = trained(config_of(options), weather=ROUGH)
    np.testing.assert_allclose(result.weights, np.tile(OPTIMUM, (3, 1)), atol=0.02)
    sent = [sum(entries is not None for _, entries in step.values()) for step in result.sent[0]]
    assert max(sent) == peers


def test_the_documentations_strategy_can_be_resumed() -> None:
    plan = Plan(config=Config(strategy="turns:Turns"), rank=0, ranks=(0, 1, 2), layout=LAYOUT)
    strategy = find("turns:Turns")()
    state: Any = strategy.start(plan)
    strategy.outgoing(state, local(OPTIMUM), {1: LinkView(True, 1e9), 2: LinkView(False, 1e9)})
    kept = strategy.to_arrays(state)
    assert kept.keys() == {"residuals/1", "residuals/2"}
    resumed: Any = strategy.start(plan)
    strategy.from_arrays(resumed, kept)
    for peer, expected in ((1, 0 * OPTIMUM), (2, OPTIMUM)):
        np.testing.assert_array_equal(resumed.residuals[peer], expected)


def test_the_documentations_sum_is_the_mean_gradient() -> None:
    options = {"strategy": "summed:Summed", "steps": 250, "batch_size": 8}
    result = trained(config_of(options), weather=ROUGH)
    np.testing.assert_allclose(result.weights, np.tile(OPTIMUM, (3, 1)), atol=0.02)
