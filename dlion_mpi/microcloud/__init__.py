"""Description of a micro-cloud's machines and links, read from TOML."""

from __future__ import annotations
