"""Provenance of a result: versions and commit."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("dlion-mpi", "mpi4py", "numpy", "h5py", "keras", "tensorflow", "tensorflow-cpu", "jax", "torch")
"""Packages whose versions must be equal on all ranks and are recorded."""


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions that all ranks must share, and Keras's backend where the environment names one."""
    found = {"backend": os.environ["KERAS_BACKEND"]} if "KERAS_BACKEND" in os.environ else {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@functools.cache
def commit() -> str:
    """Return the git commit of the package in a checkout, else an empty text."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
