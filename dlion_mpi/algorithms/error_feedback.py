"""What has been computed and not sent yet: one memory for all links of a worker. Pure numpy.

Links do not each search the whole gradient. It is added to one memory, `common`. What is selected there for the
widest link leaves `common` for all links at once: a link that can carry it gets it as it is, and to any other it is
*owed*. A link that owes something chooses among the entries that leave `common` in this step, by what it owes of
them in all. So for every link

    sum of what it was sent + owed to it + common == sum of all gradients

and one more link costs in proportion to what is sent, not to the model. Links of about the same width get the same
entries: all that can take the widest one's get those, of the others all that can take what the widest of them gets,
and so on. So what many links cost depends on how unlike they are, not on how many.

Source: memory of the unsent as in Deep Gradient Compression (Lin et al. 2018); one for many links: issue 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dlion_mpi.algorithms.selection import Ranking, Selection, Selector
from dlion_mpi.vector.layout import Entries, Layout, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, number, numbers, part, under, vector, vectors_by_rank
from dlion_mpi.wire import ValueType, bytes_for_count, encoded_bytes, rounded


@dataclass(frozen=True, slots=True)
class Choice:
    """What goes to one link: the entries, with the values that the receiver will see, and their N in (0, 100]."""

    entries: Entries
    quality: float


@dataclass(frozen=True, slots=True)
class Rules:
    """How entries are chosen: by a fixed N (``max_n``), else each link its own N of at least ``n_min``."""

    max_n: float | None
    n_min: float
    value_type: ValueType


@dataclass(frozen=True, slots=True)
class Budget:
    """What a message to one link should have, and the most that it may have to be the same as a wider link's."""

    wanted_bytes: float
    most_bytes: float


