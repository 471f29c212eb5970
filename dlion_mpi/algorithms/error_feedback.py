"""Error feedback: what a worker has computed and not sent yet, in one memory for all its links. Pure numpy.

Each gradient is added to one memory, `common`, so the links do not each search the whole gradient. The entries selected
for the widest link leave `common` for all links at once. A link that can carry them gets them as they are. Any other
link keeps them in its residual, `by_peer`, and sends the largest entries of that residual among those that
leave `common` in this step. So for every link

    sum of what was sent + its residual + common == sum of all gradients

and one more link costs in proportion to what is sent, not to the model. Links of similar width get the same entries:
every link that can carry the widest link's message gets that message, of the rest every link that can carry the
widest of them gets the same part, and so on. So the cost depends on the number of different widths, not of links.

Source: error feedback as in Deep Gradient Compression (Lin et al. 2018, arXiv 1712.01887); the shared memory is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dlion_mpi.algorithms.forms import EXACT, Terms, best, forms
from dlion_mpi.algorithms.selection import Ranking, Selection, Selector
from dlion_mpi.algorithms.sparse import take_out
from dlion_mpi.vector.layout import Entries, Layout, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, number, numbers, part, under, vector, vectors_by_rank
from dlion_mpi.wire import ValueType, bytes_for_count, encoded_bytes, rounded_entries


@dataclass(frozen=True, slots=True)
class Choice:
    """The entries for one link, with the values that the receiver will see, their N in (0, 100], their type."""

    entries: Entries
    quality: float
    value_type: ValueType


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of selection: a fixed N (``max_n``), or for each link its own N of at least ``n_min``.

    ``value_type``: None: the one that captures most. ``few_bytes``: the largest message that does not have all entries.
    """

    max_n: float | None
    n_min: float
    value_type: ValueType | None
    few_bytes: float = math.inf

    @property
    def usual_type(self) -> ValueType:
        """The value type where none is chosen."""
        return self.value_type or EXACT


@dataclass(frozen=True, slots=True)
class Budget:
    """The size that a message to one link should have, and the size up to which it may equal a wider link's."""

    wanted_bytes: float
    most_bytes: float


