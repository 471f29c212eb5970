"""Models as Keras's users build them: what is trained and tested, and what is said of models that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlion_mpi.errors import UserError
from dlion_mpi.learner import backend
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.compiled import check_labels, fitting, prepared
from dlion_mpi.learner.keras_model import KerasModel, check_alike, facts
from dlion_mpi.learner.replica import Replica
from dlion_mpi.simulation.shared_replica import SharedReplica, VirtualReplica
from tests.nets import ready

RANDOM = np.random.default_rng(5)
X = RANDOM.normal(size=(64, 16)).astype(np.float32)
Y = (X @ RANDOM.normal(size=(16, 4))).argmax(1).astype(np.int32)
ROWS = Batch(X, Y)


def net(*layers: Any, shape: tuple[int | None, ...] = (16,)) -> Any:
    import keras

    return keras.Sequential([keras.Input(shape), *layers])


def dense(units: int = 4, **options: Any) -> Any:
    """A layer with the same weights every time."""
    import keras

    backend.start(1)
    keras.utils.set_random_seed(units)
    return keras.layers.Dense(units, **options)


def sgd() -> Any:
    import keras

    return keras.optimizers.SGD(0.1)


def results(model: Any, rows: Batch, **options: Any) -> dict[str, float]:
    replica = Replica(ready(model, rows, sgd()), tests=rows, **options)
    return replica.evaluate(replica.knowledge(), [rows])


def test_a_softmax_that_is_not_the_last_layer_is_no_logits() -> None:
    """Both models are one function: they have one loss."""
    import keras

    last = results(net(dense(activation="softmax")), ROWS)
    reshaped = results(net(dense(activation="softmax"), keras.layers.Reshape((4,))), ROWS)
    assert reshaped == pytest.approx(last, rel=1e-6)
    logits = results(net(dense(), keras.layers.Reshape((4,))), ROWS)
    assert logits == pytest.approx(last, rel=1e-5), "the same weights: the softmax is in the loss"


@pytest.mark.parametrize(("activation", "threshold"), [("sigmoid", 0.5), (None, 0.0)])
@pytest.mark.parametrize("compiled", [True, False])
def test_one_output_is_counted_by_its_threshold(activation: str | None, threshold: float, compiled: bool) -> None:
    import keras

    labels = (X[:, 0] > 0.3).astype(np.int32)
    model = net(dense(1, activation=activation))
    if compiled:
        model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=activation is None))
    found = results(model, Batch(X, labels))
    wanted = ((model.predict(X, verbose=0)[:, 0] > threshold) == labels).mean()
    assert found["accuracy"] == pytest.approx(wanted)
    assert 0.05 < wanted < 0.95, "the share of a class would not be told apart"


def test_the_users_metrics_are_the_tests() -> None:
    import keras

    model = net(dense(1))
    model.compile("sgd", "mse", metrics=["mae", keras.metrics.RootMeanSquaredError(name="root")])
    rows = Batch(X, X[:, 0], np.linspace(0, 1, 64, dtype=np.float32))
    found = results(model, rows)
    wanted = model.evaluate(*rows[:2], sample_weight=rows.sample_weight, verbose=0, return_dict=True)
    assert found == pytest.approx({"val_loss": wanted.pop("loss"), **wanted}, rel=1e-5)
    assert set(found) == {"val_loss", "mae", "root"}


def test_a_model_that_is_not_compiled_has_the_loss_of_its_targets() -> None:
    import keras

    assert set(results(net(dense(1)), Batch(X, X[:, 0]))) == {"val_loss", "mae"}
    with pytest.raises(UserError, match=r"cannot be guessed.*compile it with an optimizer and a loss"):
        prepared(net(dense(1)), Batch(X), sgd)
    square = net(dense(9), keras.layers.Reshape((3, 3)))
    with pytest.raises(UserError, match=r"outputs of \(3, 3\)"):
        prepared(square, ROWS, sgd)
    with pytest.raises(UserError, match="float32 targets"):
        prepared(net(dense(3)), Batch(X, X[:, 0]), sgd)


@pytest.mark.parametrize(("labels", "classes"), [((20, 23), None), ((-1, 1), None), ((0, 1), 24)])
def test_whole_numbers_for_one_output_are_no_binary_labels_unless_they_are_0_and_1(
    labels: tuple[int, int], classes: int | None
) -> None:
    two = Batch(X[:2], np.array([0, 1]))
    prepared(net(dense(1)), two, sgd, 2)
    with pytest.raises(UserError, match=r"no loss fits outputs of \(1,\) and int64 targets"):
        prepared(net(dense(1)), two._replace(y=np.array(labels)), sgd, classes)


def test_data_that_do_not_fit_are_told_in_one_line_before_the_start() -> None:
    import keras

    model = net(dense(), shape=(8,))
    model.compile("sgd", "mse")
    with pytest.raises(UserError) as told, fitting(ROWS):
        KerasModel(model, ROWS)
    assert "\n" not in str(told.value)
    assert "incompatible" in str(told.value)
    assert "x (16,) float32, y () int32" in str(told.value)
    model = net(dense())
    model.compile("sgd", keras.losses.CategoricalCrossentropy())
    with pytest.raises(UserError, match=r"does not fit the data: .*same (rank|shape)"), fitting(ROWS):
        ready(model, ROWS)


def test_labels_beyond_the_outputs_are_refused() -> None:
    model = prepared(net(dense(3)), ROWS, sgd)
    check_labels(model, ROWS, 3)
    with pytest.raises(UserError, match=r"3 outputs.*4 classes, 0 to 3"):
        check_labels(model, ROWS, 4)


def test_statistics_frozen_variables_and_seeds_are_told_apart() -> None:
    import keras

    layers = keras.layers
    frozen = layers.BatchNormalization()
    frozen.trainable = False
    model = net(dense(8, trainable=False), layers.BatchNormalization(), frozen, layers.Dropout(0.5), dense(4))
    model.layers[-1].enable_lora(2)
    found = ready(model, ROWS, sgd())
    assert [v.path.split("/")[-1] for v in found.trainable] == [
        "gamma",
        "beta",
        "bias",
        "lora_kernel_a",
        "lora_kernel_b",
    ]
    assert [v.path.split("/")[-1] for v in found.statistics] == ["moving_mean", "moving_variance"]
    assert len(found.frozen) == 2 + 4 + 1, "a dense layer, a whole normalisation, the kernel under LoRA"
    assert [v.name for v in found.others] == ["seed_generator_state"]
    replica = Replica(found)
    assert len(replica.statistics()) == 16
    replica.set_statistics(np.arange(16, dtype=np.float32))
    np.testing.assert_array_equal(replica.knowledge()[replica.layout.size :], np.arange(16))
    replica.set_frozen(np.arange(len(replica.frozen()), dtype=np.float32))
    np.testing.assert_array_equal(np.ravel(model.layers[0].kernel), np.arange(128))


@pytest.mark.parametrize("kind", ["real", "virtual"])
def test_constraints_hold_after_the_movements_of_others(kind: str) -> None:
    import keras

    model = net(dense(kernel_constraint=keras.constraints.MaxNorm(0.5, axis=0)))
    found = ready(model, ROWS, sgd())
    replica = Replica(found) if kind == "real" else VirtualReplica(SharedReplica(found), 0)
    replica.move(np.ones(replica.layout.size, np.float32))
    kernel = replica.layout.split(replica.weights())[0]
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 0.5, rtol=1e-5)


def test_a_guarded_movement_that_is_not_finite_changes_nothing() -> None:
    import keras

    replica = Replica(
        ready(net(dense(), keras.layers.BatchNormalization()), ROWS, keras.optimizers.Adam()), guarded=True
    )
    before = replica.to_arrays()
    broken = Batch(np.full_like(X, np.inf), Y)
    assert not replica.movement(broken).finite
    assert not replica.step_alone(broken).finite
    for name, value in replica.to_arrays().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert replica.step_alone(ROWS).finite
    assert np.abs(replica.weights() - before["weights/0"].ravel()[0]).max() > 0


@pytest.mark.parametrize("kind", ["real", "virtual"])
def test_a_loss_that_was_scaled_too_far_is_scaled_less(kind: str) -> None:
    """Its gradient is zero, until the scale fits; then it is that of the plain loss, and so is its update."""
    import keras

    def model() -> Any:
        return net(dense(8, dtype="mixed_float16"), dense(dtype="float32"))

    def replica(optimizer: Any) -> Any:
        found = ready(model(), ROWS, optimizer)
        return Replica(found) if kind == "real" else VirtualReplica(SharedReplica(found), 0)

    scaled = replica(keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=2.0**24))
    plain = replica(sgd())
    found = [np.array(scaled.gradient(ROWS).vector) for _ in range(20)]
    assert not found[0].any()
    wanted = plain.gradient(ROWS).vector
    np.testing.assert_allclose(found[-1], wanted, rtol=0.02, atol=1e-4)
    for own in (scaled, plain):
        own.apply(np.array(wanted))
    np.testing.assert_allclose(scaled.weights(), plain.weights(), rtol=1e-5, atol=1e-6)


def test_optimizers_that_a_model_keeps_in_a_list_are_found() -> None:
    import keras

    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(dense())
            self.several = [sgd(), keras.optimizers.Adam()]
            self.by_name = {"third": keras.optimizers.Nadam()}

        def call(self, x: Any) -> Any:
            return self.inner(x)

    model = Own()
    model.compile(keras.optimizers.RMSprop(), "sparse_categorical_crossentropy")
    names = [type(optimizer).__name__ for optimizer in ready(model, ROWS).optimizers]
    assert names == ["RMSprop", "SGD", "Adam", "Nadam"]


def test_ranks_with_other_models_are_refused_by_rank_and_difference() -> None:
    import keras

    def told(make: Any) -> str:
        mine = facts(ready(net(dense(8), dense()), ROWS, sgd()))
        with pytest.raises(UserError) as refused:
            check_alike([mine, mine, facts(ready(make(), ROWS, sgd()))])
        return str(refused.value)

    def frozen() -> Any:
        model = net(dense(8), dense())
        model.layers[0].trainable = False
        return model

    def other_optimizer() -> Any:
        model = net(dense(8), dense())
        model.compile(keras.optimizers.Adam(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    def other_loss() -> Any:
        model = net(dense(8), dense())
        model.compile(sgd(), keras.losses.SparseCategoricalCrossentropy(ignore_class=3, from_logits=True))
        return model

    assert "rank 2" in told(frozen)
    assert "2 trainable, 0 statistics, 2 frozen" in told(frozen)
    assert "4 trainable, 0 statistics, 0 frozen" in told(frozen)
    assert "optimizer: Adam. Rank 0: optimizer: SGD" in told(other_optimizer)
    assert "ignore_class: 3" in told(other_loss)


def test_ranks_that_have_built_another_number_of_models_are_alike() -> None:
    first = facts(ready(net(dense(8), dense()), ROWS, sgd()))
    net(dense())
    check_alike([first, facts(ready(net(dense(8), dense()), ROWS, sgd()))])


def test_sequences_of_any_length_are_trained_and_results() -> None:
    import keras

    model = net(keras.layers.GRU(8), dense(), shape=(None, 2))
    replica = Replica(ready(model, Batch(X.reshape(64, 8, 2), Y), sgd()))
    for length in (8, 3, 5, 8):
        x = RANDOM.normal(size=(10, length, 2)).astype(np.float32)
        before = replica.weights()
        moved = replica.movement(Batch(x, Y[:10]))
        wanted = float(model.compute_loss(y=Y[:10], y_pred=model(x)))
        assert moved.loss == pytest.approx(wanted, rel=1e-5)
        np.testing.assert_array_equal(replica.weights(), before)


@pytest.mark.parametrize("kind", ["real", "virtual"])
def test_averages_of_weights_are_read_replaced_and_put_in_at_the_end(kind: str) -> None:
    """So that all ranks can end with the mean of their averages."""
    import keras

    model = net(dense())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, use_ema=True), loss)
    keras_model = ready(model, ROWS)
    replica = Replica(keras_model) if kind == "real" else VirtualReplica(SharedReplica(keras_model), 0)
    replica.move(replica.movement(ROWS).vector)
    np.testing.assert_allclose(replica.averages(), replica.weights(), atol=1e-6)  # the first average is the weights
    replica.set_averages(np.arange(len(replica.weights()), dtype=np.float32))
    replica.finish()
    np.testing.assert_array_equal(replica.weights(), np.arange(len(replica.weights())))
    none = net(dense())
    none.compile("sgd", loss)
    assert not len(Replica(ready(none, ROWS)).averages())