@dataclass(slots=True)
class Unsent:
    """The memory of one worker: ``common`` (P,) float32, what no link has been sent.

    ``owed``: by link, (P,) float32 what others have been sent and this one has not; absent where there is nothing.
    Links that are owed the same have one vector together, and are served together, as long as they are.
    """

    layout: Layout
    rules: Rules
    common: Vector = field(init=False)
    owed: dict[int, Vector] = field(init=False, default_factory=dict)
    sent: Entries | None = field(init=False, default=None)
    """What left `common` in the newest `take`, as its receivers see it; None if nothing did."""
    _selector: Selector = field(init=False)
    _largest: Vector = field(init=False)
    _widest_bytes: float = math.inf
    """What the widest link's message could have when one was last made."""
    _clustering: float = 1.0
    """Bytes of the last selection over what they would be at random positions."""

    def __post_init__(self) -> None:
        self.common = np.zeros(self.layout.size, np.float32)
        self._selector = Selector(self.layout)
        self._largest = self._selector.measure(self.common)

    def of(self, peer: int) -> Vector:
        """All that ``peer`` has not been sent, (P,) float32, a copy."""
        return self.common + self.owed[peer] if peer in self.owed else self.common.copy()

    def to_arrays(self) -> Arrays:
        """What is remembered, by name: its own arrays, not copies."""
        owed = under("owed", {str(peer): owed for peer, owed in self.owed.items()})
        return {"common": self.common, **owed, **numbers(clustering=self._clustering)}

    def from_arrays(self, arrays: Mapping[str, Array], name: str, ranks: Iterable[int]) -> None:
        """Restore what `to_arrays` gave, stored under ``name``. Raises StateError."""
        arrays = part(arrays, name)
        self.common[:] = vector(arrays, "common", self.layout.size)
        self.owed = {}
        for peer, owed in vectors_by_rank(arrays, "owed", ranks, self.layout.size).items():
            self.owed[peer] = next((other for other in self.owed.values() if np.array_equal(other, owed)), owed)
        self._clustering = number(arrays, "clustering")

    def add(self, gradient: Vector) -> None:
        """Remember a gradient, (P,) float32."""
        self._largest = self._selector.measure(self.common, add=gradient)

    def take(self, budgets: Mapping[int, Budget | None]) -> dict[int, Choice]:
        """What goes to each link: the largest entries that its budget pays for, or all within a fixed N.

        ``budgets``: of every live link; None for one that takes no message now. Where there is no link any more,
        entries go on leaving `common` as for the last that there was.
        """
        self.sent = None
        widest = max((budget.wanted_bytes for budget in budgets.values() if budget is not None), default=None)
        if not budgets:
            widest = self._widest_bytes
        if widest is None:
            return {}
        self._widest_bytes = widest
        shared = self._sent(self.common, self._select(widest))
        self.sent = shared.entries
        indices = shared.entries.indices
        shared_bytes = encoded_bytes(indices, self.layout.size, self.rules.value_type)
        choices: dict[int, Choice] = {}
        for peers, allotted in self._alike(_allotted(budgets, shared_bytes, self.rules.max_n is not None)):
            if peers[0] not in self.owed and allotted == math.inf:
                choices |= dict.fromkeys(peers, shared)
                continue
            owed = self._debt(peers)
            if allotted is None:
                shared.entries.add_to(owed, 1.0)
                continue
            if allotted == math.inf:
                choice = self._all(owed, shared)
            elif indices is None:
                owed += shared.entries.values
                choice = self._largest_of_all(owed, allotted)
            else:
                choice = self._largest_among(
                    owed, shared.entries, allotted, int(len(indices) * allotted / shared_bytes)
                )
            choices |= dict.fromkeys(peers, choice)
        return choices

    def _alike(self, allotted: Mapping[int, float | None]) -> list[tuple[list[int], float | None]]:
        """The links by what they are owed and allotted: those alike in both are served together."""
        groups: dict[tuple[int | None, float | None], list[int]] = {}
        for peer, size_bytes in allotted.items():
            owed = id(self.owed[peer]) if peer in self.owed else None
            groups.setdefault((owed, size_bytes), []).append(peer)
        return [(peers, size_bytes) for (_, size_bytes), peers in groups.items()]

    def _debt(self, peers: Sequence[int]) -> Vector:
        """What these links are owed, alike so far, and from now on without those that it was the same for."""
        if peers[0] not in self.owed:
            owed = np.zeros(self.layout.size, np.float32)
        else:
            owed = self.owed[peers[0]]
            if any(other is owed for peer, other in self.owed.items() if peer not in peers):
                owed = owed.copy()
        self.owed |= dict.fromkeys(peers, owed)
        return owed

    def _select(self, budget_bytes: float) -> Selection:
        """From `common`, for the widest link."""
        rules = self.rules
        if rules.max_n is not None:
            return self._selector.max_n(self.common, self._largest, rules.max_n)
        (selection,) = self._selector.nested(
            self.common,
            self._largest,
            [budget_bytes],
            n_min=rules.n_min,
            value_type=rules.value_type,
            clustering=self._clustering,
        )
        if selection.indices is not None and len(selection.indices):
            random = bytes_for_count(len(selection.indices), self.layout.size, rules.value_type)
            self._clustering = encoded_bytes(selection.indices, self.layout.size, rules.value_type) / random
        return selection

    def _all(self, owed: Vector, shared: Choice) -> Choice:
        """The shared entries, each with all that is owed of it."""
        shared.entries.add_to(owed, 1.0)
        return self._sent(owed, Selection(shared.entries.indices, shared.quality))

    def _largest_of_all(self, owed: Vector, budget_bytes: float) -> Choice:
        """The largest of everything owed, where everybody else gets everything."""
        rules, selector = self.rules, self._selector
        (selection,) = selector.nested(
            owed, selector.measure(owed), [budget_bytes], n_min=rules.n_min, value_type=rules.value_type
        )
        return self._sent(owed, selection)

    def _sent(self, memory: Vector, selection: Selection) -> Choice:
        """Take what was selected out of a memory, as the receiver will see it; rounding errors stay."""
        places = slice(None) if selection.indices is None else selection.indices.astype(np.intp)
        values = memory[places]
        received = rounded(values, self.rules.value_type)
        if received is values:
            received = values.copy() if selection.indices is None else values
            memory[places] = 0
        else:
            memory[places] = values - received
        return Choice(Entries(self.layout.size, received, selection.indices), selection.quality)

    def _largest_among(self, owed: Vector, shared: Entries, budget_bytes: float, count: int) -> Choice:
        """The largest of what is owed among the shared entries; about ``count`` of them fit."""
        assert shared.indices is not None
        rules, size = self.rules, self.layout.size
        places = shared.indices.astype(np.intp)  # NumPy reads and writes through these much faster
        values = owed.take(places)
        values += shared.values
        ranking = Ranking(shared.indices, self._selector.relative(places, np.abs(values)))
        chosen, least = ranking.fit(count, budget_bytes, 1 - rules.n_min / 100, size, rules.value_type)
        sent = values.take(chosen)
        received = rounded(sent, rules.value_type)
        values[chosen] = 0 if received is sent else sent - received
        owed[places] = values
        return Choice(Entries(size, received, shared.indices.take(chosen)), 100 * (1 - least))


def _allotted(budgets: Mapping[int, Budget | None], shared_bytes: float, fixed_n: bool) -> dict[int, float | None]:
    """Bytes of each link's message: infinite for the widest one's entries, whole; None for no message.

    From wide to narrow, each link gets what the one before it gets if it can take that, else what it wants.
    ``shared_bytes``: of the widest one's entries; with a ``fixed_n`` every message has them.
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
