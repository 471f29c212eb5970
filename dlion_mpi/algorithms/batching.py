"""Weighted dynamic batching: the global batch's schedule, the throughput fit, and everyone's share. All pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

DRIFT = 0.25
"""Relative error of the last few predictions beyond which the machine has changed and old timings mislead."""
DRIFT_RUN = 3
"""How many timings in a row must be off by DRIFT: one slow step is noise, three are a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatchSchedule:
    """How the global batch size (GBS, samples) grows with the step.

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

    def at(self, step: int) -> int:
        """GBS at this step: the start after ``step // interval`` adjustments."""
        gbs = float(self.start)  # whole samples only in the end, or a small factor would never add one
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

    ``window``: how many (b, seconds) pairs are remembered. A machine that changes speed is noticed by its
    timings (see DRIFT), and what was measured before is forgotten. Source: DLion
    (HPDC 2021), weighted dynamic batching.
    """

    window: int = 40
    pairs: deque[tuple[int, float]] = field(init=False)
    off: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.pairs = deque(maxlen=self.window)

    def add(self, samples: int, seconds: float) -> None:
        """Remember that an iteration of ``samples`` took ``seconds``."""
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
        """(alpha in seconds, beta in seconds per sample), alpha >= 0 and beta > 0.

        With timings of one batch size only, alpha is 0: all that is known is a rate. Raises ValueError
        without any timing.
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
    gbs: int, fits: Sequence[tuple[float, float]], limits: Sequence[int], *, policy: str = "auto"
) -> list[int]:
    """Everyone's local batch size (LBS), summing to ``gbs`` exactly.

    ``auto``: T = (GBS + sum alpha_k/beta_k) / sum(1/beta_k), LBS_k = (T - alpha_k)/beta_k, so that all finish
    together. ``proportional``: in proportion to 1/beta_k (the paper's relative compute power). Both are
    clamped to [1, limits[k]], what was clamped is shared among the rest, and largest remainders round.
    ``fits``: (alpha, beta) per worker. A gbs below n, or above the sum of the limits, is what cannot be met:
    ValueError. Source: DLion (HPDC 2021), weighted dynamic batching; `auto` is ours.
    """
    n = len(fits)
    if not n <= gbs <= sum(limits):
        raise ValueError(f"a global batch of {gbs} cannot be shared by {n} workers with limits {list(limits)}")
    alpha = np.array([a if policy == "auto" else 0.0 for a, _ in fits])
    beta = np.array([b for _, b in fits])
    low, high = np.ones(n), np.array(limits, dtype=np.float64)
    # sum_k clamp((T - alpha_k)/beta_k) grows with T, so the T that meets GBS is found by bisection:
    # clamping and sharing what was clamped are then one thing.
    t_low, t_high = 0.0, float(np.max(alpha + beta * high))
    for _ in range(200):
        t = (t_low + t_high) / 2
        if float(np.clip((t - alpha) / beta, low, high).sum()) < gbs:
            t_low = t
        else:
            t_high = t
    return _round_to_sum(np.clip((t_high - alpha) / beta, low, high), gbs, limits)


def equal_lbs(gbs: int, n: int) -> list[int]:
    """GBS dealt as evenly as whole samples allow."""
    return [gbs // n + (k < gbs % n) for k in range(n)]


def _round_to_sum(exact: np.ndarray, total: int, limits: Sequence[int]) -> list[int]:
    """Largest remainders, without leaving [1, limit]."""
    lbs = np.maximum(np.floor(exact + 1e-9).astype(np.int64), 1)
    order = np.argsort(-(exact - lbs), kind="stable")
    missing = total - int(lbs.sum())
    while missing > 0:
        for k in order:
            if missing > 0 and lbs[k] < limits[k]:
                lbs[k] += 1
                missing -= 1
    while missing < 0:  # only by the floor of 1
        k = int(np.argmax(lbs))
        lbs[k] -= 1
        missing += 1
    return [int(v) for v in lbs]