@dataclass(slots=True)
class Residuals:
    """The memory of one worker. ``common``: (P,) float32, not sent to any link yet.

    ``by_peer``: by link, (P,) float32, sent to other links and not to this one; absent if there is nothing. Links with
    equal residuals share one vector, and are served together as long as they do.
    """

    layout: Layout
    rules: Rules
    common: Vector = field(init=False)
    by_peer: dict[int, Vector] = field(init=False, default_factory=dict)
    taken: Entries | None = field(init=False, default=None)
    """The entries that left `common` in the newest `take`, as receivers see them; None if there were none."""
    _selector: Selector = field(init=False)
    _largest: Vector = field(init=False)
    _clustering: float = 1.0
    """Bytes of the last selection, relative to the same number of entries at random positions."""

    def __post_init__(self) -> None:
        self.common = np.zeros(self.layout.size, np.float32)
        self._selector = Selector(self.layout)
        self._largest = self._selector.measure(self.common)

    def of(self, peer: int) -> Vector:
        """Return everything that ``peer`` has not been sent, (P,) float32, a copy."""
        return self.common + self.by_peer[peer] if peer in self.by_peer else self.common.copy()

    def to_arrays(self) -> Arrays:
        """The memory by name, for a checkpoint: its own arrays, not copies."""
        by_peer = under("by_peer", {str(peer): residual for peer, residual in self.by_peer.items()})
        return {"common": self.common, **by_peer, **numbers(clustering=self._clustering)}

    def from_arrays(self, arrays: Mapping[str, Array], name: str, ranks: Iterable[int]) -> None:
        """Restore what `to_arrays` gave, stored under ``name``. Raises StateError."""
        arrays = part(arrays, name)
        self.common[:] = vector(arrays, "common", self.layout.size)
        self.by_peer = {}
        for peer, residual in vectors_by_rank(arrays, "by_peer", ranks, self.layout.size).items():
            equal = (other for other in self.by_peer.values() if np.array_equal(other, residual))
            self.by_peer[peer] = next(equal, residual)
        self._clustering = number(arrays, "clustering")

    def add(self, gradient: Vector, weight: float = 1.0) -> None:
        """Add ``weight`` times a gradient, (P,) float32."""
        self._largest = self._selector.measure(self.common, add=gradient, weight=weight)

    def take(self, budgets: Mapping[int, Budget | None], left: Sequence[int] = ()) -> dict[int, Choice]:
        """Take out and return the entries for each link: the largest that its budget pays for, or all within a fixed N.

        ``budgets``: of every live link; None for one that takes no message now. ``left``: peers that have left;
        their residuals get what leaves `common`: all of it when no link remains.
        """
        self.taken = None
        if not budgets:
            self.taken = Entries(self.layout.size, self.common.copy())
            for peers, _ in self._groups(dict.fromkeys(left)):
                residual = self._residual_of(peers)
                residual += self.common
            self.common.fill(0)
        widest = max((budget.wanted_bytes for budget in budgets.values() if budget is not None), default=None)
        if widest is None:
            return {}
        shared = self._take_largest(self.common, self._largest, widest)
        self.taken = shared.entries
        indices = shared.entries.indices
        shared_bytes = encoded_bytes(indices, self.layout.size, shared.value_type)
        choices: dict[int, Choice] = {}
        allotments = _allotted(budgets, shared_bytes, self.rules.max_n is not None) | dict.fromkeys(left)
        for peers, allotted in self._groups(allotments):
            if peers[0] not in self.by_peer and allotted == math.inf:
                choices |= dict.fromkeys(peers, shared)
                continue
            residual = self._residual_of(peers)
            if allotted is None:
                shared.entries.add_to(residual, 1.0)
                continue
            if allotted == math.inf:
                choice = self._all_shared(residual, shared)
            elif indices is None:
                residual += shared.entries.values
                choice = self._take_largest(residual, self._selector.measure(residual), allotted)
            else:
                count = int(len(indices) * allotted / shared_bytes)
                choice = self._largest_shared(residual, shared, allotted, count)
            choices |= dict.fromkeys(peers, choice)
        return choices

    def _groups(self, allotted: Mapping[int, float | None]) -> list[tuple[list[int], float | None]]:
        """Group the links whose residuals and allotted bytes are equal: each group is served together."""
        groups: dict[tuple[int | None, float | None], list[int]] = {}
        for peer, size_bytes in allotted.items():
            residual = id(self.by_peer[peer]) if peer in self.by_peer else None
            groups.setdefault((residual, size_bytes), []).append(peer)
        return [(peers, size_bytes) for (_, size_bytes), peers in groups.items()]

    def _residual_of(self, peers: Sequence[int]) -> Vector:
        """Return the residual that these links share, detached from the links that no longer share it."""
        if peers[0] not in self.by_peer:
            residual = np.zeros(self.layout.size, np.float32)
        else:
            residual = self.by_peer[peers[0]]
            if any(other is residual for peer, other in self.by_peer.items() if peer not in peers):
                residual = residual.copy()
        self.by_peer |= dict.fromkeys(peers, residual)
        return residual

    def _take_largest(self, memory: Vector, largest: Vector, budget_bytes: float) -> Choice:
        """Take the largest entries out of a memory, in the form that captures most within a budget."""
        rules = self.rules
        if rules.max_n is not None:
            return self._take_out(memory, self._selector.max_n(memory, largest, rules.max_n), rules.usual_type)
        types = None if rules.value_type is None else (rules.value_type,)
        terms = Terms(budget_bytes, rules.few_bytes, types, rules.n_min, self._clustering)
        form = best(forms(self._selector, memory, largest, terms))
        indices = form.selection.indices
        if memory is self.common and indices is not None and len(indices):
            random = bytes_for_count(len(indices), self.layout.size, form.value_type)
            self._clustering = encoded_bytes(indices, self.layout.size, form.value_type) / random
        return self._take_out(memory, form.selection, form.value_type)

    def _all_shared(self, residual: Vector, shared: Choice) -> Choice:
        """Take out the shared entries, each with all of its residual."""
        shared.entries.add_to(residual, 1.0)
        return self._take_out(residual, Selection(shared.entries.indices, shared.quality), shared.value_type)

    def _take_out(self, memory: Vector, selection: Selection, value_type: ValueType) -> Choice:
        """Take the selected entries out of a memory, as the receiver will see them; rounding errors stay in it."""
        return Choice(take_out(memory, selection.indices, value_type), selection.quality, value_type)

    def _largest_shared(self, residual: Vector, choice: Choice, budget_bytes: float, count: int) -> Choice:
        """Take out the largest of the shared entries, with their residual; about ``count`` of them fit."""
        shared, value_type = choice.entries, choice.value_type
        assert shared.indices is not None
        rules, size = self.rules, self.layout.size
        places = shared.indices.astype(np.intp)  # NumPy reads and writes through these much faster
        values = residual.take(places)
        values += shared.values
        ranking = Ranking(shared.indices, self._selector.relative(places, np.abs(values)))
        chosen, least = ranking.fit(count, budget_bytes, 1 - rules.n_min / 100, size, value_type)
        sent = Entries(size, values.take(chosen), shared.indices.take(chosen))
        received = rounded_entries(sent, value_type)
        values[chosen] = 0 if received is sent else sent.values - received.values
        residual[places] = values
        return Choice(received, 100 * (1 - least), value_type)


