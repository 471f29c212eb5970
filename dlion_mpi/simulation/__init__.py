"""Simulation of a micro-cloud in one process: virtual time and links, workers that share a model."""

from __future__ import annotations
