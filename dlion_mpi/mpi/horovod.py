"""Horovod's all-reduce in the place of ours: what most users of MPI and TensorFlow run today.

The only module that imports Horovod, on first use. Horovod drives MPI from a thread of its own, over a duplicate of
the run's communicator.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from dlion_mpi.algorithms.ring import ring_bytes
from dlion_mpi.errors import UserError
from dlion_mpi.learner import tensorflow
from dlion_mpi.mpi.collectives import Ticket
from dlion_mpi.mpi.startup import Ranks, thread_multiple
from dlion_mpi.vector.layout import Vector

BUILD = "bash env/horovod/build.sh"


def require() -> None:
    """Raises UserError where Horovod is not installed; imports nothing."""
    if find_spec("horovod") is None:
        raise UserError(f"--strategy horovod: Horovod is not installed: build it with {BUILD}")
    if not thread_multiple():
        raise UserError("--strategy horovod: this MPI has no MPI_THREAD_MULTIPLE: use a build that has it")


def load() -> Any:
    """Horovod for TensorFlow. Raises UserError where it was built for something else than what is here."""
    try:
        import horovod.tensorflow as hvd
    except Exception as error:  # TensorFlow has errors of its own for a library that does not fit
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"--strategy horovod: Horovod does not load ({first}): build it again with {BUILD}") from None
    return hvd


class HorovodReducer:
    """Sums everyone's shares of a gradient of ``size`` entries, as `mpi.collectives.Collectives.reduce` does.

    ``hvd``: what `load` gave. ``carried``: counts the bytes of each sum, see `loop.links.Links.carried`;
    Horovod does not say them, so they are a ring's.
    """

    def __init__(self, hvd: Any, ranks: Ranks, size: int, carried: Callable[[int, int, int], None]) -> None:
        tf = tensorflow.load()
        hvd.init(comm=ranks.communicator)
        self._hvd, self._tf, self._carried = hvd, tf, carried
        self._rank, self._size = ranks.rank, ranks.size
        self._nothing = np.zeros(size, np.float32)

        # One flat tensor goes as it is; several would be copied into a buffer and out of it. An integer is not
        # fused with it either, and travels in the same round.
        @tf.function(input_signature=[tf.TensorSpec((size,), tf.float32), tf.TensorSpec((), tf.int32)])
        def total(share: Any, ended: Any) -> tuple[Any, Any]:
            return hvd.allreduce(share, op=hvd.Sum), hvd.allreduce(ended, op=hvd.Sum)

        self._total = total.get_concrete_function()

    def reduce(self, share: Vector | None) -> Ticket:
        """The sum of everyone's ``share`` (P,) float32; none if anyone gives None. Returns when it is done."""
        own = self._nothing if share is None else share
        total, ended = self._total(self._tf.convert_to_tensor(own), self._tf.constant(share is None, self._tf.int32))
        sent, received = ring_bytes(len(own), self._rank, self._size)
        self._carried((self._rank + 1) % self._size, sent, 0)
        self._carried((self._rank - 1) % self._size, 0, received)
        return Ticket(done=True, vector=self._nothing[:0] if int(ended) else np.asarray(total))

    def close(self) -> None:
        """End Horovod's thread; on all ranks together."""
        self._hvd.shutdown()
