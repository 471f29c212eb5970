"""Resuming a run: read a checkpoint on all ranks, and set the workers to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dlion_mpi.checkpoint import file, folder, snapshot
from dlion_mpi.checkpoint.folder import Checkpoint
from dlion_mpi.checkpoint.start import Start
from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.log import say
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.files import next_part
from dlion_mpi.mpi.ranks import Ranks
from dlion_mpi.vector.named_arrays import Arrays, StateError, integer

FORMAT = "4"
"""Of the arrays in a rank's file."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The snapshot that this rank resumes from. ``moved``: the best rank's, since the number of ranks has changed or
    a part is missing."""

    checkpoint: Checkpoint
    arrays: Arrays
    texts: dict[str, str]
    moved: bool
    rank: int

    @property
    def own_step(self) -> int:
        """The step of this rank's own snapshot; -1 if it has none."""
        return -1 if self.moved else self.checkpoint.steps[self.rank]

    @property
    def step(self) -> int:
        """The step at which this rank resumes."""
        return snapshot.step_of(self.arrays)

    def restore(self, w: Worker) -> None:
        """Set a new worker to its snapshot. Raises UserError for a checkpoint of another model."""
        path = self.checkpoint.path(self.checkpoint.best if self.moved else self.rank)
        if self.texts.get("variables") != w.replica.describe():
            raise UserError(
                f"{path} is of another model, with variables {_short(self.texts.get('variables'))}; this run has "
                f"{_short(w.replica.describe())}: resume with the same --model and data"
            )
        try:
            if self.moved:
                snapshot.restore_elsewhere(w, self.arrays)
                w.batches.start_epoch(integer(self.arrays, "data/epoch") + 1)
                return
            snapshot.restore(w, self.arrays, dict(enumerate(self.checkpoint.steps)))
            for peer, (sent, received) in snapshot.links_of(self.arrays).items():
                w.links.carried(peer, sent, received)
        except StateError as error:
            raise UserError(f"{path} does not fit this run ({error}): resume with the version that wrote it") from None


def _short(text: str | None) -> str:
    return text if text is not None and len(text) < 120 else f"{text or 'unknown'}"[:117] + "..."


def load(ranks: Ranks, start: Start, *, report: bool) -> Loaded | None:
    """Read and check the snapshot to resume from, on all ranks; None for a new run. Raises UserError on all ranks."""
    if start.run is None:
        return None
    run = start.run
    names = ranks.gather_text("\n".join(path.name for path in folder.complete(run)))[0].split()
    if not names and not start.or_over:
        raise UserError(f"--resume {run}: has no checkpoint to resume from", quiet=ranks.rank != 0)
    for name in reversed(names):
        try:
            loaded = ranks.together(lambda name=name: _read(run / folder.FOLDER / name, ranks))  # type: ignore[misc]
        except UserError as error:
            if not start.earlier or name == names[0]:
                raise
            if ranks.rank == 0:
                say(f"dlion: {error}")
            continue
        if ranks.rank == 0:
            _tell(loaded, ranks, report)
        return loaded
    return None


def _read(path: Path, ranks: Ranks) -> Loaded:
    checkpoint = folder.read_manifest(path)
    moved = checkpoint.ranks != ranks.size or bool(checkpoint.missing)
    arrays, texts = checkpoint.read(checkpoint.best if moved else ranks.rank)
    if texts.get("format") != FORMAT:
        raise UserError(f"{path} has format {texts.get('format')}, this program reads {FORMAT}")
    return Loaded(checkpoint=checkpoint, arrays=arrays, texts=texts, moved=moved, rank=ranks.rank)


def _tell(loaded: Loaded, ranks: Ranks, report: bool) -> None:
    """Say on rank 0 where the run resumes."""
    checkpoint = loaded.checkpoint
    if not report:
        return
    if loaded.moved:
        taken = f"was taken by {checkpoint.ranks} rank{'s' * (checkpoint.ranks > 1)}, now there are {ranks.size}"
        if missing := checkpoint.missing:
            taken = f"was taken without rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        say(
            f"dlion: {checkpoint.folder} {taken}: all resume from the weights of rank {checkpoint.best}, the best, at "
            f"step {checkpoint.steps[checkpoint.best]}; the data is dealt again, and residuals are dropped"
        )
    else:
        say(f"dlion: resumes from {checkpoint.folder}, {checkpoint.time_s:.1f} s into the run")


def part_of(ranks: Ranks, run: Path) -> int:
    """Return the number of the new part of a run that resumes. Raises UserError on all ranks."""

    def counted() -> int:
        try:
            return next_part(run) if ranks.rank == 0 else 0
        except OSError as error:
            raise UserError(f"{run}: cannot be read ({error.strerror})") from None

    return int(ranks.gather_numbers(ranks.together(counted))[0, 0])


def accept(ranks: Ranks, config: Config, run: Path, loaded: Loaded | None) -> None:
    """Change the folder of a run that does resume: write the new options, set later checkpoints aside.

    Rank 0 does that for all. Raises UserError on all ranks.
    """

    def change() -> None:
        if ranks.rank != 0:
            return
        try:
            file.write_text(run / "config.toml", config.to_toml())
        except OSError as error:
            raise UserError(f"{run}: cannot be written ({error.strerror})") from None
        for path in folder.set_aside(run, -1 if loaded is None else loaded.checkpoint.step):
            say(f"dlion: a later checkpoint is not used, and kept as {path}")

    ranks.together(change)


def about(loaded: Loaded | None) -> str:
    """Return what a part of the metrics says of the parts before it (JSON): which steps of each rank count."""
    if loaded is None:
        return json.dumps({"steps": [], "time_s": 0.0})
    checkpoint = loaded.checkpoint
    return json.dumps({"steps": checkpoint.steps, "time_s": checkpoint.time_s})
