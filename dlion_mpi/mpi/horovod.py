"""Sums by Horovod: what most users of MPI and TensorFlow run today.

The only module that imports Horovod, on first use. Horovod calls MPI from its own thread, over a duplicate of the
run's communicator.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from dlion_mpi.algorithms.ring import ring_bytes
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.learner import tensorflow
from dlion_mpi.mpi.collectives import Ticket
from dlion_mpi.mpi.ranks import Ranks
from dlion_mpi.mpi.startup import thread_multiple
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import ValueType

BUILD = "bash env/horovod/build.sh"


def require() -> None:
    """Raise UserError where Horovod is not installed, or cannot run. Imports nothing."""
    if find_spec("horovod") is None:
        raise UserError(f"--strategy horovod: Horovod is not installed: build it with {BUILD}")
    if not thread_multiple():
        raise UserError("--strategy horovod: this MPI has no MPI_THREAD_MULTIPLE: use a build that has it")


def load() -> Any:
    """Import Horovod for TensorFlow. Raises UserError where it was built for other libraries than those here."""
    try:
        import horovod.tensorflow as hvd
    except Exception as error:  # TensorFlow has its own errors for a library that does not fit
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"--strategy horovod: Horovod does not load ({first}): build it again with {BUILD}") from None
    return hvd


class HorovodSums:
    """Sums vectors of ``size`` entries over all ranks; see `mpi.sums.Summer`.

    ``hvd``: what `load` returned. ``carried``: counts the bytes of each sum, see `loop.links.Links.carried`. Horovod
    does not report its bytes, so a ring's are counted.
    """

    def __init__(self, hvd: Any, ranks: Ranks, size: int, carried: Callable[[int, int, int], None]) -> None:
        tf = tensorflow.load()
        hvd.init(comm=ranks.communicator)
        self._hvd, self._tf, self._carried = hvd, tf, carried
        self._rank, self._size = ranks.rank, ranks.size
        self._zeros = np.zeros(size, np.float32)

        # Horovod sends one flat tensor from where it is, and would copy several into a buffer and out of it. It does
        # not fuse an integer with floats, so the second tensor costs no copy and travels in the same round.
        @tf.function(input_signature=[tf.TensorSpec((size,), tf.float32), tf.TensorSpec((), tf.int32)])
        def total(vector: Any, ended: Any) -> tuple[Any, Any]:
            return hvd.allreduce(vector, op=hvd.Sum), hvd.allreduce(ended, op=hvd.Sum)

        self._total = total.get_concrete_function()

    def reduce(self, vector: Vector | None, value_type: ValueType = "float32") -> Ticket:
        """Sum all ranks' ``vector``, and return when that is done. If any rank's is None, there is no sum.

        Raises RunError for a vector that is not as long as the gradient, and for other values than float32.
        """
        if value_type != "float32":
            raise RunError(f"Horovod sums float32 here, not {value_type}")
        own = self._zeros if vector is None else vector
        if len(own) != len(self._zeros):
            raise RunError(f"Horovod sums vectors of {len(self._zeros)} entries here, not of {len(own)}")
        total, ended = self._total(self._tf.convert_to_tensor(own), self._tf.constant(vector is None, self._tf.int32))
        sent, received = ring_bytes(len(own), self._rank, self._size)
        self._carried((self._rank + 1) % self._size, sent, 0)
        self._carried((self._rank - 1) % self._size, 0, received)
        return Ticket(done=True, vector=self._zeros[:0] if int(ended) else np.asarray(total))

    def close(self) -> None:
        """End Horovod's thread, on all ranks together."""
        self._hvd.shutdown()