@dataclass(slots=True)
class NoResiduals:
    """The same without memory: each link gets entries of the newest gradient, and the rest is dropped."""

    layout: Layout
    rules: Rules
    _gradient: Vector = field(init=False)
    _selector: Selector = field(init=False)

    def __post_init__(self) -> None:
        self._selector = Selector(self.layout)

    def to_arrays(self) -> Arrays:
        """Nothing is kept in a checkpoint."""
        return {}

    def from_arrays(self, arrays: Mapping[str, Array], name: str, ranks: Iterable[int]) -> None:
        """Restore nothing."""

    def add(self, gradient: Vector, weight: float = 1.0) -> None:
        """Replace the gradient, (P,) float32, by ``weight`` times this one."""
        self._gradient = gradient if weight == 1.0 else gradient * np.float32(weight)

    def take(self, budgets: Mapping[int, Budget | None], left: Sequence[int] = ()) -> dict[int, Choice]:
        """Return the entries for each link; see `Residuals.take`."""
        rules, gradient, selector = self.rules, self._gradient, self._selector
        ready = {peer: budget.wanted_bytes for peer, budget in budgets.items() if budget is not None}
        if not ready:
            return {}
        largest = selector.measure(gradient)
        if rules.max_n is not None:
            selections = [selector.max_n(gradient, largest, rules.max_n)] * len(ready)
        else:
            selections = selector.nested(
                gradient, largest, list(ready.values()), n_min=rules.n_min, value_type=rules.usual_type
            )
        return {peer: self._choice(selection) for peer, selection in zip(ready, selections, strict=True)}

    def _choice(self, selection: Selection) -> Choice:
        indices = selection.indices
        # The whole gradient is copied too: a message must not change after it was made.
        values = self._gradient.copy() if indices is None else self._gradient[indices]
        return Choice(Entries(self.layout.size, values, indices), selection.quality, self.rules.usual_type)


def _allotted(budgets: Mapping[int, Budget | None], shared_bytes: float, fixed_n: bool) -> dict[int, float | None]:
    """Allot bytes to each link's message: infinite for the shared entries, whole; None for no message.

    From wide to narrow, each link gets what the one before it gets if it can take that, else what it wants.
    ``shared_bytes``: the size of the shared entries. With ``fixed_n`` every message has them all.
    """
    allotted: dict[int, float | None] = dict.fromkeys(budgets)
    ready = [(budget.wanted_bytes, budget.most_bytes, peer) for peer, budget in budgets.items() if budget is not None]
    widest_bytes = max((wanted_bytes for wanted_bytes, _, _ in ready), default=0.0)
    same_bytes = math.inf
    for wanted_bytes, most_bytes, peer in sorted(ready, reverse=True):
        if fixed_n or wanted_bytes == widest_bytes or shared_bytes <= most_bytes:
            allotted[peer] = math.inf
            continue
        if same_bytes > most_bytes:
            same_bytes = wanted_bytes
        allotted[peer] = same_bytes
    return allotted
