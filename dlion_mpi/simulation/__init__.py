"""Simulation of a micro-cloud in one process: virtual time and links, workers that share a model, idealised systems."""

from __future__ import annotations
