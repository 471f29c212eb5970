"""The contract between the training loop and a strategy: what a worker sends, when it waits, what it applies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import isgeneratorfunction
from typing import Any, ClassVar, Literal

from dlion_mpi.config.options import Config
from dlion_mpi.strategies import state as state_as_arrays
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.state import State
from dlion_mpi.strategies.types import Effect, Inbox, LinkViews, LocalUpdate, Outbox, Plan, Sums, Weights
from dlion_mpi.vector.layout import Vector
from dlion_mpi.vector.named_arrays import Array, Arrays
from dlion_mpi.wire import VALUE_TYPES, Message, ValueType

BATCHING: Mapping[str, object] = {"batching": "auto", "batch_size_max": 1024, "global_batch": "grow"}
"""To be put into ``uses`` by a strategy whose batch sizes follow the workers' speed. The loop does the rest."""
EQUAL_BATCHES: Mapping[str, object] = {"batching": "fixed", "batch_size_max": None, "global_batch": "fixed"}
"""The same options, for a strategy that weighs gradients by their batches and has equal ones by default."""
SUMMED_TYPES: tuple[ValueType, ...] = ("float32", "float16", "bfloat16")
"""The ``value_types`` of a strategy that sums: values of few bits would lose too much each time that they are added."""
TRANSFER: Mapping[str, object] = {"transfer": "worse-than-mean", "transfer_period": 25, "transfer_merge": 0.75}
"""To be put into ``uses`` by a strategy whose workers merge the best worker's weights. The loop does the rest."""


