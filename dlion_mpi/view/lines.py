"""What a run says while it goes on and at its end, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dlion_mpi.log import say
from dlion_mpi.metrics.records import StepRecord


def progress_line(
    *,
    rank: int,
    time_s: float,
    step: int,
    batch: str,
    loss: float,
    samples_per_s: float,
    accuracy: float | None,
    links: Sequence[tuple[int, float, float]],
) -> str:
    """How a rank is getting on, in a line. ``links``: per peer its number, N and the bytes sent so far."""
    tested = f"  accuracy {accuracy:.1%}" if accuracy is not None else ""
    sent = "".join(f"  ->{peer} N {quality:.1f} {count / 1e6:.1f} MB" for peer, quality, count in links)
    return (
        f"[{rank}] {time_s:6.1f} s  step {step}  batch {batch}  loss {loss:.3f}  {samples_per_s:.0f} samples/s"
        f"{tested}{sent}"
    )


@dataclass(slots=True)
class Progress:
    """Prints one line per rank every ``every_s`` seconds (0: never)."""

    rank: int
    every_s: float
    accuracy: Callable[[], float | None]
    _printed_s: float = 0.0
    _samples: int = 0
    _quality: dict[int, float] = field(default_factory=dict)

    def __call__(self, record: StepRecord) -> None:
        """After every step."""
        self._samples += record.lbs
        self._quality.update(record.quality)
        elapsed_s = record.time_s - self._printed_s
        if not self.every_s or elapsed_s < self.every_s:
            return
        say(
            progress_line(
                rank=self.rank,
                time_s=record.time_s,
                step=record.step + 1,
                batch=f"{record.lbs}/{record.gbs}",
                loss=record.loss,
                samples_per_s=self._samples / elapsed_s,
                accuracy=self.accuracy(),
                links=[(peer, self._quality.get(peer, 0), sent) for peer, sent in sorted(record.bytes_sent.items())],
            )
        )
        self._printed_s, self._samples = record.time_s, 0


SUMMARY_COLUMNS = (
    "steps",
    "accuracy",
    "loss",
    "samples",
    "compute_s",
    "select_encode_s",
    "wait_s",
    "apply_s",
    "seconds",
    "bytes_sent",
)


def summary(result: dict[str, Any], rows: Sequence[Sequence[float]]) -> str:
    """The table at the end. ``rows``: per rank the numbers of SUMMARY_COLUMNS."""
    head = f"{'rank':>4} {'steps':>6} {'accuracy':>8} {'loss':>7} {'samples/s':>9}"
    head += f" {'compute':>8} {'select':>7} {'waiting':>7} {'apply':>6} {'MB sent':>8}"
    lines = ["", head]
    for rank, row in enumerate(rows):
        v = dict(zip(SUMMARY_COLUMNS, row, strict=True))
        total_s = max(v["seconds"], 1e-9)
        shares = [v[name] / total_s for name in ("compute_s", "select_encode_s", "wait_s", "apply_s")]
        lines.append(
            f"{rank:>4} {v['steps']:>6.0f} {v['accuracy']:>8.2%} {v['loss']:>7.3f} {v['samples'] / total_s:>9.0f}"
            f" {shares[0]:>8.1%} {shares[1]:>7.1%} {shares[2]:>7.1%} {shares[3]:>6.1%}"
            f" {v['bytes_sent'] / 1e6:>8.1f}"
        )
    accuracy, ranks = f"{result['accuracy_mean']:.2%}", "1 rank"
    if result["ranks"] > 1:
        accuracy += f", standard deviation between ranks {result['accuracy_std']:.2%}"
        ranks = f"{result['ranks']} ranks"
    lines.append(f"{result['strategy']}, {ranks}, {result['seconds']:.1f} s: test accuracy {accuracy}")
    if result["stopped"]:
        lines.append(f"stopped early: {result['stopped']}")
    if result["out"]:
        lines.append(f"metrics: {result['out']}")
    return "\n".join(lines)
