"""A real Keras model's state: kept without a copy, unchanged by what training does next, and put back bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlion_mpi.learner import backend
from dlion_mpi.learner.batches import Batch
from dlion_mpi.learner.models import build, optimizer
from dlion_mpi.learner.replica import Replica
from dlion_mpi.vector.named_arrays import StateError
from tests.nets import ready
from tests.shards import byte_shard

ROWS = Batch(
    np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), np.arange(40, dtype=np.int32) % 10
)


def replica(name: str = "sgd", momentum: float = 0.0, model: str = "tests.nets:normalised") -> Replica:
    backend.start(1)
    return Replica(ready(build(model, byte_shard(), 0), ROWS, optimizer(name, 0.01, momentum)))


def steps(own: Replica, count: int, alone: bool) -> list[float]:
    """Losses of some steps."""
    losses = []
    for _ in range(count):
        if alone:
            losses.append(own.step_alone(ROWS).loss)
        else:
            gradient = own.gradient(ROWS)
            own.apply(gradient.vector)
            losses.append(gradient.loss)
    return losses


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("name", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0)])
def test_training_on_does_not_reach_what_was_kept(name: str, momentum: float, alone: bool) -> None:
    own = replica(name, momentum)
    steps(own, 2, alone)
    kept = own.to_arrays()
    copies = {name: value.copy() for name, value in kept.items()}
    first = steps(own, 3, alone)
    own.set_knowledge(own.knowledge() * np.float32(0.5))
    for name_, value in copies.items():
        np.testing.assert_array_equal(kept[name_], value, err_msg=name_)
    again = replica(name, momentum)
    again.from_arrays(kept)
    assert steps(again, 3, alone) == first, "dropout's generators, statistics and slots included"


def test_another_models_state_is_refused_and_changes_nothing() -> None:
    own, other = replica(), replica(model="tests.nets:dense")
    before: Any = own.knowledge()
    with pytest.raises(StateError):
        own.from_arrays(other.to_arrays())
    np.testing.assert_array_equal(own.knowledge(), before)
    assert own.describe() != other.describe()
