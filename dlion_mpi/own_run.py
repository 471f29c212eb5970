"""One run on this rank whose steps are computed elsewhere, by a loop of the user's; see `own_loop.Exchange`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from dlion_mpi.checkpoint import stalled
from dlion_mpi.config.options import Config
from dlion_mpi.errors import RunError, Stalled, UserError
from dlion_mpi.files import AnyRecorder, new_folder, new_recorder, new_recorders
from dlion_mpi.learner.variables import Variables
from dlion_mpi.loop import statistics
from dlion_mpi.loop.leave import leave
from dlion_mpi.loop.membership import Membership
from dlion_mpi.loop.ports import Compute, Computed
from dlion_mpi.loop.train import CHANNELS, train
from dlion_mpi.loop.worker import Clock, Worker
from dlion_mpi.metrics.names import check_names
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.microcloud.environments import PaceClock, start_clock
from dlion_mpi.mpi.cores import share_of_cores
from dlion_mpi.mpi.driver import advance, slow_down
from dlion_mpi.mpi.exchange import Exchange
from dlion_mpi.mpi.ranks import Ranks
from dlion_mpi.mpi.stall import limit_of
from dlion_mpi.mpi.startup import library
from dlion_mpi.provenance import versions
from dlion_mpi.result import Finish, Result, sum_up
from dlion_mpi.signals import stopped_by_signals
from dlion_mpi.strategies.given import config_of, options_of_strategy, refuse_texts
from dlion_mpi.strategies.registry import check_gradients, resolve
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.view.live import show_progress, title_of


class OwnRun:
    """A run between the steps of a loop. ``request``: the step that the loop is to do; None after the end.
    ``is_stalled``: whether it ended because a rank had waited too long.

    ``variables``, ``metrics``, ``options``: those of `own_loop.Exchange`. Raises UserError, on all ranks.
    """

    def __init__(self, variables: Any, metrics: tuple[str, ...], options: Mapping[str, Any]) -> None:
        self.request: Compute | None = None
        self.is_stalled = False
        self._ranks = ranks = Ranks(stall_limit=limit_of(options.get("stall_limit")))
        given = {"model": "variables", "data": "a loop", **options}
        ranks.together(lambda: refuse_texts(options))
        config = ranks.together(lambda: config_of({**given, **options_of_strategy(options.get("strategy"))}))
        facts = {**versions(), "metrics": ", ".join(metrics)}
        ranks.agree("\n".join([*(f"{name} = {fact}" for name, fact in facts.items()), config.to_toml()]))
        strategy, self._config = resolve(config)
        check_gradients(self._config.strategy, strategy.exchanges, False)
        check_names(metrics, self._config.target, None)
        self._replica = replica = ranks.together(lambda: Variables(variables, metrics))
        ranks.agree(f"variables = {replica.describe()}")
        replica.set_knowledge(ranks.share(replica.knowledge()))
        self._pace = ranks.together(lambda: PaceClock.from_environ(ranks.rank, run_seconds=config.seconds))
        self._recorder = _recorder(ranks, self._config, metrics)
        self._exchange = exchange = Exchange(
            ranks,
            size=replica.layout.size,
            window=strategy.window,
            summed_by=strategy.summed_by,
            channels=CHANNELS,
            log=self._recorder,
        )
        self._tests = _Tests(metrics)
        self._worker = Worker(
            config=self._config,
            rank=ranks.rank,
            members=Membership(tuple(range(ranks.size))),
            strategy=strategy,
            replica=replica,
            batches=_Loop(),
            links=exchange.links,
            collectives=exchange.collectives,
            evaluator=self._tests,
            recorder=self._recorder,
            clock=Clock(exchange.clock.now_s, time.thread_time),
            training_samples=0,
            processors=share_of_cores(ranks),
            encoder=exchange.encoder,
            reduce=exchange.sums.reduce,
            profiles=False,
            metrics=metrics,
        )
        self._train = train(self._worker)
        self._shown, self._joined = ExitStack(), ExitStack()

    @property
    def is_cut(self) -> bool:
        """Whether a signal, a failure or a target has ended the run, and not its last step."""
        return self._worker.stop_reason is not None

    def begin(self) -> None:
        """Start the clock, and wait for the first step."""
        ranks, worker, exchange = self._ranks, self._worker, self._exchange
        self._shown.enter_context(stopped_by_signals([worker]))
        if self._config.progress_every:
            title = title_of(self._config, "rank", ranks.size)
            shown = show_progress(
                worker, ranks.size, exchange.links, ranks.gather_numbers, title, lambda: ranks.stall.note
            )
            self._shown.enter_context(shown)
        exchange.clock.start(0.0)
        exchange.stall.follow(worker)
        if ranks.rank == 0:
            start_clock(self._config.seconds)
        self._joined.enter_context(exchange.open())
        self._continue(None)

    def complete(self, samples: int | None, loss: float, metrics: Mapping[str, float]) -> None:
        """Complete the step that the loop has done, and wait for the next. Raises RunError."""
        if metrics:
            self._tests.add(self._worker.step, self._worker.now_s(), metrics)
        assert self.request is not None
        used, now_s = samples or self.request.samples, self._worker.now_s
        paced_s = slow_down(self._pace, used, self._given_s, now_s() - self._given_s)
        moved = Gradient(loss, self._replica.moved())
        if self.request.kind == "alone":
            self._replica.keep(moved.finite)
            moved = moved.applied()
        found = Computed.of(moved, now_s() - self._given_s, paced_s)
        self._continue(found.of_samples(used))

    def _continue(self, answer: Computed | None) -> None:
        try:
            self.request = advance(self._train, answer, self._exchange)
        except Stalled as error:
            self._stall(error)
        except RunError as error:
            self.request = None
            self._worker.stop_reason, self._worker.exit_code = str(error), 1
            raise
        self._replica.show()
        self._given_s = self._worker.now_s()

    def _stall(self, error: Stalled) -> NoReturn:
        """End the run with the ranks that are there. Raises RunError."""
        self.request, self.is_stalled = None, True
        with suppress(Stalled):
            self._joined.__exit__(Stalled, error, error.__traceback__)
        self._shown.close()
        done = stalled.end(self._ranks, self._worker, error, self._recorder)
        raise RunError(str(done.summary["stopped"]), quiet=done.rank != 0, exit_code=done.exit_code) from None

    def leave(self, error: BaseException | None) -> Result:
        """End the run with all ranks. ``error``: what has ended the loop. Raises RunError after a stall."""
        try:
            return self._leave(error)
        except Stalled as stall:
            self._stall(stall)

    def _leave(self, error: BaseException | None) -> Result:
        ranks, worker = self._ranks, self._worker
        if error is not None and not worker.exit_code:
            reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
            worker.stop_reason, worker.exit_code = f"rank {ranks.rank}: {reason}", 1
        if self.request is not None or worker.exit_code == 1:
            self.request = None
            self._train.close()
            advance(leave(worker), None, self._exchange)
        seconds = worker.now_s()
        self._joined.close()
        if ranks.size > 1:
            statistics.settle(self._replica, worker.batch_sizes.lbs, ranks.mean)
        self._replica.show()
        for evaluation in self._tests.last(worker.step, seconds, worker.history.evaluations):
            worker.history.evaluations.append(evaluation)
            worker.recorder.evaluation(evaluation)
        self._shown.close()
        try:
            self._recorder.close(complete=worker.exit_code == 0)
        except RunError as full:
            if not worker.exit_code:
                worker.stop_reason, worker.exit_code = f"rank {ranks.rank}: {full}", 1
        finishes = [Finish.from_text(text) for text in ranks.gather_text(Finish.of(worker, seconds).to_text())]
        ranks.free()
        return sum_up(self._config, finishes, rank=ranks.rank, report=self._config.progress_every > 0)


def _recorder(ranks: Ranks, config: Config, metrics: Sequence[str]) -> AnyRecorder:
    ranks.together(lambda: new_folder(config) if ranks.rank == 0 else None)
    make = partial(new_recorder, config, ranks.rank, ranks.size, _Loop(), {"mpi": library()}, metrics)
    return new_recorders(ranks, make)


@dataclass(frozen=True)
class _Loop:
    """The training data of a loop of the user's; see `loop.ports.Batches` and `files.Data`."""

    source: str = "a loop"
    samples: int | None = None

    def take(self, size: int) -> None:
        """Nothing: the loop reads its rows itself."""

    def start_epoch(self, epoch: int) -> None:
        """Nothing."""

    def state(self) -> dict[str, int]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, int]) -> None:
        """Nothing."""


class _Tests:
    """Results of the loop's tests; a `loop.parts.Evaluator`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._found: list[Evaluation] = []

    def add(self, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        """Add a result. Raises UserError for a name that was not announced."""
        for name in metrics:
            if name not in self._names:
                known = f"metrics={list(self._names)}" if self._names else "no metrics"
                raise UserError(f"step got the metric {name}, but Exchange got {known}: name it there")
        self._found.append(Evaluation(step, time_s, {n: float(metrics.get(n, math.nan)) for n in self._names}))

    def last(self, step: int, time_s: float, before: Sequence[Evaluation]) -> list[Evaluation]:
        """The results not yet seen, at the end of a run. If there was none at all, one of unknown values."""
        if self._names and not before and not self._found:
            self.add(step, time_s, {})
        return self.poll(wait=True)

    def pending(self) -> int:
        """Zero: the loop tests when it likes."""
        return 0

    def submit(self, step: int, time_s: float, knowledge: Any) -> None:
        """Nothing."""

    def poll(self, *, wait: bool = False) -> list[Evaluation]:
        """The results since the last call."""
        found, self._found = self._found, []
        return found
