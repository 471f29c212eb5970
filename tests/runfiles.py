"""Folders of runs that nobody trained: written by the package's own recorder, with numbers that can be reckoned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlion_mpi.config.options import Config
from dlion_mpi.metrics.recorder import Recorder
from dlion_mpi.metrics.records import Evaluation, StepRecord, Transfer
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.wire import Header, Kind

METRICS = ("val_loss", "accuracy")
STEP_S = 0.5
"""A step of worker 0; worker k takes k + 1 times as long."""


def record(rank: int, workers: int, step: int) -> StepRecord:
    """A step: half of it computing, a quarter waiting, a tenth each selecting and applying, the rest nothing."""
    step_s = STEP_S * (rank + 1)
    peers = [peer for peer in range(workers) if peer != rank]
    return StepRecord(
        step=step,
        time_s=step_s * (step + 1),
        compute_s=0.5 * step_s,
        paced_s=0.2 * step_s,
        select_encode_s=0.1 * step_s,
        wait_s=0.25 * step_s,
        apply_s=0.1 * step_s,
        step_s=step_s,
        loss=2.0 / (step + 1),
        lbs=32 // (rank + 1),
        gbs=32 * workers,
        quality={peer: 10.0 + peer for peer in peers if step % 2 == 0},
        bytes_sent={peer: 1000 * (step + 1) * (peer + 1) for peer in peers},
        bytes_received=dict.fromkeys(peers, 1000 * (step + 1) * (rank + 1)),
        bytes_per_s=dict.fromkeys(peers, 8000.0),
        age_s={peer: 0.25 for peer in peers if step % 2 == 0},
        age_steps={peer: 1.5 for peer in peers if step % 2 == 0},
    )


def tested(time_s: float, rank: int, workers: int) -> dict[str, float]:
    """A test of a worker. By loss worker 0 is the worst, though by accuracy the best."""
    accuracy = min(1.0, 0.01 * time_s**0.5 + 0.1 * (workers - rank))
    return {"accuracy": accuracy, "val_loss": 3.0 / (1.0 + time_s) + 0.5 * (workers - rank)}


def write(folder: Path, rank: int, workers: int, steps: int, **attributes: Any) -> Recorder:
    """A rank's file, flushed and still open: accuracy rises with the root of time, worker 0 knows the most."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"config": Config(seconds=60.0).to_toml(), "versions": json.dumps({"numpy": "2.0"}), "host": "edge"}
    recorder = Recorder(
        folder, rank, workers, {**about, "python": "3.11", "mpi": "none", "samples": 100, **attributes}, metrics=METRICS
    )
    for step in range(steps):
        now = record(rank, workers, step)
        recorder.step(now)
        if step % 4 == 3:
            recorder.evaluation(Evaluation(step, now.time_s, tested(now.time_s, rank, workers)))
        if step % 10 == 9:
            recorder.transfer(Transfer(step + 1, 0, rank != 0, step - 1, 4_000_000 * (rank != 0)), now.time_s)
    recorder.flush()
    return recorder


def make_run(
    folder: Path, *, workers: int = 3, steps: int = 40, ended: bool = True, timeline: bool = False, **attributes: Any
) -> Path:
    """A whole run in a folder; ``attributes`` in place of those that it would have."""
    for rank in range(workers):
        recorder = write(folder, rank, workers, steps, **attributes)
        if timeline:
            write_timeline(recorder, rank, workers, steps)
        recorder.close(complete=ended)
    return folder


TRANSIT_S = 0.3


def posted_s(rank: int, step: int) -> float:
    """When a rank has handed its messages of a step to its links."""
    return STEP_S * (rank + 1) * (step + 0.6)


def write_timeline(recorder: Recorder, rank: int, workers: int, steps: int) -> None:
    """When what `record` says was done; a message of 1000 bytes to every peer in each step, used where it arrives."""
    step_s = STEP_S * (rank + 1)
    for step in range(steps):
        parts = [
            (Phase.COMPUTE, 0.0, 0.5),
            (Phase.SELECT, 0.5, 0.6),
            (Phase.WAIT, 0.6, 0.85),
            (Phase.APPLY, 0.85, 0.95),
        ]
        for phase, start, end in parts:
            recorder.span(phase, step, step_s * (step + start), step_s * (step + end))
        if step % 10 == 9:
            recorder.span(Phase.TRANSFER, step - 1, step_s * step, step_s * (step + 1))
        for peer in set(range(workers)) - {rank}:
            header = Header(
                kind=Kind.GRADIENT,
                sender=rank,
                epoch=0,
                step=step,
                sequence=step + 1,
                acknowledged=0,
                quality=10.0 + peer,
                computed_at=step_s * (step + 0.5),
            )
            recorder.sent(peer, header, 1000, posted_s(rank, step))
    end_s = step_s * steps
    for peer in set(range(workers)) - {rank}:
        for step in range(steps):
            arrived_s = posted_s(peer, step) + TRANSIT_S
            if arrived_s < end_s:
                recorder.arrived(peer, step + 1, arrived_s)
                header = Header(kind=Kind.GRADIENT, sender=peer, epoch=0, step=step, sequence=step + 1, acknowledged=0)
                recorder.applied(header, int(arrived_s / step_s), arrived_s)
