"""`dlion_mpi.fit` as editors, notebooks and type checkers see it: every option, with its type and default."""

from __future__ import annotations

import gc
import inspect
import json
import re
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest

import dlion_mpi
from dlion_mpi import api, own_loop
from dlion_mpi.config.fields import Every, type_name
from dlion_mpi.config.options import FIELDS
from dlion_mpi.errors import UserError
from dlion_mpi.learner import backend
from dlion_mpi.strategies.baseline import Baseline
from dlion_mpi.strategies.dlion import Dlion
from dlion_mpi.strategies.gaia import Gaia
from dlion_mpi.strategies.given import options_of_strategy

ARGUMENTS = ("model", "train", "validation")
OF_KERAS = ("callbacks", "epochs", "steps_per_epoch", "class_weight")
OF_THE_DATA = ("data", "partition", "dirichlet_alpha")
"""Options that the arguments of `fit` take the place of, besides the model."""
RESUMING = {"resume": None, "requeue": False, "resume_earlier": False}
OPTIONS = {name: f for name, f in FIELDS.items() if name not in (*ARGUMENTS, *OF_THE_DATA)}
SIGNATURE = inspect.signature(dlion_mpi.fit)
HINTS = typing.get_type_hints(api.fit)


def test_fit_has_every_option_by_name_and_no_other() -> None:
    keywords = [p.name for p in SIGNATURE.parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert keywords == [*OF_KERAS, *OPTIONS, *RESUMING]
    assert [p.name for p in SIGNATURE.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == [*ARGUMENTS]


@pytest.mark.parametrize("name", [*OPTIONS, *RESUMING])
def test_a_default_of_fit_is_that_of_the_option(name: str) -> None:
    default = RESUMING[name] if name in RESUMING else OPTIONS[name].default
    assert SIGNATURE.parameters[name].default == (str(default) if isinstance(default, Every) else default)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "strategy"])
def test_a_type_of_fit_is_that_of_the_option(name: str) -> None:
    f, hint = OPTIONS[name], HINTS[name]
    alternatives = set(typing.get_args(hint)) if typing.get_origin(hint) in (types.UnionType, typing.Union) else {hint}
    assert (type(None) in alternatives) == (f.default is None)
    alternatives.discard(type(None))
    kinds: dict[str, Any] = {"int": {int}, "float": {float}, "str": {str}, "Every": {int, str}, "Target": {str}}
    if f.metadata["choices"]:
        assert alternatives == {Literal[f.metadata["choices"]]}
    else:
        assert alternatives == (kinds[type_name(f)] if name not in ("time_limit", "stall_limit") else {str})


def test_exchange_has_options_of_fit_with_their_types() -> None:
    hints = typing.get_type_hints(own_loop.Options)
    assert {name: HINTS[name] for name in hints} == hints
    assert not hints.keys() & {"model", "optimizer", "learning_rate", "checkpoint_every", "evaluate_every"}
    options: Any = {"stepps": 5}
    with pytest.raises(UserError, match=r"Exchange\(\) has no option stepps; it has metrics, .*steps, strategy"):
        dlion_mpi.Exchange(None, **options)


def test_it_reads_well_in_help() -> None:
    text = inspect.getdoc(dlion_mpi.fit) or ""
    assert text.startswith("Train a Keras model on all MPI ranks")
    assert "steps: int | None = None, seconds: float | None = None, target: str | None = None" in str(SIGNATURE)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (Gaia, {"strategy": "gaia"}),
        (Gaia(threshold=0.2), {"strategy": "gaia", "gaia.threshold": 0.2}),
        (Gaia(), {"strategy": "gaia"}),
        (Dlion(max_n=10, unsent="drop"), {"strategy": "dlion", "dlion.unsent": "drop", "dlion.max_n": 10.0}),
        ("gaia", {}),
        (None, {}),
    ],
)
def test_a_strategy_is_a_name_a_class_or_an_instance_with_options(strategy: Any, options: dict[str, Any]) -> None:
    assert options_of_strategy(strategy) == options


class Brought(Baseline):
    name = "brought"


def test_a_strategy_of_yours_is_named_by_its_module() -> None:
    assert options_of_strategy(Brought) == {"strategy": f"{__name__}:Brought"}


def test_an_unknown_option_is_refused_with_what_there_is() -> None:
    options: Any = {"stepps": 5}
    with pytest.raises(
        UserError,
        match=r"fit\(\) has no option stepps; it has .*staleness, stall_limit, steps, steps_per_epoch, strategy",
    ):
        dlion_mpi.fit(None, ((), ()), ((), ()), **options)


def test_importing_the_package_is_light() -> None:
    code = "import json, sys, dlion_mpi; print(json.dumps([m for m in sys.modules if m.startswith('dlion_mpi')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert sorted(json.loads(done.stdout)) == ["dlion_mpi", "dlion_mpi.errors"]
    with pytest.raises(AttributeError, match="no attribute 'fits'"):
        _ = dlion_mpi.fits  # type: ignore[attr-defined]


def test_garbage_is_collected_again_after_keras_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keras", types.ModuleType("keras"))
    with backend.light():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_type_checker_sees_its_types(tmp_path: Path) -> None:
    good = "from dlion_mpi import fit, rank\n\nresult: dict[str, object] = fit(None, (1, 2), (1, 2), steps=rank())\n"
    loop = "from dlion_mpi import Exchange\n\nwith Exchange([], steps=5) as exchange:\n    exchange.step(loss=1.0)\n"
    wrong = ((good, "steps=", "stepps="), (loop, "steps=5", "steps='5'"), (loop, "loss=", "los="))
    texts = [good, loop, *(text.replace(a, b) for text, a, b in wrong)]
    files = [tmp_path / f"program{number}.py" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", *map(str, files)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        cwd=Path(dlion_mpi.__file__).parent.parent,
    )
    faulty = {line.split(":")[0].rpartition("/")[2] for line in checked.stdout.splitlines() if ": error:" in line}
    assert faulty == {file.name for file in files[2:]}, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("dlion_mpi.fit(1, 2, nope=3)", r"dlion: fit\(\) has no option nope"),
        ("dlion_mpi.fit(1, 2, target_accuracy=3)", r"dlion: .*target"),
        ("dlion_mpi.Exchange([], nope=3)", r"dlion: Exchange\(\) has no option nope"),
    ],
)
def test_a_mistake_in_a_program_is_told_in_one_line(program: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import dlion_mpi; {program}"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(said, line)


def test_other_errors_keep_their_traceback() -> None:
    program = (
        "import dlion_mpi\ntry: dlion_mpi.fit(1, 2, nope=3)\nexcept dlion_mpi.UserError: pass\nraise KeyError('x')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "KeyError: 'x'"
