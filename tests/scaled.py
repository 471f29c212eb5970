"""A strategy as a user would bring it, with an option of its own: Baseline, but for the size of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlion_mpi.config.fields import at_least, option
from dlion_mpi.strategies.baseline import Baseline, Mean
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.types import Effect, LocalUpdate, Weights
from dlion_mpi.wire import Message


class Scaled(Baseline):
    """The mean of all gradients, times ``--scaled.factor``."""

    name = "scaled"

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        factor: float = option(1.0, "factor of the mean gradient", bounds=at_least(0))

    options: Options

    def incoming(self, state: Mean, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Effect:
        effect = super().incoming(state, local, weights, messages)
        assert effect.gradient is not None
        effect.gradient[:] *= np.float32(self.options.factor)
        return effect
