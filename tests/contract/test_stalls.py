"""A worker that stops for ever: every other comes to a wait that a driver can watch, and knows whom it lacks."""

from __future__ import annotations

import pytest

from dlion_mpi.loop.ports import Until
from tests.contract.problem import config, trained
from tests.inmemory import Stuck, Weather

STOP = 9
MODES = [
    *[("dlion", mode) for mode in ("sync", "bounded")],
    ("baseline", "sync"),
    ("ako", "bounded"),
    ("gaia", "bounded"),
    ("hop", "bounded"),
    ("allreduce", "sync"),
    ("powersgd", "sync"),
    ("diloco", "sync"),
]


@pytest.mark.parametrize(("name", "mode"), MODES)
@pytest.mark.parametrize("stopped", [0, 2])
def test_the_others_wait_where_they_are_watched(name: str, mode: str, stopped: int) -> None:
    with pytest.raises(Stuck) as stuck:
        trained(config(name, mode, steps=200, batching="auto"), weather=Weather(seed=3, stopped=(stopped, STOP)))
    waiting, workers = stuck.value.waiting, stuck.value.workers
    others = [worker for worker in workers if worker.rank != stopped]
    assert len(others) == len(workers) - 1
    for worker in others:
        assert isinstance(waiting[worker.rank], Until)
        heard = worker.heard_steps()
        assert heard[stopped] <= workers[stopped].step
        assert heard[stopped] == min(heard.values()), "it is not the slowest of those that were heard of"


@pytest.mark.parametrize("mode", ["bounded", "async"])
def test_without_it_the_others_leave_no_further_than_the_end(mode: str) -> None:
    """In `async` no step waits: the others come as far as the last step, and wait for it to leave."""
    with pytest.raises(Stuck) as stuck:
        trained(config("dlion", mode, steps=60), weather=Weather(seed=1, stopped=(1, STOP)))
    waiting, workers = stuck.value.waiting, stuck.value.workers
    for worker in workers:
        if worker.rank != 1:
            assert isinstance(waiting[worker.rank], Until)
            assert worker.heard_steps()[1] <= STOP
            assert (worker.step == 60) == (mode == "async")
