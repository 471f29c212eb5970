"""The checkpoints of a run: ``RUN/checkpoints/step-00000500`` with a file per rank and a manifest.

A checkpoint is complete once its ``manifest.json`` exists. Rank 0 writes it after every rank has flushed its file to
the disk, with the sizes and digests that the ranks reported. A folder without a manifest is incomplete.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlion_mpi.checkpoint import file
from dlion_mpi.checkpoint.file import Damaged, Written
from dlion_mpi.errors import UserError
from dlion_mpi.vector.named_arrays import Arrays

FORMAT = 1
FOLDER, MANIFEST = "checkpoints", "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
MOST_RANKS = 1_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part of a checkpoint.

    ``step``: the next step to compute. ``time_s``: seconds from the start of the run to the snapshot. ``loss``: mean of
    the recent losses, NaN if unknown.
    """

    file: Written
    step: int
    time_s: float
    loss: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint. ``step``: number of steps that every worker has completed.

    ``parts``: by rank; None for a rank that was missing when the others ended the run.
    """

    folder: Path
    step: int
    parts: tuple[Part | None, ...]

    @property
    def ranks(self) -> int:
        """Number of ranks of the run."""
        return len(self.parts)

    @property
    def missing(self) -> list[int]:
        """The ranks without a part."""
        return [rank for rank, part in enumerate(self.parts) if part is None]

    @property
    def time_s(self) -> float:
        """Seconds from the start of the run to the last snapshot."""
        return max(part.time_s for part in self.parts if part is not None)

    @property
    def steps(self) -> list[int]:
        """The next step of each rank; `step` for one that was missing."""
        return [self.step if part is None else part.step for part in self.parts]

    @property
    def best(self) -> int:
        """Rank with the lowest recent loss."""
        losses = {rank: part.loss for rank, part in enumerate(self.parts) if part is not None}
        return min(losses, key=lambda rank: losses[rank] if math.isfinite(losses[rank]) else math.inf)

    def path(self, rank: int) -> Path:
        """Path of a rank's file."""
        return rank_path(self.folder, rank)

    def read(self, rank: int) -> tuple[Arrays, dict[str, str]]:
        """Read a rank's arrays and texts. Raises UserError if the file is damaged or missing."""
        part = self.parts[rank]
        assert part is not None
        try:
            return file.read(self.path(rank), part.file)
        except Damaged as damage:
            raise UserError(
                f"{self.path(rank)} is damaged ({damage}): --resume-earlier resumes from the checkpoint before it"
            ) from None


def folder_of(run: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return run / FOLDER / f"step-{step:08d}"


def rank_path(folder: Path, rank: int) -> Path:
    """Path of a rank's file in a checkpoint's folder."""
    return folder / f"rank-{rank:05d}.h5"


def write_manifest(folder: Path, step: int, parts: Sequence[Part | None]) -> None:
    """Write the manifest, which completes a checkpoint. Raises OSError."""
    entries = [
        None
        if part is None
        else {
            "file": rank_path(folder, rank).name,
            "bytes": part.file.size_bytes,
            "xxh3": f"{part.file.digest:016x}",
            "step": part.step,
            "time_s": part.time_s,
            "loss": part.loss if math.isfinite(part.loss) else None,
        }
        for rank, part in enumerate(parts)
    ]
    content = {"format": FORMAT, "step": step, "ranks": entries}
    file.write_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")
    file.sync_folder(folder.parent)


def complete(run: Path) -> list[Path]:
    """List the folders of complete checkpoints, the newest last."""
    return [folder for folder in _folders(run) if (folder / MANIFEST).exists()]


def incomplete(run: Path) -> list[Path]:
    """List the folders of incomplete checkpoints."""
    return [folder for folder in _folders(run) if not (folder / MANIFEST).exists()]


def read_manifest(folder: Path) -> Checkpoint:
    """Read the manifest of a complete checkpoint. Raises UserError if it is damaged."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
        if version != FORMAT:
            raise UserError(
                f"{path} has format {version}, and this version reads format {FORMAT}: resume with the version of "
                "dlion_mpi that wrote it"
            )
        entries = content["ranks"]
        if not 0 < len(entries) <= MOST_RANKS or content["step"] != _step(folder):
            raise ValueError
        parts = tuple(None if entry is None else _part(entry) for entry in entries)
        if not any(parts):
            raise ValueError
        return Checkpoint(folder, int(content["step"]), parts)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged: resume from the checkpoint before it with --resume-earlier, or remove {folder}"
        ) from None


def _part(entry: Mapping[str, Any]) -> Part:
    loss = math.nan if entry["loss"] is None else float(entry["loss"])
    written = Written(int(entry["bytes"]), int(entry["xxh3"], 16))
    return Part(written, int(entry["step"]), float(entry["time_s"]), loss)


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` complete checkpoints, and incomplete ones that are older."""
    kept = complete(run)[-keep:]
    for folder in _folders(run):
        if folder not in kept and (not kept or folder < kept[-1]):
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that a partly removed one never looks complete."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name != MANIFEST):
            path.unlink()
        folder.rmdir()


def set_aside(run: Path, after: int) -> list[Path]:
    """Rename complete checkpoints of steps later than ``after``, and remove incomplete ones.

    For a run that resumes from an earlier checkpoint and will repeat those steps. Returns the new paths.
    """
    for folder in incomplete(run):
        remove(folder)
    moved = []
    for folder in complete(run):
        if _step(folder) > after:
            target, number = folder.with_name(f"aside-{folder.name}"), 1
            while target.exists():
                number += 1
                target = folder.with_name(f"aside-{number}-{folder.name}")
            with contextlib.suppress(OSError):
                os.replace(folder, target)
                moved.append(target)
    return moved


def _folders(run: Path) -> list[Path]:
    try:
        found = [path for path in (run / FOLDER).iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1
