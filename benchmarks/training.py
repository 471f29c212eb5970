"""A run of dlion in an environment, for benchmarks that read its metrics."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def trained(env: str, options: Sequence[str], *, seconds: float, seed: int, simulated: bool) -> Iterator[Path]:
    """Run dlion and provide the folder of the run until the context ends. Exits the program if the run fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        dlion = [sys.executable, "-m", "dlion_mpi"]
        command = [*dlion, "simulate", "--env", env]
        if not simulated:
            command = [*dlion, "emulate", "run", "--env", env, "--name", "benchmark", "--", *dlion, "train"]
        command += [*options, "--seconds", str(seconds), "--seed", str(seed), "--progress-every", "0"]
        if subprocess.run([*command, "--out", str(out)], stdout=subprocess.DEVNULL, check=False).returncode:
            sys.exit(f"the run in {env} failed")
        yield out
