"""Read the options that a user gives, on the command line, in TOML or in Python, into a Config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlion_mpi.config import toml
from dlion_mpi.config.fields import Field, convert, declared, type_name
from dlion_mpi.config.options import FIELDS, TABLES, Config
from dlion_mpi.config.renamed import refusal
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.registry import STRATEGIES, find


def own_options(strategy: str = "") -> dict[str, type[StrategyOptions]]:
    """Return the options that belong to one strategy, by table: of the package's strategies and the user's."""
    classes = [*STRATEGIES.values(), *([find(strategy)] if ":" in strategy else [])]
    return {cls.Options.table: cls.Options for cls in classes}


def values_of(options: Mapping[str, Any], *, strategy: str = Config.strategy) -> dict[str, Any]:
    """Return options by full name, converted to their types. Those of the file ``options["config"]`` come second.

    ``options``: parsed arguments; other names than options are left out. ``strategy``: the strategy if none is given.
    Raises UserError.
    """
    path = options.get("config")
    tables = toml.read(path) if path else {}
    strategy = str(options.get("strategy") or tables.get("run", {}).get("strategy") or strategy)
    named = tables.keys() | {name.partition(".")[0] for name in options if "." in name}
    fields = _by_table(strategy if named - TABLES.keys() else "")
    values = {}
    for table, entries in tables.items():
        for key, value in entries.items():
            try:
                name, f = _known(fields, table, key)
                values[name] = convert(f, value, name.removesuffix(f.name))
            except UserError as error:
                raise UserError(f"--config {path}: {error}") from None
    known = {name: f for entries in fields.values() for name, f in entries.values()}
    given = {name: value for name, value in options.items() if name in known}
    return values | {n: convert(known[n], value, n.removesuffix(known[n].name)) for n, value in given.items()}


def config_of(options: Mapping[str, Any]) -> Config:
    """Return the Config of parsed options and their file. Raises UserError."""
    return Config.of(values_of(options))


def refuse_texts(options: Mapping[str, Any]) -> None:
    """Raise UserError for a text where a program is to give a number."""
    kinds = {"int": "a whole number", "float": "a number"}
    for name, value in options.items():
        kind = kinds.get(type_name(FIELDS[name])) if name in FIELDS else None
        if kind is not None and isinstance(value, str):
            raise UserError(f"{name} {value!r}: must be {kind}")


def options_of_strategy(strategy: Any) -> dict[str, Any]:
    """Convert ``strategy=Gaia`` or ``strategy=Gaia(threshold=0.2)`` to options by full name."""
    cls = strategy if isinstance(strategy, type) else type(strategy)
    if not issubclass(cls, Strategy):
        return {}
    built_in = STRATEGIES.get(cls.name) is cls
    chosen = {"strategy": cls.name if built_in else f"{cls.__module__}:{cls.__qualname__}"}
    if isinstance(strategy, type):
        return chosen
    values = {f: getattr(strategy.options, f.name) for f in declared(strategy.options)}
    return chosen | {f"{cls.Options.table}.{f.name}": value for f, value in values.items() if value != f.default}


Named = tuple[str, Field]


def _by_table(strategy: str) -> dict[str, dict[str, Named]]:
    """Return the options of each table by key, with their full names."""
    tables: dict[str, dict[str, Named]] = {table: {} for table in TABLES}
    for name, f in FIELDS.items():
        tables[f.metadata["table"]][name] = name, f
    for table, own in own_options(strategy).items():
        tables[table] = {f.name: (f"{table}.{f.name}", f) for f in declared(own)}
    return tables


def _known(tables: Mapping[str, Mapping[str, Named]], table: str, key: str) -> Named:
    entries = tables.get(table, {})
    if (name := key.replace("-", "_")) in entries:
        return entries[name]
    if (said := refusal(name)) is not None:
        raise UserError(said)
    known = "known there: " + ", ".join(entries) if entries else "tables are " + ", ".join(filter(tables.get, tables))
    raise UserError(f"unknown key '{key}' in [{table}]; {known}")
