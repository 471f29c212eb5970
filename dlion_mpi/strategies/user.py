"""A strategy that a user brings: ``--strategy PACKAGE.MODULE:CLASS``, held to the contract before anything starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dlion_mpi import plugins
from dlion_mpi.config.modes import MODES
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.contract import Strategy

METHODS = ("start", "outgoing", "incoming", "may_advance")
OPTIONAL_METHODS = ("beside", "opening", "to_arrays", "from_arrays")


def load(spec: str, *, built_in: str, options: Collection[str]) -> type[Strategy]:
    """The class that ``spec`` names. ``options``: those that a strategy may have in its ``defaults``.

    Raises UserError for what is missing or cannot be in a strategy.
    """
    cls: Any = plugins.load("--strategy", spec, built_in=built_in, kind="class")
    problem = _problem(cls, options)
    if problem:
        raise UserError(f"--strategy {spec}: {problem}")
    own: type[Strategy] = cls
    return own


def _problem(cls: Any, options: Collection[str]) -> str:
    """What keeps ``cls`` from being a strategy; empty if nothing does."""
    if not isinstance(cls, type):
        return f"is a {type(cls).__name__}, but must be a class"
    needed = ("name", "sync_modes", "defaults", *METHODS)
    missing = [name for name in needed if getattr(cls, name, None) in (None, getattr(Strategy, name, None))]
    if missing:
        return f"the class lacks {', '.join(missing)}"
    given = [*METHODS, *(name for name in OPTIONAL_METHODS if hasattr(cls, name))]
    wrong = [name for name in given if not callable(getattr(cls, name))]
    if wrong:
        return f"{', '.join(wrong)} must be methods"
    modes: Any = cls.sync_modes  # type: ignore[attr-defined]
    if not isinstance(modes, tuple) or not modes or not set(modes) <= set(MODES):
        return f"sync_modes is {modes!r}, but must be a tuple of some of {', '.join(MODES)}, the default first"
    defaults: Any = cls.defaults  # type: ignore[attr-defined]
    if not isinstance(defaults, Mapping):
        return "defaults must be a dictionary of option names and values"
    unknown = [str(name) for name in defaults if name not in options]
    if unknown:
        return f"defaults has {', '.join(unknown)}, but a strategy's options are {', '.join(sorted(options))}"
    try:
        cls()
    except TypeError as error:
        return f"it must be possible to make one without arguments ({error})"
    return ""
