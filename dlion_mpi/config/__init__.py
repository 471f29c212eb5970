"""What a run is told: its options, on the command line, in TOML and in Python."""

from __future__ import annotations
