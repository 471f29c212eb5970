"""The processor time that the exchange may take (``--exchange-share``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from dlion_mpi.algorithms.bandwidth import MEASURABLE_BYTES
from dlion_mpi.loop.clock import Clock
from dlion_mpi.strategies.types import LinkView
from dlion_mpi.vector.named_arrays import Array, Arrays, integer, integers, number, numbers

STEPS_APART = 4
"""Exchanges are put off up to this many steps before messages shrink. All entries every few steps bring more than few
entries at every step, and often cost less: to select some, every entry is read several times."""
MOST_STEPS_APART = 8
"""Gradients are exchanged at least once in this many steps, whatever that costs."""
LEAST_SHARE = 0.01
"""Of a gradient's bytes: the budget shrinks messages no further. Below it, most of the cost is reading every entry."""
ADAPTED = (0.25, 1.25)
"""How fast messages shrink, and grow again, from one exchange to the next."""


@dataclass(slots=True)
class ExchangeBudget:
    """Keeps selecting, encoding, decoding and MPI's thread within a share of the time of a step.

    On a fast network the processor, not the link, is what a message costs. When the exchange costs more than its
    share, gradients are exchanged every few steps; when that is not enough, messages shrink too.

    ``share``: of a step's time without waiting; 0 means no limit. ``processors``: threads that compute the gradient.
    ``dense_bytes``: size of a gradient with all its entries. ``clock``: the worker's.
    ``transport_cpu_s``: processor seconds of the thread that moves messages.
    """

    share: float
    processors: int
    dense_bytes: float
    clock: Clock
    transport_cpu_s: Callable[[], float]
    message_bytes: float = field(init=False)
    """Upper limit on a message's size."""
    credit_s: float = field(init=False, default=0.0)
    """Processor seconds granted and not yet spent."""
    exchanged_step: int = field(init=False, default=-1)
    """The last step whose gradient was exchanged."""
    received: bool = field(init=False, default=False)
    """Whether entries have been received since the last `settle`."""
    _cost_s: float = field(init=False, default=0.0)
    _transport_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.message_bytes = self.dense_bytes

    @property
    def least_bytes(self) -> float:
        """The smallest limit on a message's size. Smaller messages would not tell the link's bandwidth either."""
        return max(LEAST_SHARE * self.dense_bytes, MEASURABLE_BYTES)

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Charge the processor time of what is done in this scope."""
        start_s = self.clock.cpu_s()
        yield
        self._cost_s += self.clock.cpu_s() - start_s

    @contextmanager
    def idle(self) -> Iterator[None]:
        """While the loop waits, moving messages slows no computing, so it is not charged."""
        start_s = self.transport_cpu_s()
        yield
        self._transport_s += self.transport_cpu_s() - start_s

    def charge(self, cpu_s: float) -> None:
        """Charge processor seconds that another thread has spent."""
        self._cost_s += cpu_s

    def start(self) -> None:
        """Forget the cost of what was moved before training began."""
        self._transport_s = self.transport_cpu_s()

    def settle(self, step: int, step_s: float) -> None:
        """Grant the share of a step that takes ``step_s``, and take off what the exchange has cost since the last one.

        A step without entries, sent or received, has cost nothing that could be put off.
        """
        transport_s = self.transport_cpu_s()
        granted_s = self.share * step_s * self.processors
        cost_s = self._cost_s + transport_s - self._transport_s
        if not self.received and self.exchanged_step != step - 1:
            cost_s = 0.0
        self._cost_s, self._transport_s, self.received = 0.0, transport_s, False
        if self.exchanged_step == step - 1 and cost_s > 0:
            least, most = ADAPTED
            wanted_bytes = self.message_bytes * min(max(STEPS_APART * granted_s / cost_s, least), most)
            self.message_bytes = min(max(wanted_bytes, self.least_bytes), self.dense_bytes)
        # Unused credit lapses after a step, so that no burst follows a lull. Debt is limited to what can be put off.
        credit_s = max(self.credit_s + granted_s - cost_s, -MOST_STEPS_APART * granted_s)
        self.credit_s = min(credit_s, granted_s)

    def limit(self, step: int, links: Mapping[int, LinkView]) -> Mapping[int, LinkView]:
        """Return the links with the budget's limit on message size, or with none ready if the budget is overdrawn.

        A gradient that is not exchanged is treated as on a link that has not drained. In lockstep there is no limit,
        because every worker waits for the messages of all peers at every step.
        """
        if not self.share:
            return links
        overdue = step - self.exchanged_step >= MOST_STEPS_APART
        if self.credit_s < 0 and not overdue:
            return {peer: LinkView(False, link.budget_bytes) for peer, link in links.items()}
        self.exchanged_step = step
        return {peer: replace(link, affordable_bytes=self.message_bytes) for peer, link in links.items()}

    def to_arrays(self) -> Arrays:
        """The state for a checkpoint."""
        return {
            **integers(exchanged_step=self.exchanged_step),
            **numbers(exchange_credit_s=self.credit_s, message_bytes=self.message_bytes),
        }

    def from_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Restore what `to_arrays` gave. Raises StateError."""
        self.exchanged_step = integer(arrays, "exchanged_step")
        self.credit_s, self.message_bytes = number(arrays, "exchange_credit_s"), number(arrays, "message_bytes")
