"""The strategies by name, and the options that each of them uses."""

from __future__ import annotations

import dataclasses

from dlion_mpi.config.modes import MODES
from dlion_mpi.config.options import Config, flag
from dlion_mpi.errors import UserError
from dlion_mpi.strategies import user as own
from dlion_mpi.strategies.ako import Ako
from dlion_mpi.strategies.allreduce import AllReduce, Horovod
from dlion_mpi.strategies.baseline import Baseline
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.dlion import LINK_SHARE, MESSAGE_LIMIT, PAPER, PATIENCE, Dlion
from dlion_mpi.strategies.gaia import Gaia
from dlion_mpi.strategies.hop import Hop

STRATEGIES: dict[str, type[Strategy]] = {cls.name: cls for cls in (Dlion, Baseline, Ako, Gaia, Hop, AllReduce, Horovod)}


def find(name: str) -> type[Strategy]:
    """The strategy of this name, or a user's own, PACKAGE.MODULE:CLASS. Raises UserError if there is none."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    if ":" not in name:
        raise UserError(f"--strategy {name}: unknown; known are {', '.join(STRATEGIES)}, or PACKAGE.MODULE:CLASS")
    return own.load(name, built_in=", ".join(STRATEGIES), options=options())


def options() -> set[str]:
    """The options that belong to strategies: which of them one uses, its ``defaults`` say."""
    return {name for strategy in STRATEGIES.values() for name in strategy.uses}


def default_values() -> dict[str, object]:
    """What an option of a strategy is by default, for ``--help``: that of dlion where it has one."""
    rivals = {name: value for strategy in STRATEGIES.values() for name, value in strategy.uses.items()}
    return {"sync": Dlion.modes[0], **rivals, **Dlion.uses}


def resolve(config: Config) -> tuple[Strategy, Config]:
    """The strategy that the Config names, and the Config with that strategy's defaults filled in.

    Raises UserError for an unknown strategy, a synchronisation mode it does not support, and an option it
    does not use.
    """
    strategy = find(config.strategy)()
    sync = config.sync or strategy.modes[0]
    if sync not in strategy.modes:
        raise UserError(
            f"--strategy {strategy.name} does not support --sync {sync}: it supports " + ", ".join(strategy.modes)
        )
    if config.preset is not None and strategy.name != Dlion.name:
        raise UserError(f"--preset {config.preset} is dlion's, not of --strategy {strategy.name}: drop it")
    defaults = {**strategy.uses, **(PAPER if config.preset == "paper" else {})}
    for name in (*(() if MODES[sync].bounded else _BOUNDED_ONLY), *(_NOT_IN_LOCKSTEP if MODES[sync].lockstep else ())):
        defaults.pop(name, None)
    values: dict[str, object] = {"sync": sync}
    for name in sorted(options()):
        given = getattr(config, name)
        if given is None:
            values[name] = defaults.get(name)
        elif name not in defaults:
            uses = ", ".join(flag(used) for used in defaults) or "no options of its own"
            raise UserError(
                f"{flag(name)} is not used by --strategy {strategy.name} --sync {sync}, which has {uses}: drop it"
            )

    def chosen(name: str) -> object:
        return values.get(name, getattr(config, name))

    if chosen("transfer") == "auto":
        asked = any(getattr(config, name) is not None for name in _SWITCHES["transfer"][1])
        values["transfer"] = "none" if chosen("unsent") == "accumulate" and not asked else "all"
    if "message_limit" in defaults and chosen("message_limit") is None:
        short = chosen("unsent") == "accumulate" and chosen("link_share") is None
        values["message_limit"] = MESSAGE_LIMIT if short else 1.0
    if "link_share" in defaults and chosen("link_share") is None:
        values["link_share"] = LINK_SHARE if chosen("unsent") == "accumulate" else 1.0
    if "own_gradient" in defaults and chosen("own_gradient") is None:
        values["own_gradient"] = (
            "as-sent" if chosen("unsent") == "accumulate" and MODES[sync].reports_progress else "whole"
        )
    if "patience" in defaults and chosen("patience") is None:
        in_time = config.max_n is None and chosen("link_share") != 1
        values["patience"] = PATIENCE if in_time else 0.0
    for master, (off, rest) in _SWITCHES.items():
        if chosen(master) == off:
            values.update(dict.fromkeys(rest))
    if config.max_n is not None:
        values.update(n_min=None, link_share=None, message_limit=None)
    return strategy, dataclasses.replace(config, **values)  # type: ignore[arg-type]


_BOUNDED_ONLY = ("staleness", "backup", "patience", "hop_max_gap", "hop_skip")
_NOT_IN_LOCKSTEP = ("exchange_share", "exchange_thread", "window")

# A technique that is switched off leaves these options without a value.
_SWITCHES: dict[str, tuple[str, tuple[str, ...]]] = {
    "batching": ("fixed", ("rebalance_every",)),
    "gbs_schedule": (
        "fixed",
        ("gbs_interval", "gbs_warmup_step", "gbs_warmup_limit", "gbs_speedup_factor", "gbs_limit"),
    ),
    "transfer": ("none", ("transfer_period", "transfer_merge", "transfer_losses")),
}
