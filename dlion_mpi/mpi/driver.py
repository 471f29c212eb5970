"""Drives a worker's loop in real time: computes with TensorFlow, waits for real messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from dlion_mpi.loop.ports import Compute, Computed, EncodedBatch, Loop, Replica
from dlion_mpi.mpi.progress import ProgressThread


class PaceModel(Protocol):
    """How long an iteration must last on the machine that is played; see `microcloud.environments.PaceClock`."""

    def seconds(self, batch: int, elapsed_s: float) -> float:
        """Seconds for ``batch`` samples, ``elapsed_s`` seconds into the run."""


def pace(model: PaceModel | None, samples: int, started_s: float, now_s: Callable[[], float]) -> float:
    """Sleep until an iteration that began at ``started_s`` has lasted as long as its model says.

    The one place where compute is paced, for every strategy. Returns the seconds slept: 0 without a model, or
    where the machine is slower than what it plays.
    """
    if model is None:
        return 0.0
    rest_s = model.seconds(samples, started_s) - (now_s() - started_s)
    if rest_s <= 0:
        return 0.0
    time.sleep(rest_s)
    return rest_s


class EncoderThread:
    """Encodes messages in a thread; see `loop.ports.BackgroundEncoder`. ``notify``: called when a batch is done."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._executor = ThreadPoolExecutor(1, "exchange")
        self._begun: list[Future[EncodedBatch]] = []

    def begin(self, work: Callable[[], EncodedBatch]) -> None:
        """Have ``work`` done after what was begun before."""
        future = self._executor.submit(work)
        self._begun.append(future)
        future.add_done_callback(lambda _: self._notify())

    def done(self) -> bool:
        """Whether all that was begun is done. Raises what ``work`` raised, once."""
        try:
            return all(future.done() and future.result() for future in self._begun)
        except BaseException:
            self._begun = []
            raise

    def take(self) -> list[EncodedBatch]:
        """What has been made since the last call."""
        begun, self._begun = self._begun, []
        return [future.result() for future in begun]

    def close(self) -> None:
        """End the thread, after what it is at."""
        self._executor.shutdown(cancel_futures=True)


def drive(
    loop: Loop,
    *,
    replica: Replica,
    progress: ProgressThread,
    now_s: Callable[[], float],
    pace_model: PaceModel | None,
) -> None:
    """Run the loop to its end."""
    answer: Computed | None = None
    while True:
        try:
            request = loop.send(answer)
        except StopIteration:
            return
        progress.check()
        if isinstance(request, Compute):
            answer = _compute(request, replica, now_s, pace_model)
            progress.computed(answer.seconds)
        else:
            progress.wait_until(request.ask, ask_s=request.deadline_s - now_s())
            answer = None


def _compute(
    request: Compute,
    replica: Replica,
    now_s: Callable[[], float],
    pace_model: PaceModel | None,
) -> Computed:
    started_s = now_s()
    if request.alone:
        loss, finite = replica.step_alone(request.batch)
        vector = None
    else:
        gradient = replica.gradient(request.batch)
        loss, finite, vector = gradient.loss, gradient.finite, gradient.vector
    paced_s = pace(pace_model, request.samples, started_s, now_s)
    return Computed(loss, vector, finite, now_s() - started_s, paced_s)
