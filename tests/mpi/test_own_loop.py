"""Training loops outside the package, over MPI: `dlion_mpi.Exchange`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import dlion_mpi
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.learner import backend

MOST_RANKS = 3

OPTIMUM = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)
EXACT: dict[str, Any] = {
    "sync": "sync",
    "batching": "fixed",
    "transfer": "none",
    "value_type": "float32",
    "progress_every": 0,
}


def variable(value: Any = 0.0, **options: Any) -> Any:
    backend.start(1)
    import keras

    return keras.Variable(np.full((3, 4), value, np.float32), **options)


def towards(w: Any, rank: int, size: int) -> float:
    """A step of SGD on the share of a quadratic that only this rank knows. Returns the loss."""
    away = w.numpy() - OPTIMUM
    away.ravel()[np.arange(12) % size != rank] = 0
    w.assign_sub(0.03 * size * away)
    time.sleep(0.002)  # so that messages arrive within some steps
    return float((away**2).sum())


@pytest.mark.mpi
@pytest.mark.parametrize(
    "options",
    [
        {"batching": "fixed"},
        {"batching": "fixed", "sync": "sync"},
        {"batching": "fixed", "sync": "async"},
        {"strategy": "gaia"},
        {"strategy": "hop"},
        {"strategy": "diloco"},
    ],
)
def test_every_rank_learns_what_all_ranks_know(world: MPI.Intracomm, options: dict[str, Any]) -> None:
    rank, size = world.Get_rank(), world.Get_size()
    w = variable(rank)
    with dlion_mpi.Exchange([w], steps=400, progress_every=0, **options) as exchange:
        while exchange.running:
            assert exchange.batch_size >= 1
            exchange.step(loss=towards(w, rank, size))
    np.testing.assert_allclose(w.numpy(), OPTIMUM, atol=0.05)
    assert exchange.batch_size == 0
    assert exchange.result["steps"] == 400
    assert exchange.result["ranks"] == size
    assert exchange.result["loss"] < 0.1


@pytest.mark.mpi
def test_a_step_is_the_mean_of_all_movements_by_their_samples(world: MPI.Intracomm) -> None:
    """Exactly, in sync with everything sent. Rank r moves by r + 1 in each of three steps."""
    from dlion_mpi.strategies.dlion import Dlion

    rank, size = world.Get_rank(), world.Get_size()
    w = variable(5 * rank)
    seen = []
    options = EXACT | {"strategy": Dlion(max_n=100)}
    with dlion_mpi.Exchange([w], steps=3, batch_size=8, **options) as exchange:
        while exchange.running:
            seen.append(float(w.numpy()[0, 0]))
            w.assign_add(np.full((3, 4), rank + 1, np.float32))
            exchange.step(samples=8)
    mean = (size + 1) / 2
    np.testing.assert_allclose(seen, [0, mean, 2 * mean], rtol=1e-5, err_msg="rank 0's values, then the mean")
    np.testing.assert_allclose(w.numpy(), 3 * mean, rtol=1e-5)


@pytest.mark.mpi(min_size=2)
def test_a_movement_counts_with_the_samples_that_were_used(world: MPI.Intracomm) -> None:
    """Rank 0 had 4 rows of the 8 that it was to take: its movement counts half."""
    from dlion_mpi.strategies.dlion import Dlion

    rank, size = world.Get_rank(), world.Get_size()
    w = variable()
    with dlion_mpi.Exchange([w], steps=1, batch_size=8, **(EXACT | {"strategy": Dlion(max_n=100)})) as exchange:
        w.assign_add(np.ones((3, 4), np.float32))
        exchange.step(samples=4 if rank == 0 else None)
    np.testing.assert_allclose(w.numpy(), (size - 0.5) / size, rtol=1e-5)


@pytest.mark.mpi
def test_a_loop_with_larger_batches_takes_no_larger_steps(world: MPI.Intracomm) -> None:
    """128 rows where 8 were asked for: the mean of the movements, not 16 times as much."""
    from dlion_mpi.strategies.dlion import Dlion

    w = variable()
    with dlion_mpi.Exchange([w], steps=1, batch_size=8, **(EXACT | {"strategy": Dlion(max_n=100)})) as exchange:
        w.assign_add(np.ones((3, 4), np.float32))
        exchange.step(samples=128)
    np.testing.assert_allclose(w.numpy(), 1, rtol=1e-5)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "options", [{}, {"sync": "sync"}, {"strategy": "gaia"}, {"strategy": "hop"}, {"strategy": "diloco"}]
)
def test_an_exception_in_the_loop_ends_all_ranks(world: MPI.Intracomm, options: dict[str, Any]) -> None:
    rank = world.Get_rank()
    w = variable()
    last = world.Get_size() - 1

    def loop() -> None:
        with dlion_mpi.Exchange([w], steps=10_000, progress_every=0, **options) as exchange:
            steps = 0
            while exchange.running:
                if rank == last and steps == 20:
                    raise ZeroDivisionError("the user's")
                exchange.step()
                steps += 1

    if rank == last:
        with pytest.raises(ZeroDivisionError, match="the user's"):
            loop()
    else:
        with pytest.raises(RunError, match=f"rank {last}: ZeroDivisionError: the user's"):
            loop()
    with dlion_mpi.Exchange([w], steps=2, progress_every=0) as again:
        while again.running:
            again.step()
    assert again.result["steps"] == 2, "and MPI is as before"


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_leaves_early_does_not_hold_the_others(world: MPI.Intracomm) -> None:
    rank = world.Get_rank()
    w, steps = variable(), 0
    with dlion_mpi.Exchange([w], steps=60, progress_every=0) as exchange:
        while exchange.running and not (rank == 0 and steps == 20):
            exchange.step()
            steps += 1
    assert steps == (20 if rank == 0 else 60)
    assert exchange.result["steps"] == 60


@pytest.mark.mpi
def test_a_movement_that_is_not_finite_stops_the_run_or_is_left_out(world: MPI.Intracomm) -> None:
    rank, size = world.Get_rank(), world.Get_size()
    w, where = variable(), size - 1

    def loop() -> None:
        with dlion_mpi.Exchange([w], steps=50, progress_every=0) as exchange:
            step = 0
            while exchange.running:
                exchange.step(loss=float("nan") if rank == where and step == 2 else 0.0)
                step += 1

    with pytest.raises(RunError, match=rf"rank {where}, step 2: the loss is nan"):
        loop()
    assert np.isfinite(w.numpy()).all()
    with dlion_mpi.Exchange([w], steps=50, progress_every=0, non_finite="skip") as exchange:
        for step in range(50):
            w.assign_add(np.full((3, 4), np.inf if rank == where and step == 2 else 0.1, np.float32))
            exchange.step()
    assert np.isfinite(w.numpy()).all()


@pytest.mark.mpi
def test_a_gan_with_two_optimizers_and_batch_statistics(world: MPI.Intracomm, shared_folder: Path) -> None:
    """The generator learns a normal distribution of which every rank has a part; its statistics end equal."""
    backend.start(1)
    import keras
    import tensorflow as tf

    rank = world.Get_rank()
    keras.utils.set_random_seed(rank)
    layers = keras.layers
    generator = keras.Sequential(
        [keras.Input((2,)), layers.Dense(16), layers.BatchNormalization(), layers.ReLU(), layers.Dense(1)]
    )
    critic = keras.Sequential([keras.Input((1,)), layers.Dense(16, activation="relu"), layers.Dense(1)])
    optimizers = keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01)
    cross_entropy = keras.losses.BinaryCrossentropy(from_logits=True)
    for model, optimizer in zip((critic, generator), optimizers, strict=True):
        optimizer.build(model.trainable_variables)
    random = np.random.default_rng(rank)

    @tf.function(reduce_retracing=True)
    def update(real: Any, noise: Any) -> Any:
        with tf.GradientTape(persistent=True) as tape:
            fake = generator(noise, training=True)
            scores, real_scores = critic(fake), critic(real)
            loss_of_critic = cross_entropy(tf.ones_like(real_scores), real_scores)
            loss_of_critic += cross_entropy(tf.zeros_like(scores), scores)
            loss = cross_entropy(tf.ones_like(scores), scores)
        for model, optimizer, value in zip((critic, generator), optimizers, (loss_of_critic, loss), strict=True):
            variables = model.trainable_variables
            optimizer.apply(tape.gradient(value, [v.value for v in variables]), variables)
        return loss

    def drawn(*shape: int) -> Any:
        return tf.constant(random.normal(size=shape), tf.float32)

    with dlion_mpi.Exchange(
        [generator, critic], metrics=["mean"], steps=120, out=str(shared_folder), progress_every=0
    ) as exchange:
        while exchange.running:
            rows = exchange.batch_size
            loss = float(update(3 + rank % 2 + 0.5 * drawn(rows, 1), drawn(rows, 2)))
            test = {"mean": float(np.mean(generator(drawn(64, 2))))}
            exchange.step(loss=loss, metrics=test)
    assert 1.5 < exchange.result["mean_mean"] < 5.5
    assert len(exchange.result["mean_per_rank"]) == world.Get_size()
    own = np.concatenate([np.ravel(v) for v in generator.non_trainable_variables[:2]])
    assert len({values.tobytes() for values in world.allgather(own)}) == 1


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ("variable", {"strategy": "allreduce"}, "needs gradients, which a custom train_step or loop does not give"),
        ("variable", {"target": "reward>=3"}, "nothing is tested|the model has no metric reward"),
        ("array", {}, "Exchange was given a ndarray"),
        ("nothing", {}, "no trainable variables: build the model first"),
        ("variable", {"learning_rate": 0.1}, r"Exchange\(\) has no option learning_rate"),
        ("ranks", {}, "rank 1 has 'variables"),
    ],
)
def test_mistakes_are_refused_on_all_ranks(
    world: MPI.Intracomm, given: str, options: dict[str, Any], said: str
) -> None:
    if given == "ranks" and world.Get_size() == 1:
        pytest.skip("one rank is alike")
    w = variable()
    more = [variable()] if world.Get_rank() == 1 else []
    variables: Any = {"variable": [w], "array": [np.zeros(3)], "nothing": [], "ranks": [w, *more]}[given]
    with pytest.raises(UserError, match=said), dlion_mpi.Exchange(variables, progress_every=0, **options):
        pytest.fail("has begun")


@pytest.mark.mpi
def test_a_metric_that_was_not_announced_is_refused(world: MPI.Intracomm) -> None:
    with (
        pytest.raises(UserError, match="step got the metric reward, but Exchange got no metrics"),
        dlion_mpi.Exchange([variable()], steps=5, progress_every=0) as exchange,
    ):
        exchange.step(metrics={"reward": 1.0})


@pytest.mark.mpi
def test_after_the_end_there_is_no_step(world: MPI.Intracomm) -> None:
    with dlion_mpi.Exchange([variable()], steps=1, progress_every=0) as exchange:
        exchange.step()
        assert not exchange.running
        with pytest.raises(RunError, match=r"the run has ended: call step only while exchange\.running"):
            exchange.step()
