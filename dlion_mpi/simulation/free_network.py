"""Synchronous SGD with perfect balance and free communication: the limit of what a better exchange can gain in time.

All replicas are equal after every step, so one replica is computed, with the exact mean gradient over the global batch.
No messages are needed for that: `free-network` exists in `dlion simulate` only, next to the strategies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dlion_mpi.algorithms.batching import solve_lbs
from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.loop import statistics
from dlion_mpi.loop.batch_sizes import NO_LIMIT, growth
from dlion_mpi.metrics.gauges import Totals
from dlion_mpi.metrics.records import Evaluation, StepRecord
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.microcloud.environments import Pace
from dlion_mpi.result import Finish
from dlion_mpi.signals import stopped_by_signals
from dlion_mpi.simulation.run import VirtualRun
from dlion_mpi.strategies.contract import BATCHING
from dlion_mpi.strategies.registry import refuse_unused, with_room
from dlion_mpi.vector.layout import Vector

NAME = "free-network"
USES: dict[str, Any] = {"batch_size_max": BATCHING["batch_size_max"], "global_batch": "fixed"}
"""The shared options that it uses, and their defaults."""


def is_named(config: Config) -> bool:
    """Whether a Config names it instead of a strategy."""
    return config.strategy == NAME


def resolve(config: Config) -> Config:
    """Fill in the defaults of a Config that names it. Raises UserError for an option that it does not use."""
    if config.sync not in (None, "sync"):
        raise UserError(f"--strategy {NAME} does not support --sync {config.sync}: it supports sync")
    refuse_unused(config, NAME, uses=USES)
    given = {name: value for name in USES if (value := getattr(config, name)) is not None}
    return dataclasses.replace(config, sync="sync", **with_room(USES, config.batch_size) | given)


@dataclass(kw_only=True)
class Group:
    """State of all workers, which are always at the same step. By rank: ``totals``, ``shares`` of the last batch."""

    run: VirtualRun
    totals: list[Totals]
    shares: list[int]
    stop_reason: str | None = None
    exit_code: int = 0
    step: int = 0
    now_s: float = 0.0
    evaluated_s: float = 0.0
    evaluations: list[Evaluation] = field(default_factory=list)

    def ended(self) -> bool:
        """Whether the run has ended."""
        config = self.run.config
        timed_out = config.seconds is not None and self.now_s >= config.seconds
        return self.stop_reason is not None or self.step >= config.last_step or timed_out


def train_together(run: VirtualRun) -> list[Finish]:
    """Train until the run ends. Each step computes all gradients, applies their mean and advances the time."""
    workers = run.workers
    group = Group(run=run, totals=[Totals() for _ in range(workers)], shares=[1] * workers)
    evaluator = run.evaluator()
    schedule = growth(run.config, workers, run.shards[0].train_samples_global or 0)
    every = run.config.evaluate_every
    with stopped_by_signals([group]):
        while not group.ended():
            gbs = schedule.at(group.step) if schedule else run.config.batch_size * workers
            _step(group, gbs)
            _take(group, evaluator.poll())
            due = group.now_s - group.evaluated_s >= (every.seconds or math.inf)
            if run.metrics and (due or (every.steps is not None and group.step % every.steps == 0)):
                group.evaluated_s = group.now_s
                statistics.average(run.replicas, group.shares)
                evaluator.submit(group.step, group.now_s, run.replicas[0].knowledge())
    statistics.average(run.replicas, group.shares)
    run.replicas[0].finish()
    if run.metrics:
        evaluator.submit(group.step, group.now_s, run.replicas[0].knowledge())
        _take(group, evaluator.poll(wait=True))
    return [_finish(group, rank) for rank in range(workers)]


def balanced(gbs: int, paces: Sequence[Pace], limit: int) -> list[int]:
    """Divide the global batch so that all workers finish at the same time."""
    fits = [(pace.alpha_s, pace.beta_s) for pace in paces]
    return solve_lbs(min(gbs, limit * len(paces)), fits, [limit] * len(paces))


def _step(group: Group, gbs: int) -> None:
    """Do one step: divide the batch, compute all gradients, apply their mean, advance the time."""
    run, config, environment = group.run, group.run.config, group.run.environment
    paces = [environment.pace(rank, group.now_s, config.seconds) for rank in range(run.workers)]
    shares = group.shares = balanced(gbs, paces, config.batch_size_max or NO_LIMIT)
    futures = [
        run.pool.submit(replica.gradient, batches.take(lbs))
        for replica, batches, lbs in zip(run.replicas, run.batches, shares, strict=True)
    ]
    mean: Vector = np.zeros(run.shared.layout.size, np.float32)
    losses = []
    finite = True
    for future, lbs in zip(futures, shares, strict=True):
        gradient = future.result()
        losses.append(gradient.loss)
        finite = finite and gradient.finite
        mean += np.float32(lbs / sum(shares)) * gradient.vector
    if finite:
        run.replicas[0].apply(mean)
        for replica in run.replicas[1:]:
            replica.set_weights(run.replicas[0].weights())
    elif config.non_finite == "stop":
        group.stop_reason, group.exit_code = (
            f"step {group.step}: the loss or its gradient is not finite; lower --learning-rate, or leave such "
            "gradients out with --non-finite skip",
            1,
        )
        return
    _record(group, shares, [pace.seconds(lbs) for pace, lbs in zip(paces, shares, strict=True)], losses)


def _record(group: Group, shares: Sequence[int], compute_s: Sequence[float], losses: Sequence[float]) -> None:
    run = group.run
    step_s, start_s = max(compute_s), group.now_s
    group.now_s += step_s
    for rank, (lbs, own_s, loss) in enumerate(zip(shares, compute_s, losses, strict=True)):
        record = StepRecord(
            step=group.step,
            time_s=group.now_s,
            compute_s=own_s,
            paced_s=own_s,
            select_encode_s=0.0,
            wait_s=step_s - own_s,
            apply_s=0.0,
            step_s=step_s,
            loss=loss,
            lbs=lbs,
            gbs=sum(shares),
        )
        run.recorders[rank].span(Phase.COMPUTE, group.step, start_s, start_s + own_s)
        run.recorders[rank].span(Phase.WAIT, group.step, start_s + own_s, group.now_s)
        run.recorders[rank].step(record)
        group.totals[rank].add(record)
        run.meter.step(rank, record, group.evaluations)
    group.step += 1


def _take(group: Group, evaluations: Sequence[Evaluation]) -> None:
    """Record evaluations for all workers, which have the same weights."""
    for evaluation in evaluations:
        group.evaluations.append(evaluation)
        for recorder in group.run.recorders:
            recorder.evaluation(evaluation)
        target = group.run.config.target
        if target is not None and target.reached(evaluation.metrics[target.metric]):
            group.stop_reason = group.stop_reason or f"target {target} reached"


def _finish(group: Group, rank: int) -> Finish:
    test = group.evaluations[-1].metrics if group.evaluations else {}
    return Finish(
        row=group.totals[rank].row(group.now_s, test, step=group.step, bytes_sent=0),
        evaluations=group.evaluations,
        stop_reason=group.stop_reason,
        exit_code=group.exit_code,
    )
