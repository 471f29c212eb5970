"""Configs in tests: a strategy's own options by their short names, and the constants of long runs made small."""

from __future__ import annotations

from typing import Any

import pytest

from dlion_mpi.algorithms import batching
from dlion_mpi.config.fields import declared
from dlion_mpi.config.options import Config
from dlion_mpi.strategies.given import values_of
from dlion_mpi.strategies.registry import STRATEGIES


def full_names(options: dict[str, Any]) -> dict[str, Any]:
    """``max_n`` as ``dlion.max_n``, and so on: those of the chosen strategy's own under their full names."""
    cls = STRATEGIES.get(options.get("strategy", "dlion"))
    own = {f.name for f in declared(cls.Options)} if cls is not None else set()
    return {f"{options.get('strategy', 'dlion')}.{n}" if n in own else n: value for n, value in options.items()}


def config(**options: Any) -> Config:
    """The Config of options by name, of the strategy's own by their short names. None: not given."""
    named = full_names({name: value for name, value in options.items() if value is not None})
    values = values_of(named)
    assert values.keys() == named.keys(), f"no options: {sorted(named.keys() - values.keys())}"
    return Config.of(values)


def grow_soon(
    patched: pytest.MonkeyPatch,
    *,
    every: int,
    samples: int = 32,
    warmup: float = 1.0,
    factor: float = 1.5,
    most: float = 1.0,
) -> None:
    """Let the global batch grow within a short run."""
    values = {"GROW_EVERY": every, "WARMUP_SAMPLES": samples, "WARMUP_SHARE": warmup, "SPEEDUP": factor}
    for name, value in (values | {"LARGEST_SHARE": most}).items():
        patched.setattr(batching, name, value)
