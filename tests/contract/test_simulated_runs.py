"""Whole runs in virtual time: the loop of `train`, with digits and a small dense model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dlion_mpi.algorithms.ring import ring_bytes
from dlion_mpi.config.fields import Every
from dlion_mpi.config.options import Config
from dlion_mpi.config.target import Target
from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch, joined
from dlion_mpi.learner.batches import Batches
from dlion_mpi.learner.models import trainable
from dlion_mpi.learner.replica import Replica
from dlion_mpi.learner.shards import Shard, load_shards
from dlion_mpi.learner.source import Table
from dlion_mpi.loop import links as loop_links
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.microcloud import environments
from dlion_mpi.microcloud.environments import Environment
from dlion_mpi.result import Result
from dlion_mpi.simulation import driver as simulation_driver
from dlion_mpi.simulation import free_network
from dlion_mpi.simulation import links as simulation_testbed
from dlion_mpi.simulation.network import payload_bytes_per_s
from dlion_mpi.simulation.run import prepare
from dlion_mpi.simulation.shared_replica import SharedReplica
from dlion_mpi.simulation.simulate import simulate
from dlion_mpi.strategies.dlion import Dlion
from dlion_mpi.strategies.registry import STRATEGIES, resolve
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import HEADER_BYTES, Message
from tests.contract.problem import every_message_mode
from tests.options import config as options_config
from tests.shards import whole_of

PARAMETERS = 2410
BALANCED = [58, 29, 9]
"""How 96 samples are shared by 24, 12 and 4 cores so that all finish together."""


def config(**options: Any) -> Config:
    """Digits, the small model, and ends and periods that suit a test."""
    small = {"data": "digits", "model": "tests.nets:dense", "evaluate_every": Every(steps=10)}
    if not {"steps", "seconds", "target"} & set(options):
        small["steps"] = 12
    return options_config(**(small | options))


def cloud(cores: tuple[float, ...] = (24.0, 24.0, 24.0), mbit: float = 1000.0, **rest: Any) -> Environment:
    phase = environments.Phase(cores=cores, uplink_mbit=(mbit,) * len(cores))
    return Environment(name="test", workers=len(cores), phases=(phase,), **rest)


def metrics(folder: Path) -> dict[str, dict[str, Any]]:
    """Every data set of every rank's file, by file and name."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("metrics-*.h5")):
        with h5py.File(path) as file:
            groups = [name for name, item in file.items() if isinstance(item, h5py.Group)]
            names = ["ended", *(f"{group}/{name}" for group in groups for name in file[group])]
            found[path.name] = {name: file[name][()] for name in names}
    return found


def recorded(tmp_path: Path, environment: Environment, **options: Any) -> tuple[Result, list[dict[str, Any]]]:
    """A run with metrics, and those of every rank."""
    outcome = simulate(config(out=str(tmp_path / "run"), **options), environment, report=False)
    return outcome, list(metrics(tmp_path / "run").values())


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """The workers of the run that the test makes, for it to look into."""
    made: list[Worker] = []

    class Spy(simulation_driver.Process):
        def __init__(self, worker: Worker, *rest: Any) -> None:
            made.append(worker)
            super().__init__(worker, *rest)

    monkeypatch.setattr(simulation_driver, "Process", Spy)
    return made


# ---- the same again, and nothing lost


@pytest.mark.parametrize("strategy", ["free-network", *(name for name in STRATEGIES if name != "horovod")])
def test_the_same_run_twice_is_the_same_to_the_last_byte(strategy: str, tmp_path: Path) -> None:
    environment = cloud((24.0, 12.0, 4.0), mbit=2.0, latency_s=0.003)
    options = {"transfer_period": 5, "transfer": "all"} if strategy == "dlion" else {}
    results = []
    for name in ("a", "b"):
        outcome = simulate(config(strategy=strategy, out=str(tmp_path / name), **options), environment, report=False)
        results.append(outcome.summary | {"out": None})
    assert results[0] == results[1]
    first, second = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert len(first) == 3
    assert first.keys() == second.keys()
    for file, sets in first.items():
        assert sets.keys() == second[file].keys()
        for name, values in sets.items():
            assert np.asarray(values).tobytes() == np.asarray(second[file][name]).tobytes(), f"{file} {name}"


