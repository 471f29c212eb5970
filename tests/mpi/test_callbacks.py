"""`fit` with Keras's callbacks over MPI: equal logs at an epoch's end, and the same consequences on all ranks."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import dlion_mpi
from dlion_mpi.errors import UserError
from dlion_mpi.learner import backend

MOST_RANKS = 3


def compiled(rate: float = 0.1, momentum: float = 0.0) -> Any:
    backend.start(1)
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate, momentum), loss, metrics=["accuracy"])
    return model


def rows(rank: int, samples: int = 64) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(rank)
    x = random.normal(size=(samples, 4)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)


def fit(model: Any, world: MPI.Intracomm, **options: Any) -> dict[str, Any]:
    train, validation = rows(world.Get_rank()), rows(99)
    options = {"batching": "fixed", "global_batch": "fixed", "batch_size": 8, "progress_every": 0, **options}
    return dlion_mpi.fit(model, train, validation, **{k: v for k, v in options.items() if v != "left out"})


def keras_callback() -> Any:
    backend.start(1)
    import keras

    return keras.callbacks.Callback


SUMMED: dict[str, Any] = {"strategy": "allreduce", "batching": "left out", "global_batch": "left out"}
MODES: list[dict[str, Any]] = [{}, {"sync": "sync"}, {"sync": "async"}, {"strategy": "hop", "batching": "left out"}]
MODES[3] |= {"global_batch": "left out"}


@pytest.mark.mpi
@pytest.mark.parametrize("options", [*MODES, SUMMED])
def test_the_history_is_the_same_on_all_ranks_and_keras_has_its_names(
    world: MPI.Intracomm, options: dict[str, Any]
) -> None:
    result = fit(compiled(), world, steps=35, steps_per_epoch=10, **options)
    history = result["history"]
    names = {"loss", "val_loss", "val_accuracy"} | (
        set() if options == SUMMED and world.Get_size() > 1 else {"accuracy"}
    )
    assert history.keys() == names
    assert {len(values) for values in history.values()} == {3}, "the fourth is not complete"
    assert len(set(world.allgather(str(history)))) == 1
    assert history["loss"][-1] < history["loss"][0]
    assert 0.5 < history["val_accuracy"][-1] <= 1


@pytest.mark.mpi
@pytest.mark.parametrize("options", [*MODES, SUMMED, {"steps_per_epoch": 5}])
def test_a_number_of_epochs_ends_all_ranks_at_the_same_step(world: MPI.Intracomm, options: dict[str, Any]) -> None:
    result = fit(compiled(), world, epochs=3, **options)
    assert {len(values) for values in result["history"].values()} == {3}
    assert result["stopped"] is None
    assert set(world.allgather(result["steps"])) == {3 * options.get("steps_per_epoch", 8)}


@pytest.mark.mpi
def test_a_number_of_epochs_counts_from_the_start_of_a_resumed_run(world: MPI.Intracomm, shared_folder: Path) -> None:
    begun: list[int] = []

    class Spy(keras_callback()):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            begun.append(epoch)

    kept: dict[str, Any] = {"out": str(shared_folder), "checkpoint_every": 100, "requeue": True, "sync": "sync"}
    assert fit(compiled(), world, epochs=2, **kept)["steps"] == 16
    result = fit(compiled(), world, epochs=4, callbacks=[Spy()], **kept)
    assert (result["steps"], len(result["history"]["loss"]), begun) == (32, 2, [2, 3])
    assert fit(compiled(), world, epochs=3, callbacks=[Spy()], **kept)["steps"] == 32
    assert begun == [2, 3]


@pytest.mark.mpi
def test_logs_are_weighed_by_samples_over_all_ranks_as_keras_has_them(world: MPI.Intracomm) -> None:
    """One epoch with a learning rate of 0 is a test on all training rows: Keras gives the same numbers."""
    model = compiled(rate=0.0)
    size = world.Get_size()
    result = fit(model, world, steps=8, steps_per_epoch=8, sync="sync", callbacks=[])
    x, y = (np.concatenate(part) for part in zip(*(rows(rank) for rank in range(size)), strict=True))
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert result["history"]["loss"] == pytest.approx([expected["loss"]], rel=1e-4)
    assert result["history"]["accuracy"] == pytest.approx([expected["accuracy"]], rel=1e-4)
    tested = model.evaluate(*rows(99), verbose=0, return_dict=True)
    assert result["history"]["val_loss"] == pytest.approx([tested["loss"]], rel=1e-4)


@pytest.mark.mpi
@pytest.mark.parametrize("options", MODES)
def test_early_stopping_stops_all_ranks_after_the_same_step(world: MPI.Intracomm, options: dict[str, Any]) -> None:
    import keras

    stopping = keras.callbacks.EarlyStopping("val_loss", patience=2, min_delta=100)
    result = fit(compiled(), world, steps=10_000, steps_per_epoch=5, callbacks=[stopping], **options)
    assert stopping.stopped_epoch == 2
    assert result["steps"] == 15
    assert len(result["history"]["loss"]) == 3
    assert "callback" in result["stopped"]


@pytest.mark.mpi
def test_the_best_weights_are_restored_on_all_ranks(world: MPI.Intracomm) -> None:
    """The learning rate explodes after the first epoch, of which all ranks restore the weights."""
    import keras

    model = compiled()
    kept: list[np.ndarray] = []
    options: dict[str, Any] = {"strategy": "allreduce", "batching": "left out", "global_batch": "left out"}

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            kept.append(self.model.get_weights()[0])
            self.model.optimizer.learning_rate = -5.0

    callbacks = [keras.callbacks.EarlyStopping("val_loss", patience=3, restore_best_weights=True), Keep()]
    fit(model, world, steps=10_000, steps_per_epoch=5, callbacks=callbacks, **options)
    np.testing.assert_array_equal(model.get_weights()[0], kept[0])
    assert len({weights.tobytes() for weights in world.allgather(kept[0])}) == 1


@pytest.mark.mpi
def test_a_learning_rate_is_set_on_all_ranks_alike(world: MPI.Intracomm) -> None:
    """By a plateau of the common logs, by a schedule of epochs; where ranks differ, rank 0's counts."""
    import keras

    rank = world.Get_rank()
    model = compiled(rate=0.4)
    reduce = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=100)
    result = fit(model, world, steps=20, steps_per_epoch=5, callbacks=[reduce])
    assert result["history"]["learning_rate"] == pytest.approx([0.4, 0.4, 0.2, 0.1])
    rates = []

    class Differs(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.model.optimizer.learning_rate = 0.1 * (epoch + 1) + rank

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            rates.append(float(self.model.optimizer.learning_rate))

    fit(model, world, steps=6, steps_per_epoch=2, callbacks=Differs())
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])


