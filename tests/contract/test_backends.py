"""Each of Keras's backends computes the same, within the precision of float32."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]

OTHERS = ("jax", "torch")


def environment_of(backend: str) -> Path:
    """The folder of programs of an environment that has this backend: this one, or that of env/setup.sh."""
    here = Path(sys.executable).parent
    there = ROOT / (".venv" if backend == "tensorflow" else f".venv-{backend}") / "bin"
    if find_spec(backend) is not None:
        return here
    if not (there / "dlion").exists():
        pytest.skip(f"no environment with {backend}: DLION_BACKEND={backend} bash env/setup.sh")
    return there


def computed(backend: str, path: Path, *words: str) -> dict[str, np.ndarray]:
    """The arrays that a program writes to ``path`` on this backend. ``words``: the program after `python -m`."""
    programs = environment_of(backend)
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TF_NUM_INTRAOP_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [str(programs / "python"), "-m", *words, str(path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, timeout=110, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(path) as found:
        return dict(found)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(
    ("words", "rtol", "atol"),
    [
        (("tests.contract.trajectory",), 2e-4, 2e-5),
        (("dlion_mpi", "launch", "-n", "2", "--", "python", "-m", "tests.contract.backend_run"), 1e-3, 1e-4),
    ],
    ids=["computations", "a run of two ranks"],
)
def test_a_backend_computes_what_tensorflow_does(
    words: tuple[str, ...], rtol: float, atol: float, backend: str, tmp_path: Path
) -> None:
    """Gradients, movements, updates, statistics and tests, of batches that JAX pads or not; and a seeded run."""
    found = computed(backend, tmp_path / f"{backend}.npz", *words)
    wanted = computed("tensorflow", tmp_path / "tensorflow.npz", *words)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol, err_msg=name)


def test_batches_are_padded_to_few_sizes() -> None:
    from dlion_mpi.learner.padding import padded_size

    sizes = [padded_size(size) for size in range(1, 1025)]
    assert all(size <= padded <= max(size + 1, 1.5 * size) for size, padded in enumerate(sizes, 1))
    assert len(set(sizes)) == 20


def test_a_backend_that_is_not_there_is_named() -> None:
    code = "from dlion_mpi.learner import backend; backend.start()"
    environment = {**os.environ, "KERAS_BACKEND": "openvino"}
    failed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("dlion_mpi.errors.UserError: Keras")
