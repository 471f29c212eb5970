"""That the shares of every step add up to the global batch, whatever the weather, and that nobody hangs for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlion_mpi.config.options import Config
from dlion_mpi.loop import batch_sizes
from dlion_mpi.loop.worker import Worker
from dlion_mpi.strategies.given import config_of
from tests.contract.test_checkpoints import PEERS, KeptQuadratic, checkpoints, rows, train
from tests.contract.test_checkpoints import config as checkpointed
from tests.inmemory import Network, Run, Weather, run
from tests.options import grow_soon

CHANGE_STEP = 30


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The global batch grows every ten steps."""
    grow_soon(monkeypatch, every=10, samples=8)


def share_every(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    monkeypatch.setattr(batch_sizes, "PERIOD", steps)


def config(**options: Any) -> Config:
    end = {} if "seconds" in options else {"steps": 60}
    return config_of({"strategy": "dlion", "batch_size": 8, **end, **options})


def changing() -> Callable[[int, int], float]:
    """What computing takes: at step 30 of each, one worker gets five times as slow and one three times as fast."""
    made = dict.fromkeys(PEERS, -4)  # two sizes are timed twice before the first step

    def seconds(rank: int, samples: int) -> float:
        made[rank] += 1
        pace = {0: 5.0, 1: 1 / 3}.get(rank, 1.0) if made[rank] > CHANGE_STEP else 1.0
        return 0.001 * samples * pace

    return seconds


def off_the_global_batch(done: Run, first: int = 0) -> list[int]:
    """The steps from ``first`` on, made by all, whose shares do not add up to the global batch that all know."""
    steps = [{record.step: record for record in own} for own in done.records]
    shared = sorted(set.intersection(*map(set, steps)))
    assert len(shared) > 20
    batches = {step: [own[step] for own in steps] for step in shared if step >= first}
    return [step for step, own in batches.items() if {r.gbs for r in own} != {sum(r.lbs for r in own)}]


@pytest.mark.usefixtures("growing")
@pytest.mark.parametrize(
    ("options", "every"), [({"sync": "sync"}, 5), ({}, 5), ({"staleness": 1}, 5), ({"staleness": 20}, 5), ({}, 1)]
)
@pytest.mark.parametrize("seed", range(3))
def test_shares_add_up_to_the_global_batch_at_every_step(
    options: dict[str, Any], every: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine is slow to move: the others are as far ahead of it as they may be when shares are asked for."""
    share_every(monkeypatch, every)
    weather = Weather(seed=seed, delay=30, blocked=0.3, slow=2)
    done = run(
        config(**options),
        [KeptQuadratic(rank) for rank in PEERS],
        rows(),
        weather=weather,
        seconds=changing(),
    )
    assert off_the_global_batch(done) == []
    first, last = ([own[k] for own in done.records] for k in (0, -1))
    assert first[0].gbs < last[0].gbs
    assert last[0].lbs < last[3].lbs < last[1].lbs


@pytest.mark.parametrize("options", [{"sync": "async"}, {"backup": 1}], ids=["async", "backup"])
def test_where_the_slowest_is_not_waited_for_nor_are_its_shares(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others end while it has made a few steps."""
    share_every(monkeypatch, 2)
    ahead: list[int] = []

    def on_step(worker: Worker, network: Network) -> None:
        if worker.rank == 2:
            ahead.append(max(network.posted) - worker.step)

    run(
        config(**options),
        [KeptQuadratic(rank) for rank in PEERS],
        rows(),
        weather=Weather(seed=1, slow=2, slowness=200),
        on_step=on_step,
    )
    assert ahead[0] > 10


@pytest.mark.parametrize("seed", range(4))
def test_who_waits_for_shares_does_not_wait_for_one_that_has_ended(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock workers end at steps of their own, and one may not ask for shares any more that others wait for."""
    share_every(monkeypatch, 1)
    done = run(
        config(seconds=1.0),
        [KeptQuadratic(rank) for rank in PEERS],
        rows(),
        weather=Weather(seed=seed, delay=20, slow=2),
    )
    assert len({worker.step for worker in done.workers}) > 1


@pytest.mark.usefixtures("growing")
@pytest.mark.parametrize("every", [3, 10])
@pytest.mark.parametrize("seed", range(4))
def test_workers_that_go_on_from_unequal_steps_share_again(
    seed: int, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a round some may have taken the shares before the checkpoint, some not; nobody may wait for it."""
    share_every(monkeypatch, every)
    options = {"strategy": "dlion"}
    weather = Weather(seed=seed, delay=30, slow=1, slowness=10)
    train(checkpointed(tmp_path / "a", **options, checkpoint_every="0.1s"), weather)
    unequal = [c for c in checkpoints(tmp_path / "a") if len(set(c.steps)) > 1]
    for number, middle in enumerate(unequal):
        farthest = max(middle.steps)
        settings = checkpointed(tmp_path / f"b{number}", **options, steps=90, checkpoint_every="1h")
        resumed, _ = train(settings, weather, from_=middle)
        assert {worker.step for worker in resumed.workers} == {90}
        assert off_the_global_batch(resumed, farthest + 1) == []
    assert unequal
