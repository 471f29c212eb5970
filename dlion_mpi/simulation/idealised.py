"""Synchronous SGD with communication by formula: `free-network`, the limit to compare with, and `allreduce`.

All replicas are equal after every step, so one replica is computed, with the exact mean gradient over the global batch.
These strategies exist in `dlion simulate` only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from dlion_mpi.algorithms.batching import equal_lbs, solve_lbs
from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.loop.batch_sizes import NO_LIMIT, growth
from dlion_mpi.metrics.gauges import Totals
from dlion_mpi.metrics.records import Evaluation, StepRecord
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.microcloud.environments import Environment, Pace
from dlion_mpi.result import Finish
from dlion_mpi.signals import stopped_by_signals
from dlion_mpi.simulation.network import payload_bytes_per_s
from dlion_mpi.simulation.run import VirtualRun
from dlion_mpi.strategies.contract import BATCHING
from dlion_mpi.strategies.registry import refuse_unused
from dlion_mpi.vector.layout import Vector

BATCH_OPTIONS: dict[str, Any] = {"batch_size_max": BATCHING["batch_size_max"], "global_batch": "fixed"}
"""The options that an ideal uses, and their defaults."""


class Ideal(Protocol):
    """Division of the global batch, and the cost of a step's exchange."""

    name: ClassVar[str]

    def share(self, gbs: int, paces: Sequence[Pace], limit: int) -> list[int]:
        """Return the batch size of each worker."""

    def exchange(self, environment: Environment, time_s: float, seconds: float | None, size: int) -> tuple[float, int]:
        """Return (seconds, bytes that each worker sends to the next) for a gradient of ``size`` entries."""


class FreeNetwork:
    """Perfect balance and free communication: the limit of what a better exchange can gain in time."""

    name: ClassVar[str] = "free-network"

    def share(self, gbs: int, paces: Sequence[Pace], limit: int) -> list[int]:
        """Divide the batch so that all workers finish at the same time."""
        fits = [(pace.alpha_s, pace.beta_s) for pace in paces]
        return solve_lbs(min(gbs, limit * len(paces)), fits, [limit] * len(paces))

    def exchange(self, environment: Environment, time_s: float, seconds: float | None, size: int) -> tuple[float, int]:
        """Return no cost."""
        return 0.0, 0


class AllReduce:
    """Equal batches and a ring all-reduce after the computation, as in Horovod.

    Each worker sends 2 (n - 1) / n of the gradient to the next one, in 2 (n - 1) rounds at the rate of the slowest
    link. Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms" (2009).
    """

    name: ClassVar[str] = "allreduce"

    def share(self, gbs: int, paces: Sequence[Pace], limit: int) -> list[int]:
        """Divide the batch equally."""
        return equal_lbs(min(gbs, limit * len(paces)), len(paces))

    def exchange(self, environment: Environment, time_s: float, seconds: float | None, size: int) -> tuple[float, int]:
        """Return rounds x latency + bytes / slowest link. A worker sends to one peer, which gets the whole uplink."""
        workers = environment.workers
        if workers == 1:
            return 0.0, 0
        phase = environment.phase_at(time_s, seconds)
        if phase.uplink_mbit is not None:
            slowest_mbit = min(phase.uplink_mbit)
        else:
            slowest_mbit = min(environment.rate_mbit(k, (k + 1) % workers, phase) for k in range(workers))
        sent_bytes = math.ceil(2 * (workers - 1) / workers * 4 * size)
        return 2 * (workers - 1) * environment.latency_s + sent_bytes / payload_bytes_per_s(slowest_mbit), sent_bytes


IDEALS: dict[str, type[Ideal]] = {cls.name: cls for cls in (FreeNetwork, AllReduce)}


def resolve(config: Config) -> Config:
    """Fill in the defaults of the ideal that a Config names. The global batch is fixed by default.

    Raises UserError for an option that the ideal does not use.
    """
    ideal = IDEALS[config.strategy]
    if config.sync not in (None, "sync"):
        raise UserError(f"--strategy {ideal.name} does not support --sync {config.sync}: it supports sync")
    refuse_unused(config, ideal.name, uses=BATCH_OPTIONS)
    given = {name: value for name in BATCH_OPTIONS if (value := getattr(config, name)) is not None}
    return dataclasses.replace(config, sync="sync", **BATCH_OPTIONS | given)


