"""The shape of the package: who may import what, which way imports run, and what is never used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import dlion_mpi

ROOT = Path(dlion_mpi.__file__).parent
MODULES = {
    ".".join(("dlion_mpi", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
LONGEST = 500
"""Lines of a module."""

MPI = {"links", "collectives", "startup", "emulation.linkprobe", "doctor"}
TENSORFLOW = {"model", "data", "doctor", "horovod_baseline", "tensorboard"}
LAZY_ONLY = {"doctor"}
"""Looks at MPI and TensorFlow only when it is asked to."""

# What a module may import of this package, at any depth of its code: the lower layers, each knowing only those
# below. What is not named here is the upper part, which `ABOVE` keeps out of these.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "plugins": {"errors"},
    "flat": set(),
    "batching": set(),
    "bandwidth": set(),
    "membership": set(),
    "update": set(),
    "arrays": {"flat"},
    "transfer": {"flat"},
    "evaluate": {"flat"},
    "wire": {"flat"},
    "select": {"flat", "wire"},
    "unsent": {"arrays", "flat", "select", "wire"},
    "config": {"errors", "wire"},
}
STRATEGIES_MAY = {"arrays", "config", "errors", "plugins", "flat", "wire", "select", "unsent", "update"}
STRATEGIES_MAY |= {"batching", "transfer"}
TRAIN_MAY_NOT = {"links", "collectives", "startup", "progress", "run", "driver", "model", "data", "cli"}
TRAIN_MAY_NOT |= {"horovod_baseline"}
"""The loop knows its surroundings only as `testbed` describes them, so that they can be simulated."""


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run, or may run, when the module is imported: all but what is inside functions."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from at_import(child)


def imported(module: str, *, top: bool = False) -> set[str]:
    """Full names that a module imports: ``a.b`` for ``import a.b``, ``a.b`` and ``a.b.c`` for ``from a.b import c``."""
    names: set[str] = set()
    nodes = at_import(tree(module)) if top else ast.walk(tree(module))
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import in line {node.lineno}"
            base = node.module or ""
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def own(module: str, *, top: bool = False) -> set[str]:
    """The package's modules that a module imports, as in ``strategies.base``."""
    prefix = "dlion_mpi."
    found = {name for name in imported(module, top=top) if name in MODULES}
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


def importers(*packages: str, top: bool = False) -> set[str]:
    return {
        module.removeprefix("dlion_mpi.")
        for module in MODULES
        if any(name.split(".")[0] in packages for name in imported(module, top=top))
    }


def test_the_walk_sees_what_there_is() -> None:
    """A rule that finds nothing anywhere would pass for ever."""
    assert {"dlion_mpi.train", "dlion_mpi.strategies.dlion", "dlion_mpi"} <= set(MODULES)
    assert "links" in importers("mpi4py", top=True)
    assert "model" in importers("keras", "tensorflow")
    assert {"select", "update", "wire"} <= own("dlion_mpi.strategies.dlion", top=True)
    assert "run" in own("dlion_mpi.cli")
    assert "run" not in own("dlion_mpi.cli", top=True)


def test_only_the_modules_that_own_mpi_import_it() -> None:
    assert importers("mpi4py") <= MPI
    assert not importers("mpi4py", top=True) & LAZY_ONLY


def test_only_the_model_and_the_data_import_tensorflow_and_only_when_used() -> None:
    assert importers("tensorflow", "keras", "horovod") <= TENSORFLOW
    assert not importers("tensorflow", "keras", "horovod", top=True)


def test_only_the_baseline_that_it_is_imports_horovod() -> None:
    assert importers("horovod") == {"horovod_baseline"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled_or_evaluated(module: str) -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    assert not {name.split(".")[0] for name in imported(module)} & forbidden
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("eval", "exec", "compile", "yaml.load"), f"line {node.lineno}"
            assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), f"line {node.lineno}"


@pytest.mark.parametrize("module", sorted(MPI - LAZY_ONLY))
def test_mpi_is_given_buffers_never_objects_to_pickle(module: str) -> None:
    """mpi4py's lower-case methods pickle what they send."""
    pickling = {
        *("send", "bsend", "ssend", "isend", "ibsend", "issend", "recv", "irecv", "mrecv", "sendrecv", "bcast"),
        *("gather", "scatter", "allgather", "alltoall", "reduce", "allreduce", "scan", "exscan"),
    }
    for node in ast.walk(tree(f"dlion_mpi.{module}")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in pickling:
            owner = ast.unparse(node.func.value).lower()
            assert not any(word in owner for word in ("comm", "mpi", "node")), f"{module}, line {node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_too_long(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("module", sorted(LAYERS))
def test_lower_layers_know_only_what_is_below_them(module: str) -> None:
    assert own(f"dlion_mpi.{module}") <= LAYERS[module]


def test_the_layers_are_layers() -> None:
    """Taken in some order, every one of them comes after all that it may import."""
    placed: set[str] = set()
    while len(placed) < len(LAYERS):
        ready = {module for module, below in LAYERS.items() if module not in placed and below <= placed}
        assert ready, f"{set(LAYERS) - placed} import each other"
        placed |= ready


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("dlion_mpi.strategies")])
def test_strategies_know_neither_the_loop_nor_mpi_nor_the_clock(module: str) -> None:
    others = {name for name in own(module) if not name.startswith("strategies")}
    assert others <= STRATEGIES_MAY
    foreign = {name.split(".")[0] for name in imported(module)}
    assert not foreign & {"time", "datetime", "threading", "os", "socket", "mpi4py", "tensorflow", "keras"}


@pytest.mark.parametrize("module", ["train", "exchange", "worker", "rounds", "testbed"])
def test_the_loop_runs_on_any_testbed(module: str) -> None:
    assert not own(f"dlion_mpi.{module}") & TRAIN_MAY_NOT
    foreign = {name.split(".")[0] for name in imported(f"dlion_mpi.{module}")}
    assert not foreign & {"time", "threading", "mpi4py", "tensorflow", "keras"}


def test_no_two_modules_need_each_other_to_be_imported() -> None:
    below = {module.removeprefix("dlion_mpi."): own(module, top=True) for module in MODULES}
    placed: set[str] = set()
    while len(placed) < len(below):
        ready = {module for module, needs in below.items() if module not in placed and needs - {module} <= placed}
        assert ready, f"{sorted(set(below) - placed)} import each other"
        placed |= ready


FIRST = """
import os, sys
class Watch:
    def find_spec(self, name, *more):
        if name == "mpi4py.MPI":
            print(os.environ.get("OMPI_MCA_btl_tcp_eager_limit"))
sys.meta_path.insert(0, Watch())
import dlion_mpi.run
"""


def test_mpi_is_not_started_before_its_settings_are_there() -> None:
    """Whoever imports mpi4py's MPI starts it: that must be `startup`, since later settings come too late."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMPI_MCA_btl_tcp")}
    command = [sys.executable, "-c", FIRST]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(8 << 20)]


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_a_module_wide_communicator(module: str) -> None:
    """COMM_WORLD is duplicated once at the start and passed on; it is named where that happens, and to abort."""
    if module in ("dlion_mpi.startup", "dlion_mpi.emulation.linkprobe", "dlion_mpi.doctor"):
        return
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and node.attr == "COMM_WORLD":
            assert module == "dlion_mpi.cli", f"line {node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_and_is_annotated_lazily(module: str) -> None:
    assert ast.get_docstring(tree(module))
    futures = {
        alias.name
        for node in tree(module).body
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
        for alias in node.names
    }
    assert "annotations" in futures
