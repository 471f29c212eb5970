"""How a run goes on: reading a checkpoint on all ranks, and putting a worker back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlion_mpi.checkpoint import file, folder, snapshot
from dlion_mpi.checkpoint.folder import Checkpoint
from dlion_mpi.checkpoint.start import Start
from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.log import say
from dlion_mpi.loop.links import Links
from dlion_mpi.loop.ports import Batches, Replica
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.files import next_part
from dlion_mpi.mpi import startup
from dlion_mpi.mpi.startup import Ranks, together
from dlion_mpi.vector.named_arrays import Arrays, StateError, integer

FORMAT = "3"
"""Of the arrays in a rank's file."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What this rank goes on from. ``moved``: with another number of ranks, from the best of the old ones."""

    checkpoint: Checkpoint
    arrays: Arrays
    texts: dict[str, str]
    moved: bool
    rank: int

    @property
    def own_step(self) -> int:
        """Where this rank's snapshot was taken; -1 if it had none."""
        return -1 if self.moved else self.checkpoint.parts[self.rank].step

    def restore(self, w: Worker, replica: Replica, batches: Batches, links: Links[Any]) -> None:
        """Put a worker that has just been made back. Raises UserError for a checkpoint of another model."""
        path = self.checkpoint.path(self.checkpoint.best if self.moved else self.rank)
        if self.texts.get("variables") != replica.describe():
            raise UserError(
                f"{path} is of another model, with variables {_short(self.texts.get('variables'))}; this run has "
                f"{_short(replica.describe())}: resume with the same --model and data"
            )
        try:
            if self.moved:
                snapshot.restore_elsewhere(w, self.arrays)
                batches.start_epoch(integer(self.arrays, "data/epoch") + 1)
                return
            snapshot.restore(w, self.arrays, {rank: part.step for rank, part in enumerate(self.checkpoint.parts)})
            for peer, (sent, received) in snapshot.links_of(self.arrays).items():
                links.carried(peer, sent, received)
        except StateError as error:
            raise UserError(f"{path} does not fit this run ({error}): resume with the version that wrote it") from None


def _short(text: str | None) -> str:
    return text if text is not None and len(text) < 120 else f"{text or 'unknown'}"[:117] + "..."


def load(ranks: Ranks, start: Start, *, report: bool) -> Loaded | None:
    """What to go on from, read and checked on all ranks; None for a beginning. Raises UserError on all ranks."""
    if start.run is None:
        return None
    run = start.run
    names = startup.gather_text(ranks.communicator, "\n".join(path.name for path in folder.complete(run)))[0].split()
    if not names and not start.or_over:
        raise UserError(f"--resume {run}: has no checkpoint to go on from", quiet=ranks.rank != 0)
    for name in reversed(names):
        try:
            loaded = together(ranks, lambda name=name: _read(run / folder.FOLDER / name, ranks))  # type: ignore[misc]
        except UserError as error:
            if not start.earlier or name == names[0]:
                raise
            if ranks.rank == 0:
                say(f"dlion: {error}")
            continue
        if ranks.rank == 0:
            _tell(loaded, ranks, run, report)
        return loaded
    if ranks.rank == 0:
        folder.set_aside(run, -1)
    return None


def _read(path: Path, ranks: Ranks) -> Loaded:
    checkpoint = folder.read_manifest(path)
    moved = checkpoint.ranks != ranks.size
    arrays, texts = checkpoint.read(checkpoint.best if moved else ranks.rank)
    if texts.get("format") != FORMAT:
        raise UserError(f"{path} has format {texts.get('format')}, this program reads {FORMAT}")
    return Loaded(checkpoint=checkpoint, arrays=arrays, texts=texts, moved=moved, rank=ranks.rank)


def _tell(loaded: Loaded, ranks: Ranks, run: Path, report: bool) -> None:
    """Rank 0: say where it goes on, and put later checkpoints out of the way."""
    checkpoint = loaded.checkpoint
    for path in folder.set_aside(run, checkpoint.step):
        say(f"dlion: a later checkpoint is not gone on from, and kept as {path}")
    if not report:
        return
    if loaded.moved:
        say(
            f"dlion: {checkpoint.folder} was taken by {checkpoint.ranks} rank{'s' * (checkpoint.ranks > 1)}, now there "
            f"are {ranks.size}: all go on from the weights of rank {checkpoint.best}, the best, at step "
            f"{checkpoint.parts[checkpoint.best].step}; the data is dealt anew, what had not been sent is left behind"
        )
    else:
        say(f"dlion: goes on from {checkpoint.folder}, {checkpoint.time_s:.1f} s into the run")


def prepare_folder(config: Config, start: Start, ranks: Ranks) -> int:
    """Rank 0: the folder of a run that goes on. Returns the number of its new part, on all ranks. Raises UserError."""
    assert start.run is not None
    part, run = 0, start.run
    if ranks.rank == 0:
        try:
            file.write_text(run / "config.toml", config.to_toml())
            part = next_part(run)
        except OSError as error:
            raise UserError(f"{run}: cannot be written ({error.strerror})") from None
    return part


def about(loaded: Loaded | None) -> str:
    """What a part of the metrics says of the parts before it: up to which step of every rank they count (JSON)."""
    if loaded is None:
        return json.dumps({"steps": [], "time_s": 0.0})
    checkpoint = loaded.checkpoint
    return json.dumps({"steps": [part.step for part in checkpoint.parts], "time_s": checkpoint.time_s})
