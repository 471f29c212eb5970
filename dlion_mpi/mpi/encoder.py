"""Encode messages in the background, in real time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dlion_mpi.loop.ports import EncodedBatch


class EncoderThread:
    """Encodes in a thread; see `loop.ports.BackgroundEncoder`. ``notify``: called when a batch is done."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._executor = ThreadPoolExecutor(1, "exchange")
        self._begun: list[Future[EncodedBatch]] = []

    def begin(self, work: Callable[[], EncodedBatch]) -> None:
        """Queue ``work``."""
        future = self._executor.submit(work)
        self._begun.append(future)
        future.add_done_callback(lambda _: self._notify())

    def done(self) -> bool:
        """Whether all queued work is done. Raises what ``work`` raised, once."""
        try:
            return all(future.done() and future.result() for future in self._begun)
        except BaseException:
            self._begun = []
            raise

    def take(self) -> list[EncodedBatch]:
        """Return the batches encoded since the last call."""
        begun, self._begun = self._begun, []
        return [future.result() for future in begun]

    def close(self) -> None:
        """End the thread after its current batch."""
        self._executor.shutdown(cancel_futures=True)
