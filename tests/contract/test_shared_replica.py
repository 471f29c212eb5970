"""Workers that share one model compute what each would with a model of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.learner import backend
from dlion_mpi.learner.batches import Batch
from dlion_mpi.learner.models import build, optimizer
from dlion_mpi.learner.replica import Replica
from dlion_mpi.simulation.shared_replica import SharedReplica, VirtualReplica
from tests.nets import ready
from tests.shards import byte_shard

NETS = ["tests.nets:dense", "tests.nets:normalised"]
OPTIMIZERS = [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0)]


def keras_model(net: str) -> Any:
    backend.start(1)
    return build(net, byte_shard(), 3)


def shared_of(model: Any, optimizer: Any, rows: Batch | None = None) -> SharedReplica:
    rows = batch(0) if rows is None else rows
    return SharedReplica(ready(model, rows, optimizer), tests=rows)


def real_of(model: Any, optimizer: Any, rank: int = 0, rows: Batch | None = None) -> Replica:
    rows = batch(0) if rows is None else rows
    return Replica(ready(model, rows, optimizer), rank, tests=rows)


def batch(number: int, size: int = 16) -> Batch:
    random = np.random.default_rng(number)
    x = random.integers(0, 255, (size, 8, 8, 1)).astype(np.uint8)
    return Batch(x, random.integers(0, 10, size).astype(np.int32))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("name", "momentum"), OPTIMIZERS)
def test_two_virtual_replicas_are_two_replicas(net: str, name: str, momentum: float) -> None:
    """Each worker keeps its weights, statistics, dropout's seeds and optimizer slots."""
    shared = shared_of(keras_model(net), optimizer(name, 0.05, momentum))
    virtual = [VirtualReplica(shared, rank) for rank in range(2)]
    real = [real_of(keras_model(net), optimizer(name, 0.05, momentum), rank) for rank in range(2)]
    for number in range(4):
        for rank, (one, other) in enumerate(zip(virtual, real, strict=True)):
            got, wanted = one.gradient(batch(10 * number + rank)), other.gradient(batch(10 * number + rank))
            assert got.loss == pytest.approx(wanted.loss, rel=1e-6)
            np.testing.assert_allclose(got.vector, wanted.vector, rtol=1e-4, atol=1e-6)
            for replica in (one, other):
                replica.apply(np.array(wanted.vector) * (rank + 1))
            np.testing.assert_allclose(one.weights(), other.weights(), rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(one.knowledge(), other.knowledge(), rtol=1e-5, atol=1e-6)
    assert np.abs(virtual[0].weights() - virtual[1].weights()).max() > 1e-3


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("name", "momentum"), OPTIMIZERS)
@pytest.mark.parametrize("kind", ["real", "virtual"])
def test_a_movement_is_what_kerass_training_step_does(kind: str, net: str, name: str, momentum: float) -> None:
    """The weights stay, the optimizer and the statistics are as after the step."""
    model, plain = (ready(keras_model(net), batch(0), optimizer(name, 0.05, momentum)) for _ in range(2))
    replica = Replica(model) if kind == "real" else VirtualReplica(SharedReplica(model), 0)
    for number in range(3):
        before = replica.weights()
        moved = replica.movement(batch(number))
        np.testing.assert_array_equal(replica.weights(), before)
        replica.move(moved.vector)
        wanted = plain.model.train_on_batch(batch(number).x, batch(number).y, return_dict=True)
        plain.model.reset_metrics()
        assert moved.loss == pytest.approx(wanted["loss"], rel=1e-5)
        after = np.concatenate([np.ravel(v.numpy()) for v in (*plain.trainable, *plain.statistics)])
        np.testing.assert_allclose(replica.knowledge(), after, rtol=1e-5, atol=1e-6)
        assert np.abs(moved.vector).max() > 1e-4


@pytest.mark.parametrize("kind", ["real", "virtual"])
def test_ranks_drop_other_units(kind: str) -> None:
    """A dropout layer gives each rank and step other units, and a rank the same ones each time it is built."""

    def losses(rank: int) -> list[float]:
        model, sgd = keras_model(NETS[1]), optimizer("sgd", 0.05, 0.0)
        replica = real_of(model, sgd, rank) if kind == "real" else VirtualReplica(shared_of(model, sgd), rank)
        return [replica.gradient(batch(1)).loss for _ in range(3)]

    assert losses(1) == losses(1)
    assert len({loss for rank in range(3) for loss in losses(rank)}) == 9


def twice_built() -> Any:
    """A block that is built twice: two kernels of one Keras path, and two biases."""
    import keras

    backend.start(1)
    keras.utils.set_random_seed(1)

    def block() -> Any:
        inputs = keras.Input((16,))
        return keras.Model(inputs, keras.layers.Dense(16, name="fc", activation="relu")(inputs))

    model = keras.Sequential([keras.Input((16,)), block(), block(), keras.layers.Dense(4)])
    paths = [variable.path for variable in model.trainable_variables]
    assert len(set(paths)) < len(paths)
    return model


