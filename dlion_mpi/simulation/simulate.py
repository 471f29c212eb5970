"""Simulation of a training run: the loop and the strategies of `dlion train` in virtual time and in one process.

Gradients are real. The environment gives the duration of each computation and of each message. A run is deterministic:
the same options give the same result and the same metrics to the last digit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dlion_mpi.config.fields import flag
from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.microcloud import environments
from dlion_mpi.microcloud.environments import Environment

if TYPE_CHECKING:  # slow imports, done when a simulation starts so that `--help` stays fast
    from dlion_mpi.learner.shards import Shard
    from dlion_mpi.result import Result


def micro_cloud(reference: str, workers: str | int | None = None) -> Environment:
    """Return the environment of that name or file, with a different number of ``workers`` if given.

    Raises UserError if its workers differ, so that a different number is not defined.
    """
    environment = environments.load(reference)
    if workers is None:
        return environment
    try:
        wanted = int(workers)
    except ValueError:
        raise UserError(f"--workers {workers}: must be a whole number") from None
    if wanted < 1:
        raise UserError(f"--workers {wanted}: must be at least 1")
    if wanted == environment.workers:
        return environment
    phases = []
    for phase in environment.phases:
        links = [rate for row in phase.link_mbit or () for rate in row if rate]
        alike = [set(phase.cores), set(phase.uplink_mbit or ()), set(links)]
        if max(len(values) for values in alike) > 1 or (phase.link_mbit is not None and not links):
            raise UserError(
                f"--workers {wanted}: the {environment.workers} workers of environment {environment.name} differ: "
                f"omit --workers, or write an environment file for {wanted} workers"
            )
        matrix = tuple(tuple(0.0 if a == b else links[0] for b in range(wanted)) for a in range(wanted) if links)
        phases.append(
            dataclasses.replace(
                phase,
                cores=phase.cores[:1] * wanted,
                uplink_mbit=phase.uplink_mbit[:1] * wanted if phase.uplink_mbit else None,
                link_mbit=matrix or None,
            )
        )
    return dataclasses.replace(environment, workers=wanted, phases=tuple(phases))


def simulate(
    config: Config,
    environment: Environment,
    *,
    model: Any = None,
    shards: Sequence[Shard] | None = None,
    report: bool = True,
) -> Result:
    """Train on all workers of ``environment`` in virtual time.

    ``model``: a Keras model to use instead of the Config's. ``shards``: data by rank to use instead of the Config's.
    ``report``: print progress on stderr. Raises UserError.
    """
    from dlion_mpi.result import sum_up
    from dlion_mpi.simulation import free_network
    from dlion_mpi.simulation.driver import drive
    from dlion_mpi.simulation.run import prepare
    from dlion_mpi.strategies import registry as strategies

    for name in ("checkpoint_every", "save_model"):
        if getattr(config, name) is not None:
            raise UserError(f"{flag(name)} belongs to dlion train: repeat a simulated run from its seed instead")
    free = free_network.is_named(config)
    if not free and (library := strategies.find(config.strategy, also=(free_network.NAME,)).summed_by) != "mpi":
        raise UserError(
            f"--strategy {config.strategy} needs real processes, because {library} computes its sums: "
            "simulate --strategy allreduce instead"
        )
    config = free_network.resolve(config) if free else strategies.resolve(config)[1]
    exchanges = "gradients" if free else strategies.find(config.strategy).exchanges
    run = prepare(config, environment, model=model, shards=shards, report=report, exchanges=exchanges)
    with run, run.meter.shown():
        finishes = free_network.train_together(run) if free else drive(run)
        run.complete = not any(finish.exit_code for finish in finishes)
    return sum_up(config, finishes, report=report)
