"""A training loop outside this package, of which `Exchange` makes a run on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from dlion_mpi.errors import RunError, UserError, in_one_line
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.wire import ValueType

if TYPE_CHECKING:  # slow imports, done when a run begins so that ``import dlion_mpi`` stays fast
    from typing_extensions import Unpack

    from dlion_mpi.own_run import OwnRun


class Options(TypedDict, total=False):
    """The options of `Exchange`: those of `fit` that do not concern its model and its data."""

    strategy: str | Strategy | type[Strategy]
    preset: str | None
    sync: Literal["sync", "bounded", "async"] | None
    staleness: int | None
    backup: int | None
    patience: float | None
    steps: int | None
    seconds: float | None
    target: str | None
    progress: Literal["auto", "live", "lines"]
    progress_every: float
    non_finite: Literal["stop", "skip"]
    stall_limit: str | None
    seed: int
    out: str | None
    tensorboard: str | None
    batch_size: int
    batching: Literal["auto", "proportional", "fixed"] | None
    batch_size_max: int | None
    value_type: ValueType | None
    exchange_share: float | None
    transfer: Literal["all", "worse-than-mean", "worst", "none"] | None
    transfer_period: int | None
    transfer_merge: float | None


class _Ended(RunError):
    """A step after the end of the run."""


class Exchange:
    """Exchange what your own training loop moves, on all MPI ranks.

    ::

        with dlion_mpi.Exchange(model, steps=1000) as exchange:
            while exchange.running:
                loss = update(rows(exchange.batch_size))  # any code that changes the variables
                exchange.step(loss=loss)

    - ``variables``: a Keras model, or a list of Keras models and variables. All must be built, and alike on all ranks.
      Every rank starts with rank 0's values.
    - ``metrics``: names of the test results that `step` is given; the same on all ranks.
    - ``options``: the options of `fit` that do not concern its model and its data. The strategy must exchange
      movements: dlion, gaia, hop, choco-sgd, local-sgd, diloco, streaming-diloco or sparseloco.

    Enter the block on all ranks, with the same options. It ends on all ranks when the run ends. If an exception leaves
    the block on one rank, that rank raises the exception and the others raise RunError. A rank that leaves the block
    early, by ``break``, leaves the run, and the others continue. After the block `result` has the summary of the run.
    Raises UserError for a mistake in the options, on all ranks.
    """

    result: dict[str, Any]
    """The JSON object of the run, the same on all ranks; after the block."""

    def __init__(self, variables: Any, *, metrics: Sequence[str] = (), **options: Unpack[Options]) -> None:
        in_one_line()
        known = Options.__annotations__
        for name in options:
            if name not in known:
                raise UserError(f"Exchange() has no option {name}; it has metrics, {', '.join(sorted(known))}")
        self._given = variables, tuple(metrics), {name: v for name, v in options.items() if v is not None}
        self._run: OwnRun | None = None
        self._is_lost = False

    @property
    def running(self) -> bool:
        """Whether the run continues, and waits for another step."""
        return self._run is not None and self._run.request is not None

    @property
    def batch_size(self) -> int:
        """The number of samples for this rank's next step. It follows the rank's speed. 0 after the end."""
        request = self._run.request if self._run is not None else None
        return 0 if request is None else request.samples

    def step(
        self, *, samples: int | None = None, loss: float = 0.0, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Complete a step: exchange what the variables have moved since the last one, and set them to the result.

        ``samples``: samples of this step; by default `batch_size`. ``loss``: their mean loss, for the records.
        ``metrics``: results of a test, if there was one since the last step. Raises RunError.
        """
        if self._run is None or self._run.request is None:
            raise _Ended("the run has ended: call step only while exchange.running")
        self._guarded(self._run.complete, samples, float(loss), metrics or {})

    def __enter__(self) -> Exchange:
        """Agree with all ranks, and begin."""
        from dlion_mpi.own_run import OwnRun

        variables, metrics, options = self._given
        self._run = self._guarded(OwnRun, variables, metrics, options)
        self._guarded(self._run.begin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the run together with all ranks."""
        if self._run is None or self._is_lost or self._run.is_stalled or isinstance(error, KeyboardInterrupt):
            return
        if isinstance(error, _Ended) and self._run.is_cut:
            error = None
        done = self._guarded(self._run.leave, error)
        self.result = done.summary
        if done.exit_code and error is None:  # of a failure, the rank that has failed speaks itself
            quiet = done.exit_code == 1 or done.rank != 0
            raise RunError(str(done.summary["stopped"]), quiet=quiet, exit_code=done.exit_code) from None

    def _guarded(self, action: Any, *arguments: Any) -> Any:
        """Call an action. An error that other ranks cannot know of ends all ranks at once."""
        from dlion_mpi.mpi import startup

        try:
            return action(*arguments)
        except (UserError, RunError):
            raise
        except Exception:
            self._is_lost = True
            startup.end_if_shared(1)
            raise
