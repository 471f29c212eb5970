"""The shape of the package: which room may import which, and what is never used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dlion_mpi

ROOT = Path(dlion_mpi.__file__).parent
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
LONGEST = 500
"""Lines of a file."""
MOST_AT_THE_TOP = 16

# Bottom up: a room imports only from rooms on earlier lines.
ORDER = """
errors.py
plugins.py
vector
wire
algorithms
log.py signals.py provenance.py config
metrics strategies
learner loop
microcloud view
mpi
result.py files.py
checkpoint simulation emulation
run.py own_run.py
api.py own_loop.py
report
trace
commands
cli.py
__init__.py __main__.py
"""
LEVEL = {room: level for level, line in enumerate(ORDER.strip().splitlines()) for room in line.split()}


def imports(path: Path, *, top: bool = False) -> Iterator[str]:
    """Full names that a file imports; ``top``: only those that run when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in at_import(tree) if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may run when a file is imported: all but what is inside functions."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from at_import(child)


def room(path: str) -> str:
    return Path(path).parts[0]


def imported_rooms(file: str) -> set[str]:
    found = set()
    for name in imports(FILES[file]):
        parts = name.split(".")
        if parts[0] == "dlion_mpi" and len(parts) > 1:
            found.add(parts[1] if (ROOT / parts[1]).is_dir() else f"{parts[1]}.py")
    return {name for name in found if name in LEVEL} - {room(file)}


def importers(*packages: str, top: bool = False) -> set[str]:
    return {
        room(file) for file, path in FILES.items() if {n.split(".")[0] for n in imports(path, top=top)} & set(packages)
    }


@pytest.mark.parametrize("file", FILES)
def test_imports_run_one_way(file: str) -> None:
    below = {name for name, level in LEVEL.items() if level < LEVEL[room(file)]}
    assert imported_rooms(file) <= below


def test_every_room_has_its_place_and_few_files_stand_at_the_top() -> None:
    assert {room(file) for file in FILES} == set(LEVEL)
    assert len([file for file in FILES if "/" not in file]) <= MOST_AT_THE_TOP


def test_only_mpi_imports_mpi4py_and_only_the_learner_imports_keras() -> None:
    assert importers("mpi4py") == {"mpi"}
    assert importers("tensorflow", "keras", "torch", "jax") == {"learner"}
    assert importers("horovod") == {"mpi"}
    assert not importers("tensorflow", "keras", "torch", "jax", "horovod", top=True)


def test_nobody_outside_mpi_is_handed_a_communicator() -> None:
    knowing = {room(file) for file, path in FILES.items() if "communicator" in path.read_text(encoding="utf-8").lower()}
    assert knowing == {"mpi"}


@pytest.mark.parametrize("folder", ["loop", "strategies", "algorithms", "wire", "vector"])
def test_the_algorithm_knows_no_clock_no_thread_and_no_backend(folder: str) -> None:
    foreign = {"time", "datetime", "threading", "socket", "mpi4py", "tensorflow", "keras", "torch", "jax"}
    for file in FILES:
        if room(file) == folder:
            assert not {name.split(".")[0] for name in imports(FILES[file])} & foreign, file


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_unpickled_or_evaluated(file: str) -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    assert not {name.split(".")[0] for name in imports(FILES[file])} & forbidden
    for node in ast.walk(ast.parse(FILES[file].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("eval", "exec", "compile", "yaml.load"), f"line {node.lineno}"
            assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), f"line {node.lineno}"


@pytest.mark.parametrize("file", [file for file in FILES if room(file) == "mpi"])
def test_mpi_is_given_buffers_never_objects_to_pickle(file: str) -> None:
    """mpi4py's lower-case methods pickle what they send."""
    pickling = {
        *("send", "bsend", "ssend", "isend", "ibsend", "issend", "recv", "irecv", "mrecv", "sendrecv", "bcast"),
        *("gather", "scatter", "allgather", "alltoall", "reduce", "allreduce", "scan", "exscan"),
    }
    for node in ast.walk(ast.parse(FILES[file].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in pickling:
            owner = ast.unparse(node.func.value).lower()
            assert not any(word in owner for word in ("comm", "mpi", "node")), f"{file}, line {node.lineno}"


@pytest.mark.parametrize("file", FILES)
def test_files_are_short_and_say_what_they_are(file: str) -> None:
    text = FILES[file].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert ast.get_docstring(ast.parse(text))
    assert "from __future__ import annotations" in text


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
    """Whoever imports mpi4py's MPI starts it, and later settings come too late."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMPI_MCA_btl_tcp")}
    command = [sys.executable, "-c", FIRST]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(8 << 20)]
