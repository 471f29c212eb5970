"""How a run is getting on, on stderr: a view of all ranks in rank 0's terminal, or a line per rank now and then.

What rank 0 shows of the others, they have sent it: a message of a few hundred bytes each, once a second. Collectives
would have to be awaited in step, and not every strategy has some; and to read the others' metrics files here would be
to trust a file system with the run: HDF5 can hang in a file of another node, and the training would with it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from dlion_mpi.config.options import Config
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.records import StepRecord
from dlion_mpi.view.lines import Progress
from dlion_mpi.view.snapshot import Goal, Numbers, RankSnapshot, Snapshot, Tally, vector_length
from dlion_mpi.view.terminal import Terminal, View, launchers_terminal, on, terminal_of

EVERY_S = 1.0
"""Between two frames, and between what a rank tells of itself."""


class Teller:
    """Tells every EVERY_S seconds how a rank is getting on; called after every step."""

    def __init__(
        self, rank: int, workers: int, accuracy: Callable[[], float | None], tell: Callable[[RankSnapshot], None]
    ) -> None:
        self._tally, self._accuracy, self._tell = Tally(rank, workers), accuracy, tell
        self._told_s = -EVERY_S

    def __call__(self, record: StepRecord) -> None:
        """A step is done."""
        self._tally.add(record)
        now_s = time.monotonic()
        if now_s - self._told_s >= EVERY_S:
            self._told_s = now_s
            self._tell(self._tally.take(self._accuracy()))


def terminal_for(config: Config) -> Terminal | None:
    """Where `--progress` wants a view to be drawn; None for lines, or for nothing at all."""
    if not config.progress_every or config.progress == "lines":
        return None
    found = terminal_of(sys.stderr) or launchers_terminal()
    return on(sys.stderr) if found is None and config.progress == "live" else found


def goal_of(config: Config) -> Goal:
    """When the run ends."""
    return Goal(config.last_step, config.seconds, config.target_accuracy)


class Reports(Protocol):
    """What brings the others' measures to rank 0; see `loop.links.ByteLinks`."""

    reports: dict[int, Numbers]

    def expect_reports(self, length: int) -> None:
        """Keep every peer's newest report, of so many numbers."""

    def report(self, peer: int, numbers: Numbers) -> None:
        """Tell a peer how it goes here."""


@contextlib.contextmanager
def told(
    worker: Worker, workers: int, links: Reports, gather: Callable[[float], Numbers], title: str
) -> Iterator[None]:
    """While the worker trains, say how it goes. Every rank comes here before MPI is its thread's.

    ``gather``: everyone's number, (n, 1).
    """
    config, rank = worker.config, worker.rank
    terminal = terminal_for(config) if rank == 0 else None
    if not gather(float(terminal is not None))[0, 0]:
        worker.on_step = Progress(rank, config.progress_every, worker.last_accuracy)
        yield
        return
    own: dict[int, RankSnapshot] = {}
    if terminal is None:
        worker.on_step = Teller(rank, workers, worker.last_accuracy, lambda g: links.report(0, g.to_vector()))
        yield
        return

    def look() -> Snapshot:
        others = [RankSnapshot.from_vector(peer, vector) for peer, vector in sorted(dict(links.reports).items())]
        return Snapshot(
            title=title, workers=workers, ranks=[*own.values(), *others], goal=goal_of(config), elapsed_s=worker.now_s()
        )

    worker.on_step = Teller(rank, workers, worker.last_accuracy, functools.partial(own.__setitem__, 0))
    links.expect_reports(vector_length(workers))
    with shown(terminal, look):
        yield


@contextlib.contextmanager
def shown(terminal: Terminal, look: Callable[[], Snapshot]) -> Iterator[None]:
    """Draw what ``look`` sees, from here to the end."""
    from dlion_mpi.view.render import render

    def frame(width: int, height: int) -> str:
        return render(look(), width, height, encoding=terminal.encoding)

    with View(terminal, frame, EVERY_S).shown():
        yield


def title_of(config: Config, what: str, ranks: int, more: Sequence[str] = ()) -> str:
    """What is being run, in a line."""
    words = [str(config.strategy), str(config.sync), f"{ranks} {what}{'s' * (ranks > 1)}", config.model, config.data]
    return f"dlion: {', '.join([*words, *more, *([config.out] if config.out else [])])}"
