"""How an option is declared, checked, and read from text: the same for a run's options and for a strategy's own."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dlion_mpi.errors import UserError

Field = dataclasses.Field[Any]


@dataclass(frozen=True, slots=True)
class Every:
    """How often something happens: every ``steps`` steps or every ``seconds`` seconds (one of them is set)."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> Every:
        """``"100"`` is 100 steps, ``"20s"``, ``"10m"`` and ``"2h"`` are times. Raises UserError for anything else."""
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?(?:e[+-]?\d+)?)([smh])", text.strip())
        if match is None or not 0 < float(match[1] or match[2]) < math.inf:
            raise UserError(f"'{text}' is not a number of steps such as 100, nor a time such as 20s, 10m or 2h")
        return cls(steps=int(match[1])) if match[1] else cls(seconds=float(match[2]) * _SECONDS[match[3]])

    def __str__(self) -> str:
        return str(self.steps) if self.steps is not None else f"{self.seconds!r}s".replace(".0s", "s")


_SECONDS = {"s": 1, "m": 60, "h": 3600}


def option(
    default: Any,
    help_: str,
    *,
    table: str = "",
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    wanted: str = "",
) -> Any:
    """Declare a field of a dataclass as an option. A default of None stands for an option that was not given.

    ``choices``: the texts that it can be. ``low``, ``high``: the lowest and highest number, which the message about
    any other calls ``wanted``. ``table``: its TOML table and its group in ``--help``; a strategy's is its name.
    """
    metadata = {"help": help_, "table": table, "choices": choices, "bounds": (low, high), "wanted": wanted}
    return dataclasses.field(default=default, metadata=metadata)


def declared(options: Any) -> Iterator[Field]:
    """The options of a dataclass, or of an instance of one: the fields that `option` has declared."""
    return (f for f in dataclasses.fields(options) if "help" in f.metadata)


def flag(name: str) -> str:
    """The command line's spelling of an option: ``n_min`` is ``--n-min``, ``hop.max_gap`` is ``--hop.max-gap``."""
    return "--" + name.replace("_", "-")


def check(options: Any, prefix: str = "") -> None:
    """Raise UserError for an option that is not what its declaration says. ``prefix``: stands before its name."""
    for f in declared(options):
        value = getattr(options, f.name)
        if value is None and f.default is None:
            continue
        name = flag(prefix + f.name)
        _check_text(name, value)
        choices, (low, high) = f.metadata["choices"], f.metadata["bounds"]
        if choices and value not in choices:
            raise UserError(f"{name} {value}: must be one of {', '.join(choices)}")
        if f.metadata["wanted"] and not (math.isfinite(value) and low <= value <= high):
            raise UserError(f"{name} {value:g}: must be {f.metadata['wanted']}")


def _check_text(name: str, value: Any) -> None:
    """Texts go to a file and to other ranks as UTF-8; a name that the file system has in another code cannot."""
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} {value!a}: must be UTF-8") from None


def convert(f: Field, text: Any, prefix: str = "") -> Any:
    """A value of the command line, of TOML or of Python as the field's type. Raises UserError."""
    declared_type, name = type_name(f), flag(prefix + f.name)
    if declared_type == "Every":
        try:
            return text if isinstance(text, Every) else Every.parse(str(text))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    wanted = {"int": int, "float": float}.get(declared_type, str)
    try:
        if isinstance(text, bool) or (wanted is str and not isinstance(text, str)):
            raise ValueError
        value = wanted(text)
        if wanted is int and float(text) != value:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        kinds: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text"}
        raise UserError(f"{name} {text}: must be {kinds[wanted]}") from None
    return value


def type_name(f: Field) -> str:
    """The type that was declared, such as ``int``, without what stands for an option that was not given."""
    text = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
    return text.removesuffix(" | None")
