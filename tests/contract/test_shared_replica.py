"""Workers that share one model compute what each would with a model of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dlion_mpi.learner.models import build, optimizer
from dlion_mpi.learner.replica import Replica
from dlion_mpi.simulation.shared_replica import SharedReplica, VirtualReplica, prepare_tensorflow

NETS = ["tests.nets:dense", "tests.nets:normalised"]
OPTIMIZERS = [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0)]


def keras_model(net: str) -> Any:
    prepare_tensorflow(1)
    return build(net, (8, 8, 1), 10, seed=3)


def batch(number: int, size: int = 16) -> tuple[Any, Any]:
    random = np.random.default_rng(number)
    x = random.integers(0, 255, (size, 8, 8, 1)).astype(np.uint8)
    return x, random.integers(0, 10, size).astype(np.int32)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("name", "momentum"), OPTIMIZERS)
def test_two_seats_are_two_replicas(net: str, name: str, momentum: float) -> None:
    """Weights, statistics, dropout's seeds and optimizer slots stay each worker's own."""
    shared = SharedReplica(keras_model(net), optimizer(name, 0.05, momentum), np.uint8)
    seats = [VirtualReplica(shared, rank) for rank in range(2)]
    replicas = [Replica(keras_model(net), optimizer(name, 0.05, momentum), np.uint8) for _ in range(2)]
    for variable in replicas[1].model.non_trainable_variables:
        if "seed" in variable.path:
            variable.assign(variable.numpy() + np.array([1, 0]))
    for number in range(4):
        for rank, (seat, replica) in enumerate(zip(seats, replicas, strict=True)):
            got, wanted = seat.gradient(*batch(10 * number + rank)), replica.gradient(*batch(10 * number + rank))
            assert got.loss == pytest.approx(wanted.loss, rel=1e-6)
            np.testing.assert_allclose(got.vector, wanted.vector, rtol=1e-4, atol=1e-6)
            for one in (seat, replica):
                one.apply(np.array(wanted.vector) * (rank + 1))
            np.testing.assert_allclose(seat.weights(), replica.weights(), rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(seat.knowledge(), replica.knowledge(), rtol=1e-5, atol=1e-6)
    assert np.abs(seats[0].weights() - seats[1].weights()).max() > 1e-3


def test_plain_sgd_done_by_hand_is_kerass_to_the_bit() -> None:
    model = keras_model(NETS[0])
    shared = SharedReplica(model, optimizer("sgd", 0.05, 0.0), np.uint8)
    seat = VirtualReplica(shared, 0)
    vector = np.random.default_rng(0).standard_normal(seat.layout.size, dtype=np.float32)
    seat.apply(vector)
    shared.apply(vector)
    np.testing.assert_array_equal(seat.weights(), shared.weights())


def decayed() -> Any:
    import keras

    return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5))


def clipped() -> Any:
    import keras

    return keras.optimizers.SGD(0.1, clipnorm=0.5)


@pytest.mark.parametrize("make", [decayed, clipped])
def test_an_optimizer_that_does_more_than_plain_sgd_is_asked_itself(make: Callable[[], Any]) -> None:
    shared = SharedReplica(keras_model(NETS[0]), make(), np.uint8)
    replica = Replica(keras_model(NETS[0]), make(), np.uint8)
    seat = VirtualReplica(shared, 0)
    for number in range(3):
        vector = np.random.default_rng(number).standard_normal(seat.layout.size, dtype=np.float32)
        seat.apply(vector)
        replica.apply(vector)
    np.testing.assert_allclose(seat.weights(), replica.weights(), rtol=1e-6, atol=1e-7)


def test_knowledge_goes_in_as_it_came_out() -> None:
    shared = SharedReplica(keras_model(NETS[1]), optimizer("sgd", 0.05, 0.0), np.uint8)
    seats = [VirtualReplica(shared, rank) for rank in range(2)]
    seats[0].apply(seats[0].gradient(*batch(1)).vector)
    seats[1].set_knowledge(seats[0].knowledge())
    np.testing.assert_array_equal(seats[1].knowledge(), seats[0].knowledge())
    kept = seats[1].knowledge()
    seats[0].apply(np.ones(seats[0].layout.size, np.float32))
    np.testing.assert_array_equal(seats[1].knowledge(), kept)
    assert shared.accuracy(kept, *batch(2, 1203)) == shared.correct(kept, *batch(2, 1203)) / 1203
