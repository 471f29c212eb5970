"""The machines and links of a micro-cloud, described in TOML."""

from __future__ import annotations
