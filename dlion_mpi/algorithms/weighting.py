"""The weighted update: the weight of worker j's gradient at worker k. Pure."""

from __future__ import annotations


def coefficient(weighting: str | None, lbs: int, gbs: int, *, own_lbs: int, workers: int) -> float:
    """Return the weight of a mean gradient over ``lbs`` of ``gbs`` samples (LBS_j and GBS when it was computed).

    ``global``: LBS_j / GBS, the true mean gradient over the global batch. ``paper``: LBS_j / (n LBS_k), with
    ``own_lbs`` = LBS_k and ``workers`` = n. They agree when all LBS are equal.
    Source: DLion, weighted dynamic batching; `global` is ours (docs/algorithms.md).
    """
    if weighting == "global":
        return lbs / gbs
    if weighting == "paper":
        return lbs / (workers * own_lbs)
    raise ValueError(f"unknown weighting '{weighting}'")
