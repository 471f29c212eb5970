"""Read a TOML file of options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dlion_mpi.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read(path: str) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file, as they are. Raises UserError naming the file."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid TOML: {error}") from None
    for table, entries in tables.items():
        if not isinstance(entries, dict):
            raise UserError(f"--config {path}: '{table}' stands outside a table: put it under its [table]")
    return tables
