"""What makes Ako, Gaia and Hop what they are, in simulated runs: real gradients, links that are busy, slow workers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.config.fields import Every
from dlion_mpi.microcloud.environments import Environment, Phase
from dlion_mpi.simulation.driver import VirtualLinks
from dlion_mpi.simulation.simulate import simulate
from dlion_mpi.strategies.ako import Ako
from dlion_mpi.strategies.gaia import Gaia
from dlion_mpi.strategies.types import LinkView
from tests.conservation import Exact
from tests.gaps import leads
from tests.options import config


def cloud(cores: tuple[float, ...], mbit: float) -> Environment:
    phase = Phase(cores=cores, uplink_mbit=(mbit,) * len(cores))
    return Environment(name="test", workers=len(cores), phases=(phase,))


def simulated(environment: Environment, **options: Any) -> dict[str, Any]:
    settings = {"data": "digits", "model": "tests.nets:dense", "evaluate_every": Every(steps=1000), **options}
    outcome = simulate(config(**settings), environment, report=False)
    assert outcome.exit_code == 0
    return outcome.summary


@pytest.mark.parametrize(("sync", "mbit"), [("async", 100.0), ("async", 0.1), ("bounded", 0.1)])
def test_what_ako_computed_has_come_or_is_kept_bit_for_bit(
    sync: str, mbit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With P fixed, so that slow links miss many turns; over a multiple of P steps."""
    exact = Exact(monkeypatch, VirtualLinks, lambda links: links.rank)
    simulated(cloud((24.0, 24.0, 4.0), mbit), strategy="ako", sync=sync, partitions=4, steps=24)
    assert len(exact.came) == 6
    assert (exact.turns_missed > 5) == (mbit < 1)
    for source, destination in exact.came:
        exact.check(source, destination)
    kept = exact.states[0].accumulated  # of one that had others to send to until its end
    assert kept[: len(kept) // 4].any(), "the part that was sent first has been added to since"
    assert not kept[len(kept) * 3 // 4 :].any(), "the part that was sent last has not"


def test_ako_s_p_follows_the_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cycle, in steps, in which every entry is sent once."""
    taken: dict[float, list[int]] = {}

    def watch(mbit: float) -> None:
        outgoing = Ako.outgoing

        def spy(self: Ako, state: Any, local: Any, links: Any) -> Any:
            before = state.start
            messages = outgoing(self, state, local, links)
            taken.setdefault(mbit, []).append((state.start - before) % state.plan.layout.size or 2410)
            return messages

        with monkeypatch.context() as patch:
            patch.setattr(Ako, "outgoing", spy)
            simulated(cloud((24.0,) * 3, mbit), strategy="ako", steps=40)

    for mbit in (0.1, 0.2, 100.0):
        watch(mbit)
    late = {mbit: float(np.median(parts[60:])) for mbit, parts in taken.items()}
    assert late[100.0] == 2410
    assert 1.7 < late[0.2] / late[0.1] < 2.3


def test_gaia_sends_what_is_significant_at_its_step_and_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    first, steps = 0.3, 40
    before_compute = Gaia.before_compute
    entered: list[int] = []
    sizes: list[int] = []

    def spy(self: Gaia, state: Any, step: int, weights: Callable[[], Any], links: dict[int, LinkView]) -> Any:
        messages = before_compute(self, state, step, weights, links)
        limit = np.float32(first / math.sqrt(step + 1)) * np.abs(weights())
        if state.plan.rank == 0 and step not in entered:
            entered.append(step)
            sizes.append(sum(len(m.entries) for m in messages.values() if m.entries is not None))
        assert (np.abs(state.accumulated) <= limit).all(), "what is significant does not stay"
        for peer, message in messages.items():
            if message.entries is not None and message.entries.indices is not None and links[peer].idle:
                own = message.entries.indices
                assert (np.abs(message.entries.values) > limit[own]).all(), "what is not does not go"
        return messages

    monkeypatch.setattr(Gaia, "before_compute", spy)
    simulated(cloud((24.0,) * 3, 100.0), strategy="gaia", threshold=first, steps=steps)
    assert entered == list(range(steps))
    assert 0 < sum(sizes) < 2 * 2410 * steps


@pytest.mark.parametrize("clock", [0, 3])
def test_gaia_s_mirror_clock_holds_those_ahead(clock: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    simulated(cloud((24.0, 12.0, 2.0), 0.5), strategy="gaia", staleness=clock, steps=25, out=str(out))
    assert max(leads(out, 3)) == clock + 1, "the step that is entered, of the newest that was begun"


@pytest.mark.parametrize(("backup", "skip"), [(0, 0), (3, 0), (3, 10)])
@pytest.mark.parametrize("max_gap", [1, 6])
def test_hop_s_tokens_bound_the_gap(backup: int, skip: int, max_gap: int, tmp_path: Path) -> None:
    """Staleness and backup workers would let the fast ones run away from one that is twelve times as slow."""
    out = tmp_path / "run"
    options = {"staleness": 20, "backup": backup, "max_gap": max_gap, "skip": skip, "steps": 30}
    simulated(cloud((24.0, 24.0, 12.0, 2.0), 1.0), strategy="hop", out=str(out), **options)
    assert max(leads(out, 4)) == max_gap


@pytest.mark.parametrize(("backup", "most"), [(0, 2), (1, 20)])
def test_hop_goes_on_without_its_backup_workers(backup: int, most: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {"staleness": 1, "backup": backup, "max_gap": 20, "skip": 0, "steps": 30}
    simulated(cloud((24.0, 24.0, 24.0, 2.0), 100.0), strategy="hop", out=str(out), **options)
    assert max(leads(out, 4)) == most
