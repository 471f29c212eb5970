"""The Config's options on a command line, and how a command says what is wrong."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from dlion_mpi.config.options import Config, convert, flag, from_toml

TABLES = {
    "run": "the run",
    "model": "model and optimizer",
    "data": "data",
    "batching": "weighted dynamic batching",
    "exchange": "per-link prioritized exchange",
    "transfer": "direct knowledge transfer",
    "rivals": "of other strategies",
    "checkpoints": "checkpoints, and the trained model",
}
"""The groups of options in `--help`, by their TOML table."""
VALUES = {
    "data": "NAME|FILE",
    **dict.fromkeys(("out", "tensorboard"), "FOLDER"),
    "save_model": "FILE.keras",
    "time_limit": "TIME",
    **dict.fromkeys(("staleness", "rebalance_every", "gbs_interval", "hop_max_gap", "hop_skip"), "STEPS"),
    "transfer_period": "STEPS",
    "progress_every": "SECONDS",
    **dict.fromkeys(("evaluate_every", "checkpoint_every"), "STEPS|TIME"),
    **dict.fromkeys(("lbs", "lbs_max", "gbs_warmup_step"), "SAMPLES"),
    **dict.fromkeys(("gbs_warmup_limit", "gbs_limit", "transfer_merge", "gaia_threshold"), "SHARE"),
    "backup": "WORKERS",
    "window": "MESSAGES",
    "n_min": "N",
}
"""What `--help` calls the value of an option, its unit if it has one, where the option's last word does not say it."""


def add_config_options(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """Add ``--config FILE.toml`` and an option for every field of the Config. ``defaults``: those of strategies."""
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file; the command line comes first")
    groups = {table: parser.add_argument_group(title) for table, title in TABLES.items()}
    for f in dataclasses.fields(Config):
        _add_option(groups[f.metadata["table"]], f, defaults.get(f.name, f.default))


def _add_option(group: Any, f: dataclasses.Field[Any], default: Any) -> None:
    """The option of one field of the Config. Left out, it stays out: the file or the default then decides."""
    shown = "" if default is None else f" (default: {str(default).replace('%', '%%')})"
    choices = f.metadata["choices"]
    group.add_argument(
        flag(f.name),
        metavar="|".join(choices) or VALUES.get(f.name) or f.name.rsplit("_", 1)[-1].upper(),
        default=argparse.SUPPRESS,
        help=f.metadata["help"] + shown,
    )


def config_of(options: dict[str, Any]) -> Config:
    """The Config of parsed options: the file's values, overruled by the command line's. Raises UserError."""
    return Config(**values_of(options))


def values_of(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Config that parsed options give, by the file or the command line. Raises UserError."""
    names = {f.name for f in dataclasses.fields(Config)}
    values = from_toml(options["config"]) if options.get("config") else {}
    return values | {name: convert(name, text) for name, text in options.items() if name in names}
