"""Max N: selecting the entries of a gradient that are worth sending, for many links in one pass. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.vector.layout import Indices, Layout, Vector, blocks
from dlion_mpi.wire import ValueType, bytes_for_count, encoded_bytes

Places = npt.NDArray[np.intp]
SAMPLE = 1 << 14
"""Entries sampled to place a threshold. A larger sample costs more than its precision gains."""
RANKED = 1 << 12
"""Most candidates that are sorted to place a link's threshold; of more, a sample is sorted."""
MARGIN = 1.25
"""Candidates wanted, relative to the entries needed, because a sample places the first threshold."""
BLOCK = 1 << 18
"""Entries processed at a time: large, since every block costs some calls; small enough to stay in the cache."""
CAUTION = 0.98
"""Share of a budget to aim at when a sample places the threshold, because a miss costs another try."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Selected entries: ``indices``, (K,) uint32 ascending, or None for all, and their N in (0, 100], ``quality``."""

    indices: Indices | None
    quality: float


class Selector:
    """Selects from vectors of one layout by relative magnitude: ``|v_i| / max|v|`` of the entry's variable.

    Call `measure` first, which makes one pass over the vector; then `max_n` or `nested`, which makes another.
    """

    def __init__(self, layout: Layout) -> None:
        self._segments = list(layout.segments())
        self._size = layout.size
        positions = np.arange(0, layout.size, max(1, layout.size // SAMPLE))
        self._sampled = positions
        self._stops = np.array([segment.stop for segment in self._segments])
        self._sampled_variable = self.variables(positions)
        self._starts = np.array([segment.start for segment in self._segments], np.intp)
        self._scratch = np.empty(min(BLOCK, layout.size), np.float32)
        self._mask = np.empty(len(self._scratch), np.bool_)

    def measure(self, vector: Vector, add: Vector | None = None, weight: float = 1.0) -> Vector:
        """Return the largest magnitude of every variable that has entries, (V,) float32.

        ``vector``: (P,) float32. ``add``: first ``vector += weight add``, in the same pass.
        """
        largest = np.zeros(len(self._segments), np.float32)
        for variable, segment in enumerate(self._segments):
            for block in blocks(segment, BLOCK):
                part = vector[block]
                if add is not None:
                    part += add[block] if weight == 1.0 else add[block] * np.float32(weight)
                largest[variable] = max(largest[variable], part.max(), -part.min())
        return largest

    def max_n(self, vector: Vector, largest: Vector, quality: float) -> Selection:
        """Select the entries with ``|g_i| >= (1 - N/100) max|g|`` of their variable, N = ``quality``.

        ``largest``: from `measure`. Zeros are never selected. N = 100 keeps everything. Raises ValueError unless
        0 < N <= 100. Source: DLion (HPDC 2021), Max N.
        """
        if not 0 < quality <= 100:
            raise ValueError(f"N is {quality}, but must be in (0, 100]")
        if quality == 100:
            return Selection(None, 100.0)
        return Selection(self._above(vector, largest, 1 - quality / 100)[0], quality)

    def nested(
        self,
        vector: Vector,
        largest: Vector,
        budgets_bytes: Sequence[float],
        *,
        n_min: float,
        value_type: ValueType,
        clustering: float = 1.0,
    ) -> list[Selection]:
        """Select, for every budget, the largest N in [n_min, 100] whose encoded message fits it.

        A smaller budget gets a subset of the entries of a larger budget. A budget that n_min exceeds gets n_min. Zeros
        are not selected unless the whole vector fits. One pass over the vector serves all budgets. ``largest``: from
        `measure`. ``clustering``: expected bytes, relative to entries at random positions (entries near each other cost
        less).
        Source: DLion (HPDC 2021), per-link N.
        """
        counts = [self.affordable(budget, value_type, clustering) for budget in budgets_bytes]
        least = 1 - n_min / 100
        partial = [count for count in counts if count < self._size]
        ranking = Ranking(*self.candidates(vector, largest, max(partial), least)) if partial else None
        selections: dict[float, Selection] = {}
        for budget, count in sorted(set(zip(budgets_bytes, counts, strict=True))):
            if count >= self._size:
                selections[budget] = Selection(None, 100.0)
            else:  # a larger budget gets all entries of a smaller one, whose threshold is the new least
                assert ranking is not None
                chosen, least = ranking.fit(count, budget, least, self._size, value_type)
                selections[budget] = Selection(ranking.indices.take(chosen), 100 * (1 - least))
        return [selections[budget] for budget in budgets_bytes]

    def sample(self, vector: Vector, largest: Vector) -> tuple[Vector, Vector, npt.NDArray[np.intp]]:
        """Entries at even distances: their relative magnitudes, their magnitudes, and the places of their variables.

        ``largest``: from `measure`.
        """
        magnitudes = np.abs(vector[self._sampled])
        scales = largest[self._sampled_variable]
        relative = np.divide(magnitudes, scales, out=np.zeros_like(scales), where=scales > 0)
        return relative, magnitudes, self._sampled_variable

    def variables(self, places: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
        """The places of the variables that these entries are of."""
        return np.searchsorted(self._stops, places, side="right")

    def relative(self, places: Places, magnitudes: Vector) -> Vector:
        """Divide magnitudes by the largest of their variable among the given entries.

        ``places``: (K,) ascending. ``magnitudes``: (K,) float32, not negative, overwritten by the result.
        """
        bounds = [*np.searchsorted(places, self._starts), len(places)]
        for start, stop in pairwise(bounds):
            part = magnitudes[start:stop]
            if stop > start and (largest := part.max()) > 0:
                np.divide(part, largest, out=part)
        return magnitudes

    def _above(self, vector: Vector, largest: Vector, threshold: float) -> tuple[Indices, Vector]:
        """Find the nonzero entries of relative magnitude >= threshold: (indices ascending, their magnitudes)."""
        places, magnitudes = [], []
        for segment, scale in zip(self._segments, largest, strict=True):
            if scale > 0:
                # A little too low, so that rounding leaves no entry out; entries that are too small are dropped below.
                limit = np.nextafter(np.float32(threshold * float(scale) * (1 - 1e-6)), np.float32(0))
                compare = np.greater_equal if limit > 0 else np.greater
                for block in blocks(segment, BLOCK):
                    entries = block.stop - block.start
                    all_magnitudes = np.abs(vector[block], out=self._scratch[:entries])
                    (found,) = compare(all_magnitudes, limit, out=self._mask[:entries]).nonzero()
                    if len(found):
                        magnitudes.append(all_magnitudes.take(found) / scale)
                        places.append(np.add(found, block.start, out=found))
        if not places:
            return np.empty(0, np.uint32), np.empty(0, np.float32)
        relative = np.concatenate(magnitudes)
        indices = np.concatenate(places, dtype=np.uint32, casting="unsafe")
        keep = relative >= np.float32(threshold) if threshold > 0 else relative > 0
        return (indices, relative) if keep.all() else (indices[keep], relative[keep])

    def affordable(self, budget_bytes: float, value_type: ValueType, clustering: float) -> int:
        """Return the number of entries expected to fit, by bisection, since bytes grow with the count."""
        if encoded_bytes(None, self._size, value_type) <= budget_bytes:
            return self._size
        low, high = 0, max(0, self._size - 1)
        while low < high:
            middle = (low + high + 1) // 2
            if clustering * bytes_for_count(middle, self._size, value_type) <= budget_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def candidates(self, vector: Vector, largest: Vector, count: int, least: float) -> tuple[Indices, Vector]:
        """Find at least the ``count`` largest nonzero entries, and all with a relative magnitude >= least.

        Returns indices, ascending, and relative magnitudes.
        """
        sample, _, _ = self.sample(vector, largest)
        wanted = count * MARGIN / self._size
        while True:
            kept = min(len(sample) - 1, int(wanted * len(sample)) + 4)
            threshold = min(float(np.partition(sample, len(sample) - 1 - kept)[len(sample) - 1 - kept]), least)
            found = self._above(vector, largest, max(0.0, threshold))
            if len(found[0]) >= count or threshold <= 0:
                return found
            if kept == len(sample) - 1:  # the sample missed the smallest entries
                return self._above(vector, largest, 0.0)
            wanted *= 2


@dataclass(frozen=True, slots=True)
class Ranking:
    """Candidates, (C,) ascending by index, and the relative magnitudes of every ``stride``-th, sorted descending.

    Sorted once for all links, and at most RANKED of them.
    """

    indices: Indices
    magnitudes: Vector
    stride: int = field(init=False)
    descending: Vector = field(init=False)

    def __post_init__(self) -> None:
        stride = -(-len(self.magnitudes) // RANKED) or 1
        object.__setattr__(self, "stride", stride)
        object.__setattr__(self, "descending", np.sort(self.magnitudes[::stride])[::-1])

    def fit(
        self, count: int, budget_bytes: float, least: float, size: int, value_type: ValueType
    ) -> tuple[Places, float]:
        """Return the largest candidates that fit, and their threshold, which is at most ``least``.

        ``count``: the first guess of their number, lowered while their exact size is too large.
        """
        if not len(self.indices):
            return np.empty(0, np.intp), least
        aim = CAUTION if self.stride > 1 else 1.0
        wanted, given_up = int(count * aim) // self.stride, 0
        while True:
            threshold = least
            if wanted >= len(self.descending):
                threshold = float(self.magnitudes.min())
            elif wanted > 0:
                threshold = float(self.descending[wanted - 1])
            threshold = min(threshold, least)
            chosen = np.flatnonzero(self.magnitudes >= threshold)
            exact_bytes = encoded_bytes(self.indices.take(chosen), size, value_type)
            if exact_bytes <= budget_bytes or threshold >= least:
                return chosen, threshold
            # Entries of equal magnitude are selected all or none: if they are too many, only larger entries can fit. A
            # sampled ranking may be a little wrong each time, so every try gives up twice as much as the last one.
            larger = int(np.count_nonzero(self.descending > threshold))
            fitting = int(len(chosen) * aim * budget_bytes / exact_bytes) // self.stride
            wanted = max(0, min(larger - given_up, fitting))
            given_up = 2 * given_up + 1
