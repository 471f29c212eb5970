"""How workers exchange what they learn: one file a strategy."""

from __future__ import annotations
