"""The options that belong to one strategy: declared once for the command line, TOML and Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dlion_mpi.config.fields import check, convert, declared, flag
from dlion_mpi.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    """The options of one strategy, frozen. A subclass declares each as a field, with `dlion_mpi.config.fields.option`.

    ``table``: the strategy's name, which is the TOML table of the options and the first part of their flags.
    """

    table: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Raise UserError for a value that the declarations do not allow."""
        check(self, f"{self.table}.")

    @classmethod
    def of(cls, values: dict[str, Any]) -> StrategyOptions:
        """Return the options with these values, converted from text. Raises UserError, also for an unknown name."""
        fields = {f.name: f for f in declared(cls)}
        for name in values:
            if name not in fields:
                known = ", ".join(flag(f"{cls.table}.{known}") for known in fields) or "none"
                raise UserError(f"{flag(f'{cls.table}.{name}')}: {cls.table} has no such option; it has {known}")
        given = {name: value for name, value in values.items() if value is not None}
        return cls(**{name: convert(fields[name], value, f"{cls.table}.") for name, value in given.items()})
