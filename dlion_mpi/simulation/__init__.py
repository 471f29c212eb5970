"""A micro-cloud simulated in one process: virtual time and links, many workers at one model, idealised systems."""

from __future__ import annotations