@dataclass(kw_only=True)
class Group:
    """State of all workers, which are always at the same step. ``losses``, ``compute_s``, ``samples``: by rank."""

    run: VirtualRun
    ideal: Ideal
    totals: list[Totals]
    stop_reason: str | None = None
    exit_code: int = 0
    step: int = 0
    now_s: float = 0.0
    evaluated_s: float = 0.0
    bytes_sent: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)

    def ended(self) -> bool:
        """Whether the run has ended."""
        config = self.run.config
        timed_out = config.seconds is not None and self.now_s >= config.seconds
        return self.stop_reason is not None or self.step >= config.last_step or timed_out


def train_together(run: VirtualRun) -> list[Finish]:
    """Train until the run ends. Each step computes all gradients, applies their mean and advances the time."""
    workers = run.workers
    group = Group(
        run=run,
        ideal=IDEALS[run.config.strategy](),
        totals=[Totals() for _ in range(workers)],
    )
    evaluator = run.evaluator()
    schedule = growth(run.config, workers, run.shards[0].train_samples_global)
    every = run.config.evaluate_every
    with stopped_by_signals([group]):
        while not group.ended():
            gbs = schedule.at(group.step) if schedule else run.config.batch_size * workers
            _step(group, gbs)
            _take(group, evaluator.poll())
            due = group.now_s - group.evaluated_s >= (every.seconds or math.inf)
            if due or (every.steps is not None and group.step % every.steps == 0):
                group.evaluated_s = group.now_s
                evaluator.submit(group.step, group.now_s, run.replicas[0].knowledge())
    run.replicas[0].finish()
    evaluator.submit(group.step, group.now_s, run.replicas[0].knowledge())
    _take(group, evaluator.poll(wait=True))
    return [_finish(group, rank) for rank in range(workers)]


def _step(group: Group, gbs: int) -> None:
    """Do one step: divide the batch, compute all gradients, apply their mean, advance the time."""
    run, config, environment = group.run, group.run.config, group.run.environment
    paces = [environment.pace(rank, group.now_s, config.seconds) for rank in range(run.workers)]
    shares = group.ideal.share(gbs, paces, config.batch_size_max or NO_LIMIT)
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
    run, workers = group.run, group.run.workers
    exchange_s, sent_bytes = group.ideal.exchange(
        run.environment, group.now_s + max(compute_s), run.config.seconds, run.shared.layout.size
    )
    step_s = max(compute_s) + exchange_s
    start_s = group.now_s
    group.now_s += step_s
    group.bytes_sent += sent_bytes
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
            bytes_sent=_link((rank + 1) % workers, group.bytes_sent),
            bytes_received=_link((rank - 1) % workers, group.bytes_sent),
        )
        run.recorders[rank].span(Phase.COMPUTE, group.step, start_s, start_s + own_s)
        run.recorders[rank].span(Phase.WAIT, group.step, start_s + own_s, group.now_s)
        run.recorders[rank].step(record)
        group.totals[rank].add(record)
        run.meter.step(rank, record, group.evaluations)
    group.step += 1


def _link(peer: int, total_bytes: int) -> Mapping[int, int]:
    return {peer: total_bytes} if total_bytes else {}


def _take(group: Group, evaluations: Sequence[Evaluation]) -> None:
    """Record evaluations for all workers, which have the same weights."""
    for evaluation in evaluations:
        group.evaluations.append(evaluation)
        for recorder in group.run.recorders:
            recorder.evaluation(evaluation)
        if group.run.config.target_accuracy is not None and evaluation.accuracy >= group.run.config.target_accuracy:
            group.stop_reason = group.stop_reason or "target accuracy reached"


def _finish(group: Group, rank: int) -> Finish:
    accuracy = group.evaluations[-1].accuracy
    return Finish(
        row=group.totals[rank].row(group.now_s, step=group.step, accuracy=accuracy, bytes_sent=group.bytes_sent),
        evaluations=group.evaluations,
        stop_reason=group.stop_reason,
        exit_code=group.exit_code,
    )
