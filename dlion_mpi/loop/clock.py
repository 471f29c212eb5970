"""The clocks of a worker, and the scopes that it times by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Scope:
    """A timed scope; ``discarded``: as if it had not been timed."""

    start_s: float
    start_cpu_s: float
    discarded: bool = False


@dataclass(slots=True)
class Clock:
    """The clocks that a worker reads, and the timed scopes that are open.

    ``now_s``: seconds on the run's common clock, 0 when training begins. ``cpu_s``: processor seconds of the calling
    thread.
    """

    now_s: Callable[[], float]
    cpu_s: Callable[[], float] = lambda: 0.0
    nested_s: list[float] = field(default_factory=list)
    """By open scope, the seconds of the scopes inside it."""
