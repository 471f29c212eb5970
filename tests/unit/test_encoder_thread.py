"""The thread that makes messages beside the loop."""

from __future__ import annotations

import threading

import pytest

from dlion_mpi.loop.ports import EncodedBatch
from dlion_mpi.mpi.encoder import EncoderThread


def made(number: int) -> EncodedBatch:
    return EncodedBatch(number, float(number), number + 0.5, 0.0, {number: 1.0})


def test_work_is_done_in_its_order_and_the_loop_is_told_of_each() -> None:
    told = threading.Semaphore(0)
    thread = EncoderThread(told.release)
    go = threading.Event()

    def slow() -> EncodedBatch:
        assert go.wait(30)
        return made(1)

    thread.begin(slow)
    thread.begin(lambda: made(2))
    assert not thread.done()
    go.set()
    assert all(told.acquire(timeout=30) for _ in range(2))
    assert thread.done()
    assert thread.take() == [made(1), made(2)]
    assert thread.take() == []
    thread.close()


def test_what_failed_is_raised_where_the_loop_asks_for_it() -> None:
    told = threading.Semaphore(0)
    thread = EncoderThread(told.release)

    def fails() -> EncodedBatch:
        raise ZeroDivisionError("of the strategy")

    thread.begin(fails)
    assert told.acquire(timeout=30)
    with pytest.raises(ZeroDivisionError, match="of the strategy"):
        thread.done()
    assert thread.done(), "leaving must be possible"
    thread.close()
