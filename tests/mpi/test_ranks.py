"""Agreement before training: a mistake on one rank is one on all, and only one rank says it."""

from __future__ import annotations

import os
import platform
import time

import numpy as np
import pytest
from mpi4py import MPI

from dlion_mpi.config.fields import Every
from dlion_mpi.errors import Stalled, UserError
from dlion_mpi.mpi import stall
from dlion_mpi.mpi.clock import CommonClock
from dlion_mpi.mpi.cores import share_of_cores
from dlion_mpi.mpi.ranks import Ranks


@pytest.mark.mpi
def test_text_of_any_length_and_script_reaches_everyone(world: MPI.Intracomm) -> None:
    ranks = Ranks(world)
    assert ranks.gather_text("größe " * ranks.rank) == ["größe " * r for r in range(ranks.size)]
    ranks.free()


@pytest.mark.mpi
def test_numbers_and_vectors_reach_all_ranks(world: MPI.Intracomm) -> None:
    ranks = Ranks(world)
    np.testing.assert_array_equal(ranks.gather_numbers(ranks.rank, 0.5), [[rank, 0.5] for rank in range(ranks.size)])
    own = np.full(3, ranks.rank, np.float32)
    np.testing.assert_array_equal(ranks.mean(own), np.full(3, (ranks.size - 1) / 2, np.float32))
    assert own.tolist() == [ranks.rank] * 3
    last = ranks.size - 1
    assert ranks.share(own, last).tolist() == [last] * 3
    ranks.free()


@pytest.mark.mpi
def test_a_mistake_on_the_last_rank_is_raised_on_all_and_said_by_it(world: MPI.Intracomm) -> None:
    ranks = Ranks(world)

    def check() -> int:
        if ranks.rank == ranks.size - 1:
            raise UserError("shard-3.h5 is missing")
        return 1

    with pytest.raises(UserError, match=r"shard-3\.h5 is missing") as caught:
        ranks.together(check)
    assert caught.value.quiet == (ranks.rank != ranks.size - 1)
    assert ranks.together(lambda: ranks.rank) == ranks.rank
    ranks.free()


@pytest.mark.mpi(min_size=2)
def test_different_options_are_named(world: MPI.Intracomm) -> None:
    ranks = Ranks(world)
    options = "strategy = dlion\nseed = " + ("7" if ranks.rank == 1 else "0")
    with pytest.raises(UserError, match="rank 1 has 'seed = 7' where rank 0 has 'seed = 0'"):
        ranks.agree(options)
    ranks.agree("seed = 0")
    ranks.free()


@pytest.mark.mpi
def test_the_common_clock_reads_alike_everywhere(world: MPI.Intracomm) -> None:
    ranks = Ranks(world)
    clock = CommonClock(ranks)
    clock.start()
    time.sleep(0.05)
    ranks.barrier()
    times = ranks.gather_numbers(clock.now_s())[:, 0]
    assert np.all(times > 0.04)
    # One machine has one monotonic clock, so what differs is the measured offset and the barrier's own spread.
    offsets = ranks.gather_numbers(clock._offset_s)[:, 0]
    assert np.abs(offsets).max() < 0.05
    ranks.free()


@pytest.mark.mpi
@pytest.mark.parametrize("host_names", ["one", "own"])
def test_threads_divide_the_cores_that_ranks_share(
    world: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, host_names: str
) -> None:
    """Also where ranks on one machine have host names of their own, as in containers and in emulations."""
    if host_names == "own":
        monkeypatch.setattr(platform, "node", lambda: f"worker-{world.rank}")
    ranks = Ranks(world)
    own = ranks.gather_numbers(share_of_cores(ranks))[:, 0]
    cores = os.cpu_count() or 1
    assert own.min() >= 1
    assert own.sum() <= max(cores, ranks.size)
    ranks.free()


@pytest.mark.mpi
def test_ranks_that_wait_long_name_the_one_that_does_not(
    world: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last rank is late for a collective, and then for the end, where the others' notices are still unread."""
    monkeypatch.setattr(stall, "FIRST_S", 1.0)
    ranks = Ranks(world)
    last = ranks.size - 1
    for _ in range(2):
        if ranks.rank == last:
            time.sleep(4)
        ranks.barrier()
    ranks.free()
    said = capsys.readouterr().err
    if ranks.rank == last:
        assert "waiting" not in said
    else:
        assert f"rank {ranks.rank}: waiting 1 s for rank {last}; --stall-limit 10m would end the run\n" in said
        assert f"rank {ranks.rank}: continues after" in said
    senders = set(range(last)) if ranks.rank == last else ranks.presence.notices.keys()
    assert ranks.presence.notices.keys() >= senders, "a notice was never received"
    assert not any(notice.ends for notice in ranks.presence.notices.values())


@pytest.mark.mpi
def test_a_rank_ends_its_wait_at_the_limit(world: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must then end the process; here it comes back to the collective after all."""
    monkeypatch.setattr(stall, "FIRST_LIMIT_S", 1.0)
    monkeypatch.setattr("dlion_mpi.mpi.ranks.abort_at_exit", lambda code: None)
    ranks = Ranks(world, stall_limit=Every.parse("1s"))
    last = ranks.size - 1
    request = ranks.communicator.Ibarrier() if ranks.rank != last else None
    if request is None:
        time.sleep(5)
        request = ranks.communicator.Ibarrier()
    elif ranks.size > 1:
        with pytest.raises(Stalled, match=f"for rank {last}|has waited too long") as stalled:
            ranks.wait(request)
        assert last in stalled.value.peers or ranks.size > 2
    request.Wait()
    ranks.free()