@every_message_mode
def test_every_message_sent_has_come(name: str, mode: str, workers: list[Worker]) -> None:
    every_step: dict[str, Any] = {"h": 1} if hasattr(STRATEGIES[name].Options, "h") else {}
    outcome = simulate(config(strategy=name, sync=mode, **every_step), cloud(), report=False)
    assert outcome.exit_code == 0
    assert [worker.step for worker in workers] == [12, 12, 12]
    sent = [worker.links.fall_silent() for worker in workers]
    assert [[row[k] for row in sent] for k in range(3)] == [worker.links.received_counts() for worker in workers]
    for worker in workers:
        for peer, totals in worker.links.totals().items():
            assert totals.bytes_sent == workers[peer].links.totals()[worker.rank].bytes_received
            assert totals.bytes_sent > 12 * HEADER_BYTES


@pytest.mark.parametrize("value_type", ["float32", "float16"])
def test_what_was_computed_was_sent_or_is_remembered(
    value_type: str, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On links that carry a part of it, for every pair: entries that came + residual == sum of gradients."""
    came: dict[tuple[int, int], Any] = {}
    computed: dict[int, Any] = {}
    sparse: list[bool] = []
    poll, outgoing = simulation_driver.VirtualLinks.poll, STRATEGIES["dlion"].outgoing

    def spy_poll(self: Any) -> list[Message]:
        messages = poll(self)
        for message in messages:
            total = came.setdefault((message.header.sender, self.rank), np.zeros(PARAMETERS, np.float32))
            message.entries.add_to(total, 1.0)
            sparse.append(message.entries.indices is not None and len(message.entries) > 0)
        return messages

    def spy_outgoing(self: Any, state: Any, local: Any, links: Any) -> Any:
        computed.setdefault(state.plan.rank, np.zeros(PARAMETERS, np.float32))
        computed[state.plan.rank] += local.vector * np.float32(local.lbs / local.gbs)
        return outgoing(self, state, local, links)

    monkeypatch.setattr(simulation_driver.VirtualLinks, "poll", spy_poll)
    monkeypatch.setattr(STRATEGIES["dlion"], "outgoing", spy_outgoing)
    options = {"sync": "async", "steps": 40, "value_type": value_type}
    simulate(config(**options), cloud(mbit=0.3), report=False)
    assert sum(sparse) > 20
    for (source, destination), total in came.items():
        kept = workers[source].state.residuals.of(destination)
        assert np.abs(kept).max() > 0
        np.testing.assert_allclose(total + kept, computed[source], rtol=1e-3, atol=2e-5)


# ---- what it computes


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("dlion", {"sync": "sync", "max_n": 100.0, "batching": "fixed", "global_batch": "fixed", "transfer": "none"}),
        ("baseline", {}),
        ("allreduce", {}),
        ("free-network", {}),
        (
            "dlion",
            {
                "sync": "sync",
                "max_n": 100.0,
                "batching": "fixed",
                "global_batch": "fixed",
                "transfer": "none",
                "value_type": "float32",
                "momentum": 0.9,
            },
        ),
        ("allreduce", {"optimizer": "adam", "learning_rate": 0.01}),
        ("powersgd", {"rank": 1000}),
        ("dgc", {"density": 1.0, "momentum": 0.0}),
        ("choco-sgd", {"density": 1.0, "gamma": 1.0}),
        ("local-sgd", {"h": 1}),
        ("sparseloco", {"h": 1, "entries": 4096, "value_type": "float32"}),
        ("diloco", {"h": 1, "outer_learning_rate": 1.0, "outer_momentum": 0.0, "value_type": "float32"}),
    ],
)
def test_all_workers_together_are_one_process_with_the_joint_batch(strategy: str, options: dict[str, Any]) -> None:
    wanted = config(strategy=strategy, **options)
    run = prepare(_resolved(wanted), cloud((24.0, 12.0, 4.0)), model=None, shards=None, report=False)
    with run:
        _train(run)
        got = [replica.weights() for replica in run.replicas]
    shards = load_shards("digits", ranks=3)
    batches = [Batches(shard, seed=0, rank=rank) for rank, shard in enumerate(shards)]
    sizes = BALANCED if strategy == "free-network" else [32] * 3
    replica = Replica(trainable(wanted, shards[0]))
    start = replica.weights()
    for _ in range(12):
        joint = joined(list(map(Batches.take, batches, sizes)))
        replica.apply(np.array(replica.gradient(joint).vector))
    assert np.abs(replica.weights() - start).max() > 0.01
    for weights in got:
        np.testing.assert_allclose(weights, replica.weights(), rtol=1e-3, atol=2e-5)


def _resolved(wanted: Config) -> Config:
    return free_network.resolve(wanted) if free_network.is_named(wanted) else resolve(wanted)[1]


def _train(run: Any) -> None:
    (free_network.train_together if free_network.is_named(run.config) else simulation_driver.drive)(run)


def test_one_worker_alone_is_plain_training() -> None:
    outcome = simulate(config(steps=100), cloud((24.0,)), report=False)
    assert outcome.summary["bytes_sent"] == 0
    assert outcome.summary["accuracy_mean"] > 0.6
    assert outcome.summary["seconds"] == pytest.approx(100 * 0.2, abs=1e-3)


# ---- how long it takes


@pytest.mark.parametrize("latency_s", [0.0, 0.05])
def test_a_step_of_baseline_takes_computing_and_sending(latency_s: float, tmp_path: Path) -> None:
    outcome, ranks = recorded(tmp_path, cloud(mbit=1.0, latency_s=latency_s), strategy="baseline", steps=4)
    exchange_s = 2 * (2 * HEADER_BYTES + 4 * PARAMETERS) / payload_bytes_per_s(1.0) + latency_s  # with a probe each
    for own in ranks:
        np.testing.assert_allclose(own["steps/compute_s"], 0.2, rtol=1e-6)
        np.testing.assert_allclose(own["steps/wait_s"], exchange_s, rtol=1e-5)
        np.testing.assert_allclose(own["steps/time_s"], np.arange(1, 5) * (0.2 + exchange_s), rtol=1e-4)
    assert outcome.summary["seconds"] >= 4 * (0.2 + exchange_s)


def test_what_messages_cost_a_processor_takes_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per step two messages go out and two come in, of which each takes 10 ms."""
    monkeypatch.setattr(simulation_testbed, "DENSE_S", 0.010 / PARAMETERS)
    _, ranks = recorded(tmp_path, cloud(), strategy="baseline", steps=6)
    for own in ranks:
        np.testing.assert_allclose(own["steps/compute_s"], 0.2, rtol=1e-6)
        np.testing.assert_allclose(own["steps/step_s"][1:], 0.24, atol=0.002)


ALL_ENTRIES = {
    "max_n": 100.0,
    "exchange_share": 0.0,
    "batching": "fixed",
    "value_type": "float32",
}
"""Of dlion: a dense message to every peer at every step, while the next one is computed."""


def spans(own: dict[str, Any], phase: Phase) -> list[tuple[float, float]]:
    found = own["timeline/spans"]
    return [(float(s["start_s"]), float(s["end_s"])) for s in found[found["phase"] == int(phase)]]


@pytest.mark.parametrize(("patience", "steps_late"), [(0.5, 0), (0.0, 1)])
def test_patience_waits_for_the_gradients_of_the_same_step(patience: float, steps_late: int, tmp_path: Path) -> None:
    """A message takes 30 ms of a step of 200."""
    _, ranks = recorded(tmp_path, cloud(latency_s=0.03), patience=patience, batching="fixed", steps=10)
    for own in ranks:
        ages = own["links/age_steps"][2:]
        assert set(ages[np.isfinite(ages)]) == {steps_late}
        np.testing.assert_allclose(own["steps/wait_s"][1:], 0.0 if steps_late else 0.03, atol=0.005)


@pytest.mark.parametrize(("patience", "late_s"), [(0.0, 0.0), (0.2, 0.04), (0.4, 0.08)])
def test_patience_has_an_end(patience: float, late_s: float, tmp_path: Path) -> None:
    """One worker takes longer than any of these: the others wait for as long as they may, and no longer."""
    options = {"patience": patience, "staleness": 100, "batching": "fixed", "seconds": 3.0}
    _, ranks = recorded(tmp_path, cloud((24.0, 24.0, 12.0)), **options)
    for own in ranks[:2]:
        np.testing.assert_allclose(own["steps/step_s"][1:-1], 0.2 + late_s, atol=0.003)
    np.testing.assert_allclose(ranks[2]["steps/step_s"][1:-1], 0.38, atol=0.003)


@pytest.mark.parametrize(("latency_s", "steps_late"), [(0.1, 1), (0.19, 1), (0.25, 2)])
def test_what_cannot_be_in_time_is_not_waited_for(latency_s: float, steps_late: int, tmp_path: Path) -> None:
    """The first steps wait, since nothing is known of the links."""
    _, ranks = recorded(tmp_path, cloud(latency_s=latency_s), batching="fixed", steps=20)
    for own in ranks:
        np.testing.assert_allclose(own["steps/step_s"][8:], 0.2, atol=0.003)
        ages = own["links/age_steps"][8:]
        assert np.median(ages[np.isfinite(ages)]) == steps_late


def test_workers_that_are_far_apart_still_wait_for_each_other(tmp_path: Path) -> None:
    """All but the message of this step should be here: a worker that is a little slower is not left behind."""
    options = {"staleness": 100, "batching": "fixed", "seconds": 8.0}
    _, ranks = recorded(tmp_path, cloud((24.0, 24.0, 20.0), latency_s=0.1), **options)
    steps = [len(own["steps/step"]) for own in ranks]
    assert max(steps) - min(steps) <= 2


def test_a_worker_does_not_wait_for_one_that_has_ended(tmp_path: Path) -> None:
    """The two fast ones end in the step before the slow one's last, which it does without waiting for them."""
    options = {"patience": 100.0, "staleness": 100, "batching": "fixed", "seconds": 3.06}
    outcome, ranks = recorded(tmp_path, cloud((24.0, 24.0, 12.0), latency_s=0.05), **options)
    assert outcome.exit_code == 0
    assert [len(own["steps/time_s"]) for own in ranks] == [8, 8, 9]
    assert max(own["steps/time_s"][-1] for own in ranks) < 3.6


def test_patience_does_not_wait_for_those_that_backup_leaves_out(tmp_path: Path) -> None:
    options = {"batching": "fixed", "seconds": 6.0, "staleness": 100}
    environment = cloud((24.0, 24.0, 24.0, 3.0))
    _, ranks = recorded(tmp_path / "a", environment, backup=1, **options)
    assert len(ranks[0]["steps/step"]) > 28
    _, ranks = recorded(tmp_path / "b", environment, backup=0, **options)
    assert len(ranks[0]["steps/step"]) < 22


def test_what_is_tested_is_the_same_on_all_that_get_everything_in_time(
    tmp_path: Path, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas differ by what their workers have not sent; the tests leave it out."""
    tested: list[Vector] = []
    replicas: list[Vector] = []
    evaluate = SharedReplica.evaluate

    def noted(shared: SharedReplica, knowledge: Vector, batches: Iterable[Batch]) -> dict[str, float]:
        tested.append(knowledge.copy())
        replicas.append(workers[len(replicas) % 3].replica.weights())
        return evaluate(shared, knowledge, batches)

    monkeypatch.setattr(SharedReplica, "evaluate", noted)
    environment = cloud((24.0, 12.0, 4.0), mbit=3.0)
    recorded(tmp_path, environment, steps=20, evaluate_every=Every.parse("10"), link_share=0.3)
    assert len(tested) >= 6
    for first, *others in (tested[:3], tested[3:6]):
        for knowledge in others:
            np.testing.assert_allclose(knowledge, first, atol=1e-6)
    assert max(np.abs(own - replicas[0]).max() for own in replicas[1:3]) > 1e-4


def test_what_is_made_beside_the_loop_does_not_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two messages takes 10 ms to make, and as long to take in."""
    monkeypatch.setattr(simulation_testbed, "DENSE_S", 0.010 / PARAMETERS)
    _, ranks = recorded(tmp_path, cloud(), patience=0.0, steps=8, **ALL_ENTRIES)
    for own in ranks:
        np.testing.assert_allclose(own["steps/step_s"][2:], 0.22, atol=0.002)
        beside = spans(own, Phase.EXCHANGE)
        assert [round(end - start, 4) for start, end in beside] == [0.02] * 8
        sent = own["timeline/sent"]
        sent = sent[sent["size_bytes"] > HEADER_BYTES]
        np.testing.assert_allclose(sent["posted_s"] - sent["computed_s"], [0.01, 0.02] * 8, atol=1e-6)


def test_the_next_messages_wait_for_those_that_are_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two messages takes 0.15 s to make; computing takes 0.2 s, and taking two in 0.3 s."""
    monkeypatch.setattr(simulation_testbed, "DENSE_S", 0.15 / PARAMETERS)
    monkeypatch.setattr(loop_links, "UNREAD_MESSAGES", 100)
    monkeypatch.setattr(Dlion, "window", 64)
    _, ranks = recorded(tmp_path, cloud(), sync="async", steps=8, **ALL_ENTRIES)
    for own in ranks:
        making = spans(own, Phase.EXCHANGE)
        assert len(making) == 8
        assert all(start >= end for (_, end), (start, _) in itertools.pairwise(making))
        waited = own["steps/select_encode_s"]
        assert waited[1] == pytest.approx(0.1, abs=1e-3)  # of 0.3 s, 0.2 s are computed meanwhile


def test_an_allreduce_step_is_the_slowest_worker_and_the_ring(tmp_path: Path) -> None:
    """And a word of 8 bytes to everyone before it."""
    _, ranks = recorded(tmp_path, cloud((24.0, 12.0, 4.0), mbit=1.0), strategy="allreduce", steps=3)
    slowest_s = 0.02 + 32 * 0.18 / 32 * 6
    ring_s = (2 * 2 / 3 * 4 * PARAMETERS + 16) / payload_bytes_per_s(1.0)
    for rank, own in enumerate(ranks):
        np.testing.assert_allclose(own["steps/step_s"], slowest_s + ring_s, rtol=1e-4)
        sent = [3 * ring_bytes(PARAMETERS, rank, 3)[0] if peer == (rank + 1) % 3 else 0 for peer in range(3)]
        assert own["links/bytes_sent"][-1].tolist() == sent
    np.testing.assert_allclose(ranks[0]["steps/wait_s"], slowest_s + ring_s - 0.2, rtol=1e-4)


def test_an_allreduce_can_have_batches_that_follow_the_cores(tmp_path: Path) -> None:
    environment = cloud((24.0, 12.0, 4.0), mbit=100.0)
    _, ranks = recorded(tmp_path, environment, strategy="allreduce", steps=30, batching="auto")
    assert sum(int(own["steps/lbs"][-1]) for own in ranks) == 96
    compute_s = [own["steps/compute_s"][-1] for own in ranks]
    assert max(compute_s) - min(compute_s) < 0.035


def test_sums_of_factors_and_rare_sums_cost_as_much_less_as_they_are_smaller(tmp_path: Path) -> None:
    """The model is (64, 32), (32,), (32, 10), (10,)."""
    options: dict[str, dict[str, Any]] = {"powersgd": {"rank": 1}, "local-sgd": {"h": 4}, "diloco": {"h": 4}}
    sent, seconds = {}, {}
    for name in ("allreduce", *options):
        outcome, ranks = recorded(tmp_path / name, cloud(mbit=0.5), strategy=name, steps=12, **options.get(name, {}))
        sent[name] = sum(float(own["links/bytes_sent"][-1].sum()) for own in ranks)
        seconds[name] = ranks[0]["steps/time_s"][-1] - 12 * 0.2
        assert outcome.exit_code == 0
    assert sent["powersgd"] / sent["allreduce"] == pytest.approx((64 + 32 + 32 + 32 + 10 + 10) / PARAMETERS, rel=0.01)
    assert sent["local-sgd"] == sent["allreduce"] / 4
    assert sent["diloco"] == sent["local-sgd"] / 2, "values of 16 bits"
    assert seconds["powersgd"] < 0.15 * seconds["allreduce"]
    assert seconds["local-sgd"] == pytest.approx(seconds["allreduce"] / 4, rel=0.01)
    assert seconds["diloco"] == pytest.approx(seconds["local-sgd"] / 2, rel=0.01)


def test_a_free_network_costs_nothing_and_balances(tmp_path: Path) -> None:
    outcome, ranks = recorded(tmp_path, cloud((24.0, 12.0, 4.0), mbit=0.01), strategy="free-network", steps=3)
    assert sum(int(own["steps/lbs"][0]) for own in ranks) == 96
    compute_s = [own["steps/compute_s"][0] for own in ranks]
    assert max(compute_s) - min(compute_s) < 0.035  # a sample on 4 cores
    assert outcome.summary["seconds"] == pytest.approx(3 * max(compute_s), rel=1e-3)
    assert outcome.summary["bytes_sent"] == 0


def test_paces_and_rates_change_with_the_phase(tmp_path: Path) -> None:
    phases = (
        environments.Phase(cores=(24.0,) * 2, uplink_mbit=(1.0,) * 2, share=0.5),
        environments.Phase(cores=(12.0,) * 2, uplink_mbit=(4.0,) * 2, share=0.5),
    )
    environment = Environment(name="test", workers=2, phases=phases)
    _, (own, _) = recorded(tmp_path, environment, strategy="baseline", seconds=10.0)
    message_bytes = 2 * HEADER_BYTES + 4 * PARAMETERS  # with a probe
    assert own["steps/compute_s"][0] == pytest.approx(0.2)
    assert own["steps/compute_s"][-1] == pytest.approx(0.38)
    assert own["steps/wait_s"][0] == pytest.approx(message_bytes / payload_bytes_per_s(1.0), rel=1e-4)
    assert own["steps/wait_s"][-1] == pytest.approx(message_bytes / payload_bytes_per_s(4.0), rel=1e-4)


# ---- the techniques act


def test_batches_follow_the_cores(tmp_path: Path) -> None:
    options = {"steps": 30, "global_batch": "fixed", "transfer": "none"}
    _, ranks = recorded(tmp_path, cloud((24.0, 12.0, 4.0)), **options)
    shares = [int(own["steps/lbs"][-1]) for own in ranks]
    assert sum(shares) == 96
    assert shares[0] > 1.5 * shares[1] > 3 * shares[2]
    compute_s = [own["steps/compute_s"][-1] for own in ranks]
    assert max(compute_s) - min(compute_s) < 0.035


def test_knowledge_is_transferred_and_brings_the_workers_together(tmp_path: Path) -> None:
    def spread(name: str, **options: Any) -> tuple[float, list[dict[str, Any]]]:
        folder = str(tmp_path / name)
        common = {"max_n": 0.01, "unsent": "drop", "steps": 41, "global_batch": "fixed"}
        run = prepare(
            _resolved(config(out=folder, **common, **options)), cloud(), model=None, shards=None, report=False
        )
        with run:
            _train(run)
            weights = np.stack([replica.weights() for replica in run.replicas])
        return float(weights.std(axis=0).mean()), list(metrics(tmp_path / name).values())

    apart, without = spread("without", transfer="none")
    together, with_ = spread("with", transfer="all", transfer_period=10, transfer_merge=1.0)
    assert together < 0.7 * apart
    assert all(len(own["transfers/step"]) == 0 for own in without)
    for rank, own in enumerate(with_):
        assert len(own["transfers/step"]) >= 3
        assert (own["transfers/merged"] == (own["transfers/source"] != rank)).all()
        assert set(own["transfers/payload_bytes"]) <= {0, 4 * PARAMETERS}


def test_a_slow_network_makes_n_small_and_a_fast_one_large(tmp_path: Path) -> None:
    means = []
    for name, mbit in (("slow", 0.1), ("fast", 100.0)):
        _, ranks = recorded(tmp_path / name, cloud(mbit=mbit), steps=40, link_share=0.05)
        means.append(float(np.nanmean(ranks[0]["links/quality"][20:])))
    assert means[0] < 95
    assert means[1] == 100


def test_ako_sends_parts_that_fit_the_links(tmp_path: Path) -> None:
    shares = []
    for name, mbit in (("slow", 0.1), ("fast", 100.0)):
        _, ranks = recorded(tmp_path / name, cloud(mbit=mbit), strategy="ako", steps=40)
        shares.append(float(np.nanmean(ranks[0]["links/quality"][20:])))
    budget_bytes = payload_bytes_per_s(0.1) / 2 * 0.2
    assert 0.4 * budget_bytes < shares[0] / 100 * 4 * PARAMETERS < 1.1 * budget_bytes
    assert shares[1] == 100


def test_gaia_s_barrier_makes_workers_wait_for_what_their_links_carry_slowly(tmp_path: Path) -> None:
    waited = {}
    for barrier in ("selective", "none"):
        options = {"strategy": "gaia", "threshold": 0.0, "barrier": barrier, "sync": "async", "steps": 20}
        _, ranks = recorded(tmp_path / barrier, cloud(mbit=0.2), **options)
        waited[barrier] = sum(float(own["steps/wait_s"].sum()) for own in ranks)
    assert waited["none"] == 0
    assert waited["selective"] > 10


def test_hop_s_laggard_skips_and_the_others_do_not_wait(tmp_path: Path) -> None:
    seconds, done = {}, {}
    for skip in (0, 20):
        options = {"strategy": "hop", "staleness": 5, "backup": 0, "max_gap": 20, "skip": skip, "steps": 60}
        outcome, ranks = recorded(tmp_path / str(skip), cloud((24.0, 24.0, 4.0), mbit=100.0), **options)
        seconds[skip], done[skip] = outcome.summary["seconds"], [len(own["steps/step"]) for own in ranks]
        assert {int(own["steps/step"][-1]) for own in ranks} == {59}
    assert done[0] == [60, 60, 60]
    assert done[20][2] < 30
    assert seconds[20] < 0.5 * seconds[0]


# ---- how it ends


def test_a_target_ends_the_run() -> None:
    outcome = simulate(config(target=Target("accuracy", ">=", 0.5)), cloud(), report=False)
    assert outcome.summary["stopped"] == "target accuracy>=0.5 reached"
    assert outcome.summary["target_reached_s"] is not None
    assert outcome.summary["target_reached_s"] <= outcome.summary["seconds"]


@pytest.mark.parametrize("strategy", ["dlion", "baseline", "free-network"])
def test_a_loss_that_is_not_finite_ends_the_run_everywhere(strategy: str, tmp_path: Path) -> None:
    outcome, ranks = recorded(tmp_path, cloud(), strategy=strategy, learning_rate=1e30)
    assert outcome.exit_code == 1
    assert "--learning-rate" in outcome.summary["stopped"]
    assert [int(own["ended"]) for own in ranks] == [0, 0, 0]


def test_an_unknown_strategy_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(UserError, match=r"gossip: unknown; known are dlion, .*allreduce, .*free-network, or"):
        simulate(config(strategy="gossip"), cloud(), report=False)


def changed(shard: Shard, change: Callable[[Any], Any]) -> Shard:
    """The shard with other inputs."""
    train, test = (Table.of(rows._replace(x=change(rows.x))) for rows in whole_of(shard))
    return dataclasses.replace(shard, train=train, test=test)


def floats(shard: Shard) -> Shard:
    return changed(shard, lambda x: x.astype(np.float32))


def test_data_of_several_kinds_is_refused() -> None:
    shards = load_shards("digits", ranks=3)
    with pytest.raises(UserError, match="rank 2 has samples of"):
        simulate(config(), cloud(), shards=[*shards[:2], floats(shards[2])], report=False)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_loss_that_is_not_finite_on_one_worker_ends_the_run_everywhere(mode: str) -> None:
    shards = load_shards("digits", ranks=3)
    shards = [floats(shard) for shard in shards]
    shards[1] = changed(shards[1], lambda x: np.full(x.shape, np.inf, np.float32))
    outcome = simulate(config(sync=mode, steps=200, batching="fixed"), cloud(), shards=shards, report=False)
    assert outcome.exit_code == 1
    assert outcome.summary["stopped"].startswith("rank 1, step 0")
    assert outcome.summary["steps"] < 10


def test_a_folder_that_exists_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        simulate(config(out=str(tmp_path)), cloud(), report=False)
