"""One frozen description of a run. Every field is an option of the command line and a key of the TOML file."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlion_mpi.config.fields import Every, flag
from dlion_mpi.config.modes import MODES, Mode
from dlion_mpi.errors import UserError
from dlion_mpi.wire import ValueType

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_EVERY_20_S = Every(seconds=20.0)


def _option(default: Any, help_: str, *, table: str, choices: tuple[str, ...] = ()) -> Any:
    """A field of the Config; ``table`` is its TOML table and its group in ``--help``."""
    return field(default=default, metadata={"help": help_, "table": table, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to train, with what, how and for how long.

    A technique's option is None until `strategies.resolve` gives it the strategy's default, so that an option
    that the chosen strategy does not use is refused instead of ignored.
    """

    # run
    strategy: str = _option(
        "dlion",
        "how workers exchange what they learn: dlion, baseline, ako, gaia, hop, allreduce, horovod, or your own "
        "as PACKAGE.MODULE:CLASS",
        table="run",
    )
    preset: str | None = _option(
        None,
        "paper: dlion's defaults as the paper has them, as far as it is known; an option given beside it wins",
        table="run",
        choices=("paper",),
    )
    sync: str | None = _option(
        None,
        "when a worker may go on to its next step: with everyone's message of this one (sync), at most --staleness "
        "steps ahead of the slowest (bounded), or always (async)",
        table="run",
        choices=tuple(MODES),
    )
    staleness: int | None = _option(
        None,
        "bounded: steps a worker may be ahead of the slowest (hop: steps that the oldest weights may be behind)",
        table="run",
    )
    backup: int | None = _option(None, "bounded: go on without this many of the slowest workers", table="run")
    patience: float | None = _option(
        None,
        "bounded: how long a worker waits for its peers' gradients of the same step before it goes on without, as a "
        "share of the time that computing its own took. Not given: 0.5 where messages leave links time, else 0",
        table="run",
    )
    steps: int | None = _option(None, "stop after this many steps (1000 if no end is given)", table="run")
    seconds: float | None = _option(None, "stop after this many seconds of training", table="run")
    target_accuracy: float | None = _option(
        None, "stop when the workers' mean test accuracy reaches this, in 0..1", table="run"
    )
    evaluate_every: Every = _option(
        _EVERY_20_S, "test every so many steps (100) or seconds (20s), in the background", table="run"
    )
    test_samples: int | None = _option(
        None, "test with this many of the test samples, evenly taken; all if not given", table="run"
    )
    progress: str = _option(
        "auto",
        "on stderr, a view of all ranks that is drawn again every second, or a line per rank now and then; auto: the "
        "view where rank 0 or its mpirun writes to a terminal",
        table="run",
        choices=("auto", "live", "lines"),
    )
    progress_every: float = _option(5.0, "seconds between progress lines; 0 for none, nor a view", table="run")
    non_finite: str = _option(
        "stop",
        "a loss or gradient that is NaN or infinite: stop the run, or skip that gradient",
        table="run",
        choices=("stop", "skip"),
    )
    seed: int = _option(0, "seed of initial weights, partition and batches", table="run")
    out: str | None = _option(None, "folder for metrics and configuration; must not exist yet", table="run")
    tensorboard: str | None = _option(
        None, "folder for TensorBoard, with a folder of scalars for every rank; must not exist yet", table="run"
    )
    # model and data
    model: str = _option("cipher", "cipher, or PACKAGE.MODULE:FUNCTION that returns a Keras model", table="model")
    optimizer: str = _option("sgd", "what applies the weighted gradient", table="model", choices=("sgd", "adam"))
    learning_rate: float = _option(0.05, "learning rate of the optimizer", table="model")
    momentum: float = _option(0.0, "momentum of SGD", table="model")
    threads: int = _option(0, "TensorFlow threads per rank; 0: this rank's share of the cores", table="model")
    data: str = _option(
        "fashion-mnist",
        "fashion-mnist, digits, cifar10[:FOLDER], FILE.h5, or one file per rank: 'shard-{rank}.h5'",
        table="data",
    )
    partition: str = _option(
        "iid", "how one data set is dealt to the ranks", table="data", choices=("iid", "dirichlet")
    )
    dirichlet_alpha: float = _option(0.5, "dirichlet: smaller is more unequal in classes and sizes", table="data")
    # weighted dynamic batching
    lbs: int = _option(32, "samples per worker and step (LBS) at the start", table="batching")
    batching: str | None = _option(
        None,
        "share out the global batch so that all finish together (auto), in proportion to samples per second, or "
        "equally (fixed)",
        table="batching",
        choices=("auto", "proportional", "fixed"),
    )
    weighting: str | None = _option(
        None,
        "weight of worker j's gradient at worker k: LBS_j/GBS, or LBS_j/(n LBS_k); LBS: samples of a worker's step, "
        "GBS: of all n workers'",
        table="batching",
        choices=("global", "paper"),
    )
    rebalance_every: int | None = _option(None, "steps between exchanges of measured throughput", table="batching")
    lbs_max: int | None = _option(None, "most samples per worker and step (memory limit)", table="batching")
    gbs_schedule: str | None = _option(
        None, "grow the global batch (GBS), or leave it", table="batching", choices=("grow", "fixed")
    )
    gbs_interval: int | None = _option(None, "grow: steps between adjustments", table="batching")
    gbs_warmup_step: int | None = _option(None, "grow: samples added by a warm-up adjustment", table="batching")
    gbs_warmup_limit: float | None = _option(
        None, "grow: warm-up ends at this share of the training set", table="batching"
    )
    gbs_speedup_factor: float | None = _option(None, "grow: factor of an adjustment afterwards", table="batching")
    gbs_limit: float | None = _option(
        None, "grow: the global batch stops at this share of the training set", table="batching"
    )
    # the rivals' own
    ako_partitions: int | None = _option(
        None,
        "ako: parts of the gradient, one of which is sent at a time; 0: as many as the links ask for",
        table="rivals",
    )
    gaia_threshold: float | None = _option(
        None, "gaia: an update of this share of its weight is significant, over the root of the step", table="rivals"
    )
    gaia_barrier: str | None = _option(
        None,
        "gaia: whether a peer waits for significant updates that take their link longer than a step",
        table="rivals",
        choices=("selective", "none"),
    )
    hop_graph: str | None = _option(
        None,
        "hop: whose weights are averaged: everyone's, or those of the ranks on either side",
        table="rivals",
        choices=("all", "ring"),
    )
    hop_max_gap: int | None = _option(
        None, "hop: most steps that one of two neighbours is ahead of the other", table="rivals"
    )
    hop_skip: int | None = _option(
        None, "hop: most steps that a worker left behind leaves out at a time; 0: none", table="rivals"
    )
    # per-link prioritized exchange
    max_n: float | None = _option(
        None,
        "send the entries within N %% of each variable's largest, 100 for all; not given: each link its own N, "
        "from its measured bandwidth",
        table="exchange",
    )
    n_min: float | None = _option(None, "smallest N that a slow link may get", table="exchange")
    link_share: float | None = _option(
        None,
        "how much a message uses of what its link can take, in 0..1; 1: links are full; but at least 0.25 %% of a "
        "gradient where links can take much more. Not given: 0.05 where what is not sent is remembered, else 1",
        table="exchange",
    )
    message_limit: float | None = _option(
        None,
        "most that a message has of a gradient's bytes, in 0..1, however wide its link is, though no less than the 2 "
        "KiB that tell a link's rate; 1: no limit. Not given: 0.01 where what is not sent is remembered and "
        "--link-share is not given, else 1",
        table="exchange",
    )
    unsent: str | None = _option(
        None,
        "what was not sent: keep it, added up, until it is sent, or drop it",
        table="exchange",
        choices=("accumulate", "drop"),
    )
    own_gradient: str | None = _option(
        None,
        "what a worker applies of its own gradient: all of it at once (whole), or what it sends, when it sends it, so "
        "that replicas stay alike (as-sent). Not given: as-sent where the rest is remembered, but whole in async",
        table="exchange",
        choices=("whole", "as-sent"),
    )
    value_type: ValueType | None = _option(
        None, "values on the wire", table="exchange", choices=("float32", "float16", "bfloat16")
    )
    exchange_share: float | None = _option(
        None,
        "most processor time that the exchange may take, as a share of that of computing, on all its threads: where it "
        "would take more, messages of over 1 %% of a gradient get smaller, and in the end all get rarer (not in sync); "
        "0: no limit",
        table="exchange",
    )
    exchange_thread: str | None = _option(
        None,
        "on: encode what is sent in a thread of its own, and select it there with --own-gradient whole, while the loop "
        "goes on (not in sync); off: in the loop",
        table="exchange",
        choices=("on", "off"),
    )
    window: int | None = _option(
        None,
        "unacknowledged messages a link may have before it gets no more (not in sync); 2 in ako, gaia and hop",
        table="exchange",
    )
    # direct knowledge transfer
    transfer: str | None = _option(
        None,
        "who merges the best worker's weights; auto: all with --unsent drop or another --transfer option, else none",
        table="transfer",
        choices=("auto", "all", "worse-than-mean", "worst", "none"),
    )
    transfer_period: int | None = _option(None, "steps between transfers", table="transfer")
    transfer_merge: float | None = _option(None, "lambda of w <- w - lambda (w - w_best), in 0..1", table="transfer")
    transfer_losses: int | None = _option(None, "losses whose mean tells the best worker", table="transfer")
    # checkpoints, and what is left in the end
    checkpoint_every: Every | None = _option(
        None,
        "take a checkpoint in --out every so many steps (500) or so long (30s, 10m), written in the background",
        table="checkpoints",
    )
    keep_checkpoints: int | None = _option(None, "how many checkpoints stay (default: 2)", table="checkpoints")
    time_limit: Every | None = _option(
        None,
        "take a checkpoint and end with code 75 before the run has taken so long (90s, 30m, 2h), start-up included; "
        "the end of a Slurm job is known without",
        table="checkpoints",
    )
    save_model: str | None = _option(
        None, "write the trained model in the end, a FILE.keras that plain Keras loads", table="checkpoints"
    )
    save_model_of: str | None = _option(
        None,
        "whose model: that of the worker with the best test accuracy, or the mean of all",
        table="checkpoints",
        choices=("best", "mean"),
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_text(f.name, getattr(self, f.name))
            _check_choice(f, getattr(self, f.name))
        for name, (low, high, wanted) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                raise UserError(f"{flag(name)} {value:g}: must be {wanted}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.optimizer == "adam" and self.momentum:
            raise UserError("--momentum belongs to --optimizer sgd: drop it, or choose sgd")
        if self.max_n is not None and self.n_min is not None:
            raise UserError("--max-n fixes N and --n-min bounds a measured N: give one of them")
        for name in ("link_share", "message_limit"):
            if self.max_n is not None and getattr(self, name) is not None:
                raise UserError(f"--max-n fixes what a message has, {flag(name)} fits it to the link: give one of them")
        if self.sync in ("sync", "async") and (self.staleness is not None or self.backup is not None):
            raise UserError(f"--staleness and --backup belong to --sync bounded, not to --sync {self.sync}")
        if self.sync in ("sync", "async") and self.patience is not None:
            raise UserError(f"--patience belongs to --sync bounded, not to --sync {self.sync}")
        if self.unsent == "drop" and self.own_gradient == "as-sent":
            raise UserError("--own-gradient as-sent needs --unsent accumulate: what is dropped would never be applied")
        if self.gbs_schedule == "fixed":
            for name in ("gbs_interval", "gbs_warmup_step", "gbs_warmup_limit", "gbs_speedup_factor", "gbs_limit"):
                if getattr(self, name) is not None:
                    raise UserError(f"{flag(name)} belongs to --gbs-schedule grow, not to fixed")
        if self.transfer == "none":
            for name in ("transfer_period", "transfer_merge", "transfer_losses"):
                if getattr(self, name) is not None:
                    raise UserError(f"{flag(name)} has no effect with --transfer none: drop one of them")
        if self.batching == "fixed" and self.rebalance_every is not None:
            raise UserError("--rebalance-every has no effect with --batching fixed: drop one of them")
        self._check_checkpoints()
        if self.lbs_max is not None and self.lbs_max < self.lbs:
            raise UserError(f"--lbs-max {self.lbs_max} is below --lbs {self.lbs}: raise it or lower --lbs")

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
        if self.save_model_of is not None and self.save_model is None:
            raise UserError("--save-model-of belongs to --save-model: give that too")

    @property
    def mode(self) -> Mode:
        """The synchronisation mode that ``sync`` names. Only once the strategy's default has been filled in."""
        assert self.sync is not None
        return MODES[self.sync]

    @property
    def last_step(self) -> float:
        """Steps after which the run ends: infinite when something else ends it."""
        if self.steps is not None:
            return self.steps
        return 1000 if self.seconds is None and self.target_accuracy is None else math.inf

    def to_toml(self) -> str:
        """The whole Config as TOML; `from_toml` reads it back."""
        tables: dict[str, list[str]] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None:
                # Of what JSON writes, TOML knows neither surrogate pairs nor a bare DEL.
                text = json.dumps(str(value) if isinstance(value, Every) else value, ensure_ascii=False)
                text = text.replace("\x7f", "\\u007f")
                tables.setdefault(f.metadata["table"], []).append(f"{f.name} = {text}")
        return "\n".join(f"[{table}]\n" + "\n".join(lines) + "\n" for table, lines in tables.items())


# name: lowest, highest, and how to say it
_BOUNDS: Mapping[str, tuple[float, float, str]] = {
    "steps": (1, math.inf, "at least 1"),
    "seconds": (1e-9, math.inf, "above 0"),
    "target_accuracy": (1e-9, 1, "in (0, 1], for example 0.8"),
    "test_samples": (1, math.inf, "at least 1"),
    "progress_every": (0, math.inf, "0 or more seconds"),
    "keep_checkpoints": (1, math.inf, "at least 1"),
    "staleness": (0, math.inf, "0 or more steps"),
    "backup": (0, math.inf, "0 or more workers"),
    "patience": (0, math.inf, "0 (none) or a share such as 0.5"),
    "seed": (0, 2**32 - 1, "in 0..4294967295"),
    "learning_rate": (1e-12, math.inf, "above 0"),
    "momentum": (0, 1 - 1e-9, "in [0, 1)"),
    "threads": (0, 4096, "0 (automatic) or a number of threads"),
    "dirichlet_alpha": (1e-9, math.inf, "above 0"),
    "lbs": (1, math.inf, "at least 1 sample"),
    "lbs_max": (1, math.inf, "at least 1 sample"),
    "rebalance_every": (1, math.inf, "at least 1 step"),
    "gbs_interval": (1, math.inf, "at least 1 step"),
    "gbs_warmup_step": (0, math.inf, "0 or more samples"),
    "gbs_warmup_limit": (0, 1, "a share in [0, 1]"),
    "gbs_speedup_factor": (1, math.inf, "at least 1"),
    "gbs_limit": (0, 1, "a share in [0, 1]"),
    "ako_partitions": (0, math.inf, "0 (automatic) or a number of partitions"),
    "gaia_threshold": (0, math.inf, "0 or more, for example 0.01"),
    "hop_max_gap": (1, math.inf, "at least 1 step"),
    "hop_skip": (0, math.inf, "0 (none) or a number of steps"),
    "max_n": (1e-6, 100, "in (0, 100]"),
    "n_min": (1e-6, 100, "in (0, 100]"),
    "link_share": (1e-6, 1, "a share in (0, 1]"),
    "message_limit": (1e-6, 1, "a share in (0, 1]"),
    "exchange_share": (0, math.inf, "0 (no limit) or a share such as 0.2"),
    "window": (1, 64, "in 1..64 messages"),
    "transfer_period": (1, math.inf, "at least 1 step"),
    "transfer_merge": (0, 1, "in [0, 1]"),
    "transfer_losses": (1, math.inf, "at least 1"),
}


def _check_text(name: str, value: Any) -> None:
    """Texts go to a file and to other ranks as UTF-8; a name that the file system has in another code cannot."""
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag(name)} {value!a}: must be UTF-8") from None


def _check_choice(f: dataclasses.Field[Any], value: Any) -> None:
    choices = f.metadata["choices"]
    if choices and value is not None and value not in choices:
        raise UserError(f"{flag(f.name)} {value}: must be one of {', '.join(choices)}")


def convert(name: str, text: Any) -> Any:
    """A value of the command line or of TOML as the field's type. Raises UserError."""
    declared = str(_FIELDS[name].type)
    if declared.startswith("Every"):
        try:
            return text if isinstance(text, Every) else Every.parse(str(text))
        except UserError as error:
            raise UserError(f"{flag(name)}: {error}") from None
    wanted = int if declared.startswith("int") else float if declared.startswith("float") else str
    try:
        if isinstance(text, bool) or (wanted is str and not isinstance(text, str)):
            raise ValueError
        value = wanted(text)
        if wanted is int and float(text) != value:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        kinds = {int: "a whole number", float: "a number", str: "a text"}
        raise UserError(f"{flag(name)} {text}: must be {kinds[wanted]}") from None
    return value


def from_toml(path: str) -> dict[str, Any]:
    """The fields that a TOML file sets, checked by name and type. Raises UserError naming file and key."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid TOML: {error}") from None
    values: dict[str, Any] = {}
    for table, entries in tables.items():
        if not isinstance(entries, dict):
            raise UserError(f"--config {path}: '{table}' stands outside a table: put it under its [table]")
        for key, value in entries.items():
            name = key.replace("-", "_")
            if name not in _FIELDS or _FIELDS[name].metadata["table"] != table:
                known = ", ".join(f for f in _FIELDS if _FIELDS[f].metadata["table"] == table)
                raise UserError(
                    f"--config {path}: unknown key '{key}' in [{table}]; "
                    + (f"known there: {known}" if known else f"tables are {', '.join(_TABLES)}")
                )
            try:
                values[name] = convert(name, value)
            except UserError as error:
                raise UserError(f"--config {path}: {error}") from None
    return values


_FIELDS = {f.name: f for f in dataclasses.fields(Config)}
_TABLES = tuple(dict.fromkeys(f.metadata["table"] for f in _FIELDS.values()))
