"""Checkpoints of whole runs in memory: that one state of the run is kept, whatever is under way, and gone on from."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.checkpoint import folder, snapshot
from dlion_mpi.checkpoint.folder import Checkpoint
from dlion_mpi.checkpoint.preemption import Preemption
from dlion_mpi.checkpoint.rounds import CheckpointRounds
from dlion_mpi.config.options import Config
from dlion_mpi.errors import RunError
from dlion_mpi.loop.epochs import Epochs
from dlion_mpi.loop.worker import Worker
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, part, vector
from tests.contract.test_epochs import Watcher
from tests.inmemory import Network, Quadratic, Rows, Run, Weather, run
from tests.options import config as options_config
from tests.options import grow_soon

WORKERS = 4
SIZE = 40
LAYOUT = Layout.of([(10,), (3, 10)])
PEERS = range(WORKERS)


class KeptQuadratic(Quadratic):
    """A quadratic with momentum, which is state of the optimizer."""

    def __init__(self, rank: int, momentum: float = 0.5) -> None:
        random = np.random.default_rng(rank)
        super().__init__(LAYOUT, random.uniform(0.5, 1.5, SIZE).astype(np.float32), 0.1)
        self.momentum, self.v = np.float32(momentum), np.zeros(SIZE, np.float32)

    def movement(self, batch: Array) -> Gradient:
        gradient = self.gradient(batch)
        self.v = self.momentum * self.v + gradient.vector
        return Gradient(gradient.loss, -self.learning_rate * self.v)

    def apply(self, gradient: Vector) -> None:
        self.v = self.momentum * self.v + gradient
        self.w -= self.learning_rate * self.v

    def to_arrays(self) -> Arrays:
        return {"w": self.w.copy(), "v": self.v.copy()}

    def from_arrays(self, arrays: Mapping[str, Array], *, generators: bool = True) -> None:
        self.w, self.v = vector(arrays, "w", SIZE), vector(arrays, "v", SIZE)


class Sum(KeptQuadratic):
    """The gradient is the rows' mean, whatever the weights: so the weights tell exactly what has been applied."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, momentum=0.0)
        self.learning_rate = np.float32(1)

    def gradient(self, batch: Array) -> Gradient:
        return Gradient(float(batch.sum()), batch.mean(axis=0, dtype=np.float32))