@pytest.mark.mpi
def test_files_are_written_by_rank_0_alone(world: MPI.Intracomm, shared_folder: Path) -> None:
    import keras

    shared_folder.mkdir(exist_ok=True)
    own = shared_folder / f"{world.Get_rank()}"
    k = keras.callbacks
    callbacks = [k.ModelCheckpoint(f"{own}-{{epoch}}-{{val_loss:.1f}}.keras"), k.CSVLogger(f"{own}.csv")]
    result = fit(compiled(), world, steps=12, steps_per_epoch=4, callbacks=callbacks)
    world.Barrier()
    files = sorted(path.name for path in shared_folder.iterdir())
    assert all(name.startswith("0") for name in files)
    assert len(files) == 4
    with open(shared_folder / "0.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in table] == pytest.approx(result["history"]["loss"])
    world.Barrier()


@pytest.mark.mpi
def test_all_hooks_are_called_in_keras_s_order(world: MPI.Intracomm) -> None:
    import keras

    calls: list[str] = []

    class Spy(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            assert self.params["steps"] == 2
            assert self.params["epochs"] == 2
            calls.append("train begin")

        def on_train_end(self, logs: Any = None) -> None:
            assert "val_loss" in logs
            calls.append("train end")

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            calls.append(f"epoch {epoch}")

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= logs.keys()
            calls.append(f"epoch {epoch} end")

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            calls.append(f"batch {batch}")

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            assert {"loss", "accuracy"} <= logs.keys()
            calls.append(f"batch {batch} end")

    fit(compiled(), world, steps=4, steps_per_epoch=2, callbacks=[Spy()])
    epoch = ["batch 0", "batch 0 end", "batch 1", "batch 1 end"]
    assert calls == [
        *("train begin", "epoch 0", *epoch, "epoch 0 end", "epoch 1", *epoch, "epoch 1 end", "train end"),
    ]


@pytest.mark.mpi
def test_an_epoch_is_the_training_set_once_by_default(world: MPI.Intracomm) -> None:
    result = fit(compiled(), world, steps=24, callbacks=[])
    assert len(result["history"]["loss"]) == 3, "64 rows of every rank, 8 in a step"


@pytest.mark.mpi
def test_by_the_clock_ranks_end_in_order_in_the_middle_of_an_epoch(world: MPI.Intracomm) -> None:
    for seconds in (0.3, 0.7):
        result = fit(compiled(), world, steps=None, seconds=seconds, steps_per_epoch=7)
        assert len({str(history) for history in world.allgather(result["history"])}) == 1


@pytest.mark.mpi(min_size=2)
def test_a_callback_that_stops_one_rank_in_an_epoch_stops_all(world: MPI.Intracomm) -> None:
    """As of `TerminateOnNaN`: what one rank stops in an epoch ends all."""
    import keras

    last = world.Get_size() - 1

    class Stops(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = world.Get_rank() == last and batch == 3

    result = fit(compiled(), world, steps=10_000, steps_per_epoch=5000, callbacks=[Stops()])
    assert result["steps"] < 5000
    assert result["stopped"]


@pytest.mark.mpi
def test_a_resumed_run_continues_in_its_epoch(world: MPI.Intracomm, shared_folder: Path) -> None:
    import keras

    slower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.05)
    options: dict[str, Any] = {"steps_per_epoch": 10, "sync": "sync", "callbacks": [slower]}
    fit(compiled(), world, steps=15, out=str(shared_folder), checkpoint_every=15, **options)
    seen: list[int] = []

    class Spy(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seen.append(epoch)
            assert float(self.model.optimizer.learning_rate) == pytest.approx(0.05)

    train, validation = rows(world.Get_rank()), rows(99)
    result = dlion_mpi.fit(
        compiled(), train, validation, resume=str(shared_folder), steps=30, steps_per_epoch=10, callbacks=[Spy()]
    )
    assert seen == [1, 2]
    assert result["steps"] == 30


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"callbacks": [3]}, "callbacks has a int, but must have Keras's callbacks"),
        ({"steps_per_epoch": 0}, "steps_per_epoch 0: must be a whole number, at least 1"),
        ({"steps": None, "steps_per_epoch": "3"}, "steps_per_epoch '3': must be a whole number"),
        ({"epochs": 2}, "epochs and steps exclude each other"),
        *(({"steps": None, "epochs": value}, f"epochs {value!r}: must be") for value in (0, -1, 2.5, "3", True)),
        ({"momentum": 0.9}, "momentum has no effect with a compiled model"),
        ({"optimizer": "adam"}, "optimizer has no effect with a compiled model"),
    ],
)
def test_mistakes_are_refused(world: MPI.Intracomm, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        fit(compiled(), world, **{"steps": 2, **options})


@pytest.mark.mpi
def test_a_learning_rate_is_that_of_a_compiled_model_too(world: MPI.Intracomm) -> None:
    import keras

    model = compiled()
    fit(model, world, steps=2, learning_rate=0.003)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.003)
    model.compile(keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)), model.loss)
    with pytest.raises(UserError, match=r"learning_rate has no effect .* schedule"):
        fit(model, world, steps=2, learning_rate=0.003)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "hook", ["on_train_begin", "on_epoch_begin", "on_epoch_end", "on_train_batch_end", "on_train_end"]
)
def test_a_mistake_that_a_callback_of_one_rank_finds_ends_all(world: MPI.Intracomm, hook: str) -> None:
    model = compiled()
    import keras

    def fail(*_: Any, **__: Any) -> None:
        if world.Get_rank() == 1:
            raise UserError("mine")

    callback = keras.callbacks.Callback()
    setattr(callback, hook, fail)
    alike = hook in ("on_train_begin", "on_epoch_begin", "on_train_end")
    with pytest.raises(UserError if alike else dlion_mpi.RunError, match=r"^rank 1: mine"):
        fit(model, world, callbacks=[callback], steps=6, steps_per_epoch=3)


