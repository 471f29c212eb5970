"""Whole runs inside the test processes: the algorithms' promises, over real MPI, on real data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from dlion_mpi.config.target import Target
from dlion_mpi.learner import backend
from dlion_mpi.learner.batches import Batches
from dlion_mpi.learner.given import shard_of_fit
from dlion_mpi.learner.models import build
from dlion_mpi.learner.shards import load
from dlion_mpi.run import Result, run
from tests.options import config, grow_soon
from tests.shards import byte_shard

MODEL = "tests.nets:dense"
PLAIN = {
    "sync": "sync",
    "batching": "fixed",
    "global_batch": "fixed",
    "transfer": "none",
    "max_n": 100,
    "value_type": "float32",
}
"""DLion with every technique switched off: synchronous SGD on the joint batch."""


def train(keras_model: Any = None, **options: Any) -> Result:
    options = {"data": "digits", "model": MODEL, "steps": 20, "learning_rate": 0.1, **options}
    options = {name: value for name, value in options.items() if value is not None}
    return run(config(**options), model=keras_model, report=False)


def fresh_model(seed: int = 0) -> Any:
    backend.start(1)
    return build(MODEL, byte_shard(), seed)


def flat_weights(model: Any) -> np.ndarray:
    return np.concatenate([w.ravel() for w in model.get_weights()])


def trained_weights(**options: Any) -> np.ndarray:
    model = fresh_model()
    assert train(model, **options).exit_code == 0
    return flat_weights(model)


def joint_sgd(ranks: int, steps: int, lbs: int) -> np.ndarray:
    """Plain Keras SGD in this process, on every rank's batches put together."""
    import keras
    import tensorflow as tf

    model = fresh_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.1)
    shards = [load("digits", rank=r, ranks=ranks, partition="iid", alpha=0.5, seed=0) for r in range(ranks)]
    batches = [Batches(shard, seed=0, rank=r) for r, shard in enumerate(shards)]
    for _ in range(steps):
        parts = [b.take(lbs) for b in batches]
        x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        variables = [v.value for v in model.trainable_variables]
        optimizer.apply(tape.gradient(value, variables), model.trainable_variables)
    return flat_weights(model)


def metrics(folder: Path, rank: int) -> h5py.File:
    return h5py.File(folder / f"metrics-{rank:05d}.h5", "r", swmr=True)


@pytest.mark.mpi
def test_dlion_with_everything_off_is_sgd_on_the_joint_batch(world: MPI.Intracomm) -> None:
    expected = joint_sgd(world.Get_size(), steps=20, lbs=32)
    np.testing.assert_allclose(trained_weights(**PLAIN), expected, rtol=0, atol=2e-6)


@pytest.mark.mpi
@pytest.mark.parametrize("strategy", ["baseline", "allreduce"])
def test_synchronous_strategies_give_the_same_weights(world: MPI.Intracomm, strategy: str) -> None:
    expected = trained_weights(**PLAIN, steps=50)
    np.testing.assert_allclose(trained_weights(strategy=strategy, steps=50), expected, rtol=0, atol=2e-6)


@pytest.mark.mpi
def test_after_a_sum_all_replicas_are_equal_bit_for_bit(world: MPI.Intracomm) -> None:
    own = trained_weights(strategy="allreduce", momentum=0.9, learning_rate=0.02)
    assert len({weights.tobytes() for weights in world.allgather(own)}) == 1


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "options",
    [
        {"steps": None, "seconds": 1.0},
        {"steps": 2000, "target": Target("accuracy", ">=", 0.6), "evaluate_every": "10"},
        {"steps": 50, "learning_rate": 1e30},
    ],
    ids=["seconds", "target", "not-finite"],
)
def test_where_gradients_are_summed_all_end_after_the_same_step(
    world: MPI.Intracomm, options: dict[str, Any], shared_folder: Path
) -> None:
    outcome = train(strategy="allreduce", out=str(shared_folder), **options)
    assert outcome.exit_code == (1 if "learning_rate" in options else 0)
    assert (outcome.summary["target_reached_s"] is not None) == ("target" in options)
    assert outcome.summary["seconds"] < 60
    world.Barrier()
    steps = set()
    for rank in range(world.Get_size()):
        with metrics(shared_folder, rank) as file:
            steps.add(len(file["steps/step"]))
    assert steps == {outcome.summary["steps"]}


