"""Directives that generate the reference of options, commands, measures and micro-clouds from the program.

{options} TABLE      the options of `dlion train` that belong to a TOML table, such as `batching` or `gaia`
{command} WORDS      a command's description, usage and arguments, such as `emulate run`
{measures} GROUP     the columns of a group of the metrics files, such as `steps`
{micro-clouds}       the environments that come with the package
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from dlion_mpi.cli import parser as parser_of_all
from dlion_mpi.config.fields import Field, declared, flag
from dlion_mpi.config.options import FIELDS
from dlion_mpi.metrics import records
from dlion_mpi.microcloud import environments
from dlion_mpi.microcloud.environment import Phase
from dlion_mpi.strategies.registry import STRATEGIES


def options(table: str) -> str:
    """Return a Markdown table of the options of a TOML table. Raises ValueError if there are none."""
    fields = {name: f for name, f in FIELDS.items() if f.metadata["table"] == table}
    if table in STRATEGIES:
        fields = {f"{table}.{f.name}": f for f in declared(STRATEGIES[table].Options)}
    if not fields:
        raise ValueError(f"no option belongs to the table '{table}'")
    return _table(("option", "default", "meaning"), [_option(name, f) for name, f in fields.items()])


def _option(name: str, f: Field) -> tuple[str, str, str]:
    defaults = {s.name: s.uses[f.name] for s in STRATEGIES.values() if f.name in s.uses}
    if f.name == "sync":
        defaults = {s.name: s.modes[0] for s in STRATEGIES.values()}
    meaning = [_sentence(f.metadata["help"])]
    if f.metadata["choices"]:
        meaning.append(f"One of {_codes(f.metadata['choices'])}.")
    if f.metadata["bounds"] is not None:
        meaning.append(f"Must be {f.metadata['bounds'].text}.")
    if f.name == "sync":
        meaning += [f"{name}: {_codes(STRATEGIES[name].modes)}." for name in defaults]
    elif defaults:
        meaning.append(f"Used by {', '.join(defaults)}.")
    return f"`{flag(name)}`", _default(defaults or {"": f.default}), " ".join(meaning)


def _default(values: dict[str, Any]) -> str:
    """Format one default for all strategies, or each with its strategies."""
    owners: dict[str, list[str]] = {}
    for strategy, value in values.items():
        owners.setdefault("none" if value is None else f"`{value}`", []).append(strategy)
    if len(owners) == 1:
        return next(iter(owners))
    return "; ".join(f"{', '.join(strategies)}: {value}" for value, strategies in owners.items())


def command(words: str) -> str:
    """Describe a command in Markdown. Options of `dlion train` are left to the page of the configuration."""
    parser: argparse.ArgumentParser = parser_of_all()
    for word in words.split():
        parser = _subcommands(parser)[word]
    parts = [parser.description or "", f"```text\n{_usage(parser)}\n```"]
    rows = [row for action in parser._actions for row in _argument(action)]
    if rows:
        parts.append(_table(("argument", "meaning"), rows))
    if _has_config(parser):
        parts.append("And every option of [the configuration](configuration.md).")
    return "\n\n".join(parts)


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def _has_config(parser: argparse.ArgumentParser) -> bool:
    return any("--config" in action.option_strings for action in parser._actions)


def _usage(parser: argparse.ArgumentParser) -> str:
    if not _has_config(parser):
        return parser.format_usage().removeprefix("usage: ").strip()
    own = [a for a in parser._actions if a.required and a.option_strings]
    return " ".join([parser.prog, *(f"{a.option_strings[0]} {a.metavar}" for a in own), "[OPTIONS]"])


def _argument(action: argparse.Action) -> Iterable[tuple[str, str]]:
    own = {f"{table}.{f.name}" for table, cls in STRATEGIES.items() for f in declared(cls.Options)}
    if isinstance(action, argparse._HelpAction | argparse._SubParsersAction) or action.dest in FIELDS.keys() | own:
        return
    help_ = getattr(action, "full_help", action.help)
    if help_ == argparse.SUPPRESS:
        return
    value = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or action.dest.upper()}"
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    yield f"`{name}{value}`", _sentence((help_ or "").replace("%%", "%"))


def _sentence(text: str) -> str:
    """Turn a help text into a sentence, with the options that it names as code."""
    text = re.sub(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z][\w-]*)?", r"`\g<0>`", text)
    return text[:1].upper() + text[1:].removesuffix(".") + "." if text else ""


def _codes(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def micro_clouds() -> str:
    """Return a Markdown table of the built-in environments: the first line of each file, cores and links."""
    rows = []
    for name in environments.names():
        path = environments.locate(name)
        phases = environments.load(name).phases
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
        cores, links = ("; then ".join(map(values, phases)) for values in (_cores, _links))
        rows.append((f"`{name}`", first, cores, links))
    return _table(("name", "what", "cores", "uplinks, Mbit/s"), rows)


def _cores(phase: Phase) -> str:
    return _list(phase.cores)


def _links(phase: Phase) -> str:
    if phase.uplink_mbit is not None:
        return _list(phase.uplink_mbit)
    rates = [rate for row in phase.link_mbit or () for rate in row if rate]
    return f"each link differs, {min(rates):g} to {max(rates):g}"


def _list(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else " ".join(f"{value:g}" for value in values)


class _Options(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(options(self.arguments[0]))


class _Command(SphinxDirective):
    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(command(self.arguments[0]))


class _Measures(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(records.table(self.arguments[0]))


class _MicroClouds(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(micro_clouds())


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("options", _Options)
    app.add_directive("command", _Command)
    app.add_directive("measures", _Measures)
    app.add_directive("micro-clouds", _MicroClouds)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
