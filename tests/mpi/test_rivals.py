"""Rivals over real MPI: they learn what all ranks know, send what they should, and end in good order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from dlion_mpi.loop.links import Links
from dlion_mpi.wire import HEADER_BYTES
from tests.conservation import Exact
from tests.gaps import leads
from tests.mpi.test_training import fresh_model, metrics, train, trained_weights

PARAMETERS = 2410


def slow(world: MPI.Intracomm, folder: Path, monkeypatch: pytest.MonkeyPatch, sample_s: float = 0.0005) -> None:
    """The last rank computes twelve times as slowly as the others, which take ``sample_s`` for a sample."""
    environment = folder.parent / f"slow-{world.Get_rank()}.toml"
    cores = [24.0] * (world.Get_size() - 1) + [2.0]
    environment.write_text(
        f'name = "slow"\nworkers = {world.Get_size()}\nalpha_s = 0.01\nseconds_per_sample_24 = {sample_s}\n'
        f"[[phases]]\ncores = {cores}\nuplink_mbit = {[1000.0] * world.Get_size()}\n"
    )
    monkeypatch.setenv("DLION_ENVIRONMENT", str(environment))


@pytest.mark.mpi
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "ako", "partitions": 3},
        {"strategy": "ako", "sync": "bounded"},
        {"strategy": "gaia"},
        {"strategy": "gaia", "sync": "async", "barrier": "none"},
        {"strategy": "hop"},
        {"strategy": "hop", "sync": "sync", "graph": "ring"},
        {"strategy": "choco-sgd"},
        {"strategy": "streaming-diloco", "h": 8, "overlap": 2},
        {"strategy": "sparseloco", "h": 5},
        {"strategy": "dgc", "density": 0.1, "momentum": 0.0},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_it_learns_and_ends_in_good_order(world: MPI.Intracomm, options: dict[str, object]) -> None:
    outcome = train(**options, steps=200)
    assert outcome.exit_code == 0
    assert outcome.summary["stopped"] is None
    # Workers of `async` that are done before the others have begun have learnt from their own data only.
    is_apart = options["strategy"] in ("ako", "gaia", "hop") and options.get("sync") != "sync"
    assert min(outcome.summary["accuracy_per_rank"]) > (0.5 if is_apart else 0.8)


@pytest.mark.mpi(min_size=2)
def test_demo_learns_by_signs(world: MPI.Intracomm) -> None:
    """One rank alone takes no sign: its steps would need another learning rate."""
    outcome = train(strategy="demo", learning_rate=0.01, steps=200)
    assert outcome.exit_code == 0
    assert min(outcome.summary["accuracy_per_rank"]) > 0.8


@pytest.mark.mpi
@pytest.mark.parametrize("strategy", ["ako", "gaia", "hop"])
def test_a_time_limit_ends_all_ranks_together(world: MPI.Intracomm, strategy: str, shared_folder: Path) -> None:
    result = train(strategy=strategy, steps=None, seconds=1.0, out=str(shared_folder)).summary
    assert result["stopped"] is None
    assert result["seconds"] < 20
    world.Barrier()
    for rank in range(world.Get_size()):
        with metrics(shared_folder, rank) as file:
            assert file["ended"][()] == 1
            assert len(file["steps/step"]) > 0


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("strategy", ["ako", "gaia", "hop"])
def test_a_loss_that_is_not_finite_ends_all(world: MPI.Intracomm, strategy: str) -> None:
    outcome = train(strategy=strategy, learning_rate=1e30, steps=50)
    assert outcome.exit_code == 1
    assert "not finite" in outcome.summary["stopped"]


@pytest.mark.mpi(min_size=2)
def test_ako_sends_a_partition_a_step(world: MPI.Intracomm) -> None:
    """In all no more than the steps' partitions, their headers and the acknowledgements; a busy link gets less."""
    result = train(strategy="ako", partitions=5, steps=40).summary
    links = world.Get_size() * (world.Get_size() - 1)
    most = 40 * (4 * PARAMETERS / 5 + 4 + 3 * HEADER_BYTES) + 4 * HEADER_BYTES
    assert 0.2 * links * most < result["bytes_sent"] <= 1.02 * links * most


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("sync", ["async", "bounded"])
def test_what_ako_computed_has_come_or_is_kept_bit_for_bit(
    world: MPI.Intracomm, sync: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everyone tells everyone what it has had from it."""
    rank = world.Get_rank()
    exact = Exact(monkeypatch, Links, lambda links: rank)
    assert train(strategy="ako", sync=sync, partitions=4, steps=80).exit_code == 0
    for peer, came in enumerate(world.allgather(exact.came)):
        if (rank, peer) in exact.computed:  # in `async` a peer may have left before this rank began
            exact.came |= came
            exact.check(rank, peer)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"strategy": "gaia", "staleness": 2}, 3),
        ({"strategy": "hop", "staleness": 30, "backup": 3, "max_gap": 2, "skip": 0}, 2),
        ({"strategy": "hop", "staleness": 30, "backup": 3, "max_gap": 4, "skip": 5}, 4),
    ],
)
def test_nobody_is_further_ahead_than_the_clock_or_the_tokens_allow(
    world: MPI.Intracomm, shared_folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], most: int
) -> None:
    """With a rank that is slower than the others. In simulated runs they go as far as they may."""
    slow(world, shared_folder, monkeypatch, sample_s=0.0002)
    assert train(**options, steps=20, out=str(shared_folder)).exit_code == 0
    world.Barrier()
    assert 0 <= max(leads(shared_folder, world.Get_size())) <= most


@pytest.mark.mpi(min_size=2)
def test_gaia_sends_less_with_a_higher_threshold(world: MPI.Intracomm) -> None:
    sent = [train(strategy="gaia", threshold=s, steps=60, staleness=0).summary["bytes_sent"] for s in (0.0, 5.0)]
    assert sent[1] < 0.7 * sent[0]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("graph", ["all", "ring"])
def test_hop_in_sync_is_deterministic(world: MPI.Intracomm, graph: str) -> None:
    options = {"strategy": "hop", "sync": "sync", "graph": graph, "steps": 20}
    first, second = trained_weights(**options), trained_weights(**options)
    np.testing.assert_array_equal(first, second)


@pytest.mark.mpi(min_size=2)
def test_hop_s_parameters_are_those_of_decentralised_sgd(world: MPI.Intracomm) -> None:
    """With everyone a neighbour the mean over the workers takes the steps of SGD on the joint batch."""
    start = np.concatenate([w.ravel() for w in fresh_model().get_weights()])
    options = {"sync": "sync", "steps": 2, "learning_rate": 0.01}
    hop, baseline = (trained_weights(strategy=name, **options) for name in ("hop", "baseline"))
    mean = np.mean(world.allgather(hop), axis=0)
    assert np.abs(baseline - start).max() > 1e-4
    # The second gradient is taken at x - eta g, not at x - eta mean g: alike to the second order of eta.
    np.testing.assert_allclose(mean, baseline, rtol=0, atol=0.05 * np.abs(baseline - start).max())


@pytest.mark.mpi(min_size=2)
def test_with_hop_a_slow_rank_skips(world: MPI.Intracomm, shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(world, shared_folder, monkeypatch)
    options = {"strategy": "hop", "staleness": 3, "backup": 0, "max_gap": 8}
    outcome = train(**options, skip=10, steps=60, out=str(shared_folder))
    assert outcome.exit_code == 0
    world.Barrier()
    with metrics(shared_folder, world.Get_size() - 1) as file:
        steps = file["steps/step"][:]
    assert steps[-1] == 59
    assert len(steps) < 45
    assert np.diff(steps.astype(int)).max() <= 11
    plain = train(**options, skip=0, steps=60, out=str(shared_folder) + "-plain")
    assert plain.exit_code == 0
    world.Barrier()
    with metrics(Path(str(shared_folder) + "-plain"), world.Get_size() - 1) as file:
        assert len(file["steps/step"]) == 60, "without skipping, everyone waits for it to make every step"