@pytest.mark.mpi
@pytest.mark.parametrize("sync", ["sync", "bounded", "async"])
def test_every_synchronisation_mode_learns(world: MPI.Intracomm, sync: str) -> None:
    share = {} if sync == "sync" else {"exchange_share": 0}
    result = train(sync=sync, steps=300, transfer_period=20, **share).summary
    assert result["steps"] == 300
    # A worker of `async` that is done before the others have begun has learnt from its own data only.
    assert min(result["accuracy_per_rank"]) > (0.5 if sync == "async" else 0.8)


@pytest.mark.mpi(min_size=2)
def test_sync_with_fixed_n_and_batches_is_deterministic_and_replicas_differ_by_what_was_dropped(
    world: MPI.Intracomm,
) -> None:
    options = {**PLAIN, "max_n": 60, "unsent": "drop"}
    first, second = trained_weights(**options), trained_weights(**options)
    np.testing.assert_array_equal(first, second)
    assert len({w.tobytes() for w in world.allgather(first)}) == world.Get_size()
    whole = trained_weights(**PLAIN)
    spread = np.ptp(np.array(world.allgather(whole)), axis=0).max()
    assert spread < 1e-6, "with N = 100 in sync all replicas stay equal but for the order of summing"


@pytest.mark.mpi(min_size=2)
def test_accumulate_sends_later_what_drop_forgets(world: MPI.Intracomm) -> None:
    """With a small N the replicas that accumulate stay nearer to the whole exchange."""
    whole = trained_weights(**PLAIN, steps=60)
    dropped = trained_weights(**{**PLAIN, "max_n": 30, "unsent": "drop"}, steps=60)
    kept = trained_weights(**{**PLAIN, "max_n": 30, "unsent": "accumulate"}, steps=60)
    assert np.linalg.norm(kept - whole) < 0.7 * np.linalg.norm(dropped - whole)


@pytest.mark.mpi(min_size=2)  # one rank alone has nothing to exchange, and no strategy is asked
def test_a_strategy_of_the_user_s_has_an_option(world: MPI.Intracomm, shared_folder: Path) -> None:
    """Half of the gradient at twice the learning rate is the same step. The option is kept with the run."""
    scaled: dict[str, Any] = {"strategy": "tests.scaled:Scaled", "scaled.factor": "0.5", "learning_rate": 0.2}
    halved = trained_weights(**scaled, out=str(shared_folder))
    np.testing.assert_allclose(halved, trained_weights(strategy="baseline", learning_rate=0.1), rtol=0, atol=1e-6)
    world.Barrier()
    assert (shared_folder / "config.toml").read_text().endswith("[scaled]\nfactor = 0.5\n")


@pytest.mark.mpi(min_size=2)
def test_n_decides_what_is_sent(world: MPI.Intracomm) -> None:
    sent = [train(**{**PLAIN, "max_n": n}).summary["bytes_sent"] for n in (10, 60, 100)]
    assert sent[0] < sent[1] < sent[2]


@pytest.mark.mpi(min_size=2)
def test_knowledge_transfer_brings_the_best_workers_weights(world: MPI.Intracomm, shared_folder: Path) -> None:
    """In sync with lambda 1 all who merge are equal afterwards, and it is recorded."""
    options = {**PLAIN, "max_n": 20, "unsent": "drop", "transfer": "all", "transfer_period": 10, "transfer_merge": 1}
    outcome = train(**options, steps=12, out=str(shared_folder))
    assert outcome.exit_code == 0
    world.Barrier()
    sources = set()
    for rank in range(world.Get_size()):
        with metrics(shared_folder, rank) as file:
            assert list(file["transfers/step"]) == [12]
            assert list(file["transfers/started_step"]) == [10]
            source = int(file["transfers/source"][0])
            assert bool(file["transfers/merged"][0]) == (rank != source)
            assert (file["transfers/payload_bytes"][0] == 0) == (rank == source)
            sources.add(source)
    assert len(sources) == 1
    merged = [a for rank, a in enumerate(outcome.summary["accuracy_per_rank"]) if rank not in sources]
    without = train(**{**options, "transfer": "none", "transfer_period": None, "transfer_merge": None}, steps=12)
    apart = [a for rank, a in enumerate(without.summary["accuracy_per_rank"]) if rank not in sources]
    assert len(set(merged)) == 1
    assert merged != apart


