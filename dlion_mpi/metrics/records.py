"""The measures of a run, each declared once.

A measure is an annotated field of one of the records below: `Measure` says how it is stored and what it means. `GAUGES`
and `CHARTS` say which views show it. The metrics files, their reader, the live view, TensorBoard, the summary, the
report, the trace and the tables of docs/metrics.md are derived from these declarations.

To add a measure, add a field to `StepRecord`, a gauge or a chart if a view is to show it, and set the field where the
loop makes the record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from typing import Annotated, get_type_hints

import numpy as np


@dataclass(frozen=True, slots=True)
class Measure:
    """A measured quantity: one column of the metrics files.

    ``dtype``: NumPy type in the file. ``unit``: "" for a number without one. ``meaning``: one line for people.
    ``link``: for a measure of each link, whether it describes traffic "to" or "from" the peer.
    ``part``: label of the part of a step's time that it is. ``within``: the measure that contains this part.
    ``trace``: whether the trace shows it with each step.
    """

    dtype: str
    unit: str
    meaning: str
    _: KW_ONLY
    link: str = ""
    part: str = ""
    within: str = ""
    trace: bool = False


PerLink = Mapping[int, float]
"""Values by peer; peers without a value are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of one worker."""

    step: Annotated[int, Measure("u8", "", "number of the step, from 0; Hop may skip numbers")]
    time_s: Annotated[float, Measure("f8", "s", "end of the step, since training began, on rank 0's clock")]
    compute_s: Annotated[
        float,
        Measure("f4", "s", "computing the gradient, with the sleep that emulates a slower machine", part="computing"),
    ]
    paced_s: Annotated[
        float,
        Measure("f4", "s", "the sleep in `compute_s`", part="slept to emulate a slower machine", within="compute_s"),
    ]
    select_encode_s: Annotated[
        float,
        Measure(
            "f4",
            "s",
            "selecting, encoding and posting messages, or waiting for the background encoder",
            part="selecting and encoding",
        ),
    ]
    wait_s: Annotated[float, Measure("f4", "s", "waiting for peers, decoding not included", part="waiting")]
    apply_s: Annotated[
        float, Measure("f4", "s", "decoding and weighting received messages, and the optimizer", part="applying")
    ]
    step_s: Annotated[float, Measure("f4", "s", "the whole step, with time that belongs to none of the parts")]
    mpi_cpu_s: Annotated[
        float, Measure("f8", "s", "processor time of the MPI thread so far; in a simulation, estimated")
    ] = 0.0
    loss: Annotated[float, Measure("f4", "", "mean training loss of the batch", trace=True)]
    lbs: Annotated[int, Measure("u4", "samples", "local batch size (LBS)", trace=True)]
    gbs: Annotated[int, Measure("u4", "samples", "global batch size (GBS): of all workers together", trace=True)]
    quality: Annotated[
        PerLink, Measure("f4", "%", "N of Max N of the message sent; other strategies: share of the entries", link="to")
    ] = field(default_factory=dict)
    bytes_sent: Annotated[
        Mapping[int, int], Measure("u8", "bytes", "sent so far, with headers and acknowledgements", link="to")
    ] = field(default_factory=dict)
    bytes_received: Annotated[
        Mapping[int, int], Measure("u8", "bytes", "received so far, with headers and acknowledgements", link="from")
    ] = field(default_factory=dict)
    bytes_per_s: Annotated[PerLink, Measure("f4", "bytes/s", "measured bandwidth", link="to")] = field(
        default_factory=dict
    )
    age_s: Annotated[
        PerLink, Measure("f4", "s", "mean age of the messages applied, since their gradient was computed", link="from")
    ] = field(default_factory=dict)
    age_steps: Annotated[
        PerLink, Measure("f4", "steps", "mean age of the messages applied; negative: the peer was ahead", link="from")
    ] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A test of a worker's weights.

    ``metrics``: the model's metrics on the test set, by name. ``seconds``: how long the test took; 0 in virtual time.
    It is not stored.
    """

    step: Annotated[int, Measure("u8", "steps", "steps done when the weights were copied")]
    time_s: Annotated[float, Measure("f8", "s", "when the weights were copied, since training began")]
    metrics: Mapping[str, float]
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Transfer:
    """A finished knowledge transfer. ``started_s``: when it was requested; the timeline has it."""

    step: Annotated[int, Measure("u8", "steps", "steps done when the transfer finished")]
    source: Annotated[int, Measure("u4", "", "rank whose weights arrived")]
    merged: Annotated[bool, Measure("u1", "", "1 if this rank merged them")]
    started_step: Annotated[int, Measure("u8", "steps", "steps done when the transfer was requested")]
    payload_bytes: Annotated[int, Measure("u8", "bytes", "bytes that this rank received")]
    started_s: float = 0.0
    time_s: Annotated[float, Measure("f8", "s", "when the transfer finished, since training began")] = math.nan


@dataclass(frozen=True, slots=True)
class Waited:
    """A wait of unusual length, as it was spoken of, for one of the ranks that were waited for."""

    step: Annotated[int, Measure("u8", "steps", "steps done when the wait began")]
    time_s: Annotated[float, Measure("f8", "s", "when the wait was spoken of, since training began")]
    seconds: Annotated[float, Measure("f8", "s", "how long it had lasted")]
    peer: Annotated[int, Measure("u4", "", "rank that was waited for")]
    peer_step: Annotated[int, Measure("i8", "steps", "step at which that rank was last heard of; -1: never")]


