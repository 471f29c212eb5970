"""The progress of a run on stderr: a view of all ranks in rank 0's terminal, or a line per rank every few seconds.

For the view, the other ranks send rank 0 a message of a few hundred bytes once a second. Collectives would have to be
awaited in step, and not every strategy has them. Reading the others' metrics files would make the training depend on a
file system: HDF5 can hang on a file that another machine writes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from dlion_mpi.config.options import Config
from dlion_mpi.log import say
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.records import StepRecord
from dlion_mpi.view.lines import progress_line
from dlion_mpi.view.snapshot import Goal, Numbers, RankSnapshot, Snapshot, Tally, vector_length
from dlion_mpi.view.terminal import Terminal, View, launchers_terminal, terminal_of, terminal_on

EVERY_S = 1.0
"""Seconds between two frames of the view, and between two messages of a rank to rank 0."""


class Reporter:
    """Called after every step of a rank; hands on a snapshot every ``every_s`` seconds (0: never).

    ``metrics``: names of the test metrics. ``test``: returns those of the latest evaluation. ``show``: takes the
    snapshots.
    """

    def __init__(
        self,
        rank: int,
        workers: int,
        every_s: float,
        metrics: Sequence[str],
        test: Callable[[], Mapping[str, float]],
        show: Callable[[RankSnapshot], None],
    ) -> None:
        self._tally, self._test, self._show = Tally(rank, workers, metrics), test, show
        self._every_s, self._shown_s = every_s, time.monotonic()

    def __call__(self, record: StepRecord) -> None:
        """Add a step."""
        if not self._every_s:
            return
        self._tally.add(record)
        now_s = time.monotonic()
        if now_s - self._shown_s >= self._every_s:
            self._shown_s = now_s
            self._show(self._tally.take(self._test()))


def print_line(rank: RankSnapshot) -> None:
    """Print the progress of a rank."""
    say(progress_line(rank))


def terminal_for(config: Config) -> Terminal | None:
    """The terminal in which ``--progress`` draws the view; None for lines, or for no progress at all."""
    if not config.progress_every or config.progress == "lines":
        return None
    found = terminal_of(sys.stderr) or launchers_terminal()
    return terminal_on(sys.stderr) if found is None and config.progress == "live" else found


def goal_of(config: Config) -> Goal:
    """The end of a run with this configuration."""
    return Goal(config.last_step, config.seconds, config.target)


class Reports(Protocol):
    """Sends the snapshots of other ranks to rank 0; see `loop.links.ByteLinks`."""

    reports: dict[int, Numbers]

    def expect_reports(self, length: int) -> None:
        """Keep each peer's latest report of ``length`` numbers."""

    def report(self, peer: int, numbers: Numbers) -> None:
        """Send a report to a peer."""


@contextlib.contextmanager
def show_progress(
    worker: Worker,
    workers: int,
    links: Reports,
    gather: Callable[[float], Numbers],
    title: str,
    note: Callable[[], str] = lambda: "",
) -> Iterator[None]:
    """Show the progress of the run while the worker trains in the block.

    A collective operation: every rank enters, before the progress thread owns MPI. ``gather``: a number of every rank,
    (n, 1). ``note``: a line on what this rank waits for, or an empty text.
    """
    config, rank, metrics = worker.config, worker.rank, worker.metrics
    terminal = terminal_for(config) if rank == 0 else None
    reporter = functools.partial(Reporter, rank, workers, metrics=metrics, test=worker.last_test)
    view: AbstractContextManager[None] = contextlib.nullcontext()
    if not gather(float(terminal is not None))[0, 0]:
        worker.on_step = reporter(config.progress_every, show=print_line)
    elif terminal is None:
        worker.on_step = reporter(EVERY_S, show=lambda snapshot: links.report(0, snapshot.to_vector()))
    else:
        own: dict[int, RankSnapshot] = {}
        worker.on_step = reporter(EVERY_S, show=functools.partial(own.__setitem__, 0))
        links.expect_reports(vector_length(workers, metrics))

        def snapshot() -> Snapshot:
            reports = sorted(dict(links.reports).items())
            others = [RankSnapshot.from_vector(peer, vector, metrics) for peer, vector in reports]
            return Snapshot(
                title=title,
                workers=workers,
                ranks=[*own.values(), *others],
                goal=goal_of(config),
                elapsed_s=worker.now_s(),
                metrics=metrics,
                notes=[text] if (text := note()) else [],
            )

        view = draw(terminal, snapshot)
    with view:
        yield


@contextlib.contextmanager
def draw(terminal: Terminal, snapshot: Callable[[], Snapshot]) -> Iterator[None]:
    """Draw the latest snapshot in the terminal during the block."""
    from dlion_mpi.view.render import render

    def frame(width: int, height: int) -> str:
        return render(snapshot(), width, height, encoding=terminal.encoding)

    with View(terminal, frame, EVERY_S).shown():
        yield


def title_of(config: Config, what: str, ranks: int, more: Sequence[str] = ()) -> str:
    """Describe the run in one line."""
    words = [str(config.strategy), str(config.sync), f"{ranks} {what}{'s' * (ranks > 1)}", config.model, config.data]
    return f"dlion: {', '.join([*words, *more, *([config.out] if config.out else [])])}"