@pytest.mark.mpi(min_size=2)
def test_a_slow_worker_gets_a_smaller_batch_and_gbs_is_met_at_every_step(
    world: MPI.Intracomm, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = shared_folder.parent / f"slow-{world.Get_rank()}.toml"
    cores = [24.0] * (world.Get_size() - 1) + [6.0]
    environment.write_text(
        f'name = "slow"\nworkers = {world.Get_size()}\nalpha_s = 0.005\nseconds_per_sample_24 = 0.0005\n'
        f"[[phases]]\ncores = {cores}\nuplink_mbit = {[1000.0] * world.Get_size()}\n"
    )
    monkeypatch.setenv("DLION_ENVIRONMENT", str(environment))
    options = {"sync": "sync", "global_batch": "fixed", "transfer": "none", "steps": 60}
    outcome = train(**options, out=str(shared_folder))
    assert outcome.exit_code == 0
    world.Barrier()
    lbs, gbs = [], []
    for rank in range(world.Get_size()):
        with metrics(shared_folder, rank) as file:
            lbs.append(file["steps/lbs"][:])
            gbs.append(file["steps/gbs"][:])
            assert (file["steps/paced_s"][:] > 0).any()
            assert json.loads(file.attrs["emulated"])["name"] == "slow"
    np.testing.assert_array_equal(np.sum(lbs, axis=0), gbs[0])
    # A quarter of the speed is a little over a quarter of the batch, since alpha is alike.
    ratios = lbs[-1] / lbs[0]
    assert np.median(ratios) < 0.5
    assert train(**options, batching="fixed", out=str(shared_folder) + "-fixed").exit_code == 0
    world.Barrier()
    sizes: set[int] = set()
    for rank in range(world.Get_size()):
        with metrics(Path(str(shared_folder) + "-fixed"), rank) as file:
            sizes |= set(file["steps/lbs"][:].tolist())
    assert len(sizes) == 1, "off, the slow one computes as much as the others"


@pytest.mark.mpi
def test_gbs_grows_by_its_schedule(world: MPI.Intracomm, shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow_soon(monkeypatch, every=10, samples=4, warmup=0.1, most=0.1)
    train(steps=31, batch_size=8, sync="sync", transfer="none", batching="fixed", out=str(shared_folder))
    world.Barrier()
    with metrics(shared_folder, 0) as file:
        start = 8 * world.Get_size()
        expected = [start + 4 * (step // 10) for step in range(31)]
        assert list(file["steps/gbs"]) == expected


@pytest.mark.most_ranks(3)
@pytest.mark.mpi
def test_adam_momentum_batch_norm_and_dropout_go_through_the_same_update(world: MPI.Intracomm) -> None:
    for options in ({"optimizer": "adam", "learning_rate": 0.003}, {"momentum": 0.9, "learning_rate": 0.02}):
        result = train(**{"steps": 120, **options, "transfer_period": 20, "seed": 3, "exchange_share": 0}).summary
        assert min(result["accuracy_per_rank"]) > 0.8
    result = train(model="tests.nets:normalised", steps=150, transfer_period=10, exchange_share=0).summary
    assert min(result["accuracy_per_rank"]) > 0.8


@pytest.mark.mpi
def test_a_loss_that_is_not_finite_stops_the_run_and_never_reaches_a_peer(world: MPI.Intracomm) -> None:
    outcome = train(learning_rate=1e30, steps=50)
    assert outcome.exit_code == 1
    assert "not finite" in outcome.summary["stopped"]
    assert outcome.summary["steps"] < 50


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("sync", ["sync", "bounded", "async"])
def test_a_loss_that_is_not_finite_on_one_rank_only_ends_all(world: MPI.Intracomm, sync: str) -> None:
    """The one whose data are broken names itself; the others leave with it. The model takes the data unscaled."""
    import keras

    backend.start(1)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(10)])
    scale = 1e37 if world.Get_rank() == 1 else 1.0
    x = (np.random.default_rng(world.Get_rank()).standard_normal((80, 64)) * scale).astype(np.float32)
    y = np.arange(80) % 10
    shard = shard_of_fit((x, y), (x[:10], y[:10]))
    options = {"data": "arrays", "model": MODEL, "seconds": 60, "sync": sync, "batching": "fixed"}
    outcome = run(config(**options), model=model, own_data=lambda: shard, report=False)
    assert outcome.exit_code == 1
    assert "rank 1, step" in outcome.summary["stopped"]
    assert outcome.summary["seconds"] < 50


@pytest.mark.mpi
def test_skip_leaves_such_a_gradient_out_and_goes_on(world: MPI.Intracomm) -> None:
    outcome = train(learning_rate=1e30, steps=10, non_finite="skip")
    assert outcome.exit_code == 0
    assert outcome.summary["steps"] == 10
    assert outcome.summary["loss"] is None


@pytest.mark.mpi
@pytest.mark.parametrize("sync", ["sync", "bounded", "async"])
def test_a_time_limit_ends_all_ranks_together(world: MPI.Intracomm, sync: str, shared_folder: Path) -> None:
    result = train(
        steps=None, seconds=1.0, sync=sync, transfer_period=3, transfer="all", out=str(shared_folder)
    ).summary
    assert result["stopped"] is None
    assert result["seconds"] < 20
    world.Barrier()
    steps = []
    for rank in range(world.Get_size()):
        with metrics(shared_folder, rank) as file:
            steps.append(file["steps/step"].shape[0])
            assert file["ended"][()] == 1
    if sync == "sync":
        assert len(set(steps)) == 1


@pytest.mark.mpi
def test_a_target_ends_the_run_and_says_when(world: MPI.Intracomm) -> None:
    result = train(steps=2000, target=Target("accuracy", ">=", 0.6), evaluate_every="10").summary
    assert result["stopped"] == "target accuracy>=0.6 reached"
    assert result["steps"] < 2000
    assert 0 < result["target_reached_s"] <= result["seconds"]


@pytest.mark.mpi
def test_metrics_have_every_step_and_link(world: MPI.Intracomm, shared_folder: Path) -> None:
    outcome = train(steps=30, out=str(shared_folder), evaluate_every="10")
    world.Barrier()
    rank, size = world.Get_rank(), world.Get_size()
    with metrics(shared_folder, rank) as file:
        assert list(file["steps/step"]) == list(range(30))
        parts = sum(file[f"steps/{name}"][:] for name in ("compute_s", "select_encode_s", "wait_s", "apply_s"))
        assert np.all(parts <= file["steps/step_s"][:] + 1e-3)
        assert file["evaluations/accuracy"][-1] == pytest.approx(outcome.summary["accuracy_per_rank"][rank], abs=1e-6)
        sent = file["links/bytes_sent"][:]
        assert sent.shape == (30, size)
        assert np.all(np.diff(sent.astype(np.int64), axis=0) >= 0)
        assert sent[-1, rank] == 0
        if size > 1:
            assert sent[-1].sum() > 0
            peer = (rank + 1) % size
            assert np.isfinite(file["links/quality"][:, peer]).any()
            assert np.nanmin(file["links/age_s"][:, peer]) >= 0
            moving_s = file["steps/mpi_cpu_s"][:]
            assert np.all(np.diff(moving_s) >= 0)
            assert 0 < moving_s[-1] < file["steps/time_s"][-1]
        assert file.attrs["rank"] == rank
        assert "learning_rate" in file.attrs["config"]
    assert (shared_folder / "config.toml").read_text().startswith("[run]")


@pytest.mark.mpi
def test_an_out_that_exists_is_refused_on_every_rank(world: MPI.Intracomm, shared_folder: Path) -> None:
    from dlion_mpi.errors import UserError

    if world.Get_rank() == 0:
        shared_folder.mkdir()
    world.Barrier()
    with pytest.raises(UserError, match="exists already"):
        train(out=str(shared_folder))