@pytest.mark.mpi
def test_a_model_that_fit_has_compiled_may_be_given_other_options_again(world: MPI.Intracomm) -> None:
    backend.start(1)
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    for rate in (0.1, 0.01):
        fit(model, world, steps=2, learning_rate=rate)
        assert float(model.optimizer.learning_rate) == pytest.approx(rate)
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(UserError, match="optimizer has no effect"):
        fit(model, world, steps=2, optimizer="adam")


@pytest.mark.mpi
def test_class_weights_count(world: MPI.Intracomm) -> None:
    """A class without weight is hardly learnt: the loss of its rows is nothing."""
    model = compiled()
    fit(model, world, steps=60, class_weight={0: 0.0, 1: 1.0})
    x, y = rows(3)
    assert model.predict(x, verbose=0).argmax(1).mean() > y.mean() + 0.2


@pytest.mark.mpi
def test_without_callbacks_there_is_no_history_and_no_gather(
    world: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dlion_mpi.mpi.collectives import Collectives

    channels: list[str] = []
    create = Collectives.__init__

    def spy(own: Any, communicator: Any, names: Any, *more: Any) -> None:
        channels.extend(names)
        create(own, communicator, names, *more)

    monkeypatch.setattr(Collectives, "__init__", spy)
    result = fit(compiled(), world, steps=5)
    assert "history" not in result
    assert channels
    assert "epochs" not in channels
