"""How far ahead of others a worker of a run got, by what its metrics say has come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np


def leads(folder: Path, workers: int) -> list[int]:
    """For every step that a worker entered and every other worker: by how many steps it was ahead of the newest that
    it had heard from that one. All times are of the receiver's clock."""
    files: list[dict[str, Any]] = []
    for rank in range(workers):
        with h5py.File(folder / f"metrics-{rank:05d}.h5", swmr=True) as file:
            names = ("steps/step", "steps/time_s", "timeline/sent", "timeline/arrived")
            files.append({name: file[name][:] for name in names})
    found = []
    for rank, own in enumerate(files):
        for peer, other in enumerate(files):
            if peer == rank:
                continue
            sent = other["timeline/sent"][other["timeline/sent"]["peer"] == rank]
            step_of = dict(zip(sent["sequence"].tolist(), sent["step"].tolist(), strict=True))
            came = own["timeline/arrived"][own["timeline/arrived"]["peer"] == peer]
            steps = np.array([step_of[sequence] for sequence in came["sequence"].tolist()])
            for entered, at_s in zip(own["steps/step"][1:].tolist(), own["steps/time_s"][:-1], strict=True):
                found.append(int(entered) - int(max(steps[came["arrived_s"] <= at_s], default=-1)))
    return found
