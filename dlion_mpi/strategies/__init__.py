"""Strategies: the ways in which workers exchange what they learn, one per file."""

from __future__ import annotations
