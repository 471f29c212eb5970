"""The frozen description of a run. Every option is a field here, or of the strategy's ``Options``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dlion_mpi.config.fields import ABOVE_0, Bounds, Every, Field, at_least, check, declared, flag, option
from dlion_mpi.config.modes import MODES, Mode
from dlion_mpi.config.target import Target
from dlion_mpi.errors import UserError
from dlion_mpi.wire import VALUE_TYPES, ValueType

TABLES = {
    "run": "run",
    "model": "model and optimizer",
    "data": "data",
    "batching": "weighted dynamic batching",
    "exchange": "exchange",
    "transfer": "direct knowledge transfer",
    "checkpoints": "checkpoints and the trained model",
}
"""The titles of the groups of options in ``--help``, by TOML table."""

_run, _model, _data, _batching, _exchange, _transfer, _checkpoints = (partial(option, table=name) for name in TABLES)
_NOT_BOUNDED = {"sync": ("sync", "async")}
_SHARE = Bounds(0, 1, "in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a run.

    An option that only some strategies use is None until `strategies.registry.resolve` has filled in the strategy's
    default. An option that the chosen strategy does not use is refused.
    """

    strategy_options: Mapping[str, Any] = field(default_factory=dict)
    """The strategy's options by full name, such as ``gaia.threshold``."""

    strategy: str = _run(
        "dlion",
        "how workers exchange updates: dlion, baseline, ako, gaia, hop, choco-sgd, powersgd, dgc, "
        "demo, local-sgd, diloco, streaming-diloco, sparseloco, allreduce, horovod, or PACKAGE.MODULE:CLASS",
        common=True,
    )
    preset: str | None = _run(None, "a named set of the strategy's defaults: paper, the settings of the paper")
    sync: str | None = _run(
        None,
        "when the next step may start: after all messages of this step (sync), at most --staleness steps ahead of the "
        "slowest worker (bounded), or at once (async)",
        choices=tuple(MODES),
        common=True,
    )
    staleness: int | None = _run(
        None,
        "bounded: steps that a worker may be ahead of the slowest",
        bounds=Bounds(0, math.inf, "0 or more steps"),
        idle=_NOT_BOUNDED,
        value="STEPS",
    )
    backup: int | None = _run(
        None,
        "bounded: number of slowest workers to ignore",
        bounds=Bounds(0, math.inf, "0 or more workers"),
        idle=_NOT_BOUNDED,
        value="WORKERS",
    )
    patience: float | None = _run(
        None,
        "bounded: longest wait for messages of the same step, as a share of computing time; less if recent ones came "
        "sooner, none if a latency takes 0.4 of it (default: 0.5 where messages are short, else 0)",
        bounds=Bounds(0, math.inf, "0 (none) or a share such as 0.5"),
        idle=_NOT_BOUNDED,
        value="SHARE",
    )
    steps: int | None = _run(
        None, "stop after this many steps (1000 if no end is given)", bounds=at_least(1), common=True
    )
    seconds: float | None = _run(None, "stop after this many seconds of training", bounds=ABOVE_0, common=True)
    target: Target | None = _run(
        None,
        "stop when the mean of a test metric over the workers reaches this: 'accuracy>=0.8', 'val_loss<=0.3'",
        value="METRIC>=VALUE",
        common=True,
    )
    evaluate_every: Every = _run(
        Every(seconds=20.0),
        "test in the background, every N steps (100) or seconds (20s)",
        value="STEPS|TIME",
        common=True,
    )
    test_samples: int | None = _run(
        None, "test with this many of the test samples, evenly spaced (default: all)", bounds=at_least(1)
    )
    progress: str = _run(
        "auto",
        "progress on stderr: a live view of all ranks, or lines; auto: the view if stderr is a terminal",
        choices=("auto", "live", "lines"),
    )
    progress_every: float = _run(
        5.0,
        "seconds between progress lines; 0: no progress at all",
        bounds=Bounds(0, math.inf, "0 or more seconds"),
        value="SECONDS",
    )
    non_finite: str = _run(
        "stop", "if a loss or gradient is NaN or infinite: stop the run, or skip it", choices=("stop", "skip")
    )
    stall_limit: Every | None = _run(
        None,
        "end the run, with a checkpoint if it takes any, when a rank has waited this long for another (90s, 10m)",
        value="TIME",
    )
    seed: int = _run(
        0,
        "seed of the initial weights, the partition and the batches",
        bounds=Bounds(0, 2**32 - 1, "in 0..4294967295"),
        common=True,
    )
    out: str | None = _run(None, "new folder for metrics, configuration and checkpoints", value="FOLDER", common=True)
    tensorboard: str | None = _run(
        None, "new folder for TensorBoard, with one folder of scalars per rank", value="FOLDER"
    )

    model: str = _model(
        "cipher",
        "cipher, resnet20, resnet18, transformer, transformer-large, mlp, or PACKAGE.MODULE:FUNCTION that returns a "
        "Keras model",
        common=True,
    )
    optimizer: str = _model(
        "sgd", "optimizer of a model that comes without one", choices=("sgd", "adam", "adamw"), common=True
    )
    learning_rate: float = _model(0.05, "learning rate of the optimizer", bounds=ABOVE_0, common=True)
    momentum: float = _model(
        0.0, "momentum of SGD", bounds=Bounds(0, 1 - 1e-9, "in [0, 1)"), idle={"optimizer": ("adam", "adamw")}
    )
    threads: int = _model(
        0,
        "TensorFlow threads per rank; 0: this rank's share of the cores",
        bounds=Bounds(0, 4096, "0 (automatic) or a number of threads"),
    )

    data: str = _data(
        "fashion-mnist",
        "a named data set, a file or folder, one per rank ('shard-{rank}.h5'), or PACKAGE.MODULE:FUNCTION",
        value="NAME|PATH",
        common=True,
    )
    partition: str = _data(
        "iid", "how one data set is split between the ranks", choices=("iid", "dirichlet"), common=True
    )
    dirichlet_alpha: float = _data(
        0.5,
        "dirichlet: a smaller value makes classes and sizes more unequal",
        bounds=ABOVE_0,
        idle={"partition": ("iid",)},
    )

    batch_size: int = _batching(
        32, "samples per worker and step at the start", bounds=at_least(1, "sample"), value="SAMPLES", common=True
    )
    batching: str | None = _batching(
        None,
        "split the global batch so that all workers finish together (auto), in proportion to samples per second, or "
        "equally (fixed)",
        choices=("auto", "proportional", "fixed"),
    )
    batch_size_max: int | None = _batching(
        None,
        "most samples per worker and step, for example what fits into memory; at least twice --batch-size by default",
        bounds=at_least(1, "sample"),
        value="SAMPLES",
    )
    global_batch: str | None = _batching(
        None, "size of the global batch: grows every 500 steps, or stays", choices=("grow", "fixed")
    )

    value_type: ValueType | None = _exchange(
        None,
        "type of the values in messages and sums (default: dlion chooses for each message, diloco has bfloat16, "
        "streaming-diloco int4, sparseloco int2, others float32)",
        choices=VALUE_TYPES,
    )
    exchange_share: float | None = _exchange(
        None,
        "most processor time of the exchange, as a share of a step: beyond it messages get rarer, then smaller; "
        "0: no limit",
        bounds=Bounds(0, math.inf, "0 (no limit) or a share such as 0.2"),
        idle={"sync": ("sync",)},
        value="SHARE",
    )

    transfer: str | None = _transfer(
        None,
        "workers that merge the best worker's weights (default: none where unsent entries are kept, else all)",
        choices=("all", "worse-than-mean", "worst", "none"),
    )
    transfer_period: int | None = _transfer(
        None, "steps between transfers", bounds=at_least(1, "step"), idle={"transfer": ("none",)}, value="STEPS"
    )
    transfer_merge: float | None = _transfer(
        None, "lambda of w <- w - lambda (w - w_best)", bounds=_SHARE, idle={"transfer": ("none",)}, value="SHARE"
    )

    checkpoint_every: Every | None = _checkpoints(
        None,
        "write a checkpoint to --out in the background, every N steps (500) or after a time (30s, 10m)",
        value="STEPS|TIME",
        common=True,
    )
    keep_checkpoints: int | None = _checkpoints(None, "checkpoints to keep (default: 2)", bounds=at_least(1))
    time_limit: Every | None = _checkpoints(
        None,
        "write a checkpoint and exit with code 75 before this time (90s, 30m, 2h) has passed; not needed under Slurm",
        value="TIME",
    )
    save_model: str | None = _checkpoints(
        None, "write the trained model at the end, a FILE.keras that plain Keras loads", value="FILE.keras", common=True
    )
    save_model_of: str | None = _checkpoints(
        None, "model to save: that of the best worker, or the mean of all", choices=("best", "mean")
    )
    best: str | None = _checkpoints(
        None,
        "test metric that tells the best worker (default: val_loss)",
        idle={"save_model_of": ("mean",)},
        value="METRIC",
    )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """Build a Config from options by full name, including those of the strategy."""
        own = {name: value for name, value in values.items() if "." in name}
        return cls(strategy_options=own, **{name: value for name, value in values.items() if name not in own})

    def __post_init__(self) -> None:
        check(self)
        self._check_checkpoints()
        if self.stall_limit is not None and self.stall_limit.seconds is None:
            raise UserError(f"--stall-limit {self.stall_limit}: give a time such as 90s or 10m")
        if self.batch_size_max is not None and self.batch_size_max < self.batch_size:
            raise UserError(
                f"--batch-size-max {self.batch_size_max} is below --batch-size {self.batch_size}: raise it or lower "
                "--batch-size"
            )

    def _check_checkpoints(self) -> None:
        if self.checkpoint_every is not None and self.out is None:
            raise UserError("--checkpoint-every needs --out: the checkpoints go into that folder")
        for name in ("keep_checkpoints", "time_limit"):
            if self.checkpoint_every is None and getattr(self, name) is not None:
                raise UserError(f"{flag(name)} belongs to --checkpoint-every: give that too")
        if self.time_limit is not None and self.time_limit.seconds is None:
            raise UserError(f"--time-limit {self.time_limit}: give a time such as 90s, 30m or 2h")
        if self.save_model is not None and not self.save_model.endswith(".keras"):
            raise UserError(f"--save-model {self.save_model}: must end in .keras")
        for name in ("save_model_of", "best"):
            if self.save_model is None and getattr(self, name) is not None:
                raise UserError(f"{flag(name)} belongs to --save-model: give that too")

    @property
    def mode(self) -> Mode:
        """The synchronisation mode that ``sync`` names. Requires that the strategy's default has been filled in."""
        assert self.sync is not None
        return MODES[self.sync]

    @property
    def last_step(self) -> float:
        """Number of steps of the run; infinite if only a time or a target ends it."""
        if self.steps is not None:
            return self.steps
        return 1000 if self.seconds is None and self.target is None else math.inf

    def values(self) -> dict[str, Any]:
        """Return all options by full name, those of the strategy last. None: not given."""
        return {name: getattr(self, name) for name in FIELDS} | dict(self.strategy_options)

    def to_toml(self) -> str:
        """Return the whole Config as TOML, which `config.toml.read` reads."""
        tables: dict[str, list[str]] = {}
        for name, value in self.values().items():
            if value is not None:
                # JSON text is valid TOML except for surrogate pairs and a bare DEL.
                text = json.dumps(str(value) if isinstance(value, Every | Target) else value, ensure_ascii=False)
                text = text.replace("\x7f", "\\u007f")
                table, _, own = name.rpartition(".")
                tables.setdefault(table or FIELDS[name].metadata["table"], []).append(f"{own} = {text}")
        return "\n".join(f"[{table}]\n" + "\n".join(lines) + "\n" for table, lines in tables.items())


FIELDS: dict[str, Field] = {f.name: f for f in declared(Config)}
"""The options of a Config by name."""
