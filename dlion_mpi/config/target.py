"""Targets, such as ``accuracy>=0.8``: a test metric and a bound. Also the better direction of a metric."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from dlion_mpi.errors import UserError

RISING = {
    *("accuracy", "acc", "auc", "precision", "recall", "sensitivity", "specificity", "score", "f1", "fbeta", "r2"),
    *("iou", "dice", "similarity", "correlation", "kappa", "mcc", "auroc", "ndcg", "bleu", "rouge", "psnr", "ssim"),
    *("reward", "return"),
}
"""Words in the name of a metric of which more is better."""
FALLING = {"loss", "error", "false"}
"""Words in the name of a metric of which less is better, whatever other words it has."""


@dataclass(frozen=True, slots=True)
class Target:
    """A bound that the mean of a test metric over the workers is to reach. ``sign``: ">=" or "<="."""

    metric: str
    sign: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Parse ``"accuracy>=0.8"`` or ``"val_loss<=0.3"``. Raises UserError."""
        match = re.fullmatch(r"(.*\S)\s*(>=|<=)\s*(\S+)", text.strip())
        try:
            value = float(match[3]) if match else math.nan
        except ValueError:
            value = math.nan
        if match is None or not math.isfinite(value):
            raise UserError(
                f"'{text}' is not a metric and a bound such as 'accuracy>=0.8' or 'val_loss<=0.3'; a shell needs the "
                "quotation marks"
            )
        if is_share(match[1]) and not 0 <= value <= 1:
            raise UserError(f"{text}: an accuracy is a share of the samples, from 0 to 1")
        return cls(match[1], match[2], value)

    def reached(self, value: float) -> bool:
        """Whether a value of the metric is enough; NaN never is."""
        return value >= self.value if self.sign == ">=" else value <= self.value

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{str(self.value).removesuffix('.0')}"


def is_share(metric: str) -> bool:
    """Whether a metric is a share of the samples, 0 to 1, which people read in per cent."""
    return metric.lower().endswith(("accuracy", "_acc")) or metric.lower() == "acc"


def falls(metric: str) -> bool:
    """Whether a smaller value of a metric is better: of all whose names have no word of `RISING`."""
    words = {*re.split(r"[^a-z0-9]+", metric.lower().replace("io_u", "iou"))}
    words |= {word.rstrip("0123456789") for word in words}
    rising = words & RISING or {"true", "positives"} <= words or {"true", "negatives"} <= words
    return bool(words & FALLING) or not rising
