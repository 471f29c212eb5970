"""The subcommands of ``dlion``."""

from __future__ import annotations