@pytest.mark.parametrize("kind", ["real", "virtual"])
def test_variables_of_one_path_are_told_apart(kind: str) -> None:
    """The test classifies as Keras does, and the gradient is that of the whole model."""
    random = np.random.default_rng(5)
    x = random.normal(size=(400, 16)).astype(np.float32)
    rows = Batch(x, (x @ random.normal(size=(16, 4))).argmax(1).astype(np.int32))
    model, sgd = twice_built(), optimizer("sgd", 0.1, 0.0)
    replica = real_of(model, sgd, rows=rows) if kind == "real" else VirtualReplica(shared_of(model, sgd, rows), 0)
    for _ in range(150):
        replica.apply(np.array(replica.gradient(rows).vector))
    model.set_weights(replica.layout.split(replica.weights()))
    found = int((model.predict(x, verbose=0).argmax(1) == rows.y).sum())
    assert found > 300
    assert replica.evaluate(replica.knowledge(), [rows])["accuracy"] == pytest.approx(found / 400)


@pytest.mark.parametrize("kind", ["real", "virtual"])
def test_averages_of_the_optimizer_are_put_in_at_the_end_as_keras_does(kind: str) -> None:
    import keras

    def averaging() -> Any:
        return keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)

    model, plain = keras_model(NETS[0]), keras_model(NETS[0])
    replica = real_of(model, averaging()) if kind == "real" else VirtualReplica(shared_of(model, averaging()), 0)
    rows = batch(1)
    for _ in range(5):
        replica.apply(np.array(replica.gradient(rows).vector))
    last = replica.weights()
    replica.finish()
    plain.compile(averaging(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    plain.fit(rows.x, rows.y, batch_size=16, epochs=5, verbose=0)
    wanted = np.concatenate([np.ravel(w) for w in plain.get_weights()])
    np.testing.assert_allclose(replica.weights(), wanted, rtol=1e-4, atol=1e-6)
    assert np.abs(last - wanted).max() > 1e-3


def test_a_virtual_replica_is_restored_and_saved(tmp_path: Path) -> None:
    import keras

    shared = shared_of(keras_model(NETS[1]), optimizer("adam", 0.05, 0.0))
    one, other = VirtualReplica(shared, 0), VirtualReplica(shared, 1)
    one.step_alone(batch(1))
    kept = one.to_arrays()
    wanted = one.step_alone(batch(2))
    other.from_arrays(kept, generators=False)
    np.testing.assert_array_equal(other.weights(), kept["weights"])
    assert other.gradient(batch(2)).loss != wanted.loss, "it has its own dropout"
    other.from_arrays(kept)
    assert other.step_alone(batch(2)).loss == wanted.loss
    np.testing.assert_array_equal(other.knowledge(), one.knowledge())
    one.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        np.concatenate([np.ravel(v.numpy()) for v in loaded.trainable_variables]), one.weights()
    )


def test_plain_sgd_done_by_hand_is_kerass_to_the_bit() -> None:
    import keras

    model = keras_model(NETS[0])
    shared = shared_of(model, optimizer("sgd", 0.05, 0.0))
    virtual, real = VirtualReplica(shared, 0), real_of(model, optimizer("sgd", 0.05, 0.0))
    vector = np.random.default_rng(0).standard_normal(virtual.layout.size, dtype=np.float32)
    virtual.apply(vector)
    real.apply(vector)
    # XLA rounds once where it fuses the product with the difference.
    rounding = 0.0 if keras.backend.backend() == "tensorflow" else 1e-7
    np.testing.assert_allclose(virtual.weights(), real.weights(), rtol=0, atol=rounding)


def decayed() -> Any:
    import keras

    return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5))


def clipped() -> Any:
    import keras

    return keras.optimizers.SGD(0.1, clipnorm=0.5)


@pytest.mark.parametrize("make", [decayed, clipped])
def test_an_optimizer_that_does_more_than_plain_sgd_is_asked_itself(make: Callable[[], Any]) -> None:
    shared = shared_of(keras_model(NETS[0]), make())
    replica = real_of(keras_model(NETS[0]), make())
    virtual = VirtualReplica(shared, 0)
    for number in range(3):
        vector = np.random.default_rng(number).standard_normal(virtual.layout.size, dtype=np.float32)
        virtual.apply(vector)
        replica.apply(vector)
    np.testing.assert_allclose(virtual.weights(), replica.weights(), rtol=1e-6, atol=1e-7)


def test_knowledge_goes_in_as_it_came_out() -> None:
    shared = shared_of(keras_model(NETS[1]), optimizer("sgd", 0.05, 0.0))
    one, other = (VirtualReplica(shared, rank) for rank in range(2))
    one.apply(one.gradient(batch(1)).vector)
    other.set_knowledge(one.knowledge())
    np.testing.assert_array_equal(other.knowledge(), one.knowledge())
    kept = other.knowledge()
    one.apply(np.ones(one.layout.size, np.float32))
    np.testing.assert_array_equal(other.knowledge(), kept)
    rows = batch(2, 4203)
    parts = [rows.part(start, start + 1000) for start in range(0, 4203, 1000)]
    whole, apart = other.evaluate(kept, [rows]), one.evaluate(kept, parts)
    assert whole == pytest.approx(apart, rel=1e-5)
    assert set(whole) == {"val_loss", "accuracy"}
