"""Behind `dlion_mpi.fit`: arrays in place of a data set's name."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlion_mpi.checkpoint.start import plan
from dlion_mpi.config.options import Config
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.learner.shards import shard_of_arrays
from dlion_mpi.mpi import startup
from dlion_mpi.run import run

OF_THE_CALL = {"model", "data", "partition", "dirichlet_alpha"}
"""Options that the arguments of `fit` stand for."""
BEGINNINGS = {"resume", "requeue", "resume_earlier"}
"""Options of ``dlion train`` that are no setting of the run."""


def fit(model: Any, train: tuple[Any, Any], test: tuple[Any, Any], options: dict[str, Any]) -> dict[str, Any]:
    """See `dlion_mpi.fit`."""
    known = ({f.name for f in dataclasses.fields(Config)} - OF_THE_CALL) | BEGINNINGS
    for name in options:
        if name not in known:
            raise UserError(f"fit() has no option {name}; it has {', '.join(sorted(known))}")
    strategy = options.get("strategy")
    if isinstance(strategy, type):
        options = {**options, "strategy": f"{strategy.__module__}:{strategy.__qualname__}"}
    if not options.get("resume"):  # else what the run has; whether the model fits, its checkpoint says
        options = {"model": model.name, "data": "arrays", **options}
    config, start = plan(options)
    try:
        outcome = run(
            config,
            model=model,
            own_data=lambda: shard_of_arrays(*train, *test),
            report=config.progress_every > 0,
            start=start,
        )
    except UserError:  # on all ranks
        raise
    except Exception:
        startup.end_if_shared(1)
        raise
    if outcome.exit_code:
        raise RunError(str(outcome.summary["stopped"]))
    return outcome.summary