class Soon(Executor):
    """Does a job at once, but says only after some looks that it is done."""

    def __init__(self, looks: int = 5, fail: Callable[[], bool] = lambda: False) -> None:
        self._looks, self._fail = looks, fail

    def submit(self, job: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = LateFuture(self._looks)
        try:
            if self._fail() and job.__name__ == "job":
                raise OSError(errno.ENOSPC, "No space left on device")
            future.set_result(job(*args, **kwargs))
        except OSError as error:
            future.set_exception(error)
        return future


class LateFuture(Future[Any]):
    """A future that is done only when it has been looked at often enough."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._left = looks

    def done(self) -> bool:
        self._left -= 1
        return self._left < 0


@dataclass
class Started:
    """A run with checkpoints in ``path``, and what its workers said."""

    path: Path
    workers: list[Worker] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    preemptions: list[Preemption] = field(default_factory=list)

    def rounds(self) -> list[CheckpointRounds]:
        """Of every worker."""
        found = [worker.checkpoints for worker in self.workers]
        assert all(isinstance(rounds, CheckpointRounds) for rounds in found)
        return found  # type: ignore[return-value]


def config(path: Path, **options: Any) -> Config:
    base = {"out": str(path), "checkpoint_every": "20", "keep_checkpoints": 99, "batch_size": 4, "steps": 60, **options}
    return options_config(**{name: value for name, value in base.items() if value is not None})


def rows(seed: int = 0) -> list[np.ndarray]:
    """Whole numbers, and so are the means of 4 successive rows: sums of them are exact."""
    random = np.random.default_rng(seed)
    return [(4 * random.integers(-3, 4, (52, SIZE))).astype(np.float32) for _ in PEERS]


def train(
    settings: Config,
    weather: Weather,
    replica: Callable[[int], KeptQuadratic] = KeptQuadratic,
    *,
    from_: Checkpoint | None = None,
    executor: Callable[[int], Executor] = lambda rank: Soon(),
    on_step: Callable[[Worker, Network, Started], None] = lambda worker, network, started: None,
) -> tuple[Run, Started]:
    """Train with checkpoints, from the beginning or from one."""
    started = Started(Path(str(settings.out)))

    def prepare(worker: Worker) -> None:
        rank = worker.rank
        started.workers.append(worker)
        started.preemptions.append(Preemption(environ={}))
        own_step = -1
        if from_ is not None:
            own_step = from_.steps[rank]
            arrays, _ = from_.read(rank)
            snapshot.restore(worker, arrays, dict(enumerate(from_.steps)))
        worker.checkpoints = CheckpointRounds(
            worker.config,
            rank,
            WORKERS,
            run=started.path,
            collectives=worker.collectives,
            executor=executor(rank),
            preemption=started.preemptions[rank],
            texts={"format": "1"},
            last_step=from_.step if from_ is not None else -1,
            own_step=own_step,
            say=started.said.append,
            warn=started.said.append,
        )

    done = run(
        settings,
        [replica(rank) for rank in PEERS],
        rows(),
        weather=weather,
        on_step=lambda worker, network: on_step(worker, network, started),
        prepare=prepare,
    )
    return done, started


def checkpoints(path: Path) -> list[Checkpoint]:
    return [folder.read_manifest(place) for place in folder.complete(path)]


SYNC: list[dict[str, Any]] = [
    {
        "strategy": "dlion",
        "max_n": 30,
        "transfer_period": 10,
        "transfer": "all",
        "batch_size_max": 64,
    },
    {"strategy": "dlion", "max_n": 30, "unsent": "drop", "value_type": "bfloat16", "batching": "fixed"},
    {"strategy": "baseline"},
    {"strategy": "allreduce"},
    {"strategy": "hop", "graph": "ring"},
    {"strategy": "choco-sgd"},
    {"strategy": "demo"},
    {"strategy": "powersgd", "rank": 1},
    {"strategy": "dgc", "density": 0.3, "warmup": 9},
    {"strategy": "local-sgd", "h": 7},
    {"strategy": "diloco", "h": 7},
    {"strategy": "streaming-diloco", "h": 7, "fragments": 3, "overlap": 3},
    {"strategy": "sparseloco", "h": 7, "entries": 1000},
]


@pytest.mark.parametrize("options", SYNC, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("every", ["20", "19"])
def test_in_sync_a_resumed_run_is_the_same_to_the_last_bit(
    options: dict[str, Any], every: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 20 a round of batch sizes and one of knowledge have just begun, at 19 and 21 they are further."""
    grow_soon(monkeypatch, every=20, warmup=0.01, most=0.1)
    settings = config(tmp_path, sync="sync", checkpoint_every=every, **options)
    whole, _ = train(settings, Weather(seed=1, delay=30, slow=2))
    first = checkpoints(tmp_path)[0]
    assert first.step == int(every)
    assert set(first.steps) == {int(every)}
    resumed, _ = train(config(tmp_path / "b", sync="sync", **options), Weather(seed=2, delay=50, slow=0), from_=first)
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    for again, before in zip(resumed.records, whole.records, strict=True):
        assert [(r.step, r.loss, r.lbs, r.gbs) for r in again] == [
            (r.step, r.loss, r.lbs, r.gbs) for r in before[first.step :]
        ]


class Normalised(KeptQuadratic):
    """Has a statistic, the moving average of its batches, and moves by it: so it shows in the weights."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.mean = np.zeros(SIZE, np.float32)

    def gradient(self, batch: Array) -> Gradient:
        self.mean += np.float32(0.1) * (batch.mean(axis=0, dtype=np.float32) - self.mean)
        return Gradient(0.0, self.w - self.mean)

    def statistics(self) -> Vector:
        return self.mean.copy()

    def set_statistics(self, statistics: Vector) -> None:
        self.mean = statistics.copy()

    def to_arrays(self) -> Arrays:
        return {**super().to_arrays(), "mean": self.mean.copy()}

    def from_arrays(self, arrays: Mapping[str, Array], *, generators: bool = True) -> None:
        super().from_arrays(arrays)
        self.mean = vector(arrays, "mean", SIZE)


@pytest.mark.parametrize("every", ["19", "20", "21"])
def test_in_sync_statistics_in_flight_are_resumed_to_the_last_bit(every: str, tmp_path: Path) -> None:
    """At step 20 a round has just begun."""
    options: dict[str, Any] = {"sync": "sync", "checkpoint_every": every}
    whole, _ = train(config(tmp_path, **options), Weather(seed=1, delay=30, slow=2), Normalised)
    first = checkpoints(tmp_path)[0]
    resumed, _ = train(config(tmp_path / "b", **options), Weather(seed=2, delay=50), Normalised, from_=first)
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    assert len(whole.collectives.calls["averages"]) == 3


def test_taking_checkpoints_changes_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"sync": "sync", "strategy": "dlion", "max_n": 30, "steps": 60, "batch_size": 4}
    plain = run(options_config(**options), [KeptQuadratic(rank) for rank in PEERS], rows())
    kept, started = train(config(tmp_path, **options), Weather(seed=4, delay=9))
    np.testing.assert_array_equal(kept.weights, plain.weights)
    assert [c.step for c in checkpoints(tmp_path)] == [20, 40, 60]
    assert len(started.said) == 3


SHORT = {"steps": None, "seconds": 1.2, "checkpoint_every": "0.2s"}
STEADY = {"batching": "fixed", "global_batch": "fixed", "transfer": "none"}
LOOSE: list[dict[str, Any]] = [
    {"strategy": "dlion", "sync": "bounded", "value_type": "float32", **STEADY},
    {"strategy": "dlion", "sync": "async", "value_type": "float32", **STEADY},
    {"strategy": "ako", "sync": "async", "partitions": 3},
    {"strategy": "ako", "sync": "bounded", "partitions": 5},
    {"strategy": "gaia", "sync": "bounded"},
    {"strategy": "gaia", "sync": "async", "barrier": "none"},
]


def kept_mass(checkpoint: Checkpoint, options: dict[str, Any]) -> list[np.ndarray]:
    """Per worker, times the number of workers: what it has applied, what waits for it, and what peers still keep."""
    strategy = options["strategy"]
    files = [checkpoint.read(rank)[0] for rank in PEERS]
    totals = []
    for k in PEERS:
        weights = -files[k]["model/w"].astype(np.float64)
        scale = WORKERS if strategy == "ako" else 1  # others weigh what they send
        sign = 1 if strategy == "ako" else -1  # of gradients, or of movements
        total = scale * weights
        if strategy == "dlion":  # its own movements count with their weight, as everywhere
            own = part(files[k], "strategy")
            factor = float(own.get("lead/factor", np.float64(1)))
            total += (factor - 1) * own["residuals/common"] - own.get("lead/due", np.zeros(SIZE))
        for letter in snapshot.messages_of(files[k], SIZE, WORKERS):
            came = np.zeros(SIZE, np.float32)
            letter.entries.add_to(came, 1.0)
            total += sign * came
        for j in PEERS:
            if j != k:
                total += sign * owed(part(files[j], "strategy"), k, strategy)
        totals.append(total * (WORKERS // scale))
    return totals


def owed(state: Arrays, peer: int, strategy: str) -> np.ndarray:
    """What a worker has not sent to ``peer``."""
    nothing = np.zeros(SIZE, np.float32)
    if strategy == "dlion":
        return state["residuals/common"] + state.get(f"residuals/by_peer/{peer}", nothing)
    unsent: np.ndarray = state["accumulated"] + state.get(f"missed/{peer}", nothing)
    return unsent


def computed(checkpoint: Checkpoint) -> np.ndarray:
    """The sum of all gradients of the steps before the checkpoint."""
    total = np.zeros(SIZE)
    for x, step in zip(rows(), checkpoint.steps, strict=True):
        batches = Rows(x)
        for _ in range(step):
            total += batches.take(4).mean(axis=0)
    return total


@pytest.mark.parametrize("options", LOOSE, ids=lambda options: f"{options['strategy']}-{options['sync']}")
@pytest.mark.parametrize("seed", range(2))
def test_no_gradient_is_lost_or_counted_twice(options: dict[str, Any], seed: int, tmp_path: Path) -> None:
    """Whatever is on its way, in every checkpoint every worker has, or is still owed, every gradient exactly once."""
    weather = Weather(seed=seed, delay=60, budget=(150, 400), blocked=0.3, slow=1, slowness=10)
    train(config(tmp_path, **SHORT, **options), weather, Sum)
    taken = checkpoints(tmp_path)
    assert len(taken) > 1
    assert any(len(set(c.steps)) > 1 for c in taken), "no checkpoint between unequal steps"
    assert sum(c.read(k)[0]["inbox/headers"].size for c in taken for k in PEERS), "nothing was ever under way"
    for checkpoint in taken:
        for total in kept_mass(checkpoint, options):
            np.testing.assert_array_equal(total, computed(checkpoint))


@pytest.mark.parametrize("options", [LOOSE[1], LOOSE[3], LOOSE[4]], ids=lambda options: options["strategy"])
def test_a_resumed_run_loses_nothing_either(options: dict[str, Any], tmp_path: Path) -> None:
    weather = Weather(seed=7, delay=60, budget=(150, 400), blocked=0.3, slow=1, slowness=10)
    train(config(tmp_path / "a", **SHORT, **options), weather, Sum)
    middle = checkpoints(tmp_path / "a")[1]
    train(config(tmp_path / "b", **SHORT, **options), weather, Sum, from_=middle)
    taken = checkpoints(tmp_path / "b")
    assert taken[0].step > middle.step
    for checkpoint in taken:
        for total in kept_mass(checkpoint, options):
            np.testing.assert_array_equal(total, computed(checkpoint))


@pytest.mark.parametrize("options", [*LOOSE, *({"sync": "sync", **own} for own in SYNC)], ids=str)
@pytest.mark.parametrize("end", [{"checkpoint_every": "20"}, SHORT], ids=["steps", "seconds"])
def test_epochs_and_checkpoints_do_not_wait_for_each_other(
    options: dict[str, Any], end: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that waits at the end of an epoch may be one that a checkpoint waits for."""
    watchers: list[Watcher] = []
    post_init = Worker.__post_init__

    def with_epochs(worker: Worker, *arguments: int) -> None:
        post_init(worker, *arguments)
        watchers.append(Watcher())
        worker.epochs = Epochs(watchers[-1], 10, 0, worker.collectives)

    monkeypatch.setattr(Worker, "__post_init__", with_epochs)
    train(config(tmp_path, **{**options, **end}), Weather(seed=1, delay=60, budget=(150, 400), slow=1, slowness=10))
    assert checkpoints(tmp_path)
    assert len({str(watcher.logs) for watcher in watchers}) == 1
    assert watchers[0].logs


@pytest.mark.parametrize("seed", range(3))
def test_hop_goes_on_with_tokens_and_parameters_under_way(seed: int, tmp_path: Path) -> None:
    weather = Weather(seed=seed, delay=60, blocked=0.3, slow=1, slowness=10)
    options = {"strategy": "hop", "sync": "bounded", "checkpoint_every": "0.2s"}
    train(config(tmp_path / "a", steps=40, **options), weather)
    done, _ = train(config(tmp_path / "b", steps=50, **options), weather, from_=checkpoints(tmp_path / "a")[0])
    assert {worker.step for worker in done.workers} == {50}


@pytest.mark.parametrize("options", [*LOOSE, *SYNC], ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("whom", [3])
def test_a_preempted_rank_makes_all_take_a_checkpoint_and_end(
    options: dict[str, Any], whom: int, tmp_path: Path
) -> None:
    def preempt(worker: Worker, network: Network, started: Started) -> None:
        if worker.rank == whom and worker.step == 30:
            started.preemptions[whom].reason = "SIGUSR1"

    settings = config(tmp_path, **{"sync": "sync", **options, "steps": 10_000, "checkpoint_every": "1000"})
    weather = Weather(seed=5, delay=40, slow=1)
    done, started = train(settings, weather, on_step=preempt)
    assert all(rounds.preempted and rounds.safe and rounds.over for rounds in started.rounds())
    assert [rounds.left for rounds in started.rounds()].count("SIGUSR1") == 1
    (only,) = checkpoints(tmp_path)
    assert only.steps == [worker.step for worker in done.workers]
    assert 30 < done.workers[whom].step < 1000
    if settings.sync == "sync":
        assert len(set(only.steps)) == 1


def test_the_first_to_be_done_goes_on_serving_the_others(tmp_path: Path) -> None:
    weather = Weather(seed=3, delay=20, slow=1, slowness=60)
    settings = config(tmp_path, strategy="dlion", sync="async", steps=60, checkpoint_every="0.2s", **STEADY)
    train(settings, weather, Sum)
    taken = checkpoints(tmp_path)
    after = [c for c in taken if set(c.steps) >= {60} and c.steps[1] < 60]
    assert after, "no checkpoint while some had ended and one had not"
    assert sorted({c.step for c in taken}) == [c.step for c in taken]
    assert taken[-1].steps == [60] * WORKERS


@pytest.mark.parametrize("options", [LOOSE[0], LOOSE[5], SYNC[0], SYNC[3]], ids=["bounded", "async", "sync", "sum"])
def test_a_failing_rank_hangs_nobody_and_spoils_no_checkpoint(options: dict[str, Any], tmp_path: Path) -> None:
    class Failing(KeptQuadratic):
        def gradient(self, batch: Array) -> Gradient:
            self.calls = getattr(self, "calls", 0) + 1
            return Gradient(float("nan") if self.calls > 50 else 0.0, super().gradient(batch).vector)

    settings = config(tmp_path, **{"sync": "sync", **options, "steps": 200})
    with pytest.raises(RunError, match="rank 2"):
        train(settings, Weather(seed=2, delay=20), lambda rank: Failing(rank) if rank == 2 else KeptQuadratic(rank))
    assert [c.step for c in checkpoints(tmp_path)][:1] in ([20], [21], [22], [23], [24], [25])
    for checkpoint in checkpoints(tmp_path):
        for rank in PEERS:
            checkpoint.read(rank)


@pytest.mark.parametrize("sync", ["sync", "bounded"])
def test_where_one_rank_cannot_write_the_run_goes_on_and_older_ones_stay(sync: str, tmp_path: Path) -> None:
    now: list[int] = []
    settings = config(tmp_path, strategy="dlion", sync=sync, max_n=30, steps=100)

    def watch(worker: Worker, network: Network, started: Started) -> None:
        now[:] = [min(w.step for w in started.workers)]

    def executor(rank: int) -> Executor:
        return Soon(fail=lambda: rank == 2 and 35 < now[0] < 75)

    done, started = train(settings, Weather(seed=2, delay=5), executor=executor, on_step=watch)
    assert [worker.step for worker in done.workers] == [100] * WORKERS
    steps = [c.step for c in checkpoints(tmp_path)]
    assert 20 <= steps[0] < 30
    assert steps[-1] == 100
    assert not [step for step in steps if 40 < step < 70]
    lines = [line for line in started.said if "could not be written" in line]
    assert lines
    assert all("No space left on device" in line for line in lines)
    assert len(lines) == len(set(lines)), "one rank says it"
    assert not folder.incomplete(tmp_path)


def test_a_worker_whose_ranks_are_not_what_they_were_is_refused(tmp_path: Path) -> None:
    train(config(tmp_path, strategy="ako"), Weather(), Sum)
    arrays, _ = checkpoints(tmp_path)[0].read(0)
    spoilt: Sequence[tuple[str, Any]] = [
        ("strategy/accumulated", np.zeros(SIZE - 1, np.float32)),
        ("strategy/accumulated", np.zeros(SIZE, np.float64)),
        ("strategy/start", np.array(SIZE, np.int64)),
        ("strategy/missed/9", np.zeros(SIZE, np.float32)),
        ("worker/step", np.array(3.0)),
        ("inbox/headers", np.array([[0, 9, 1, 4, 16, 0, 0]], np.int64)),
        ("inbox/values", np.zeros(3, np.float32)),
    ]
    for name, value in spoilt:
        with pytest.raises(ValueError, match=name.partition("/")[2] if "inbox" not in name else "inbox"):
            _restored({**arrays, name: value}, tmp_path)


def _restored(arrays: Arrays, path: Path) -> None:
    settings = config(path, strategy="ako", steps=1)

    def prepare(worker: Worker) -> None:
        snapshot.restore(worker, arrays, dict.fromkeys(PEERS, 20))

    run(settings, [Sum(rank) for rank in PEERS], rows(), prepare=prepare)
