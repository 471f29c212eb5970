"""Each of Keras's backends computes the same, within the precision of float32."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.contract.trajectory import trajectory

ROOT = Path(__file__).resolve().parents[2]
needs_jax = pytest.mark.skipif(find_spec("jax") is None, reason="jax is not installed: pip install 'dlion-mpi[jax]'")


@needs_jax
def test_jax_computes_what_tensorflow_does(tmp_path: Path) -> None:
    """Gradients of batches that are padded and of batches that cannot be, updates, statistics and tests."""
    command = [sys.executable, "-m", "tests.contract.trajectory", str(tmp_path / "jax.npz")]
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=110)
    wanted = trajectory()
    with np.load(tmp_path / "jax.npz") as found:
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_a_backend_that_is_not_there_is_named() -> None:
    code = "from dlion_mpi.learner import backend; backend.start()"
    environment = {**os.environ, "KERAS_BACKEND": "openvino"}
    failed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("dlion_mpi.errors.UserError: Keras")
