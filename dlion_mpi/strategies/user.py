"""A strategy that a user brings: ``--strategy PACKAGE.MODULE:CLASS``, held to the contract before anything starts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from dlion_mpi import plugins
from dlion_mpi.config.fields import declared, type_name
from dlion_mpi.config.modes import MODES
from dlion_mpi.config.options import TABLES
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.options import StrategyOptions

METHODS = [name for name, value in vars(Strategy).items() if name[0].islower() and callable(value)]


def load(spec: str, *, built_in: str, options: Collection[str]) -> type[Strategy]:
    """The class that ``spec`` names. ``options``: those that a strategy may have in its ``uses``.

    Raises UserError for what is missing or cannot be in a strategy.
    """
    cls: Any = plugins.load("--strategy", spec, built_in=built_in, kind="class")
    problem = _problem(cls, options)
    if problem:
        raise UserError(f"--strategy {spec}: {problem}")
    own: type[Strategy] = cls
    return own


def _problem(cls: Any, options: Collection[str]) -> str:
    """Return why ``cls`` is not a strategy, or an empty text."""
    if not isinstance(cls, type):
        return f"is a {type(cls).__name__}, but must be a class"
    if not issubclass(cls, Strategy):
        return "the class must inherit from dlion_mpi.strategies.contract.Strategy"
    missing = [name for name in ("name", "modes", "incoming") if getattr(cls, name, None) in (None, Strategy.incoming)]
    if missing:
        return f"the class lacks {', '.join(missing)}"
    wrong = [name for name in METHODS if not callable(getattr(cls, name))]
    if wrong:
        return f"{', '.join(wrong)} must be methods"
    modes: Any = cls.modes
    if not isinstance(modes, tuple) or not modes or not set(modes) <= set(MODES):
        return f"modes is {modes!r}, but must be a tuple of some of {', '.join(MODES)}, the default first"
    uses: Any = cls.uses
    if not isinstance(uses, Mapping):
        return "uses must be a dictionary of option names and values"
    unknown = [str(name) for name in uses if name not in options]
    if unknown:
        return f"uses has {', '.join(unknown)}, but the shared options are {', '.join(sorted(options))}"
    own: Any = cls.Options
    if not (isinstance(own, type) and issubclass(own, StrategyOptions)):
        return "Options must be a dataclass that inherits from StrategyOptions"
    if any(declared(own)) and (cls.name in TABLES or not re.fullmatch(r"[A-Za-z][\w-]*", cls.name)):
        return (
            f"name is {cls.name!r}, but options need a name of letters and digits that is none of {', '.join(TABLES)}"
        )
    for f in declared(own):
        if type_name(f) not in ("int", "float", "str", "Every"):
            return f"the option {f.name} is a {type_name(f)}, but must be an int, a float, a str or an Every"
    try:
        cls()
    except TypeError as error:
        return f"it must be possible to make one without arguments ({error})"
    return ""
