"""The strategies by name, and the options that each of them uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dlion_mpi.config.fields import check_effect, declared, flag, idle_due_to
from dlion_mpi.config.options import FIELDS, Config
from dlion_mpi.errors import UserError
from dlion_mpi.strategies import user
from dlion_mpi.strategies.ako import Ako
from dlion_mpi.strategies.allreduce import AllReduce, Horovod
from dlion_mpi.strategies.baseline import Baseline
from dlion_mpi.strategies.choco_sgd import ChocoSgd
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.demo import Demo
from dlion_mpi.strategies.dgc import Dgc
from dlion_mpi.strategies.diloco import Diloco
from dlion_mpi.strategies.dlion import Dlion
from dlion_mpi.strategies.gaia import Gaia
from dlion_mpi.strategies.hop import Hop
from dlion_mpi.strategies.local_sgd import LocalSgd
from dlion_mpi.strategies.powersgd import PowerSgd
from dlion_mpi.strategies.sparseloco import SparseLoco
from dlion_mpi.strategies.streaming_diloco import StreamingDiloco

STRATEGIES: dict[str, type[Strategy]] = {
    cls.name: cls
    for cls in (
        *(Dlion, Baseline, Ako, Gaia, Hop, ChocoSgd, PowerSgd, Dgc, Demo),
        *(LocalSgd, Diloco, StreamingDiloco, SparseLoco, AllReduce, Horovod),
    )
}


def find(name: str, *, also: Sequence[str] = ()) -> type[Strategy]:
    """Return the strategy of this name, or a user's, PACKAGE.MODULE:CLASS. Raises UserError if there is none.

    ``also``: other names that could have been given.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    if ":" not in name:
        known = ", ".join([*STRATEGIES, *also])
        raise UserError(f"--strategy {name}: unknown; known are {known}, or PACKAGE.MODULE:CLASS")
    return user.load(name, built_in=", ".join(STRATEGIES), options=shared_options())


def shared_options() -> set[str]:
    """Return the options of a Config that only some strategies use: all names in their ``uses``."""
    return {name for strategy in STRATEGIES.values() for name in strategy.uses}


def default_values() -> dict[str, object]:
    """Return the defaults of shared options that ``--help`` shows: those of the default strategy first."""
    usual = STRATEGIES[Config.strategy]
    others = {name: value for cls in STRATEGIES.values() for name, value in cls.uses.items()}
    return {**others, **usual.uses, "sync": usual.modes[0]}


def resolve(config: Config) -> tuple[Strategy, Config]:
    """Return the strategy that the Config names, and the Config with all defaults of that strategy.

    Raises UserError for an unknown strategy, a synchronisation mode or a preset that the strategy lacks, and an option
    that it does not use.
    """
    cls = find(config.strategy)
    sync = config.sync or cls.modes[0]
    if sync not in cls.modes:
        raise UserError(f"--strategy {cls.name} does not support --sync {sync}: it supports {', '.join(cls.modes)}")
    refuse_unused(config, cls.name, uses=cls.uses, own=cls.Options, presets=cls.presets)
    if config.value_type is not None and config.value_type not in cls.value_types:
        known = ", ".join(cls.value_types)
        raise UserError(f"--value-type {config.value_type}: --strategy {cls.name} has {known}")
    config = dataclasses.replace(config, sync=sync)
    preset = cls.presets[config.preset] if config.preset else {}
    strategy = cls(**_own_options(cls, config, preset))
    defaults = with_room({**cls.uses, **strategy.derived(config), **preset}, config.batch_size)
    given = {name: value for name in cls.uses if (value := getattr(config, name)) is not None}
    shared: dict[str, Any] = {name: defaults[name] for name in cls.uses} | given
    values = config.values() | shared
    shared |= {name: None for name in shared if name not in given and idle_due_to(FIELDS[name], values)}
    own = {
        f"{cls.Options.table}.{f.name}": value
        for f in declared(strategy.options)
        if (value := getattr(strategy.options, f.name)) is not None and not idle_due_to(f, values)
    }
    return strategy, dataclasses.replace(config, strategy_options=own, **shared)


def with_room(defaults: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Return defaults whose largest batch, if there is one, leaves room for twice the batch size at the start."""
    most = defaults.get("batch_size_max")
    return dict(defaults) if most is None else {**defaults, "batch_size_max": max(most, 2 * batch_size)}


def check_gradients(strategy: str, exchanges: str, takes_gradients: bool) -> None:
    """Raise UserError for a strategy that exchanges gradients if the model cannot give its gradient."""
    if exchanges == "gradients" and not takes_gradients:
        able = ", ".join(name for name, cls in STRATEGIES.items() if cls.exchanges == "movements")
        raise UserError(
            f"--strategy {strategy} needs gradients, which a custom train_step or loop does not give: choose {able}"
        )


def _own_options(cls: type[Strategy], config: Config, preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options of the strategy, and those of the preset that have an effect with them."""
    fields = {f.name: f for f in declared(cls.Options)}
    given = {name.partition(".")[2]: value for name, value in config.strategy_options.items()}
    for name in given.keys() & fields.keys():
        check_effect(fields[name], config.values(), f"{cls.Options.table}.")
    values = {name: value for name, value in preset.items() if name in fields} | given
    return {name: v for name, v in values.items() if name in given or not idle_due_to(fields[name], values)}


def refuse_unused(
    config: Config, strategy: str, *, uses: Iterable[str], own: Any = None, presets: Iterable[str] = ()
) -> None:
    """Raise UserError for an option or a preset that the strategy does not have."""
    for name in config.strategy_options:
        table = name.partition(".")[0]
        if own is None or table != own.table:
            raise UserError(f"{flag(name)} belongs to --strategy {table}, not to --strategy {strategy}: drop it")
    for name in sorted(shared_options() - set(uses)):
        if getattr(config, name) is not None:
            used = [*uses, *(f"{own.table}.{f.name}" for f in declared(own))] if own else uses
            flags = ", ".join(map(flag, used)) or "no options"
            raise UserError(f"{flag(name)} is not used by --strategy {strategy}, which has {flags}: drop it")
    if config.preset is not None and config.preset not in presets:
        known = ", ".join(presets) or "none"
        raise UserError(f"--preset {config.preset}: unknown; --strategy {strategy} has {known}")
