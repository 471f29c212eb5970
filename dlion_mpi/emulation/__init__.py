"""A micro-cloud emulated on one machine: its namespaces and links, how MPI is started in them, how they measure."""

from __future__ import annotations
