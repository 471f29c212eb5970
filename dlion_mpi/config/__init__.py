"""Options of a run, from the command line, TOML and Python."""

from __future__ import annotations
