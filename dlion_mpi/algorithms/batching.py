"""Weighted dynamic batching: schedule of the global batch, throughput fit, and each worker's batch size. All pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

GROW_EVERY = 500
"""Steps between adjustments of the global batch. Fewer buy nothing at a fixed learning rate (benchmarks/README.md)."""
WARMUP_SAMPLES = 32
"""Samples that an adjustment adds during warm-up."""
WARMUP_SHARE = 0.01
"""Warm-up ends at this share of the training set [recalled from the paper]."""
SPEEDUP = 1.5
"""Factor of an adjustment after warm-up."""
LARGEST_SHARE = 0.10
"""The global batch stops at this share of the training set [recalled from the paper]."""
DRIFT = 0.25
"""Relative error of a prediction above which the machine may have changed its speed."""
DRIFT_RUN = 3
"""Successive errors above DRIFT that mean a change of speed; fewer are noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatchSchedule:
    """Growth of the global batch size (GBS, samples) with the step.

    Warm-up adds ``warmup_step`` at every adjustment up to ``warmup_limit`` samples; then every adjustment
    multiplies by ``speedup_factor`` up to ``limit`` samples. A start above a limit stays where it is.
    Source: DLion (HPDC 2021), weighted dynamic batching.
    """

    start: int
    interval: int
    warmup_step: int
    warmup_limit: int
    speedup_factor: float
    limit: int

    @classmethod
    def usual(cls, start: int, training_samples: int) -> GlobalBatchSchedule:
        """The schedule of every run, from ``start`` samples on."""
        return cls(
            start=start,
            interval=GROW_EVERY,
            warmup_step=WARMUP_SAMPLES,
            warmup_limit=int(WARMUP_SHARE * training_samples),
            speedup_factor=SPEEDUP,
            limit=int(LARGEST_SHARE * training_samples),
        )

    def at(self, step: int) -> int:
        """Return GBS at a step, after ``step // interval`` adjustments."""
        gbs = float(self.start)  # rounded at the end only, or a small factor would never add a sample
        for _ in range(step // self.interval):
            if gbs < self.warmup_limit and self.warmup_step > 0:
                grown = min(gbs + self.warmup_step, self.warmup_limit, self.limit)
            else:
                grown = min(gbs * self.speedup_factor, self.limit)
            if grown <= gbs:
                break
            gbs = grown
        return int(gbs)


@dataclass(slots=True)
class ThroughputFit:
    """t(b) = alpha + beta b, by least squares over recent, outlier-free timings.

    ``window``: the number of (b, seconds) pairs kept. When the machine changes its speed (see DRIFT), older pairs are
    dropped. Source: DLion (HPDC 2021), weighted dynamic batching.
    """

    window: int = 40
    pairs: deque[tuple[int, float]] = field(init=False)
    off: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.pairs = deque(maxlen=self.window)

    def add(self, samples: int, seconds: float) -> None:
        """Add the timing of an iteration of ``samples``."""
        if len(self.pairs) > DRIFT_RUN:
            alpha, beta = self.solve()
            expected = alpha + beta * samples
            self.off = self.off + 1 if abs(seconds - expected) > DRIFT * expected else 0
            if self.off >= DRIFT_RUN:
                recent = list(self.pairs)[-(DRIFT_RUN - 1) :]
                self.pairs.clear()
                self.pairs.extend(recent)
                self.off = 0
        self.pairs.append((samples, seconds))

    def solve(self) -> tuple[float, float]:
        """Return (alpha in seconds, beta in seconds per sample), alpha >= 0 and beta > 0.

        With timings of a single batch size alpha is 0, because only a rate is known. Raises ValueError without timings.
        """
        if not self.pairs:
            raise ValueError("no timings to fit")
        samples, seconds = np.array(self.pairs, dtype=np.float64).T
        alpha, beta = _least_squares(samples, seconds)
        errors = np.abs(seconds - alpha - beta * samples)
        kept = errors <= 3 * np.median(errors) + 1e-9
        return _least_squares(samples[kept], seconds[kept])


def _least_squares(samples: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    spread = samples - samples.mean()
    variance = float(spread @ spread)
    beta = float(spread @ seconds) / variance if variance > 0 else 0.0
    alpha = float(seconds.mean() - beta * samples.mean())
    if beta <= 0 or alpha < 0:  # noise, or one batch size: the line through the origin
        alpha, beta = 0.0, max(float(samples @ seconds) / float(samples @ samples), 1e-12)
    return alpha, beta


def solve_lbs(
    gbs: int, fits: Sequence[tuple[float, float]], limits: Sequence[int], *, policy: str = "auto", least: int = 1
) -> list[int]:
    """Return each worker's local batch size (LBS). They sum to ``gbs`` exactly.

    ``auto``: T = (GBS + sum alpha_k/beta_k) / sum(1/beta_k), LBS_k = (T - alpha_k)/beta_k, so that all finish
    together. ``proportional``: in proportion to 1/beta_k (the paper's relative compute power). Both are
    clamped to [``least``, limits[k]], the clamped amount is shared among the rest, and largest remainders round.
    ``fits``: (alpha, beta) per worker. Raises ValueError for a gbs that these bounds exclude.
    Source: DLion (HPDC 2021), weighted dynamic batching; `auto` is ours.
    """
    floors = [min(least, limit) for limit in limits]
    if not sum(floors) <= gbs <= sum(limits):
        raise ValueError(f"a global batch of {gbs} cannot be shared by {len(fits)} workers with limits {list(limits)}")
    alpha = np.array([a if policy == "auto" else 0.0 for a, _ in fits])
    beta = np.array([b for _, b in fits])
    low, high = np.array(floors, dtype=np.float64), np.array(limits, dtype=np.float64)
    # sum_k clamp((T - alpha_k)/beta_k) grows with T. Bisection finds the T that meets GBS, and so shares the clamped
    # amount as well.
    t_low, t_high = 0.0, float(np.max(alpha + beta * high))
    for _ in range(200):
        t = (t_low + t_high) / 2
        if float(np.clip((t - alpha) / beta, low, high).sum()) < gbs:
            t_low = t
        else:
            t_high = t
    return _round_to_sum(np.clip((t_high - alpha) / beta, low, high), gbs, floors, limits)


def gain(before: Sequence[int], after: Sequence[int], fits: Sequence[tuple[float, float]]) -> float:
    """Return the share of the slowest worker's time that other batch sizes save. ``fits``: (alpha, beta) per worker."""

    def slowest(sizes: Sequence[int]) -> float:
        return max(alpha + beta * size for size, (alpha, beta) in zip(sizes, fits, strict=True))

    return 1 - slowest(after) / slowest(before)


def equal_lbs(gbs: int, n: int) -> list[int]:
    """Divide GBS as evenly as whole samples allow."""
    return [gbs // n + (k < gbs % n) for k in range(n)]


def _round_to_sum(exact: np.ndarray, total: int, floors: Sequence[int], limits: Sequence[int]) -> list[int]:
    """Round by largest remainders, within [floor, limit]."""
    lbs = np.maximum(np.floor(exact + 1e-9).astype(np.int64), floors)
    order = np.argsort(-(exact - lbs), kind="stable")
    missing = total - int(lbs.sum())
    while missing > 0:
        for k in order:
            if missing > 0 and lbs[k] < limits[k]:
                lbs[k] += 1
                missing -= 1
    while missing < 0:  # only by the floors
        k = int(np.argmax(lbs))
        lbs[k] -= 1
        missing += 1
    return [int(v) for v in lbs]
