"""Declaration, validation and parsing of options: the same for the options of a run and of a strategy."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dlion_mpi.config.target import Target
from dlion_mpi.errors import UserError

Field = dataclasses.Field[Any]


@dataclass(frozen=True, slots=True)
class Every:
    """A period: every ``steps`` steps or every ``seconds`` seconds (one of them is set)."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> Every:
        """Parse ``"100"`` as 100 steps, and ``"20s"``, ``"10m"`` or ``"2h"`` as a time. Raises UserError otherwise."""
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?(?:e[+-]?\d+)?)([smh])", text.strip())
        if match is None or not 0 < float(match[1] or match[2]) < math.inf:
            raise UserError(f"'{text}' is not a number of steps such as 100, nor a time such as 20s, 10m or 2h")
        return cls(steps=int(match[1])) if match[1] else cls(seconds=float(match[2]) * _SECONDS[match[3]])

    def __str__(self) -> str:
        return str(self.steps) if self.steps is not None else f"{self.seconds!r}s".replace(".0s", "s")


_PARSED: Mapping[str, type[Every] | type[Target]] = {"Every": Every, "Target": Target}
_SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Bounds:
    """The lowest and the highest value of a numeric option, and their text in messages."""

    low: float
    high: float
    text: str


def at_least(low: float, unit: str = "") -> Bounds:
    """Return bounds of at least ``low``, in a unit such as "step"."""
    return Bounds(low, math.inf, f"at least {low:g} {unit}".rstrip())


ABOVE_0 = Bounds(1e-12, math.inf, "above 0")


def option(
    default: Any,
    help_: str,
    *,
    table: str = "",
    choices: tuple[str, ...] = (),
    bounds: Bounds | None = None,
    idle: Mapping[str, tuple[Any, ...]] | None = None,
    value: str = "",
    common: bool = False,
) -> Any:
    """Declare a field of a dataclass as an option. A default of None means that it was not given.

    ``choices``: the allowed texts. ``bounds``: the allowed numbers. ``idle``: other options, each with the values that
    leave this option without effect; an empty tuple means any value. ``value``: name of its value in ``--help``.
    ``common``: whether ``--help`` shows it; ``--help-all`` always does. ``table``: its TOML table and its group in
    ``--help``; for an option of a strategy that is the strategy's name.
    """
    metadata = {"help": help_, "table": table, "choices": choices, "bounds": bounds, "idle": idle or {}}
    return dataclasses.field(default=default, metadata={**metadata, "value": value, "common": common})


def declared(options: Any) -> Iterator[Field]:
    """Yield the options of a dataclass or of an instance: the fields declared with `option`."""
    return (f for f in dataclasses.fields(options) if "help" in f.metadata)


def flag(name: str) -> str:
    """Return the flag of an option: ``batch_size`` is ``--batch-size``, ``hop.max_gap`` is ``--hop.max-gap``."""
    return "--" + name.replace("_", "-")


def check(options: Any, prefix: str = "") -> None:
    """Raise UserError for an option that its declaration does not allow. ``prefix``: prefix of its name."""
    values = {f.name: getattr(options, f.name) for f in declared(options)}
    for f in declared(options):
        value = values[f.name]
        if value is None and f.default is None:
            continue
        name = flag(prefix + f.name)
        _check_text(name, value)
        choices, bounds = f.metadata["choices"], f.metadata["bounds"]
        if choices and value not in choices:
            raise UserError(f"{name} {value}: must be one of {', '.join(choices)}")
        if bounds is not None and not (math.isfinite(value) and bounds.low <= value <= bounds.high):
            raise UserError(f"{name} {value:g}: must be {bounds.text}")
        if value != f.default:
            check_effect(f, values, prefix, prefix)


def idle_due_to(f: Field, values: Mapping[str, Any]) -> str:
    """Return the name of another option whose value leaves this one without effect; empty if there is none."""
    for other, when in f.metadata["idle"].items():
        value = values.get(other)
        if value is not None and (not when or value in when):
            return str(other)
    return ""


def check_effect(f: Field, values: Mapping[str, Any], prefix: str = "", others: str = "") -> None:
    """Raise UserError if another option leaves this one without effect. ``others``: prefix of the other's name."""
    if other := idle_due_to(f, values):
        this, that = flag(prefix + f.name), flag(others + other)
        cure = f"drop it, or choose another {that}" if f.metadata["idle"][other] else "drop one of them"
        raise UserError(f"{this} has no effect with {that} {values[other]}: {cure}")


def _check_text(name: str, value: Any) -> None:
    """Raise UserError for a text that is not UTF-8, which could not be written to a file or sent to other ranks."""
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} {value!a}: must be UTF-8") from None


def convert(f: Field, text: Any, prefix: str = "") -> Any:
    """Convert a value from the command line, TOML or Python to the field's type. Raises UserError."""
    declared_type, name = type_name(f), flag(prefix + f.name)
    if parsed := _PARSED.get(declared_type):
        try:
            return text if isinstance(text, parsed) else parsed.parse(str(text))
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
    """Return the declared type, such as ``int``, without ``| None``."""
    text = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
    return text.removesuffix(" | None")
