"""Behind `dlion_mpi.fit`: arrays in place of a data set's name."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlion_mpi.cli import config_of
from dlion_mpi.data import shard_of_arrays
from dlion_mpi.run import run


def fit(model: Any, train: tuple[Any, Any], test: tuple[Any, Any], options: dict[str, Any]) -> dict[str, Any]:
    """See `dlion_mpi.fit`."""
    config = config_of({"model": model.name, "data": "arrays", **options})
    shard = shard_of_arrays(*(np.asarray(a) for a in (*train, *test)))
    outcome = run(config, model=model, shard=shard, report=options.get("progress_every", 1) != 0)
    if outcome.failure is not None:
        raise outcome.failure
    return outcome.result
