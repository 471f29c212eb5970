"""The form of a message: few entries or all, and how many bits for each value. Pure numpy.

Of the forms that fit a budget, the best leaves the least of the vector's energy behind. A vector with few large entries
leads to few entries with 16 bits; a flatter one to signs of more entries; a wide link to all entries with as many bits
as it carries. What few entries bring is computed from these, what all bring is predicted from a sample. Source: ours;
every top-k and quantisation scheme is one of the forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlion_mpi.algorithms.selection import Ranking, Selection, Selector
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import ValueType, encoded_bytes, rounded
from dlion_mpi.wire.quantize import BITS, PER_MAGNITUDE

FEW: tuple[ValueType, ...] = ("sign", "bfloat16")
"""Value types for few entries, the usual one first. Their positions take about 8 bits each."""
USUAL = 1.5
"""How much more another type has to bring than the usual one. Signs also keep outliers from moving the weights far at
once: values of 4 and 8 bits brought more of the energy, and less accuracy (docs/log.md)."""
ALL: tuple[ValueType, ...] = ("sign", "int2", "int4", "int8")
"""Value types for all entries, where `EXACT` does not fit."""
EXACT: ValueType = "bfloat16"
"""The value type that leaves nearly nothing, and that costs the processor least. It is taken wherever it fits."""
LEVEL = 0.001
"""Forms whose captured shares differ by less are level: the smaller message is better."""


@dataclass(frozen=True, slots=True)
class Form:
    """``selection``: the entries. ``captured``: the predicted share of the vector's energy, in [0, 1]."""

    selection: Selection
    value_type: ValueType
    size_bytes: float
    captured: float


@dataclass(frozen=True, slots=True)
class Terms:
    """The limits of a message: its bytes, and its bytes if it does not have all entries.

    ``types``: of values, to choose from; None: those of `FEW`, `ALL` and `EXACT`. ``n_min``, ``clustering``: see
    `Selector.nested`.
    """

    budget_bytes: float
    few_bytes: float
    types: Sequence[ValueType] | None
    n_min: float
    clustering: float


def best(forms: Sequence[Form]) -> Form:
    """Return the form that captures most; of those that are level with it, the smallest message."""
    most = max(form.captured for form in forms)
    return min((form for form in forms if form.captured >= most - LEVEL), key=lambda form: form.size_bytes)


def forms(selector: Selector, vector: Vector, largest: Vector, terms: Terms) -> list[Form]:
    """The forms that fit a budget, those with few entries first.

    ``vector``: (P,) float32. ``largest``: from `Selector.measure`.
    """
    size, few_bytes = len(vector), min(terms.budget_bytes, terms.few_bytes)
    exact = EXACT if terms.types is None else terms.types[0]
    exact_bytes = encoded_bytes(None, size, exact)
    if exact not in BITS and exact_bytes <= terms.budget_bytes:
        return [Form(Selection(None, 100.0), exact, exact_bytes, 1.0)]
    counts = {kind: selector.affordable(few_bytes, kind, terms.clustering) for kind in terms.types or FEW}
    sparse = {kind: count for kind, count in counts.items() if count < size}
    least = 1 - terms.n_min / 100
    ranking = Ranking(*selector.candidates(vector, largest, max(sparse.values(), default=0), least))
    top = vector.take(ranking.indices)
    pool = _Pool.of(selector, vector, largest, ranking)
    energy = pool.energy
    few = []
    for kind, count in sparse.items():
        chosen, n = ranking.fit(count, few_bytes, least, size, kind)
        values = top.take(chosen)
        brought = _energy(values) - _energy(values - rounded(values, kind))
        selection = Selection(ranking.indices.take(chosen), 100 * (1 - n))
        few.append(Form(selection, kind, few_bytes, _share(brought, energy)))
    found = few[:1]
    found += [form for form in few[1:] if form.captured > USUAL * few[0].captured]
    for kind in terms.types or ALL:
        size_bytes = encoded_bytes(None, size, kind)
        if size_bytes <= terms.budget_bytes:
            found.append(Form(Selection(None, 100.0), kind, size_bytes, _share(pool.brought(kind), energy)))
    return found


def _energy(values: Vector) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole else 0.0


@dataclass(frozen=True, slots=True)
class _Pool:
    """Entries that stand for the whole vector: the largest, and a sample of the others.

    Their magnitudes, how many entries each stands for, and the places of their variables.
    """

    magnitudes: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]
    variables: npt.NDArray[np.intp]

    @classmethod
    def of(cls, selector: Selector, vector: Vector, largest: Vector, ranking: Ranking) -> _Pool:
        """The pool of a vector whose largest entries are ``ranking``'s."""
        relative, sample, variables = selector.sample(vector, largest)
        others = relative < ranking.magnitudes.min(initial=np.inf)
        top = np.abs(vector.take(ranking.indices))
        each = (len(vector) - len(top)) / max(1, int(others.sum()))
        return cls(
            np.concatenate([top, sample[others]]).astype(np.float64),
            np.concatenate([np.ones(len(top)), np.full(int(others.sum()), each)]),
            np.concatenate([selector.variables(ranking.indices), variables[others]]),
        )

    @property
    def energy(self) -> float:
        """The energy of the vector."""
        return float((self.counts * np.square(self.magnitudes)).sum())

    def brought(self, kind: ValueType) -> float:
        """The energy that all entries bring, rounded to few bits. A variable stands for its blocks."""
        bits = BITS[kind]
        if bits == 8:
            steps = np.zeros(int(self.variables.max()) + 1)
            np.maximum.at(steps, self.variables, self.magnitudes / 127.5)
        else:
            total = np.bincount(self.variables, self.counts * self.magnitudes)
            steps = PER_MAGNITUDE[bits] * total / np.maximum(1, np.bincount(self.variables, self.counts))
        step = np.maximum(steps[self.variables], np.finfo(np.float32).tiny)
        received = (np.minimum(np.floor(self.magnitudes / step), (1 << bits - 1) - 1) + 0.5) * step
        return float((self.counts * received * (2 * self.magnitudes - received)).sum())
