"""Train one deep-learning model across unequal machines and slow links, over MPI.

Source of the system: R. Hong and A. Chandra, "DLion: Decentralized Distributed Deep Learning in Micro-Clouds",
HPDC 2021, doi 10.1145/3431379.3460643.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlion_mpi.errors import RunError, UserError

__version__ = "0.1.0"
__all__ = ["Exchange", "RunError", "UserError", "__version__", "fit", "rank", "size"]

if TYPE_CHECKING:
    from dlion_mpi.api import fit, rank, size
    from dlion_mpi.own_loop import Exchange
else:

    def __getattr__(name: str) -> Any:
        """Import the training functions on first use, so that ``import dlion_mpi`` is fast."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from dlion_mpi import api, own_loop

        return own_loop.Exchange if name == "Exchange" else getattr(api, name)
