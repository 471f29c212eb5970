"""Max N: which entries of a gradient are worth sending, for many links in one pass. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dlion_mpi.flat import Indices, Layout, Vector
from dlion_mpi.wire import ValueType, bytes_for_count, encoded_bytes

SAMPLE = 1 << 14
"""Entries that are looked at to place a threshold; more would cost more than they sharpen it."""
MARGIN = 1.25
"""Candidates wanted over entries needed, since a sample places the first threshold."""


@dataclass(frozen=True, slots=True)
class Selection:
    """``indices``: (K,) uint32 ascending, None for all; ``quality``: the N in (0, 100] that they come from."""

    indices: Indices | None
    quality: float


def relative_magnitude(vector: Vector, layout: Layout, out: Vector) -> Vector:
    """``|v_i| / max|v|`` per variable, (P,) float32 in [0, 1], into ``out``; a variable of zeros gives zeros."""
    np.abs(vector, out=out)
    for segment in layout.segments():
        part = out[segment]
        largest = float(part.max())
        if largest > 0:
            # A subnormal maximum has no finite reciprocal in float32, so divide.
            np.divide(part, np.float32(largest), out=part)
    return out


def max_n(relative: Vector, quality: float) -> Selection:
    """Max N with N = ``quality``: the entries with ``|g_i| >= (1 - N/100) max|g|`` of their variable.

    ``relative``: (P,) float32 of `relative_magnitude`. N = 100 keeps everything. Raises ValueError unless
    0 < N <= 100. Source: DLion, section 2.
    """
    if not 0 < quality <= 100:
        raise ValueError(f"N is {quality}, but must be in (0, 100]")
    if quality == 100:
        return Selection(None, 100.0)
    threshold = np.float32(1 - quality / 100)
    return Selection(np.flatnonzero(relative >= threshold).astype(np.uint32), quality)


def nested(relative: Vector, budgets_bytes: Sequence[float], *, n_min: float, value_type: ValueType) -> list[Selection]:
    """For every budget the largest N in [n_min, 100] whose encoded message fits it.

    A smaller budget gets a subset of what a larger one gets. A budget that not even n_min fits gets n_min.
    Zeros are never selected (they would say nothing) unless the whole vector fits. ``relative``: (P,) float32.
    One pass over the vector serves all budgets. Source: DLion, section 2 (per-link N).
    """
    size = len(relative)
    counts = [_affordable(budget, size, value_type) for budget in budgets_bytes]
    least = 1 - n_min / 100
    partial = [count for count in counts if count < size]
    candidates = _candidates(relative, max(partial), least) if partial else np.empty(0, np.uint32)
    ranking = _Ranking(candidates, relative[candidates])
    selections: dict[float, Selection] = {}
    for budget, count in sorted(set(zip(budgets_bytes, counts, strict=True))):
        if count >= size:
            selections[budget] = Selection(None, 100.0)
        else:  # what a smaller budget has got, this one gets too: its threshold is the new least
            indices, least = _fit(ranking, count, budget, least, size, value_type)
            selections[budget] = Selection(indices, 100 * (1 - least))
    return [selections[budget] for budget in budgets_bytes]


def _affordable(budget_bytes: float, size: int, value_type: ValueType) -> int:
    """The largest number of entries that is expected to fit, by bisection: the size grows with the count."""
    low, high = 0, size
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_for_count(middle, size, value_type) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _candidates(relative: Vector, count: int, least: float) -> Indices:
    """At least the ``count`` largest entries that are not zero, and all with a magnitude >= least."""
    size = len(relative)
    sample = relative[:: max(1, size // SAMPLE)]
    wanted = count * MARGIN / size
    while True:
        kept = min(len(sample) - 1, int(wanted * len(sample)) + 4)
        threshold = np.partition(sample, len(sample) - 1 - kept)[len(sample) - 1 - kept]
        threshold = min(float(threshold), least)
        found = np.flatnonzero(relative >= threshold if threshold > 0 else relative > 0)
        if len(found) >= count or threshold <= 0:
            return found.astype(np.uint32)
        if kept == len(sample) - 1:  # the sample missed the smallest entries
            return np.flatnonzero(relative > 0).astype(np.uint32)
        wanted *= 2


@dataclass(frozen=True, slots=True)
class _Ranking:
    """Candidates (C,) ascending by index, and the magnitudes of every ``stride``-th, descending.

    Ranked once for all links, and never more than SAMPLE of them.
    """

    indices: Indices
    magnitudes: Vector
    stride: int = field(init=False)
    descending: Vector = field(init=False)

    def __post_init__(self) -> None:
        stride = -(-len(self.magnitudes) // SAMPLE) or 1
        object.__setattr__(self, "stride", stride)
        object.__setattr__(self, "descending", np.sort(self.magnitudes[::stride])[::-1])


def _fit(
    ranking: _Ranking, count: int, budget_bytes: float, least: float, size: int, value_type: ValueType
) -> tuple[Indices, float]:
    """The largest candidates that fit, and the threshold that they reach, at most ``least``.

    ``count`` is where to start, lowered while the exact size is too large.
    """
    if not len(ranking.indices):
        return ranking.indices, least
    wanted, given_up = count // ranking.stride, 0
    while True:
        threshold = least
        if wanted >= len(ranking.descending):
            threshold = float(ranking.magnitudes.min())
        elif wanted > 0:
            threshold = float(ranking.descending[wanted - 1])
        threshold = min(threshold, least)
        indices = ranking.indices[ranking.magnitudes >= threshold]
        exact_bytes = encoded_bytes(indices, size, value_type)
        if exact_bytes <= budget_bytes or threshold >= least:
            return indices, threshold
        # Equal magnitudes come all or none: if they are too many, only what is larger can fit. A sampled ranking
        # may be off by a little each time, so every further try gives up twice as much as the one before.
        larger = int(np.count_nonzero(ranking.descending > threshold))
        fitting = int(len(indices) * budget_bytes / exact_bytes) // ranking.stride
        wanted = max(0, min(larger - given_up, fitting))
        given_up = 2 * given_up + 1