def measures_of(record: type) -> dict[str, Measure]:
    """The measures that a record declares, by name."""
    hints = get_type_hints(record, include_extras=True)
    annotations = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: m for name, found in annotations.items() for m in found if isinstance(m, Measure)}


STEPS = {name: measure for name, measure in measures_of(StepRecord).items() if not measure.link}
LINKS = {name: measure for name, measure in measures_of(StepRecord).items() if measure.link}
TABLES: Mapping[str, Mapping[str, Measure]] = {
    "steps": STEPS,
    "evaluations": measures_of(Evaluation),
    "transfers": measures_of(Transfer),
    "waits": measures_of(Waited),
    "links": LINKS,
}
"""The columns of a metrics file by group. Those of ``links`` are (T, workers), the others (T,).

``evaluations`` has one more for each test metric of the run; see `METRIC`.
"""
METRIC = Measure("f4", "", "a test metric of the model, by its name")


class Reduce(Enum):
    """A way to reduce the values of several steps to one number."""

    LATEST = "the value of the latest step"
    DONE = "the number of the latest step, plus one"
    MEAN = "the mean; in the summary, of the last ten steps"
    PER_SECOND = "the sum divided by the time of the steps"


@dataclass(frozen=True, slots=True)
class Gauge:
    """A number that the live view, TensorBoard or the summary at the end shows.

    ``measure``: the column that it is computed from. ``head``: heading of its column; gauges of the same heading share
    one. ``form``: format specification, or "time", "bytes" or "bytes/s". ``name``: default, the measure's.
    ``tag``: name in TensorBoard. ``live``: whether snapshots of a running rank contain it. ``summary``: whether the
    summary shows it.
    """

    measure: str
    head: str = ""
    reduce: Reduce = Reduce.LATEST
    form: str = ".0f"
    _: KW_ONLY
    name: str = ""
    tag: str = ""
    live: bool = True
    summary: bool = False

    @property
    def key(self) -> str:
        """The gauge's name."""
        return self.name or self.measure


GAUGES = [
    Gauge("time_s"),
    Gauge("step", "steps", Reduce.DONE, summary=True),
    Gauge("loss", "loss", Reduce.MEAN, ".3f", tag="training/loss", summary=True),
    Gauge("lbs", "batch", tag="batch/lbs"),
    Gauge("gbs", "batch", tag="batch/gbs"),
    Gauge("step_s", "step time", Reduce.MEAN, "time", tag="time/step_s"),
    Gauge("lbs", "samples/s", Reduce.PER_SECOND, name="samples_per_s", tag="training/samples_per_s", summary=True),
    Gauge("compute_s", "compute", Reduce.PER_SECOND, ".1%", live=False, summary=True),
    Gauge("select_encode_s", "select", Reduce.PER_SECOND, ".1%", live=False, summary=True),
    Gauge("wait_s", "waiting", Reduce.PER_SECOND, ".1%", name="waiting", tag="time/waiting_share", summary=True),
    Gauge("apply_s", "apply", Reduce.PER_SECOND, ".1%", live=False, summary=True),
    Gauge("bytes_per_s", "bandwidth", form="bytes/s", tag="link_bytes_per_s"),
    Gauge("quality", "N", form=".1f", tag="link_N"),
    Gauge("bytes_sent", "sent", form="bytes", tag="link_bytes_sent", summary=True),
    Gauge("age_s", "age", form="time", tag="link_age_s"),
    Gauge("source", tag="transfer/source", live=False),
    Gauge("merged", tag="transfer/merged", live=False),
]
"""The gauges, in the order of their columns. A narrow terminal omits the last ones.

`metrics.gauges` adds one for each test metric of the run: the main one after the steps, the others at the end.
"""


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure of the report: a line per worker or, for what is sent over links, a line per link.

    ``axis``: quantity and unit. ``log``: logarithmic where values are far apart. ``rate``: growth per second of a
    total, in millions.
    """

    measure: str
    key: str
    title: str
    axis: str
    _: KW_ONLY
    log: bool = False
    rate: bool = False


CHARTS = [
    Chart("lbs", "batch-size", "Batch size of each worker", "local batch size (samples)"),
    Chart("step_s", "step-time", "Iteration time of each worker", "time of a step (s)"),
    Chart("quality", "n", "N of Max N on each link", "N (%)", log=True),
    Chart("bytes_sent", "rate", "Bytes sent on each link", "sent (MB/s)", rate=True),
    Chart("age_s", "age-s", "Message age at each worker, in seconds", "age (s)"),
    Chart("age_steps", "age-steps", "Message age at each worker, in steps", "age (steps)"),
]
"""The charts, in the order of the report."""


def table(group: str) -> str:
    """A Markdown table of the columns of a group, for the documentation."""
    lines = ["| data set | type | unit | meaning |", "| --- | --- | --- | --- |"]
    columns = TABLES[group] if group != "evaluations" else {**TABLES[group], "NAME": METRIC}
    for name, measure in columns.items():
        meaning = f"{measure.meaning[0].upper()}{measure.meaning[1:]}."
        lines.append(f"| `{group}/{name}` | {np.dtype(measure.dtype)} | {measure.unit} | {meaning} |")
    return "\n".join(lines)
