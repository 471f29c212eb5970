"""The options of a run on a command line, and how a command reports a mistake."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dlion_mpi.config import toml
from dlion_mpi.config.fields import Field, declared, flag
from dlion_mpi.config.options import FIELDS, TABLES
from dlion_mpi.config.renamed import FIXED, RENAMED, refusal
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.given import own_options
from dlion_mpi.strategies.registry import default_values


class _Formatter(argparse.HelpFormatter):
    """Wraps text, but keeps the lines of an epilog with examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, and takes no abbreviations: new options would change their meaning."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"allow_abbrev": False, "formatter_class": _Formatter})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def add_run_options(
    parser: argparse.ArgumentParser, words: Sequence[str] = (), *, hidden: Collection[str] = ()
) -> None:
    """Add ``--config FILE.toml`` and all options of a run. ``--help`` shows the common ones, ``--help-all`` all.

    ``words``: the command line, which may name a user's strategy. ``hidden``: tables that no help shows.
    """
    parser.usage = "%(prog)s [OPTIONS]"
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all options")
    parser.add_argument("--config", metavar="FILE.toml", help="read options from a file; the command line wins")
    groups = {table: parser.add_argument_group(title) for table, title in TABLES.items()}
    defaults = default_values()
    for name, f in FIELDS.items():
        action = _add(groups[f.metadata["table"]], name, f, defaults.get(name, f.default))
        if f.metadata["table"] in hidden:
            show(action, argparse.SUPPRESS, common=True)
    for table, own in own_options(_strategy_in(words)).items():
        group = parser.add_argument_group(f"--strategy {table}")
        for f in declared(own):
            _add(group, f"{table}.{f.name}", f, f.default)
    add_refused(parser, *RENAMED, *FIXED)


def add_refused(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add former options, which are refused with a message that says what to write instead."""
    for name in names:
        parser.add_argument(flag(name), action=_Refused, nargs="?", dest=name, help=argparse.SUPPRESS)


def _add(group: Any, name: str, f: Field, default: Any) -> argparse.Action:
    """Add an option without a default, so that the file or the Config decides if it is left out."""
    text = f.metadata["help"] + ("" if default is None else f" (default: {default})")
    action: argparse.Action = group.add_argument(
        flag(name),
        dest=name,
        metavar="|".join(f.metadata["choices"]) or f.metadata["value"] or f.name.rsplit("_", 1)[-1].upper(),
        default=argparse.SUPPRESS,
    )
    show(action, text, common=f.metadata["common"])
    return action


def show(action: argparse.Action, text: str, *, common: bool) -> None:
    """Set the help text of an option. Only ``--help-all`` shows an option that is not ``common``."""
    text = text.replace("%", "%%")
    action.help = text if common else argparse.SUPPRESS
    action.full_help = text  # type: ignore[attr-defined]


class _HelpAll(argparse.Action):
    """Print the help with all options."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        for action in parser._actions:
            action.help = getattr(action, "full_help", action.help)
        parser.print_help()
        parser.exit()


class _Refused(argparse.Action):
    """Refuse a former option."""

    def __call__(self, *_: Any) -> NoReturn:
        raise UserError(str(refusal(self.dest)))


def _strategy_in(words: Sequence[str]) -> str:
    """Return the strategy that is named by a command line, its file or the run that it resumes; else an empty text."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("strategy", "config", "resume"):
        peek.add_argument(f"--{name}", nargs="?")
    found = peek.parse_known_args(words)[0]
    if found.strategy:
        return str(found.strategy)
    resumed = Path(found.resume or "", "config.toml")
    for file in (found.config, str(resumed) if found.resume and resumed.is_file() else None):
        if file and (named := toml.read(file).get("run", {}).get("strategy")):
            return str(named)
    return ""