class Strategy:
    """A way for workers to exchange what they learn. A strategy inherits from this class and overrides what differs.

    `start` makes the `State` of one worker. The loop passes it to every call, which may change it. A strategy keeps
    nothing anywhere else, and knows no MPI, no clock and no backend, so the same class trains over MPI, in virtual time
    and in tests.
    """

    name: ClassVar[str]
    modes: ClassVar[tuple[str, ...]]
    """The synchronisation modes (``--sync``) that it supports, the default first."""
    uses: ClassVar[Mapping[str, object]] = {}
    """The shared options that it uses, by their Config name, with its defaults. Others are refused."""
    value_types: ClassVar[tuple[ValueType, ...]] = VALUE_TYPES
    """The values of ``--value-type`` that it supports, if that is in ``uses``."""
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """More sets of defaults by name, for ``--preset``: for the options in ``uses`` and in ``Options``."""
    exchanges: ClassVar[Literal["gradients", "movements"]] = "gradients"
    """The vector of a step: the mean gradient, or the movement of the weights by the worker's own optimizer.

    A movement includes momentum, clipping and weight decay, and every model has one.
    """
    restates: ClassVar[bool] = False
    """Whether its messages carry weights, not gradients or movements. Then one that is sent again after a resume does
    no harm."""
    window: ClassVar[int] = 2
    """The number of unacknowledged messages at which a link is no longer ready."""
    summed_by: ClassVar[str] = "mpi"
    """The library that computes its sums: ``mpi`` or ``horovod``."""
    Options: ClassVar[type[StrategyOptions]] = StrategyOptions
    """A frozen dataclass of the strategy's own options: ``--gaia.threshold 0.2``, ``Gaia(threshold=0.2)``."""
    options: Any
    """An instance of ``Options``."""

    def __init_subclass__(cls) -> None:
        """Give the options the name of their strategy, by which messages call them."""
        name, own = getattr(cls, "name", ""), cls.Options
        if not (isinstance(own, type) and issubclass(own, StrategyOptions)):
            return  # `strategies.user` refuses it
        if "Options" in vars(cls):
            own.table = name
        elif own.table != name:
            cls.Options = type("Options", (own,), {"table": name})

    def __init__(self, **options: Any) -> None:
        """Take the strategy's own options by name. Raises UserError for one that it lacks or that is wrong."""
        self.options = self.Options.of(options)

    def derived(self, config: Config) -> Mapping[str, object]:
        """Return defaults of shared options that depend on its own options, or on what ``config`` gives.

        They take the place of those in ``uses``.
        """
        return {}

    def lengthens(self, config: Config) -> bool:
        """Whether it needs ``LocalUpdate.shortened``. All workers then measure it together, every 20 steps."""
        return False

    def start(self, plan: Plan) -> State:
        """Return the state before the first step: a `State`, or a dataclass that inherits from it."""
        return State(plan)

    def before_compute(self, state: Any, step: int, weights: Weights, links: LinkViews) -> Outbox:
        """Return what to send to which peer before ``step`` is computed. ``links``: of the live peers.

        While the worker waits in that step, the loop asks again whenever something has arrived.
        """
        return {}

    def outgoing(self, state: Any, local: LocalUpdate, links: LinkViews) -> Outbox:
        """Return what to send to which peer after ``local`` was computed. ``links``: of the live peers."""
        return {}

    def may_advance(self, state: Any, step: int, inbox: Inbox) -> bool:
        """Whether ``step``, computed and sent, may be completed with what has arrived. By default: as the mode says."""
        config = state.plan.config
        return bool(
            config.mode.may_advance(
                step, inbox.newest.values(), staleness=config.staleness or 0, backup=config.backup or 0
            )
        )

    def incoming(
        self, state: Any, local: LocalUpdate, weights: Weights, messages: Sequence[Message]
    ) -> Effect | Sums[Effect]:
        """Return what the step does to the replica, given ``local`` and the messages that have arrived for it.

        A generator may ask for sums on the way: ``total = yield Sum(vector)``.
        """
        raise NotImplementedError

    def between(self, state: Any, local: LocalUpdate, weights: Weights) -> Effect | Sums[Effect | None] | None:
        """Return what else to do to the replica between this step, which has been applied, and the next.

        Like `incoming`, it may be a generator.
        """
        return None

    def unfinished(self, state: Any, local: LocalUpdate) -> Vector | None:
        """Return the movement, (P,) float32, of a step that has been sent and will not be completed.

        By default None: the step leaves no trace here.
        """
        return None

    def ahead(self, state: Any) -> Vector | None:
        """Return what this worker's weights contain and no peer's weights ever will, unless it is sent: (P,) float32.

        Tests, and what is saved after the last step, leave it out. By default None: nothing.
        """
        return None

    def late(self, state: Any, messages: Sequence[Message]) -> Vector | None:
        """Return the movement that messages make after the last step, (P,) float32. By default they are dropped."""
        return None

    def lacking(self, state: Any) -> Vector | None:
        """Return what peers lack of this worker's movements after the last step: the sum over all workers that lack it.

        (P,) float32, a new vector: the loop adds it to the weights and takes the mean of all workers, so that all end
        with equal weights. By default None: all end with the weights that they have.
        """
        return None

    def selects_in_background(self, plan: Plan) -> bool:
        """Whether `outgoing` may run in a thread while the loop runs `incoming`, `may_advance`, the optimizer and the
        next gradient: then it changes nothing that those read, and reads nothing that they change."""
        return False

    def to_arrays(self, state: Any) -> Arrays:
        """The state by name, for a checkpoint; the caller copies the arrays. By default: the fields of a dataclass."""
        return state_as_arrays.to_arrays(state)

    def from_arrays(self, state: Any, arrays: Mapping[str, Array]) -> None:
        """Restore what `to_arrays` gave into a state from `start`. Raises StateError for arrays that do not fit."""
        state_as_arrays.from_arrays(state, arrays)

    @classmethod
    def sends_first(cls) -> bool:
        """Whether it defines `before_compute`."""
        return cls.before_compute is not Strategy.before_compute

    @classmethod
    def sums(cls) -> bool:
        """Whether it may ask for sums: `incoming` or `between` is a generator."""
        return isgeneratorfunction(cls.incoming) or isgeneratorfunction(cls.between)
