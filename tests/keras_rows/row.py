"""A row of the table: a model, its data, and the words for the docs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

BACKENDS = ("tensorflow", "jax", "torch")
GROUPS = ("layers", "models", "losses", "optimizers", "data")
TRAIN_ROWS, TEST_ROWS = 48, 16
_SHARED = 999
"""Stands for a rank in the seed of what all ranks have."""


class Data(NamedTuple):
    """Arguments of `fit`: ``train``, ``validation`` and others, such as class weights, by name."""

    train: Any
    validation: Any = None
    options: Mapping[str, Any] = {}  # never changed


Maker = Callable[[np.random.Generator, int], Any]
"""Makes that number of rows of ``(x, y)`` or ``(x, y, sample_weight)``."""


@dataclass(frozen=True)
class Row:
    """``build`` returns a compiled model, ``data`` the arguments of `fit` for a rank.

    ``steps``: number of training steps. ``needs``: modules that it imports. ``tolerance``: of weights, absolute, for
    float32 and sums in another order; more where a model computes in fewer bits.
    """

    name: str
    group: str
    text: str
    build: Callable[[], Any]
    data: Callable[[int], Data]
    backends: tuple[str, ...] = BACKENDS
    needs: tuple[str, ...] = ()
    note: str = ""
    steps: int = 4
    tolerance: float = 2e-5

    def missing(self, backend: str) -> str:
        """The reason why the row cannot run here, or nothing."""
        if backend not in self.backends:
            return f"not with Keras's {backend} backend: {self.note}"
        absent = [module for module in self.needs if find_spec(module) is None]
        return f"{', '.join(absent)} not installed" if absent else ""


@dataclass
class Rows:
    """The rows of one file, added by a decorator of their build functions."""

    group: str
    rows: list[Row] = field(default_factory=list)

    def add(self, text: str, data: Maker | Callable[[int], Data], **more: Any) -> Callable[[Callable[[], Any]], Any]:
        """Add a row with the name of the decorated function. ``data``: a maker of rows, or a function of the rank."""
        given = data if getattr(data, "of_rank", False) else arrays(data)  # type: ignore[arg-type]

        def decorate(build: Callable[[], Any]) -> Callable[[], Any]:
            name = build.__name__.strip("_").replace("_", "-")
            self.rows.append(Row(name, self.group, text, build, given, **more))  # type: ignore[arg-type]
            return build

        return decorate


def of_rank(function: Callable[[int], Data]) -> Callable[[int], Data]:
    """Mark a function that returns a rank's data, in place of a maker of rows."""
    function.of_rank = True  # type: ignore[attr-defined]
    return function


def arrays(make: Maker, *, validated: bool = True, **options: Any) -> Callable[[int], Data]:
    """Training rows that differ by rank, and test rows that all ranks share, as they were made."""

    @of_rank
    def data(rank: int) -> Data:
        return Data(training(make, rank), testing(make) if validated else None, options)

    return data


def training(make: Maker, rank: int) -> Any:
    """The training rows of a rank."""
    return make(np.random.default_rng([5, rank]), TRAIN_ROWS)


def testing(make: Maker) -> Any:
    """The test rows of all ranks."""
    return make(np.random.default_rng([5, _SHARED]), TEST_ROWS)
