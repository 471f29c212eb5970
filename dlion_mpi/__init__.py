"""Train one deep-learning model across unequal machines and slow links, over MPI.

Source of the system: R. Hong and A. Chandra, "DLion: Decentralized Distributed Deep Learning in Micro-Clouds",
HPDC 2021, doi 10.1145/3431379.3460643.
"""

from __future__ import annotations

from typing import Any

from dlion_mpi.errors import RunError, UserError

__version__ = "0.1.0"
__all__ = ["RunError", "UserError", "__version__", "fit", "rank", "size"]


def rank() -> int:
    """This process's MPI rank, from 0: to choose its part of the data. Starts MPI as `fit` wants it."""
    from dlion_mpi.mpi import startup

    return startup.world()[0]


def size() -> int:
    """How many MPI ranks there are. Starts MPI as `fit` wants it."""
    from dlion_mpi.mpi import startup

    return startup.world()[1]


def fit(model: Any, train: tuple[Any, Any], test: tuple[Any, Any], **options: Any) -> dict[str, Any]:
    """Train a Keras model on all MPI ranks, each with its own data; afterwards ``model`` has the trained weights.

    ``train``, ``test``: this rank's (x, y): x (m, F), (m, H, W) or (m, H, W, C) of uint8 or float, y (m,) whole
    numbers. ``options``: the options of ``dlion train`` by name, for example ``strategy="dlion"``, ``steps=500``;
    ``strategy`` may also be a class of your own, from the top level of a module. ``resume="runs/a"`` goes on with a
    run from its newest checkpoint, with its options but for those given now; ``requeue`` and ``resume_earlier`` are
    as on the command line.
    A compiled model keeps its optimizer and loss. Returns the run's JSON object, the same on every rank.
    Raises UserError for a mistake in the options or the data, RunError if the run failed.
    """
    from dlion_mpi import api

    return api.fit(model, train, test, options)
